"""Decoding of few rows on a GPU: the kernels against the model itself, and when they are used."""

import pytest
import torch
from decode_kernel_checks import ARCHITECTURES, cached_logits
from test_pipeline_codes import codes_pipeline
from test_sampling import PROMPTS, tiny_model, tiny_tokenizer

from transfusion_mot.config import TowerConfig
from transfusion_mot.models.attention import KVCache
from transfusion_mot.models.transfusion import TransfusionMoT
from transfusion_mot.sampling import decode_step
from transfusion_mot.sampling.decode_step import FewRows
from transfusion_mot.sampling.decoding import Decoding
from transfusion_mot.sampling.sampler import OpenDocument, Sampler
from transfusion_mot.sampling.workspace import Workspace

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")
TOKENIZER = tiny_tokenizer()
# Widths that are no powers of two, and several programs for each kernel.
WIDE = {
    "towers": {"text": TowerConfig(768, 2048), "image": TowerConfig(32, 48)},
    "num_heads": 6,
    "num_kv_heads": 3,
    "head_dim": 128,
}


def model_of(dtype: torch.dtype, **architecture: object) -> TransfusionMoT:
    model = tiny_model(TOKENIZER.vocab_size, **architecture).requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            # Weights that all number formats have, and of a size at which wide layers do not saturate.
            parameter.copy_((parameter if parameter.ndim == 1 else parameter * 0.5).bfloat16())
    return model.to(dtype).to(CUDA)


@pytest.mark.parametrize("architecture", [*ARCHITECTURES.values(), WIDE], ids=[*ARCHITECTURES, "wide"])
@pytest.mark.parametrize("rows", [None, [3, 0, 2]])
@torch.no_grad()
def test_kernels_equal_the_model_in_float32(architecture, rows) -> None:
    model = model_of(torch.float32, **architecture)
    found, expected = (cached_logits(model, rows, 20, by_kernels) for by_kernels in (True, False))
    for one, two in zip(found, expected, strict=True):
        assert (one - two).norm() <= 1e-4 * two.norm()


@pytest.mark.parametrize("architecture", [*ARCHITECTURES.values(), WIDE], ids=[*ARCHITECTURES, "wide"])
@torch.no_grad()
def test_kernels_are_as_exact_as_the_model_in_bfloat16(architecture) -> None:
    exact = cached_logits(model_of(torch.float64, **architecture), None, 20, by_kernels=False)[0]
    model = model_of(torch.bfloat16, **architecture)
    by_kernels, plain = (
        (cached_logits(model, None, 20, which)[0].double() - exact).norm() / exact.norm() for which in (True, False)
    )
    assert by_kernels < 1.2 * plain < 0.2


def write(workspace: Workspace, model: TransfusionMoT, prompts: list[str], decoding: Decoding) -> list[list]:
    documents = [OpenDocument([prompt]) for prompt in prompts]
    generators = [torch.Generator().manual_seed(number) for number in range(len(prompts))]
    settings = {"decoding": decoding, "generators": generators}
    Sampler(model, TOKENIZER, workspace, documents, target="text", device=CUDA, **settings).run()
    return [document.added for document in documents]


@pytest.mark.parametrize(
    "decoding",
    [Decoding(40), Decoding(40, temperature=1.5, top_p=0.9), Decoding(40, temperature=1.5, top_k=7)],
    ids=str,
)
@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1], PROMPTS[:2] * 2], ids=len)
@torch.no_grad()
def test_recorded_kernels_write_what_the_model_writes(prompts, decoding, monkeypatch) -> None:
    model = model_of(torch.float32)
    workspace = Workspace()
    texts = [write(workspace, model, prompts, decoding) for _ in range(3)]
    (step,) = workspace._steps.values()
    assert "arrived" in step.state
    assert step._graph is not None
    monkeypatch.setattr(decode_step, "_MOST_ROWS", 0)
    plain = Workspace()
    expected = write(plain, model, prompts, decoding)
    (step,) = plain._steps.values()
    assert "arrived" not in step.state
    assert any(expected)
    assert texts == [expected] * 3


@pytest.mark.parametrize("count", [1, 3])
@torch.no_grad()
def test_guided_codes_are_written_by_one_recorded_step(count, monkeypatch) -> None:
    pipeline = codes_pipeline().to("cuda")
    pipeline.set_progress_bar_config(disable=True)
    settings = {"guidance_scale": 2.5, "code_top_k": 9, "output_type": "latent", "num_images_per_prompt": count}

    def paint() -> torch.Tensor:
        generators = [torch.Generator().manual_seed(number) for number in range(count)]
        return pipeline("sun", generator=generators, **settings).images

    recorded = [paint() for _ in range(2)]
    (step,) = pipeline.workspace._steps.values()
    assert step._graph is not None
    pipeline.workspace.records = False
    # Without the kernels for few rows, which one picture with guidance, two rows, takes.
    monkeypatch.setattr(decode_step, "_MOST_ROWS", 0)
    plain = paint()
    assert all(torch.equal(codes, plain) for codes in recorded)


@torch.no_grad()
def test_decoding_never_waits_for_the_device() -> None:
    model = model_of(torch.bfloat16)
    cache = KVCache(2, 1, 4, 12, 64, CUDA, torch.bfloat16)
    decoder = FewRows(model, cache, "text")
    position = torch.tensor([3], device=CUDA)
    state = {"lengths": position, "step": torch.zeros(1, dtype=torch.long, device=CUDA)}
    state |= decoder.state(position, 2)
    decoder.logits(position, state)  # The first call compiles and loads kernels.
    torch.cuda.set_sync_debug_mode("error")
    try:
        decoder.logits(position, state)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@torch.no_grad()
def test_where_the_kernels_are_used() -> None:
    def serves(model: TransfusionMoT, rows: int = 1, dtype: torch.dtype = torch.bfloat16) -> bool:
        return FewRows(model, KVCache(2, 1, 4, 12, 64, CUDA, dtype), "text").serves(rows)

    model = model_of(torch.bfloat16)
    assert serves(model)
    assert serves(model, 4)
    assert not serves(model, 5)
    assert not serves(model_of(torch.float32))  # Under autocast the cache has another number format.
    assert not serves(model_of(torch.float64), dtype=torch.float64)
    for bias in ("qkv_bias", "output_bias"):
        towers = {"text": TowerConfig(32, 48, **{bias: True}), "image": TowerConfig(32, 48)}
        assert not serves(model_of(torch.bfloat16, towers=towers))
    with torch.autocast("cuda", torch.bfloat16):
        assert not serves(model)
    handle = model.blocks[0].register_forward_pre_hook(lambda *_: None)
    assert not serves(model)
    handle.remove()
    tower = model.architecture.modalities["text"].tower
    model.blocks[1].output.owned[tower] = torch.nn.Linear(48, 32, device=CUDA, dtype=torch.bfloat16)
    assert not serves(model)  # It has a bias.
