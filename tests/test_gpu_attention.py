"""FlexAttention and compilation against the dense path, on a CUDA device: `pytest -m gpu`."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import DENSE, Rows, make_rows, tiny_config, tiny_model
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from transfusion_mot.config import ModalityConfig, ModelConfig, TowerConfig
from transfusion_mot.models.attention import (
    SlotIds,
    block_mask,
    dense_mask,
    joint_attention,
    training_mask,
)
from transfusion_mot.models.inputs import LatentInput, ModalityInput, Slots, TokenInput
from transfusion_mot.models.transfusion import TransfusionMoT

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

GRID = (4, 4)
# Text slots T and images K a row; the length T + 16 K is a multiple of 128 in the first two only.
LAYOUTS = {4096: (2048, 128), 256: (64, 12), 200: (72, 8), 100: (52, 3), 24: (8, 1)}


@pytest.fixture(autouse=True)
def exact():
    """No TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    convolutions = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = convolutions
    torch.set_float32_matmul_precision(before)


def spec_for(length: int, seed: int = 0):
    """Rows that fill `length` slots in part: documents of text and images in either order, padding, an empty row."""
    text_slots, images = LAYOUTS[length]
    per_image = max(2, text_slots // (images + 1))
    first = [[per_image - 1, "image", 1] for _ in range(images)]
    second = [["image", (per_image + seed) // 2] for _ in range(max(1, images // 2))] + [[per_image // 2]]
    return [first, second, [[text_slots]], []]


def rows_for(length: int, seed: int = 0, config: ModelConfig | None = None) -> Rows:
    text_slots, images = LAYOUTS[length]
    counts = {"text": text_slots, "image": images}
    return make_rows(spec_for(length, seed), counts, config, grid=GRID, seed=seed, dtype=torch.float32)


def on_gpu(rows: Rows) -> Rows:
    inputs: dict[str, ModalityInput] = {}
    for name, given in rows.inputs.items():
        kind = TokenInput if isinstance(given, TokenInput) else LatentInput
        inputs[name] = kind(*(None if tensor is None else tensor.cuda() for tensor in given))
    return Rows(inputs, Slots(*(ids.cuda() for ids in rows.slots)), rows.documents)


def slots_of(rows: Rows, clean: bool = False) -> SlotIds:
    """With clean context every other image is a copy."""
    ids, shape = rows.slots, rows.inputs["image"].timesteps.shape
    is_copy = torch.arange(shape[1], device=ids.order.device) % 2 == 1
    copies = is_copy.expand(shape) if clean else None
    return SlotIds.from_spans(ids.document_ids, ids.order, ids.span_ids, copies)


@pytest.mark.parametrize("clean", [False, True])
@pytest.mark.parametrize("length", [256, 200])
def test_block_mask_hides_no_block_that_the_dense_mask_needs(length: int, clean: bool) -> None:
    slots = slots_of(on_gpu(rows_for(length)), clean)
    mask = training_mask(slots, "flex")
    assert isinstance(mask, BlockMask)
    dense = dense_mask(slots, slots)
    q, k = torch.meshgrid(torch.arange(length, device="cuda"), torch.arange(length, device="cuda"), indexing="ij")
    for row in range(len(dense)):
        rule = torch.vmap(torch.vmap(mask.mask_mod, in_dims=(None, None, 0, 0)), in_dims=(None, None, 0, 0))
        zero = torch.tensor(0, device="cuda")
        assert torch.equal(rule(torch.tensor(row, device="cuda"), zero, q, k), dense[row])
    blocks = mask.to_dense()[:, 0].bool()
    size = mask.BLOCK_SIZE
    for row, block_q, block_k in (~blocks).nonzero().tolist():
        part = dense[row, block_q * size[0] : (block_q + 1) * size[0], block_k * size[1] : (block_k + 1) * size[1]]
        assert not part.any()


@pytest.mark.parametrize("clean", [False, True])
@pytest.mark.parametrize("length", [256, 200, 4096])
def test_block_mask_is_that_of_pytorch(length: int, clean: bool) -> None:
    """Compiled; eager it is compared for more rows without a GPU."""
    slots = slots_of(on_gpu(rows_for(length)), clean)
    mask = block_mask(slots)
    rows = slots.order.shape[0]
    expected = create_block_mask(mask.mask_mod, rows, None, length, length, "cuda")
    for side in ("kv", "q"):
        for name in (f"{side}_num_blocks", f"{side}_indices", f"full_{side}_num_blocks", f"full_{side}_indices"):
            assert torch.equal(getattr(mask, name), getattr(expected, name)), name


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize(
    ("length", "heads", "kv_heads", "head_dim", "clean"),
    [
        *((256, 4, 4, 64, False), (256, 4, 2, 128, False), (200, 4, 2, 64, False), (200, 4, 4, 128, False)),
        *((100, 4, 1, 32, False), (24, 2, 2, 32, False), (256, 4, 2, 64, True), (200, 4, 2, 64, True)),
    ],
)
def test_flex_attention_equals_dense_attention_with_gradients(
    length: int, heads: int, kv_heads: int, head_dim: int, clean: bool, dtype: torch.dtype, tolerance: float
) -> None:
    slots = slots_of(on_gpu(rows_for(length)), clean)
    rows = slots.order.shape[0]
    generator = torch.Generator("cuda").manual_seed(0)

    def drawn(count: int) -> torch.Tensor:
        return torch.randn(rows, count, length, head_dim, device="cuda", generator=generator).to(dtype)

    wide = [drawn(heads), drawn(kv_heads), drawn(kv_heads)]
    upstream = drawn(heads)
    # What padding attends to is nobody's business.
    used = (slots.document_ids >= 0)[:, None, :, None]

    def run(precision: torch.dtype, mask) -> list[torch.Tensor]:
        q, k, v = (tensor.detach().to(precision).requires_grad_() for tensor in wide)
        if precision != torch.float64:
            result = joint_attention(q, k, v, mask)
        else:
            result = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None], enable_gqa=True)
        gradients = torch.autograd.grad((result * used * upstream.to(precision)).sum(), (q, k, v))
        return [(result * used).double(), *(gradient.double() for gradient in gradients)]

    # Rows of 100 and 24 slots are shorter than a block and take the dense mask.
    flex = run(dtype, training_mask(slots, "flex" if length >= 128 else "sdpa"))
    dense = run(torch.float64, dense_mask(slots, slots))
    for one, two in zip(flex, dense, strict=True):
        assert (one - two).abs().max() <= tolerance * two.abs().max()


MODELS = {
    "mot": {},
    "dense": DENSE,
    "grouped 3d": {"num_heads": 4, "num_kv_heads": 2, "rope": "3d"},
    "no qk norm": {"qk_norm": False},
    "causal image": {"image": {"attention": "causal"}},
    "untied ffn": {"untied": ["ffn"]},
    "unet": {"image": {"adapter": "unet", "unet_channels": [32, 32], "unet_num_layers": 1}},
    "towers of two widths": {"towers": {"text": TowerConfig(16, 24), "image": TowerConfig(32, 40)}},
    "towers of two kinds": {
        "towers": {
            "text": TowerConfig(16, 24, norm_eps=0.1, qk_norm=False, qkv_bias=True),
            "image": TowerConfig(32, 40, output_bias=True),
        },
        "modalities": {
            "text": ModalityConfig("text", tied_embeddings=True),
            "image": ModalityConfig("image", "diffusion"),
        },
        "layers_without_rope": [1],
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    },
}


def outputs_and_gradients(model: TransfusionMoT, rows: Rows) -> list[torch.Tensor]:
    used = rows.slots.document_ids >= 0
    text_slots, num_images = rows.inputs["text"].ids.shape[1], rows.inputs["image"].timesteps.shape[1]
    text = used[:, :text_slots]
    images = used[:, text_slots:].unflatten(1, (num_images, -1))[..., 0]
    model.zero_grad()
    predictions = model(rows.inputs, rows.slots).predictions
    logits, prediction = predictions["text"][text].float(), predictions["image"][images].float()
    (logits.square().mean() + prediction.square().mean()).backward()
    gradients = [p.grad.float().cpu() for p in model.parameters() if p.grad is not None]
    return [logits.detach().cpu(), prediction.detach().cpu(), *gradients]


@pytest.mark.parametrize("variant", MODELS)
@pytest.mark.parametrize("length", [200, 256])
def test_model_on_cuda_equals_model_on_cpu(variant: str, length: int) -> None:
    config = tiny_config(**{"head_dim": 32, **MODELS[variant]})
    model = tiny_model(config, dtype=torch.float32)
    rows = rows_for(length, config=config)
    on_cpu = outputs_and_gradients(model, rows)
    on_cuda = outputs_and_gradients(copy.deepcopy(model).cuda(), on_gpu(rows))
    assert len(on_cpu) == len(on_cuda)
    for one, two in zip(on_cuda, on_cpu, strict=True):
        assert (one - two).abs().max() <= 2e-4 * two.abs().max() + 1e-6


@pytest.mark.parametrize("insulated", [[], ["text"]])
@pytest.mark.parametrize("variant", ["mot", "dense", "untied ffn", "towers of two kinds"])
def test_compiled_blocks_equal_eager_ones(variant: str, insulated: list[str]) -> None:
    config = tiny_config(head_dim=32, num_layers=3, **MODELS[variant])
    eager = tiny_model(config, dtype=torch.float32).cuda()
    eager.insulate(insulated)
    compiled = copy.deepcopy(eager)
    compiled.compile_blocks()
    rows = on_gpu(rows_for(200))
    for one, two in zip(outputs_and_gradients(compiled, rows), outputs_and_gradients(eager, rows), strict=True):
        assert (one - two).abs().max() <= 2e-4 * two.abs().max() + 1e-6


@pytest.mark.parametrize("autocast", [False, True])
def test_batches_of_one_shape_compile_once(autocast: bool) -> None:
    """The block, the mask and the kernel are compiled for the first batch and never again, for any documents."""
    model = tiny_model(tiny_config(head_dim=32, num_layers=4), dtype=torch.float32).cuda()
    model.compile_blocks()

    def step(seed: int) -> None:
        rows = on_gpu(rows_for(200, seed))
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            predictions = model(rows.inputs, rows.slots).predictions
        sum(prediction.float().square().mean() for prediction in predictions.values()).backward()

    step(0)
    step(1)
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(2, 8):
            step(seed)
    assert counters["stats"]["unique_graphs"] == 0
    assert counters["graph_break"] == {}


def test_validation_between_steps_computes_the_same_and_leaves_the_compiled_code() -> None:
    """Without gradients the same model runs eagerly."""
    model = tiny_model(tiny_config(head_dim=32), dtype=torch.float32).cuda()
    model.compile_blocks()
    rows = on_gpu(rows_for(200))

    def train_and_validate() -> tuple[torch.Tensor, torch.Tensor]:
        trained = model(rows.inputs, rows.slots).predictions["text"]
        trained.sum().backward()
        with torch.no_grad():
            return trained, model(rows.inputs, rows.slots).predictions["text"]

    torch.testing.assert_close(*train_and_validate(), rtol=1e-3, atol=1e-3)
    counters.clear()
    for _ in range(3):
        train_and_validate()
    assert counters["stats"]["unique_graphs"] == 0


def test_flex_attention_never_materialises_the_scores() -> None:
    """Memory grows with the length, not with its square."""
    text_slots, images = 4096, 256
    spec = [[[15, "image"] for _ in range(images)]]
    slots = slots_of(on_gpu(make_rows(spec, {"text": text_slots, "image": images}, grid=GRID, dtype=torch.float32)))
    length = text_slots + images * 16
    q, k, v = torch.randn(3, 1, 8, length, 64, device="cuda", dtype=torch.bfloat16).requires_grad_()
    mask = block_mask(slots)
    joint_attention(q, k, v, mask).sum().backward()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    joint_attention(q, k, v, block_mask(slots)).sum().backward()
    scores = 8 * length * length * 2
    assert torch.cuda.max_memory_allocated() - before < scores / 2
