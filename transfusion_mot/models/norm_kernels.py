"""Triton kernels for the root-mean-square norm in training: sum and norm in one pass over memory, and one pass for all
gradients. On other devices the equivalent plain torch code of `RMSNorm` runs.

Each pass reads and writes every element once. On an H100 the compiler's backward of the two norms of a block takes
12.1 ms of a step at width 1536, 24 layers and 32,768 slots; reading three tensors and writing one for each takes 6.4.

Shapes: L slots of all rows, D width.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements that the programs of a backward read at a time; each program sums the weight's gradient over its slots. On an
# H200 512 programs at width 768 take 0.11 ms for 32,768 slots, these 1,024 programs 0.08 ms.
_ELEMENTS = 2**20


@triton.jit
def _norm_forward(x, added, weight, total, normed, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr):
    """One slot: x, and x + added if ADD => its norm."""
    column = tl.arange(0, BLOCK)
    mask = column < WIDTH
    at = tl.program_id(0).to(tl.int64) * WIDTH + column
    value = tl.load(x + at, mask, other=0.0)
    if ADD:
        # Rounded to the number format of the sum, from which the backward computes.
        value = (value.to(tl.float32) + tl.load(added + at, mask, other=0.0).to(tl.float32)).to(value.dtype)
        tl.store(total + at, value, mask)
    value = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 0) / WIDTH + eps)
    w = tl.load(weight + column, mask, other=0.0).to(tl.float32)
    tl.store(normed + at, (value * scale * w).to(normed.dtype.element_ty), mask)


@triton.jit
def _norm_reverse(
    total,
    weight,
    d_normed,
    d_total,
    gradient,
    partial,
    slots,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
):
    """Every n-th slot: gradient of `total`, that of its own use included if ADD, and a share of the weight's."""
    column = tl.arange(0, BLOCK)
    mask = column < WIDTH
    w = tl.load(weight + column, mask, other=0.0).to(tl.float32)
    share = tl.zeros([BLOCK], tl.float32)
    for slot in range(tl.program_id(0), slots, tl.num_programs(0)):
        at = tl.cast(slot, tl.int64) * WIDTH + column
        value = tl.load(total + at, mask, other=0.0).to(tl.float32)
        upstream = tl.load(d_normed + at, mask, other=0.0).to(tl.float32)
        # Loaded before the sums, which all threads wait for.
        own = tl.load(d_total + at, mask, other=0.0).to(tl.float32) if ADD else 0.0
        scale = tl.rsqrt(tl.sum(value * value, 0) / WIDTH + eps)
        value *= scale
        share += upstream * value
        upstream *= w
        result = (upstream - value * (tl.sum(upstream * value, 0) / WIDTH)) * scale + own
        tl.store(gradient + at, result.to(gradient.dtype.element_ty), mask)
    tl.store(partial + tl.program_id(0) * WIDTH + column, share, mask)


def _constants(width: int, *, add: bool) -> dict[str, Any]:
    block = triton.next_power_of_2(width)
    return {"WIDTH": width, "BLOCK": block, "ADD": add, "num_warps": min(16, max(1, block // 512))}


def _forward(x: Tensor, added: Tensor, total: Tensor, weight: Tensor, eps: float, *, add: bool) -> Tensor:
    """Norm of x [..., D], or of x + added, which is written to `total`."""
    normed = torch.empty_like(x)
    width = x.shape[-1]
    if x.numel():
        # Triton launches kernels on the current device, which can be another than the tensors' device.
        with torch.cuda.device_of(x):
            _norm_forward[(x.numel() // width,)](x, added, weight, total, normed, eps, **_constants(width, add=add))
    return normed


def _backward(
    total: Tensor, weight: Tensor, d_normed: Tensor, d_total: Tensor, eps: float, *, add: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of `total` [..., D] and of the weight [D]."""
    width = total.shape[-1]
    slots = total.numel() // width
    gradient = torch.empty_like(total)
    constants = _constants(width, add=add)
    programs = min(slots, max(1, _ELEMENTS // constants["BLOCK"]))
    partial = weight.new_empty(programs, width, dtype=torch.float32)
    if slots:
        with torch.cuda.device_of(total):
            _norm_reverse[(programs,)](total, weight, d_normed, d_total, gradient, partial, slots, eps, **constants)
    return gradient, partial.sum(0).to(weight.dtype)


@torch.library.custom_op("transfusion_mot::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Norm of x [..., D], times the weight [D]; computed in float32, with the number format of x."""
    x = x.contiguous()
    return _forward(x, x, x, weight, eps, add=False)


@torch.library.custom_op("transfusion_mot::rms_norm_backward", mutates_args=())
def _rms_norm_backward(d_normed: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x, d_normed = x.contiguous(), d_normed.contiguous()
    return _backward(x, weight, d_normed, d_normed, eps, add=False)


@torch.library.custom_op("transfusion_mot::add_rms_norm", mutates_args=())
def add_rms_norm(x: Tensor, added: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + added, both [..., D] in one number format, and `rms_norm` of it."""
    x, added = x.contiguous(), added.contiguous()
    total = torch.empty_like(x)
    return total, _forward(x, added, total, weight, eps, add=True)


@torch.library.custom_op("transfusion_mot::add_rms_norm_backward", mutates_args=())
def _add_rms_norm_backward(
    d_total: Tensor, d_normed: Tensor, total: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return _backward(total, weight, d_normed.contiguous(), d_total.contiguous(), eps, add=True)


@rms_norm.register_fake
def _(x, weight, eps):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@add_rms_norm.register_fake
def _(x, added, weight, eps):
    total = torch.empty_like(x, memory_format=torch.contiguous_format)
    return total, torch.empty_like(total)


@_rms_norm_backward.register_fake
def _(d_normed, x, weight, eps):
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(weight)


@_add_rms_norm_backward.register_fake
def _(d_total, d_normed, total, weight, eps):
    return torch.empty_like(total), torch.empty_like(weight)


def _keep_input(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _keep_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, weight, ctx.eps = inputs
    ctx.save_for_backward(output[0], weight)


def _gradients(ctx: Any, d_normed: Tensor) -> tuple[Tensor, Tensor, None]:
    return *_rms_norm_backward(d_normed, *ctx.saved_tensors, ctx.eps), None


def _gradients_of_both(ctx: Any, d_total: Tensor, d_normed: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    gradient, d_weight = _add_rms_norm_backward(d_total, d_normed, *ctx.saved_tensors, ctx.eps)
    return gradient, gradient, d_weight, None


rms_norm.register_autograd(_gradients, setup_context=_keep_input)
add_rms_norm.register_autograd(_gradients_of_both, setup_context=_keep_sum)


class _NormBeside(torch.autograd.Function):
    """x => x and `rms_norm` of it, whose backward adds the gradient of x's other use in the same pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return x.view_as(x), rms_norm(x, weight, eps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        d_x, d_normed = gradients
        x, weight = ctx.saved_tensors
        return *_add_rms_norm_backward(d_x, d_normed, x.contiguous(), weight, ctx.eps), None


def rms_norm_beside(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x, to be used from now on, and `rms_norm` of it."""
    return _NormBeside.apply(x, weight, eps)
