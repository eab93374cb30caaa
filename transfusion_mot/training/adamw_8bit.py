"""AdamW with 8-bit moments (arXiv 2110.02861): `optimizer.name: adamw_8bit`.

Updates and number format are those of `torchao.optim.AdamW8bit`. As in a fused optimizer of torch, the device divides
gradients and skips steps; with torchao's optimizer the host would have to wait to know whether the gradient is finite.
The state is plain tensors, which a training state can store.
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from transfusion_mot.errors import UserError

# Elements that share a scale, and elements of the smallest tensor with 8-bit moments, as in torchao.
BLOCK, _FEWEST = 256, 4096


class AdamW8bit(Optimizer):
    """AdamW. Tensors of at least 4096 elements, a multiple of 256, have both moments stored as codes and scales.

    Args:
        groups: Groups of (name, parameter), each with its `weight_decay`.
        lr: Learning rate.
        betas: Decay rates of the moments.
        eps: Denominator constant.

    Raises:
        UserError: torchao is missing, or parameters are sharded.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float) -> None:
        if importlib.util.find_spec("torchao") is None:
            raise UserError(
                'optimizer.name is adamw_8bit, which needs the package torchao: pip install "transfusion-mot[float8]"'
            )
        if any(isinstance(parameter, DTensor) for group in groups for _, parameter in group["params"]):
            raise UserError(
                "optimizer.name is adamw_8bit, which needs whole parameters, but FSDP shards them; use adamw with "
                "FSDP, or adamw_8bit with DDP"
            )
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps})
        for group in self.param_groups:
            # A tensor, because the compiler would make a Python number part of the code.
            group["lr"] = torch.tensor(float(lr), device=group["params"][0].device)
        # The optimizer itself divides gradients and skips steps.
        self._step_supports_amp_scaling = True
        self.grad_scale: Tensor | None = None
        self.found_inf: Tensor | None = None
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        for group in self.param_groups:
            settings = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state.update(_new_state(parameter))
                self._update(settings, parameter, parameter.grad, state)

    def _update(self, settings: dict[str, Any], parameter: Tensor, grad: Tensor, state: dict[str, Tensor]) -> None:
        device = parameter.device
        # No new tensors where a step gives them: that would be two kernels for each parameter.
        settings = {
            **settings,
            "grad_scale": torch.ones((), device=device) if self.grad_scale is None else self.grad_scale,
            "found_inf": torch.zeros((), device=device) if self.found_inf is None else self.found_inf,
        }
        if "exp_avg_scale" not in state:
            moments = state["exp_avg"].flatten(), state["exp_avg_sq"].flatten()
            _run(_update_plain, parameter.flatten(), grad.flatten(), state["step"], *moments, **settings)
            return
        if device not in self._tables:
            self._tables[device] = tables(device)
        codes = [state[key].view(-1, BLOCK) for key in ("exp_avg", "exp_avg_sq")]
        scales = [state[f"{key}_scale"] for key in ("exp_avg", "exp_avg_sq")]
        rows = parameter.view(-1, BLOCK), grad.view(-1, BLOCK)
        _run(_update_coded, *rows, state["step"], *codes, *scales, *self._tables[device], **settings)


def tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """Values [256] of the codes of the first moment (signed) and of the second moment."""
    from torchao.optim.quant_utils import create_dynamic_map

    with torch.device("cpu"):
        signed, unsigned = (torch.tensor(create_dynamic_map(signed=is_signed)) for is_signed in (True, False))
    return signed.to(device), unsigned.to(device)


def has_codes(parameter: Tensor) -> bool:
    """Whether the moments of a parameter are stored as codes."""
    return parameter.numel() >= _FEWEST and parameter.numel() % BLOCK == 0


def _new_state(parameter: Tensor) -> dict[str, Tensor]:
    step = torch.zeros((), device=parameter.device)
    if not has_codes(parameter):
        return {"step": step, "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
    codes = torch.zeros_like(parameter, dtype=torch.uint8)
    scale = torch.zeros(parameter.numel() // BLOCK, device=parameter.device)
    return {
        "step": step,
        "exp_avg": codes,
        "exp_avg_scale": scale,
        "exp_avg_sq": codes.clone(),
        "exp_avg_sq_scale": scale.clone(),
    }


def _adamw(
    weight: Tensor,
    grad: Tensor,
    step: Tensor,
    average: Tensor,
    square: Tensor,
    *,
    lr: Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weight and both moments after a step."""
    weight = weight - lr * weight_decay * weight
    average = average.lerp(grad, 1 - betas[0])
    square = square.lerp(grad.square(), 1 - betas[1])
    denominator = square.sqrt() / (1 - betas[1] ** step).sqrt() + eps
    return weight - lr * (average / (1 - betas[0] ** step)) / denominator, average, square


def _update_plain(
    weight: Tensor,
    grad: Tensor,
    step: Tensor,
    average: Tensor,
    square: Tensor,
    *,
    grad_scale: Tensor,
    found_inf: Tensor,
    **settings: Any,
) -> None:
    good = found_inf == 0
    new = _adamw(weight, grad / grad_scale, step + 1, average, square, **settings)
    for tensor, value in zip((weight, average, square, step), (*new, step + 1), strict=True):
        tensor.copy_(torch.where(good, value, tensor))


def _update_coded(
    weight: Tensor,
    grad: Tensor,
    step: Tensor,
    average: Tensor,
    square: Tensor,
    average_scale: Tensor,
    square_scale: Tensor,
    signed: Tensor,
    unsigned: Tensor,
    *,
    grad_scale: Tensor,
    found_inf: Tensor,
    **settings: Any,
) -> None:
    """`_adamw` for rows [n, 256] whose moments are codes [n, 256] and scales [n]."""
    from torchao.optim.quant_utils import dequant_with_qmap, quantize_8bit_with_qmap, scale_tensor

    good = found_inf == 0
    moments = [
        dequant_with_qmap(codes, table, scale)
        for codes, table, scale in ((average, signed, average_scale), (square, unsigned, square_scale))
    ]
    new_weight, *new_moments = _adamw(weight, grad / grad_scale, step + 1, *moments, **settings)
    for codes, scale, table, moment in zip(
        (average, square), (average_scale, square_scale), (signed, unsigned), new_moments, strict=True
    ):
        scaled, new_scale = scale_tensor(moment, BLOCK)
        codes.copy_(torch.where(good, quantize_8bit_with_qmap(scaled, table), codes))
        scale.copy_(torch.where(good, new_scale, scale))
    weight.copy_(torch.where(good, new_weight, weight))
    step.copy_(torch.where(good, step + 1, step))


# Dynamic rows: one kernel serves tensors of every size.
_compiled = {
    function: torch.compile(function, fullgraph=True, dynamic=True) for function in (_update_plain, _update_coded)
}


def _run(function: Callable[..., None], weight: Tensor, *tensors: Tensor, **settings: Any) -> None:
    (_compiled[function] if weight.is_cuda else function)(weight, *tensors, **settings)
