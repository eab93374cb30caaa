"""Parameter groups and their optimizer, and the learning-rate schedule."""

import math
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from transfusion_mot.config import OptimizerConfig
from transfusion_mot.models.transfusion import TransfusionMoT
from transfusion_mot.training.adamw import AdamW
from transfusion_mot.training.adamw_8bit import AdamW8bit
from transfusion_mot.training.muon import MuonAdamW
from transfusion_mot.training.towers import tower_of


def make_optimizer(model: TransfusionMoT, config: OptimizerConfig) -> Optimizer:
    """The optimizer of the parameters that need a gradient.

    Matrices and convolutions have weight decay; norms, biases and embeddings have none. A group has the parameters of
    one tower with its `tower` and `lr_scale`, and their names, so that a saved state can be matched.

    Raises:
        UserError: Muon or 8-bit moments are configured with sharded parameters, or torchao is missing.
    """
    architecture = model.architecture
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    groups: dict[tuple[str, str], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        kind, tower = "decayed", tower_of(name, architecture)
        if parameter.ndim <= 1 or id(parameter) in embeddings:
            kind = "others"
        elif config.name == "muon" and name.startswith("blocks."):
            kind = "stacked" if ".qkv." in name else "matrices"
        settings = {
            "tower": tower,
            "lr_scale": config.tower_lr_scale.get(tower, 1.0),
            "weight_decay": 0.0 if kind == "others" else config.weight_decay,
        }
        groups.setdefault((kind, tower), {"params": [], **settings})["params"].append((name, parameter))
    if config.name == "adamw":
        return AdamW(list(groups.values()), config.lr, config.betas, config.eps)
    if config.name == "adamw_8bit":
        return AdamW8bit(list(groups.values()), config.lr, config.betas, config.eps)
    head_dim, heads, kv_heads = architecture.head_dim, architecture.num_heads, architecture.num_kv_heads
    row_splits = {"stacked": [head_dim * count for count in (heads, kv_heads or heads, kv_heads or heads)]}
    return MuonAdamW(
        [
            {**group, "row_splits": row_splits.get(kind, [])}
            for (kind, _), group in groups.items()
            if kind in ("matrices", "stacked")
        ],
        [group for (kind, _), group in groups.items() if kind in ("decayed", "others")],
        config.lr,
        config.betas,
        config.eps,
    )


def lr_factor(step: int, num_steps: int, config: OptimizerConfig) -> float:
    """Share of the peak learning rate in step 0, 1, ..., `num_steps` - 1."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.lr_schedule == "constant":
        return 1.0
    descent = num_steps - config.warmup_steps
    if config.lr_schedule == "wsd":
        descent = min(descent, max(1, round(config.decay_fraction * num_steps)))
    progress = min(1.0, max(0.0, (step - (num_steps - descent)) / max(1, descent - 1)))
    shape = 1 - progress if config.lr_schedule == "wsd" else (1 + math.cos(math.pi * progress)) / 2
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * shape


def set_lr(optimizer: Optimizer, config: OptimizerConfig, step: int, num_steps: int) -> float:
    """Set the learning rate of step 0, 1, ..., which depends on the step alone => the rate before `lr_scale`."""
    lr = config.lr * lr_factor(step, num_steps, config)
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            # A recorded step reads this tensor.
            group["lr"].fill_(lr * group["lr_scale"])
        else:
            group["lr"] = lr * group["lr_scale"]
    return lr
