"""Muon for the matrices of the blocks, AdamW for the rest, as one optimizer."""

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Muon, Optimizer

from transfusion_mot.errors import UserError


class StackedMuon(Muon):
    """torch's Muon, which makes the update of a matrix orthogonal, for matrices that are several stacked in one.

    A group's `row_splits` are the rows of each part. Queries, keys and values are three maps that share a product for
    speed alone. Made orthogonal as one, the values, whose gradient is the largest, would take most of the update from
    the others (https://kellerjordan.github.io/posts/muon: better apart).
    """

    def _init_group(
        self,
        group: MutableMapping[str, Any],
        params_with_grad: list[Tensor],
        grads: list[Tensor],
        muon_momentum_bufs: list[Tensor],
    ) -> bool:
        """As in torch; every list then holds the parts, which are views."""
        has_complex = super()._init_group(group, params_with_grad, grads, muon_momentum_bufs)
        if group["row_splits"]:
            for tensors in (params_with_grad, grads, muon_momentum_bufs):
                tensors[:] = [part for tensor in tensors for part in tensor.split(group["row_splits"])]
        return has_complex


class MuonAdamW(Optimizer):
    """Two optimizers with one list of groups, one state and one state dict.

    Args:
        muon_groups, adamw_groups: Groups of (name, parameter), each with its `weight_decay`; those of Muon with their
            `row_splits`.

    Raises:
        UserError: Parameters are sharded: Muon needs whole matrices.
    """

    def __init__(
        self,
        muon_groups: list[dict[str, Any]],
        adamw_groups: list[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        if any(isinstance(parameter, DTensor) for group in muon_groups for _, parameter in group["params"]):
            raise UserError(
                "optimizer.name is muon, which needs whole matrices, and the parameters are sharded over GPUs; "
                "use adamw with FSDP, or muon with DDP"
            )
        # The update's size is that of AdamW, so that one learning rate and weight decay serve both.
        self.muon = StackedMuon(muon_groups, lr=lr, adjust_lr_fn="match_rms_adamw")
        self.adamw = AdamW(adamw_groups, lr=lr, betas=betas, eps=eps, fused=True)
        super().__init__([*self.muon.param_groups, *self.adamw.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Let both optimizers work on this one's groups and state."""
        count = len(self.muon.param_groups)
        self.muon.param_groups, self.adamw.param_groups = self.param_groups[:count], self.param_groups[count:]
        self.muon.state = self.adamw.state = self.state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """What `load_state_dict` ends with; it makes new groups and a new state."""
        super().__setstate__(state)
        self._share()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Both steps."""
        self.muon.step()
        self.adamw.step()
