"""Norm kernels against plain torch: on CUDA, and on the CPU by Triton's interpreter (see `test_kernels`)."""

from collections.abc import Callable

import pytest
import torch
from conftest import make_rows, tiny_config, tiny_model
from torch import Tensor

from transfusion_mot.models import mot
from transfusion_mot.models.layers import RMSNorm
from transfusion_mot.models.mot import Checkpointing

# Rows, slots and width; one slot, and none.
SHAPES = [(3, 21, 24), (2, 5, 768), (1, 1, 1536), (2, 0, 16)]
EPS = 0.1


def check_norms(shape: tuple[int, int, int], device: str, dtype: torch.dtype) -> None:
    """Results and gradients, computed from the same rounded inputs in float32."""
    from transfusion_mot.models.norm_kernels import add_rms_norm, rms_norm, rms_norm_beside

    generator = torch.Generator().manual_seed(0)
    x, added, *upstream = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(4))
    # Other strides, as a slice of joint slots has.
    x = x.transpose(0, 1).contiguous().transpose(0, 1)
    norm = RMSNorm(shape[-1], EPS)
    torch.nn.init.normal_(norm.weight, 1.0, 0.3, generator=generator)
    norm.to(device)

    def run(function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> list[Tensor]:
        inputs = tuple(tensor.detach().clone().requires_grad_() for tensor in inputs)
        outputs = function(*inputs)
        gradients = torch.autograd.grad(
            outputs, [*inputs, norm.weight], [g.to(o.dtype) for g, o in zip(upstream, outputs, strict=False)]
        )
        return [*outputs, *gradients]

    both = run(lambda one, two: add_rms_norm(one, two, norm.weight, EPS), x, added)

    def expected_of_both(one: Tensor, two: Tensor) -> tuple[Tensor, Tensor]:
        # The norm is that of the sum as the kernel rounded it, to nearest or, by the interpreter, towards zero; a
        # rounding has the gradient one.
        total = one + two
        return total, norm(total + (both[0].float() - total).detach())

    pairs = [
        (
            run(lambda one: (rms_norm(one, norm.weight, EPS),), x),
            run(lambda one: (norm(one),), x.float()),
        ),
        (
            run(lambda one: rms_norm_beside(one, norm.weight, EPS), x),
            run(lambda one: (one, norm(one)), x.float()),
        ),
        (both, run(expected_of_both, x.float(), added.float())),
    ]
    # One rounding of a result to bfloat16 changes it by less than 2^-7.
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7
    for found, expected in pairs:
        for one, two in zip(found, expected, strict=True):
            assert one.shape == two.shape
            assert two.numel() == 0 or (one.float() - two.float()).abs().max() <= tolerance * two.float().abs().max()


def gradients_of_model(device: str, checkpointing: Checkpointing, *, kernel: bool, backend: str | None) -> list[Tensor]:
    """Gradients of a tiny model in float32, with the kernels or without, compiled or not."""
    rows = make_rows([[[3, "image", 2], [2, "image", 4]], [[6]]], {"text": 12, "image": 2}, dtype=torch.float32)
    model = tiny_model(tiny_config(num_layers=2), dtype=torch.float32).to(device)
    model.checkpoint_activations(checkpointing)
    has_kernel = mot._has_norm_kernel
    mot._has_norm_kernel = lambda hidden: kernel and torch.is_grad_enabled()
    try:
        if backend is not None:
            for block in model.blocks:
                block.forward = torch.compile(block.forward, fullgraph=True, backend=backend)
        predictions = model(rows.inputs, rows.slots).predictions
        sum(prediction.sin().sum() for prediction in predictions.values()).backward()
    finally:
        mot._has_norm_kernel = has_kernel
    return [parameter.grad for parameter in model.parameters()]


def check_by_interpreter() -> None:
    """On the CPU, also in a model, in each way that a block can run."""
    from transfusion_mot.models import norm_kernels

    # Twenty programs of a backward at width 24: each has several slots.
    norm_kernels._ELEMENTS = 20 * 32
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            check_norms(shape, "cpu", dtype)
    expected = gradients_of_model("cpu", "none", kernel=False, backend=None)
    for checkpointing in ("none", "selective", "full"):
        for backend in (None, "aot_eager_decomp_partition"):
            found = gradients_of_model("cpu", checkpointing, kernel=True, backend=backend)
            for one, two in zip(found, expected, strict=True):
                torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [*SHAPES, (2, 700, 1536), (2, 600, 5000), (1, 9, 16384)])
def test_norms_on_a_gpu(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    check_norms(shape, "cuda", dtype)
