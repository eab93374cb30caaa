"""The kernels of interval attention against the dense mask: on a GPU, and in `test_kernels` by Triton's interpreter."""

import copy
import itertools
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from conftest import DENSE, make_rows, tiny_config, tiny_model
from test_attention import packed_slots
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from transfusion_mot.data.batch import Batch
from transfusion_mot.models.attention import (
    HAS_TRITON,
    IntervalMask,
    SlotIds,
    attention_kernel,
    dense_mask,
    interval_mask,
    joint_attention,
    runs_on_hopper,
)
from transfusion_mot.models.mot import Checkpointing

if HAS_TRITON:
    from transfusion_mot.models.interval_attention import interval_attention, interval_tiles

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (HAS_TRITON and torch.cuda.is_available()), reason="needs a CUDA device and Triton"),
]

# Rows, slots, query heads, key/value heads, head width, whether there are copies.
CASES = [(1, 140, 4, 2, 24, True), (1, 100, 2, 2, 16, False)]
GPU_CASES = [
    *CASES,
    # Those of the kernels for Hopper.
    (3, 1024, 4, 4, 128, False), (3, 1024, 4, 2, 128, True), (2, 192, 6, 2, 64, False), (2, 4096, 2, 2, 64, True),
    # Wide heads, cut tiles.
    (2, 600, 2, 1, 256, False), (2, 600, 8, 8, 64, True), (3, 320, 4, 4, 96, False),
]  # fmt: skip


def on_device(slots: SlotIds, device: str) -> SlotIds:
    last = slots.visible_until
    return SlotIds(
        slots.document_ids.to(device),
        slots.order.to(device),
        slots.horizon.to(device),
        None if last is None else last.to(device),
    )


def results(
    case: tuple[int, int, int, int, int, bool], device: str, dtype: torch.dtype
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Attention and its gradients: by the kernels, and by the dense mask in float64."""
    rows, length, heads, kv_heads, width, clean = case
    slots = on_device(packed_slots(rows, length, clean, seed=length), device)
    generator = torch.Generator().manual_seed(0)
    counts = (heads, kv_heads, kv_heads, heads)
    drawn = [torch.randn(rows, length, count, width, generator=generator).to(device, dtype) for count in counts]

    def run(mask: IntervalMask | torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
        q, k, v, upstream = (heads.to(dtype).transpose(1, 2).detach().requires_grad_() for heads in drawn)
        attended = joint_attention(q, k, v, mask)
        return [attended, *torch.autograd.grad(attended, (q, k, v), upstream)]

    return list(zip(run(interval_mask(slots), dtype), run(dense_mask(slots, slots), torch.float64), strict=True))


def assert_equal(found: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    """NaN is not equal."""
    assert found.shape == wanted.shape
    assert (found.double() - wanted).norm() <= tolerance * wanted.norm()


def check_lists(length: int, clean: bool, device: str) -> None:
    """Every tile lists the tiles with visible slots, and marks those that are completely visible."""
    slots = on_device(packed_slots(3, length, clean, seed=length), device)
    mask = interval_mask(slots)
    behind = -length % 64
    dense = torch.nn.functional.pad(dense_mask(slots, slots), (0, behind, 0, behind))
    pairs = dense.unflatten(2, (-1, 64)).unflatten(1, (-1, 64)).sum(dim=(2, 4))
    for side, wanted in enumerate((pairs, pairs.mT)):
        for row, tile in itertools.product(*map(range, wanted.shape[:2])):
            met = [2 * n + (count < 64 * 64) for n, count in enumerate(wanted[row, tile].tolist()) if count]
            listed = mask.tiles[side, row, tile, : mask.counts[side, row, tile]]
            assert listed.tolist() == met


def check_by_interpreter() -> None:
    """Called where Triton was imported as an interpreter."""
    check_lists(140, True, "cpu")
    for case in CASES:
        for found, wanted in results(case, "cpu", torch.float32):
            assert_equal(found, wanted, 1e-6)
    check_operation("cpu", torch.float32)
    check_model("clean", "cpu", compiled=False)
    check_sharded()


def check_operation(device: str, dtype: torch.dtype) -> None:
    """What torch and its compiler are told of the operation is what it does."""
    mask = interval_mask(on_device(packed_slots(1, 70, True, seed=0), device))
    q, k, v = (torch.randn(1, 70, heads, 16, device=device, dtype=dtype).requires_grad_() for heads in (2, 1, 1))
    torch.library.opcheck(interval_attention, (q, k, v, *mask))
    torch.library.opcheck(interval_tiles, (mask.ids,))


def check_model(variant: str, device: str, compiled: bool) -> None:
    """The model with the kernels against the model with a dense mask; recomputed attention is counted."""
    config = tiny_config(head_dim=64 if device == "cuda" else 16, **MODELS[variant])
    plain = tiny_model(config, dtype=torch.float32).to(device)
    spec = [[[9, "image", 2]], [["image", 30], [5]]]
    rows = make_rows(spec, {"text": 48, "image": 1}, config, grid=(4, 4), dtype=torch.float32)
    batch = Batch(rows.inputs, rows.slots).to(torch.device(device))
    if variant == "clean":
        copies = torch.zeros(2, 1, dtype=torch.bool, device=device)
        batch.inputs["image"] = batch.latents("image")._replace(copies=copies)
    plain.attention = "sdpa"
    wanted = outputs_and_gradients(plain, batch)
    checkpointings: tuple[Checkpointing, ...] = ("none", "selective", "full")
    for checkpointing in checkpointings:
        model = copy.deepcopy(plain)
        # Chosen whatever the device: an interpreter runs on the CPU.
        model.kernel = lambda device, num_slots: ("interval", "as the test says")
        model.checkpoint_activations(checkpointing)
        if compiled:
            model.compile_blocks()
        with Calls() as calls:
            found = outputs_and_gradients(model, batch)
        for one, two in zip(found, wanted, strict=True):
            assert (one - two).abs().max() <= 2e-4 * two.abs().max() + 1e-6
        # What is kept is not computed again.
        if not compiled:
            times = 2 if checkpointing == "full" else 1
            assert calls.count["transfusion_mot.interval_attention.default"] == times * config.num_layers
            assert calls.count["transfusion_mot.interval_attention_backward.default"] == config.num_layers


def check_sharded() -> None:
    """FSDP2 passes the mask to a block unchanged."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model = tiny_model(tiny_config(head_dim=16), dtype=torch.float32)
    model.attention = "sdpa"
    rows = make_rows([[[9, "image", 2]]], {"text": 16, "image": 1}, dtype=torch.float32)
    batch = Batch(rows.inputs, rows.slots)
    wanted = outputs_and_gradients(model, batch)
    model.kernel = lambda device, num_slots: ("interval", "as the test says")
    for block in model.blocks:
        fully_shard(block, mp_policy=MixedPrecisionPolicy(torch.float32, cast_forward_inputs=True))
    fully_shard(model)
    for one, two in zip(outputs_and_gradients(model, batch), wanted, strict=True):
        whole = one.full_tensor() if isinstance(one, DTensor) else one
        assert (whole - two).abs().max() <= 2e-4 * two.abs().max() + 1e-6


MODELS = {"mot": {}, "dense, grouped heads": {**DENSE, "num_heads": 4, "num_kv_heads": 2}, "clean": {"rope": "3d"}}
MODELS["causal images"] = {"image": {"attention": "causal"}}


class Calls(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[str(func)] += 1
        return func(*args, **(kwargs or {}))


def outputs_and_gradients(model, batch: Batch) -> list[torch.Tensor]:
    used = batch.slots.document_ids >= 0
    model.zero_grad()
    predictions = model(batch.inputs, batch.slots).predictions
    text = predictions["text"][used[:, : predictions["text"].shape[1]]]
    prediction = predictions["image"][used[:, -1]]
    (text.square().mean() + prediction.square().mean()).backward()
    return [text.detach(), prediction.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("length", [4096, 600, 64])
@pytest.mark.parametrize("clean", [False, True])
def test_lists_on_a_gpu(length: int, clean: bool) -> None:
    check_lists(length, clean, "cuda")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 5e-3), (torch.float16, 1e-3), (torch.float32, 1e-5)])
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_kernels_equal_the_dense_mask_on_a_gpu(case, dtype: torch.dtype, tolerance: float) -> None:
    if dtype == torch.float32 and case[4] > 128:
        pytest.skip("refused")
    for found, wanted in results(case, "cuda", dtype):
        assert_equal(found, wanted, tolerance)


def test_gradients_are_the_same_in_every_run() -> None:
    case = (3, 1024, 4, 2, 128, True)
    once, again = (results(case, "cuda", torch.bfloat16) for _ in range(2))
    for (one, _), (two, _) in zip(once, again, strict=True):
        assert torch.equal(one, two)


def test_operation_on_a_gpu() -> None:
    check_operation("cuda", torch.bfloat16)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("variant", MODELS)
def test_model_on_a_gpu(variant: str, compiled: bool) -> None:
    check_model(variant, "cuda", compiled)


def test_both_sets_of_kernels_agree(monkeypatch) -> None:
    if not runs_on_hopper(torch.device("cuda")):
        pytest.skip("needs Hopper")
    case = (3, 1024, 4, 2, 128, True)
    assert attention_kernel("auto", "cuda", 1024, 128, torch.bfloat16, on_hopper=True)[0] == "interval"
    by_hopper = results(case, "cuda", torch.bfloat16)
    monkeypatch.setattr("transfusion_mot.models.interval_attention.has_hopper_kernels", lambda device: False)
    for (one, _), (two, _) in zip(by_hopper, results(case, "cuda", torch.bfloat16), strict=True):
        assert_equal(one, two.double(), 1e-3)
