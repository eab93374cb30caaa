"""AdamW with the papers' settings, its learning-rate schedule, and the averaged weights."""

import copy
import math
from typing import Any, Generic, TypeVar

import torch
from torch import nn
from torch.optim import AdamW

from transfusion_mot.config import OptimizerConfig

Model = TypeVar("Model", bound=nn.Module)


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


def load_moments(optimizer: AdamW, saved: dict[str, Any]) -> None:
    """Take over the moments of a saved optimizer; betas, epsilon and weight decay stay those of the configuration."""
    optimizer.load_state_dict({"state": saved["state"], "param_groups": optimizer.state_dict()["param_groups"]})


class EMA(Generic[Model]):
    """Averaged weights, which samples and snapshots use.

    Args:
        model: The model whose parameters are averaged; `self.model` is a copy of it that holds the averages.
        decay: Weight of the past; early in a run it is (1 + step) / (10 + step), so that the random start is forgotten.
    """

    def __init__(self, model: Model, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move the averages towards the parameters after optimizer step `step` (0, 1, ...)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - decay)
