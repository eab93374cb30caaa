"""Sampling on a GPU: recorded steps against plain ones, the kernel that counts slots against masks, and waiting."""

import math

import pytest
import torch
from test_pipeline import seeds, tiny_pipeline
from test_sampling import CAUSAL_IMAGES, LATENT_SHAPE, PATCHES, PROMPTS, tiny_model, tiny_tokenizer

from transfusion_mot.diffusion import Diffusion
from transfusion_mot.models.attention import KVCache, cached_attention
from transfusion_mot.models.transfusion import TransfusionMoT
from transfusion_mot.pipeline import TransfusionPipeline
from transfusion_mot.sampling.decoding import Decoding
from transfusion_mot.sampling.guidance import Guidance
from transfusion_mot.sampling.sampler import Making, OpenDocument, Sampler
from transfusion_mot.sampling.workspace import Workspace
from transfusion_mot.schedulers import make_scheduler

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")
TOKENIZER = tiny_tokenizer()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rows", [None, [3, 0, 2]])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 4, 128), (4, 2, 64), (6, 1, 16)])
@pytest.mark.parametrize("num_slots", [1, 5, 256])
def test_the_kernel_that_counts_slots_equals_a_mask(causal, rows, heads, kv_heads, width, num_slots) -> None:
    torch.manual_seed(0)
    cache = KVCache(2, 4, kv_heads, width, 384, CUDA, torch.bfloat16)
    assert cache.counts_slots
    cache.keys.normal_()
    cache.values.normal_()
    lengths = torch.tensor([0, 7, 100], device=CUDA)
    index = None if rows is None else torch.tensor(rows, device=CUDA)
    q = torch.randn(3, num_slots, heads, width, device=CUDA, dtype=torch.bfloat16)
    k, v = torch.randn(2, 3, num_slots, kv_heads, width, device=CUDA, dtype=torch.bfloat16)
    results = []
    for counts_slots in (True, False):
        cache.counts_slots = counts_slots
        window = cache.window(lengths, num_slots, causal, index)
        assert (window.new.mask is None) == counts_slots
        results.append(cached_attention(q, k, v, window.layer(1)))
    torch.testing.assert_close(*results, rtol=0.02, atol=0.02)


def model_of(dtype: torch.dtype, **architecture: object) -> TransfusionMoT:
    sizes = {"head_dim": 16, **architecture}
    return tiny_model(TOKENIZER.vocab_size, **sizes).to(dtype).to(CUDA).requires_grad_(False)


def run(
    workspace: Workspace, model: TransfusionMoT, prompts: list[str], **guidance: object
) -> tuple[torch.Tensor, list]:
    """Images of prompts, and documents that go on by themselves."""
    diffusion = Diffusion(make_scheduler("FlowMatchEulerDiscreteScheduler", {}))
    noise = torch.arange(len(prompts) * math.prod(LATENT_SHAPE)).sin().view(-1, *LATENT_SHAPE).to(CUDA)

    def denoise(predict, rows):
        return diffusion.sample(predict, noise[: len(rows)], 4)

    settings = {"device": CUDA, "guidance": Guidance(2.0, **guidance)}
    painted = [OpenDocument([prompt]) for prompt in prompts]
    making = {"image": Making(1, PATCHES, denoise)}
    Sampler(model, TOKENIZER, workspace, painted, target="image", making=making, **settings).run()
    documents = [OpenDocument([prompt]) for prompt in prompts]
    settings |= {"decoding": Decoding(max_new_tokens=40), "making": {"image": Making(2, PATCHES, denoise)}}
    Sampler(model, TOKENIZER, workspace, documents, target="auto", **settings).run()
    texts = [[item for item in document.added if isinstance(item, str)] for document in documents]
    return torch.stack([document.added[0].content for document in painted]), texts


MODELS = {
    "bfloat16": {"dtype": torch.bfloat16},
    "1d, grouped heads": {"dtype": torch.bfloat16, "rope": "1d", "num_kv_heads": 2},
    "causal images": {"dtype": torch.bfloat16, **CAUSAL_IMAGES},
    "float32, by masks": {"dtype": torch.float32},
}
ORDERS = [PROMPTS, PROMPTS[::-1], ["a red apple"] * 3, PROMPTS[:1], PROMPTS]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("guidance", [{}, {"interval": (0.3, 0.8)}], ids=str)
@torch.no_grad()
def test_recorded_steps_give_what_plain_ones_give(name, guidance) -> None:
    model = model_of(**MODELS[name])
    plain, recorded = Workspace(), Workspace()
    plain.records = False
    for prompts in ORDERS:
        expected, texts = run(plain, model, prompts, **guidance)
        images, written = run(recorded, model, prompts, **guidance)
        torch.testing.assert_close(images, expected, rtol=1e-3, atol=1e-3)
        assert written == texts


@torch.no_grad()
def test_recorded_steps_under_autocast() -> None:
    """Whose cache of cast weights must not be read after it is freed."""
    model = model_of(torch.float32)
    plain, recorded = Workspace(), Workspace()
    plain.records = False
    with torch.autocast("cuda", torch.bfloat16):
        expected, _ = run(plain, model, PROMPTS)
    for _ in range(3):
        with torch.autocast("cuda", torch.bfloat16):
            images, _ = run(recorded, model, PROMPTS)
        torch.randn(10**6, device=CUDA)
        torch.testing.assert_close(images, expected, rtol=1e-2, atol=1e-2)


@torch.no_grad()
def test_recorded_steps_see_other_weights() -> None:
    model = model_of(torch.bfloat16)
    workspace = Workspace()
    first, _ = run(workspace, model, PROMPTS)
    for parameter in model.parameters():
        parameter.mul_(1.1)  # In place, as averaged weights are swapped in.
    second, _ = run(workspace, model, PROMPTS)
    torch.testing.assert_close(second, run(Workspace(), model, PROMPTS)[0], rtol=1e-3, atol=1e-3)
    for parameter in model.parameters():
        parameter.data = parameter.data / 1.1  # Elsewhere in memory.
    third, _ = run(workspace, model, PROMPTS)
    assert not torch.allclose(first, second, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(third, run(Workspace(), model, PROMPTS)[0], rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_compiled_blocks_are_recorded_too() -> None:
    model = model_of(torch.bfloat16)
    expected, _ = run(Workspace(), model, PROMPTS)
    model.compile_repeated_blocks(fullgraph=True, dynamic=False)
    workspace = Workspace()
    for _ in range(2):
        torch.testing.assert_close(run(workspace, model, PROMPTS)[0], expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("records", [True, False])
@torch.no_grad()
def test_denoising_never_waits_for_the_device(records) -> None:
    model = model_of(torch.bfloat16)
    workspace = Workspace()
    workspace.records = records
    diffusion = Diffusion(make_scheduler("FlowMatchEulerDiscreteScheduler", {}))
    noise = torch.zeros(len(PROMPTS), *LATENT_SHAPE, device=CUDA)
    waited = []

    def denoise(predict, rows):
        calls = 0

        def watched(noisy, timestep):
            nonlocal calls
            calls += 1
            # The first call loads kernels, which waits; from then on nothing may, in the solver neither.
            if calls == 2:
                torch.cuda.set_sync_debug_mode("error")
            return predict(noisy, timestep)

        try:
            latents = diffusion.sample(watched, noise, 8)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        waited.append(calls)
        return latents

    documents = [OpenDocument([prompt]) for prompt in PROMPTS]
    settings = {"guidance": Guidance(2.0, rescale=0.5, renorm=True), "making": {"image": Making(1, PATCHES, denoise)}}
    Sampler(model, TOKENIZER, workspace, documents, target="image", device=CUDA, **settings).run()
    assert waited == [8]


@pytest.fixture(scope="module")
def pipeline() -> TransfusionPipeline:
    pipeline = tiny_pipeline(transformer=model_of(torch.bfloat16, head_dim=16))
    return pipeline.to(CUDA)


def test_many_images_take_no_more_memory_than_the_first(pipeline) -> None:
    def paint(number: int) -> None:
        prompts = [["sun", "an octopus"], ["a red apple", ""]][number % 2]
        pipeline(prompts, generator=seeds(number, number + 1))
        pipeline.caption(pipeline("sun").images, max_new_tokens=8)

    for number in range(3):
        paint(number)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    paint(0)
    paint(1)
    peak = torch.cuda.max_memory_allocated()
    for number in range(100):
        paint(number)
    assert torch.cuda.max_memory_allocated() <= peak


def test_sizes_in_turn_paint_what_plain_steps_paint_and_take_no_more_memory() -> None:
    sizes = [[4, 16], [8, 8], [16, 4], [16, 16], [8, 24]]
    model = model_of(torch.float32)
    plain, recorded = (
        tiny_pipeline(transformer=model, image_sizes={"trained": sizes, "fit": "crop"}).to(CUDA) for _ in range(2)
    )
    plain.workspace.records = False

    def paint(pipeline: TransfusionPipeline, size: list[int]) -> torch.Tensor:
        return pipeline("sun", height=size[0], width=size[1], generator=seeds(1), output_type="latent").images

    expected = [paint(plain, size) for size in sizes]
    peaks = []
    for _ in range(12):
        torch.cuda.reset_peak_memory_stats()
        for size, image in zip(sizes, expected, strict=True):
            torch.testing.assert_close(paint(recorded, size), image, rtol=1e-3, atol=1e-3)
        peaks.append(torch.cuda.max_memory_allocated())
    assert max(peaks[3:]) <= max(peaks[:3])


def test_an_image_is_the_same_whatever_the_batch(pipeline) -> None:
    settings = {"output_type": "latent", "num_inference_steps": 8}
    prompts = ["sun", "an octopus", "a red apple", ""]
    together = pipeline(prompts, generator=seeds(1, 2, 3, 4), **settings).images
    for number, prompt in enumerate(prompts):
        alone = pipeline(prompt, generator=seeds(number + 1), **settings).images
        torch.testing.assert_close(together[number : number + 1], alone, rtol=0.05, atol=0.05)


def test_bfloat16_paints_nearly_what_float64_paints() -> None:
    images = {}
    for dtype in (torch.bfloat16, torch.float64):
        painter = tiny_pipeline(transformer=model_of(dtype), max_prompt_tokens=None).to(CUDA)
        images[dtype] = painter(PROMPTS, generator=seeds(1, 2, 3), output_type="latent").images.double()
    difference = (images[torch.bfloat16] - images[torch.float64]).norm() / images[torch.float64].norm()
    assert difference < 0.05
