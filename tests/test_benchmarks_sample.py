"""The contenders of the sampling benchmark paint the same images, and the benchmark runs."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.sample import PROMPT_TOKENS, SCALE, main, make_pipeline, paint_uncached, painting_flops, prompts
from benchmarks.shapes import SIZES
from transfusion_mot.pipeline import TransfusionPipeline

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pipeline() -> TransfusionPipeline:
    torch.manual_seed(0)
    return make_pipeline(SIZES["tiny"], 32, CPU)


def test_prompts_have_all_the_same_length(pipeline: TransfusionPipeline) -> None:
    texts = prompts(pipeline, 20)
    assert len(set(texts)) == 20
    assert {len(pipeline.text_tokenizer.encode(text)) for text in texts} == {PROMPT_TOKENS}


def test_whole_documents_in_two_passes_give_the_same_images(pipeline: TransfusionPipeline) -> None:
    texts, noise = prompts(pipeline, 2), torch.randn(2, 4, 8, 8)
    settings = {"num_inference_steps": 3, "guidance_scale": SCALE, "output_type": "latent"}
    painted = pipeline(texts, latents=noise, **settings).images
    torch.testing.assert_close(paint_uncached(pipeline, texts, noise, 3), painted, rtol=1e-3, atol=1e-4)


def test_flops_are_those_that_torch_counts(pipeline: TransfusionPipeline) -> None:
    """Up to the filler beside the short prefix of guidance, which the floor does not have."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # Attention in matrix products: only some versions of the counter know the CPU's fused operation.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        pipeline(prompts(pipeline, 1), num_inference_steps=50, guidance_scale=SCALE, output_type="latent")
    assert painting_flops(pipeline, 1, 50) < counter.get_total_flops() < 1.35 * painting_flops(pipeline, 1, 50)


def test_the_benchmark_writes_a_line_for_everything_it_measures(tmp_path: Path) -> None:
    main(["--size", "tiny", "--output", str(tmp_path)])
    report = json.loads((tmp_path / "sample-tiny.json").read_text())
    assert report["command"] == "python -m benchmarks.sample --size tiny"
    lines = [(line["line"], line.get("how"), line.get("rows")) for line in report["lines"]]
    assert lines[:6] == [
        ("ceilings", None, None),
        *(("painting", "cache and graphs", rows) for rows in (2, 3, 1)),
        *(("writing", "cache and graphs", rows) for rows in (1, 3)),
    ]
    assert {line.get("how") for line in report["lines"]} >= {"cache", "whole documents, two passes"}
    assert all(line["seconds"] > 0 for line in report["lines"][1:])
