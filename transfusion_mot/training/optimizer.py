"""AdamW with the papers' settings, and its learning-rate schedule."""

import math

from torch import nn
from torch.optim import AdamW

from transfusion_mot.config import OptimizerConfig


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> AdamW:
    """AdamW that decays matrices and convolutions, but no norm, bias or embedding."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [p for p in trained if p.ndim > 1 and id(p) not in embeddings]
    others = [p for p in trained if p.ndim <= 1 or id(p) in embeddings]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


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


def set_lr(optimizer: AdamW, config: OptimizerConfig, step: int, num_steps: int) -> float:
    """Set the learning rate of step 0, 1, ..., which is a function of the step alone => the rate."""
    lr = config.lr * lr_factor(step, num_steps, config)
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr
