"""One step of AdamW for one tensor, in a Triton kernel."""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements for each program: 32 bytes for each thread and tensor.
_BLOCK, _WARPS = 1024, 4


@triton.jit
def _adamw_kernel(weights, grads, averages, squares, factors, found_inf, count, beta1, beta2, eps, BLOCK: tl.constexpr):
    """Elements from `pid * BLOCK` on; `factors` as for `update`."""
    if tl.load(found_inf) != 0:
        return
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    decay, step_size = tl.load(factors), tl.load(factors + 1)
    root, grad_scale = tl.load(factors + 2), tl.load(factors + 3)
    weight = tl.load(weights + at, mask)
    grad = tl.load(grads + at, mask) / grad_scale
    average = beta1 * tl.load(averages + at, mask) + (1 - beta1) * grad
    square = beta2 * tl.load(squares + at, mask) + (1 - beta2) * grad * grad
    weight = decay * weight - step_size * average / (tl.sqrt(square) / root + eps)
    tl.store(weights + at, weight, mask)
    tl.store(averages + at, average, mask)
    tl.store(squares + at, square, mask)


def update(
    weight: Tensor,
    grad: Tensor,
    average: Tensor,
    square: Tensor,
    *,
    factors: Tensor,
    found_inf: Tensor,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """Update a weight and its moments in place, all float32 and contiguous.

    Args:
        factors: [4], float32: factor of the weight for its decay, learning rate divided by the first moment's bias
            correction, square root of the second moment's bias correction, and divisor of the gradient.
        found_inf: []; nothing changes unless it is 0.
        betas, eps: Decay rates of the moments, and denominator constant.
    """
    # Triton launches kernels on the current device, which can be another than the tensors' device.
    with torch.cuda.device_of(weight):
        _adamw_kernel[(triton.cdiv(weight.numel(), _BLOCK),)](
            weight,
            grad,
            average,
            square,
            factors,
            found_inf,
            weight.numel(),
            *betas,
            eps,
            BLOCK=_BLOCK,
            num_warps=_WARPS,
        )
