"""Triton kernels against plain torch, on the CPU by Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from transfusion_mot.models.layers import QKVProjection, rotary_angles, rotate

pytest.importorskip("triton")

pytestmark = pytest.mark.slow

# Query heads, key/value heads, head width, slots of each tower, and the epsilons of their norms of queries and keys;
# None is a tower without them.
Case = tuple[int, int, int, tuple[int, ...], tuple[float | None, ...]]
CASES: list[Case] = [
    (2, 2, 8, (5, 12), (1e-5, 1e-5)),
    (4, 2, 24, (3, 8), (1e-5, 0.5)),
    (2, 1, 16, (20,), (None,)),
    (3, 3, 64, (7, 1, 9), (1e-5, 1e-5, 1e-5)),
    (2, 1, 16, (6, 9), (None, 0.3)),
    (2, 2, 8, (6, 9, 4), (0.1, None, 0.4)),
]
ROWS = 3


def check_join_heads(case: Case, device: str, dtype: torch.dtype) -> None:
    """Results and gradients of the kernel against the modules of the model, in the given number format."""
    from transfusion_mot.models.kernels import join_heads

    heads, kv_heads, head_dim, lengths, epsilons = case
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()

    projections = [drawn(ROWS, length, (heads + 2 * kv_heads) * head_dim, dtype=dtype) for length in lengths]
    modules = [QKVProjection(8, heads, kv_heads, head_dim, qk_norm=eps is not None, eps=eps or 0.0) for eps in epsilons]
    normed = [eps is not None for eps in epsilons]
    weights = [
        getattr(module, name).weight
        for name in ("q_norm", "k_norm")
        for module, has_norm in zip(modules, normed, strict=True)
        if has_norm
    ]
    for weight in weights:
        torch.nn.init.normal_(weight, 1.0, 0.3, generator=generator)
    for module in modules:
        module.to(device)
    positions = torch.randint(50, (ROWS, sum(lengths)), generator=generator).to(device)
    cos, sin = rotary_angles(positions, head_dim, 10000.0)
    half = len(weights) // 2
    eps = [module.eps for module in modules]
    joined = join_heads(projections, weights[:half], weights[half:], cos, sin, heads, kv_heads, normed, eps)

    parts, start = [], 0
    for projection, module in zip(projections, modules, strict=True):
        slots = slice(start, start := start + projection.shape[1])
        q, k, v = module.split(projection.float())
        parts.append((rotate(q, cos[:, slots], sin[:, slots]), rotate(k, cos[:, slots], sin[:, slots]), v))
    expected = [torch.cat(part, dim=1) for part in zip(*parts, strict=True)]

    # Gradients arrive with the slots of a head together, as attention leaves them.
    upstream = [drawn(*part.transpose(1, 2).shape).detach().transpose(1, 2) for part in expected]
    inputs = [*projections, *weights]

    def gradients(outputs: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(outputs, inputs, [g.to(o.dtype) for g, o in zip(upstream, outputs, strict=True)])

    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for one, two in zip([*joined, *gradients(list(joined))], [*expected, *gradients(expected)], strict=True):
        assert one.shape == two.shape
        assert (one.float() - two.float()).abs().max() <= tolerance * two.float().abs().max()


def test_kernels_by_the_interpreter() -> None:
    """All in one separate process, because Triton reads the variable when it is imported."""
    program = (
        "import torch, decode_kernel_checks, test_adamw, test_interval_attention, test_norm_kernels\n"
        "torch.manual_seed(0)\n"
        "from test_kernels import CASES, check_join_heads\n"
        "for case in CASES: check_join_heads(case, 'cpu', torch.float32)\n"
        "test_interval_attention.check_by_interpreter()\n"
        "decode_kernel_checks.compare_by_interpreter()\n"
        "test_adamw.check_by_interpreter()\n"
        "test_norm_kernels.check_by_interpreter()\n"
        "print('equal')"
    )
    folder = Path(__file__).parent
    path = os.pathsep.join([str(folder), str(folder.parent)])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "equal", done.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", [*CASES, (12, 12, 128, (300, 512), (1e-5, 1e-5)), (8, 2, 128, (77, 64), (None, 1e-5))])
def test_join_heads_on_a_gpu(case: Case, dtype: torch.dtype) -> None:
    check_join_heads(case, "cuda", dtype)
