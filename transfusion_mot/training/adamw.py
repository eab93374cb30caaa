"""AdamW with fewer memory accesses on CUDA: `optimizer.name: adamw`."""

from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from transfusion_mot.models.attention import HAS_TRITON

if HAS_TRITON:
    from transfusion_mot.training.adamw_kernel import update

# Elements of the smallest tensor with a launch of its own, which costs as much as moving two megabytes.
_FEWEST = 2**19


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW, with a kernel of our own for large float32 tensors on CUDA.

    To clip, torch's kernel divides the gradients and writes them back: 32 bytes a parameter. Ours does not write them:
    28 bytes. The state and its keys are those of torch.

    Args:
        groups: Groups of (name, parameter), each with its `weight_decay`.
        lr: Learning rate.
        betas: Decay rates of the moments.
        eps: Denominator constant.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, lr=lr, betas=betas, eps=eps, fused=True)
        # As a gradient scaler sets them in a fused optimizer: the divisor of gradients, and whether, as 1 or 0, one of
        # them is not finite, in which case nothing changes.
        self.grad_scale: Tensor | None = None
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        updated = {}
        for group in self.param_groups:
            large = [parameter for parameter in group["params"] if _has_kernel(parameter)]
            if large:
                self._update(group, large)
            for parameter in large:
                # Torch leaves out parameters without a gradient.
                updated[parameter], parameter.grad = parameter.grad, None
        super().step()
        for parameter, grad in updated.items():
            parameter.grad = grad

    def _update(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        """Update large parameters of a group."""
        device = parameters[0].device
        states = [self.state[parameter] for parameter in parameters]
        for state, parameter in zip(states, parameters, strict=True):
            if not state:
                state["step"] = torch.zeros((), device=device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        found_inf = torch.zeros((), device=device) if self.found_inf is None else self.found_inf
        steps = [state["step"] for state in states]
        torch._foreach_add_(steps, [1 - found_inf] * len(steps))
        # Rounded to float32 as in the kernel, because 1 - beta and 1 - beta ** step are small differences.
        betas = [float(np.float32(beta)) for beta in group["betas"]]
        step = torch.stack(steps).double()
        columns = [
            torch.ones_like(step) * (1 - group["lr"] * group["weight_decay"]),
            group["lr"] / (1 - betas[0] ** step),
            (1 - betas[1] ** step).sqrt(),
            torch.ones_like(step) * (1 if self.grad_scale is None else self.grad_scale),
        ]
        factors = torch.stack(columns, dim=1).float()
        for parameter, state, own in zip(parameters, states, factors.unbind(), strict=True):
            update(
                parameter,
                cast(Tensor, parameter.grad),
                state["exp_avg"],
                state["exp_avg_sq"],
                factors=own,
                found_inf=found_inf,
                betas=(betas[0], betas[1]),
                eps=group["eps"],
            )


def _has_kernel(parameter: Tensor) -> bool:
    """Whether our kernel updates a parameter."""
    grad = parameter.grad
    return (
        HAS_TRITON
        and grad is not None
        and parameter.is_cuda
        and not isinstance(parameter, DTensor)
        and parameter.numel() >= _FEWEST
        and all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in (parameter, grad))
    )
