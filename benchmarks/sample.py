"""Compare sampling times: `python -m benchmarks.sample --size 163m 760m`.

The whole pipeline call is measured, including tokenizer, prefill and solver, but without decoding of latents. All
painters do the same number of forwards: 25 Euler steps with guidance are 50.
"""

import argparse
import gc
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, cast

from benchmarks.shapes import LAYOUTS, SIZES, Size
from transfusion_mot.config import TEXT, DiffusionConfig
from transfusion_mot.errors import exit_on_user_error
from transfusion_mot.outputs import check_writable_folder


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sample", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", nargs="+", choices=SIZES, default=["163m", "760m"], help="models (default: both)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder for the JSON")
    given = parser.parse_args(arguments)
    check_writable_folder(given.output, "--output")
    return given


if __name__ == "__main__":
    # Before PyTorch loads, which takes seconds: --help, and mistakes in the options.
    with exit_on_user_error():
        parse_arguments(sys.argv[1:])

import torch
from torch import Tensor

from benchmarks.kernel_profile import profile_step
from benchmarks.train_step import surroundings, without_output
from benchmarks.workload import AUTOENCODER, CHANNELS
from transfusion_mot.codecs.autoencoder_kl import Autoencoder
from transfusion_mot.data.tokenizer import TextTokenizer, train_tokenizer
from transfusion_mot.diffusion import Diffusion
from transfusion_mot.models.inputs import LatentInput, Slots, TokenInput
from transfusion_mot.models.modalities import DiffusionModality, TokenModality
from transfusion_mot.models.positions import PositionCounter
from transfusion_mot.models.transfusion import TransfusionMoT
from transfusion_mot.pipeline import TransfusionPipeline
from transfusion_mot.reporting.flops import active_parameters, adapter_flops
from transfusion_mot.schedulers import make_scheduler

PROMPT_TOKENS = 64
STEPS = 25
SCALE = 3.0
IMAGES_FOR_MEMORY = 1000


def make_pipeline(size: Size, image_size: int, device: torch.device) -> TransfusionPipeline:
    """A pipeline of a size with random weights, which never ends a text; in bfloat16 on a GPU."""
    config = size.model(dense=False)
    tokenizer = train_tokenizer(topics.values(), 512, config.stream_order)
    tokenizer.hf.add_tokens([f"<{number}>" for number in range(tokenizer.vocab_size, size.vocab_size)])
    (pictures,) = config.of_objective("diffusion")
    with torch.device("meta"):
        model = TransfusionMoT.from_sections({TEXT: size.vocab_size, pictures: CHANNELS}, config, DiffusionConfig())
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    # Drawn on the device, because the host would need longer than all measurements.
    model = model.to_empty(device=device).to(dtype).eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0) if parameter.ndim == 1 else parameter.normal_(0, 0.02)
        text_of(model).head_weight[tokenizer.eos_id] = 0
    vae = Autoencoder.load(str(AUTOENCODER), device, dtype).vae
    scheduler = make_scheduler("FlowMatchEulerDiscreteScheduler", {})
    hf = TextTokenizer(tokenizer.hf, config.stream_order).hf
    pipeline = TransfusionPipeline(model, vae, scheduler, hf, image_size)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def text_of(model: TransfusionMoT) -> TokenModality:
    """The modality text of a model."""
    return cast(TokenModality, model.modality(TEXT))


def latents_of(pipeline: TransfusionPipeline, model: TransfusionMoT | None = None) -> DiffusionModality:
    """The modality of the pictures, of the pipeline's model or another one."""
    return cast(DiffusionModality, (model or pipeline.transformer).modality(pipeline.image_modality))


def prompts(pipeline: TransfusionPipeline, count: int) -> list[str]:
    """Different prompts of 64 tokens."""
    tokenizer = pipeline.text_tokenizer
    words = " ".join(topics.values()).split()
    made: list[str] = []
    for start in range(len(words)):
        text = tokenizer.decode(tokenizer.encode(" ".join(words[start : start + PROMPT_TOKENS]))[:PROMPT_TOKENS])
        # A text cut inside a word may have other tokens.
        if len(tokenizer.encode(text)) == PROMPT_TOKENS:
            made.append(text)
        if len(made) == count:
            break
    return made


def seconds(call: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Median time of a call, after a warm-up call."""
    times = []
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize()
        begun = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return statistics.median(times[1:])


def paint_uncached(pipeline: TransfusionPipeline, texts: list[str], noise: Tensor, steps: int) -> Tensor:
    """The same images without a cache: every step computes whole documents, with their prompts and then without."""
    device = noise.device
    model, tokenizer = pipeline.transformer, pipeline.text_tokenizer
    side, _ = pipeline.grid(pipeline.sizes.default)
    grid = side // latents_of(pipeline).patch_size

    def document(ids: list[int]) -> Slots:
        counter = PositionCounter(model.architecture.rope)
        parts = [counter.text(len(ids)), counter.image(grid, grid)]
        order, rope_positions = (torch.cat([torch.from_numpy(part[i]) for part in parts])[None] for i in (0, 1))
        span_ids = (order >= len(ids)).long() - 1
        named = {"order": order, "span_ids": span_ids, "rope_positions": rope_positions}
        named = {name: ids.expand(len(texts), *ids.shape[1:]).to(device) for name, ids in named.items()}
        nothing = torch.full_like(named["order"], -1)
        return Slots(document_ids=torch.zeros_like(nothing), source_ids=nothing, **named)

    bos, boi = tokenizer.bos_id, tokenizer.begin_ids[pipeline.image_modality]
    whole = torch.tensor([[bos, *tokenizer.encode(text), boi] for text in texts], device=device)
    nothing = torch.tensor([[bos, boi]] * len(texts), device=device)
    layouts = [document(ids[0].tolist()) for ids in (whole, nothing)]

    def predict(noisy: Tensor, timestep: Tensor) -> Tensor:
        times = timestep.to(device).expand(len(noisy), 1)
        name, images = pipeline.image_modality, LatentInput(noisy[:, None].to(model.dtype), times)
        conditional, unconditional = (
            model({TEXT: TokenInput(ids), name: images}, layout).predictions[name][:, 0].to(noisy.dtype)
            for ids, layout in zip((whole, nothing), layouts, strict=True)
        )
        return unconditional + SCALE * (conditional - unconditional)

    with torch.no_grad():
        return Diffusion(pipeline.scheduler).sample(predict, noise, steps)


def rival_painter(size: Size, patches: int, count: int, steps: int, device: torch.device) -> Callable[[], Any]:
    """The package transfusion-pytorch 0.20.0: paints `count` images with guidance and as many Euler steps."""
    from torchdiffeq import odeint

    from benchmarks.transfusion_pytorch_rival import EXTRA_IDS, Shape, TransfusionPytorch

    fields = {name: value for name, value in vars(size).items() if name in Shape.__dataclass_fields__}
    model = TransfusionPytorch(Shape(**fields, patches=patches, patch_elements=4 * CHANNELS), device).model.eval()
    for module in model.modules():
        if getattr(module, "softcap_value", None) == 0:
            # Its dense attention, used in sampling, divides by it.
            module.softcap_value = 50.0
    model.odeint_fn = partial(odeint, method="euler")
    texts = list(torch.randint(size.vocab_size - EXTRA_IDS, (count, PROMPT_TOKENS), device=device))

    def paint() -> Any:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            # Its steps are points of integration, one more than intervals; a length of 1 ends after the image.
            return model.sample_many(
                texts,
                max_length=1,
                force_modality_at_start=0,
                modality_steps=steps + 1,
                cfg_scale=SCALE,
                return_unprocessed_modalities=True,
            )

    return paint


def product_ceiling(device: torch.device, width: int) -> float:
    """FLOP/s of the best of some matrix products in the model's number format."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    best = 0.0
    for rows, columns in ((16 * width, 4 * width), (8 * width, 8 * width), (width, width)):
        a = torch.randn(rows, width, device=device, dtype=dtype)
        b = torch.randn(columns, width, device=device, dtype=dtype)
        many = 20

        def products(a: Tensor = a, b: Tensor = b, many: int = many) -> None:
            for _ in range(many):
                torch.nn.functional.linear(a, b)

        best = max(best, 2 * rows * columns * width * many / seconds(products, device, 3))
    return best


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that a copy reads and writes."""
    size = 2**30 if device.type == "cuda" else 2**24
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * 10 * size / seconds(lambda: [target.copy_(source) for _ in range(10)], device, 3)


def painting_flops(pipeline: TransfusionPipeline, rows: int, steps: int) -> float:
    """FLOPs of painting `rows` images with guidance, each with a prompt of 64 tokens."""
    config = pipeline.transformer.architecture
    side, _ = pipeline.grid(pipeline.sizes.default)
    patches = (side // latents_of(pipeline).patch_size) ** 2
    with torch.device("meta"):
        bare = TransfusionMoT.from_config(dict(pipeline.transformer.config))
    text, image = (active_parameters(bare, config, modality) for modality in (TEXT, pipeline.image_modality))
    # The head gives the logits of one slot.
    text -= text_of(bare).head_weight.numel()
    prefixes = (PROMPT_TOKENS + 2, 2)
    pairs = sum(patches * (prefix + patches) for prefix in prefixes)
    attention = 4 * config.num_layers * config.num_heads * config.head_dim * pairs
    adapter = adapter_flops(latents_of(pipeline, bare), torch.Size((2, CHANNELS, side, side)))
    step = 2 * 2 * image * patches + attention + adapter
    return rows * (steps * step + 2 * text * sum(prefixes))


def lines(name: str, device: torch.device, quick: bool) -> Iterator[dict[str, Any]]:
    """Measure one size, line by line.

    Args:
        name: Name of the size.
        device: Device to measure on.
        quick: Few steps, to test the benchmark itself.
    """
    size, image_size = SIZES[name], LAYOUTS[name].image_size
    pipeline = make_pipeline(size, image_size, device)
    model, workspace = pipeline.transformer, pipeline.workspace
    steps, tokens, repeats = (2, 4, 1) if quick else (STEPS, 256, 3)
    ceiling, bandwidth = product_ceiling(device, size.hidden_size), copy_bandwidth(device)
    yield {"line": "ceilings", "product_tflops": ceiling / 1e12, "copy_gb_per_s": bandwidth / 1e9}
    weights = active_parameters(model, model.architecture, TEXT) * text_of(model).head_weight.element_size()

    def paint(rows: int, how: str) -> dict[str, Any]:
        texts = prompts(pipeline, rows)
        settings: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": SCALE, "output_type": "latent"}
        taken = seconds(lambda: pipeline(texts, **settings), device, repeats)
        floor = painting_flops(pipeline, rows, steps) / ceiling
        result = {"seconds": taken, "ms_per_image": 1000 * taken / rows, "fraction_of_floor": floor / taken}
        return {"line": "painting", "how": how, "rows": rows, **result}

    def write(rows: int, how: str) -> dict[str, Any]:
        texts = prompts(pipeline, rows)
        taken = seconds(lambda: pipeline.complete(texts, max_new_tokens=tokens), device, repeats)
        floor = tokens * weights / bandwidth
        result = {"seconds": taken, "tokens_per_s": rows * tokens / taken, "fraction_of_floor": floor / taken}
        return {"line": "writing", "how": how, "rows": rows, **result}

    few, many = (2, 3) if quick else (16, 64)
    for rows in (few, many, 1):
        yield paint(rows, "cache and graphs")
    for rows in (1, many):
        written = write(rows, "cache and graphs")
        yield written
        if device.type == "cuda" and rows == 1:
            yield writing_profile(pipeline, tokens, written["seconds"])
    if device.type == "cuda":
        yield memory_growth(pipeline, few, IMAGES_FOR_MEMORY)
    workspace.records = False
    yield paint(few, "cache")
    workspace.records = True
    model.attention = "sdpa"
    texts = prompts(pipeline, few)
    noise = torch.randn(few, *pipeline.latent_shape(pipeline.sizes.default), device=device)
    taken = seconds(lambda: paint_uncached(pipeline, texts, noise, steps), device, repeats)
    uncached = {"rows": few, "seconds": taken, "ms_per_image": 1000 * taken / few}
    yield {"line": "painting", "how": "whole documents, two passes", **uncached}
    if device.type == "cuda":
        # Last, because the model stays compiled. Every other shape needs another compilation of at least ten seconds.
        model.compile_repeated_blocks(fullgraph=True, dynamic=False)
        yield paint(few if name == "163m" else many, "cache, graphs and compiled blocks")
        yield write(1, "cache, graphs and compiled blocks")
    if importlib.util.find_spec("transfusion_pytorch") is not None and name != "760m":
        patches = (image_size // 8) ** 2
        del pipeline, model
        workspace.release()
        call = rival_painter(size, patches, few, steps, device)
        taken = seconds(call, device, 1)
        rival = {"rows": few, "seconds": taken, "ms_per_image": 1000 * taken / few}
        yield {"line": "painting", "how": "transfusion-pytorch 0.20.0, sample_many", **rival}


def writing_profile(pipeline: TransfusionPipeline, tokens: int, seconds_taken: float) -> dict[str, Any]:
    """Kernels and idle time of the device for a token of one row, including prefill."""
    texts = prompts(pipeline, 1)
    found = profile_step(lambda: pipeline.complete(texts, max_new_tokens=tokens), repetitions=1)
    result = {"line": "kernels of writing", "rows": 1, "kernels_per_token": found["kernels_per_step"] / tokens}
    result["us_without_a_kernel"] = (1e6 * seconds_taken - 1000 * found["busy"]) / tokens
    return result | {f"us of {name}": 1000 * spent / tokens for name, spent in found["categories"].items()}


def memory_growth(pipeline: TransfusionPipeline, rows: int, images: int) -> dict[str, Any]:
    """Additional peak memory of many images compared with the first two batches."""
    peaks = []
    texts = prompts(pipeline, rows)
    for batch in range(-(-images // rows)):
        # The fewest steps: memory does not depend on their number.
        pipeline(texts, num_inference_steps=2, guidance_scale=SCALE, output_type="latent")
        peaks.append((torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()))
        if batch == 1:
            torch.cuda.reset_peak_memory_stats()
    grown = [last - first for first, last in zip(peaks[2], peaks[-1], strict=True)]
    return {"line": "memory", "images": images, "bytes_allocated_more": grown[0], "bytes_reserved_more": grown[1]}


def shown(line: dict[str, Any]) -> str:
    """A readable line."""
    return ", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{value}" for key, value in line.items())


def main(arguments: list[str]) -> None:
    options = parse_arguments(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options.output.mkdir(parents=True, exist_ok=True)
    for name in options.size:
        command = " ".join(["python -m benchmarks.sample", *without_output(arguments)])
        report = {"command": command, **surroundings(device), "size": name, "lines": []}
        for line in lines(name, device, quick=name == "tiny"):
            report["lines"].append(line)
            print(f"{name}: {shown(line)}", flush=True)
            (options.output / f"sample-{name}.json").write_text(json.dumps(report, indent=1))
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    with exit_on_user_error():
        main(sys.argv[1:])
