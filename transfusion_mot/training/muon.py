"""Muon for the matrices of the blocks, AdamW for the rest, as one optimizer."""

import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

from transfusion_mot.errors import UserError

# Matrices of one shape are multiplied together, up to this many elements at a time: temporary values take twenty-four
# bytes an element.
_ELEMENTS_AT_A_TIME = 2**26
_MOMENTUM = 0.95
# Coefficients and steps of the quintic Newton-Schulz iteration of https://kellerjordan.github.io/posts/muon.
_LINEAR, _CUBIC, _QUINTIC = 3.4445, -4.7750, 2.0315
_ITERATIONS = 5
_EPS = 1e-7


class StackedMuon(Optimizer):
    """Muon with orthogonal updates scaled to the size of AdamW's (arXiv 2502.16982, equation 4).

    A group's `row_splits` are the rows of each part of a stacked matrix. Queries, keys and values are stacked only for
    speed and are made orthogonal separately. Otherwise the values, whose gradient is the largest, would take most of
    the update (https://kellerjordan.github.io/posts/muon recommends separate updates).

    torch.optim.Muon updates one matrix after the other and reads the learning rate on the host. Here all matrices of
    one shape share a product, which needs a tenth of the kernels, and the learning rate may be a tensor on the device,
    so that a step can be recorded.

    Args:
        groups: Groups of parameters, each with its `weight_decay` and `row_splits`.
        lr: Learning rate.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float) -> None:
        super().__init__(groups, {"lr": lr})
        # A gradient scaler sets these in a fused optimizer: the divisor of gradients, and whether, as 1 or 0, one of
        # them is not finite, in which case nothing changes.
        self.grad_scale: Tensor | None = None
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        for group in self.param_groups:
            parts: dict[torch.Size, list[tuple[Tensor, Tensor, Tensor]]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter.grad)
                tensors = (parameter, parameter.grad, state["momentum_buffer"])
                rows = group["row_splits"] or [len(parameter)]
                for part in zip(*(tensor.split(rows) for tensor in tensors), strict=True):
                    parts[part[0].shape].append(part)
            for shape, found in parts.items():
                at_a_time = max(1, _ELEMENTS_AT_A_TIME // shape.numel())
                for start in range(0, len(found), at_a_time):
                    self._update(group, *map(list, zip(*found[start : start + at_a_time], strict=True)))

    def _update(
        self, group: dict[str, Any], matrices: list[Tensor], grads: list[Tensor], momenta: list[Tensor]
    ) -> None:
        """Update matrices of one shape."""
        grad, before = torch.stack(grads), torch.stack(momenta)
        if self.grad_scale is not None:
            grad /= self.grad_scale
        momentum = before.lerp(grad, 1 - _MOMENTUM)
        # Nesterov momentum.
        direction = _orthogonal(grad.lerp_(momentum, _MOMENTUM)).type_as(grad)
        update = direction * (group["lr"] * 0.2 * math.sqrt(max(matrices[0].shape)))
        decay = group["lr"] * group["weight_decay"]
        if self.found_inf is not None:
            bad = self.found_inf > 0
            momentum = torch.where(bad, before, momentum)
            update = torch.where(bad, 0.0, update)
            decay = decay * (1 - self.found_inf)
        torch._foreach_copy_(momenta, list(momentum.unbind()))
        torch._foreach_mul_(matrices, 1 - decay)
        torch._foreach_sub_(matrices, list(update.unbind()))


def _orthogonal(matrices: Tensor) -> Tensor:
    """[n, R, C] => approximately the nearest orthogonal matrices, in bfloat16: singular values of about 0.7 to 1.2."""
    is_tall = matrices.shape[1] > matrices.shape[2]
    result = matrices.bfloat16()
    if is_tall:
        # The Gram matrix of the smaller side is cheaper.
        result = result.mT
    result = result / result.norm(dim=(1, 2), keepdim=True).clamp(min=_EPS)
    for _ in range(_ITERATIONS):
        gram = result @ result.mT
        gram = torch.baddbmm(gram, gram, gram, beta=_CUBIC, alpha=_QUINTIC)
        result = torch.baddbmm(result, gram, result, beta=_LINEAR)
    return result.mT if is_tall else result


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
                "optimizer.name is muon, which needs whole matrices, but FSDP shards them; use adamw with FSDP, or "
                "muon with DDP"
            )
        # Both share the learning rate and weight decay.
        self.muon = StackedMuon(muon_groups, lr)
        self.adamw = AdamW(adamw_groups, lr=lr, betas=betas, eps=eps, fused=True)
        # Both optimizers divide gradients and skip steps themselves.
        self._step_supports_amp_scaling = True
        super().__init__([*self.muon.param_groups, *self.adamw.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Let both optimizers work on this one's groups and state."""
        count = len(self.muon.param_groups)
        self.muon.param_groups, self.adamw.param_groups = self.param_groups[:count], self.param_groups[count:]
        self.muon.state = self.adamw.state = self.state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called at the end of `load_state_dict`, which makes new groups and a new state."""
        super().__setstate__(state)
        self._share()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Step both optimizers."""
        for name in ("grad_scale", "found_inf"):
            for part in (self.muon, self.adamw):
                setattr(part, name, getattr(self, name, None))
        self.muon.step()
        self.adamw.step()
