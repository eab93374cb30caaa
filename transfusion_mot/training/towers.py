"""The tower of each parameter, frozen towers, and gradient norms of towers."""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from transfusion_mot.config import ModelConfig
from transfusion_mot.models.transfusion import TransfusionMoT


def tower_of(name: str, config: ModelConfig) -> str:
    """Tower of a parameter of `TransfusionMoT`: its owner in the blocks, else the tower of its modality.

    Shared parameters belong to `shared`. The adapter of a `read` modality belongs to the tower of the modality that it
    reads: it starts at random and must learn even if the reading tower is frozen.
    """
    if name.startswith("modalities."):
        return config.modalities[config.content_of(name.split(".")[1])].tower
    return name.split(".owned.")[1].split(".")[0]


def freeze_towers(model: TransfusionMoT, towers: list[str]) -> None:
    """Freeze the parameters of some towers, before the optimizer and the parallel wrapper are made."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(tower_of(name, model.architecture) not in towers)


@torch.no_grad()
def grad_norms(optimizer: Optimizer) -> tuple[Tensor, dict[str, Tensor]]:
    """Norm [] of all gradients, and [] of each tower's; the host does not wait for them.

    Args:
        optimizer: From `make_optimizer`; its groups have the names of their towers.
    """
    gradients: dict[str, list[Tensor]] = {}
    for group in optimizer.param_groups:
        gradients.setdefault(group.get("tower", "all"), []).extend(
            p.grad for p in group["params"] if p.grad is not None
        )
    norms = {tower: _whole(nn.utils.get_total_norm(parts)) for tower, parts in gradients.items() if parts}
    return torch.stack(list(norms.values())).norm(), norms


def _whole(norm: Tensor) -> Tensor:
    """The norm over all ranks if gradients are sharded."""
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
