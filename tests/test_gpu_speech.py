"""Speech on a GPU: recorded steps, batches, and weights that wait elsewhere."""

from pathlib import Path

import numpy as np
import pytest
import torch
from test_pipeline import seeds
from test_pipeline_speech import picture, speech_pipeline, tone

from transfusion_mot.pipeline import TransfusionPipeline

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

PROMPTS = ["sun", "an octopus", picture(), "a red apple", "sun", ""]


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("count", [1, 6])
def test_recorded_steps_say_what_plain_ones_say(count: int, scale: float) -> None:
    """Of few rows by kernels and of more by matrix products, and a second time by the steps that are there."""
    pipeline = speech_pipeline().to("cuda")
    settings = {"guidance_scale": scale, "max_seconds": 0.4}
    said = [pipeline.speak(PROMPTS[:count], generator=seeds(*range(count)), **settings) for _ in range(2)]
    pipeline.workspace.records = False
    plain = pipeline.speak(PROMPTS[:count], generator=seeds(*range(count)), **settings)
    assert max(len(audio.samples) for audio in plain) > 0
    for again in said:
        for one, other in zip(again, plain, strict=True):
            assert np.array_equal(one.samples, other.samples)


def test_one_seed_gives_one_result_whatever_the_batch_size() -> None:
    pipeline = speech_pipeline().to("cuda")
    together = pipeline.speak(PROMPTS, generator=seeds(*range(6)), max_seconds=0.4)
    for seed, prompt in enumerate(PROMPTS):
        (alone,) = pipeline.speak(prompt, generator=seeds(seed), max_seconds=0.4)
        assert np.allclose(alone.samples, together[seed].samples, atol=1e-4)


@pytest.mark.parametrize("how", ["enable_model_cpu_offload", "enable_sequential_cpu_offload", "device_map"])
def test_speech_does_not_depend_on_where_weights_wait(how: str, tmp_path: Path) -> None:
    whole = speech_pipeline()
    whole.save_pretrained(tmp_path)
    if how == "device_map":
        pipeline = TransfusionPipeline.from_pretrained(tmp_path, device_map="balanced")
    else:
        pipeline = TransfusionPipeline.from_pretrained(tmp_path)
        getattr(pipeline, how)()
    pipeline.set_progress_bar_config(disable=True)
    whole.to("cuda")
    for _ in range(2):
        expected, said = (
            one.speak(PROMPTS[:3], generator=seeds(1, 2, 3), max_seconds=0.3) for one in (whole, pipeline)
        )
        for one, other in zip(expected, said, strict=True):
            assert np.allclose(one.samples, other.samples, atol=1e-4)
        assert pipeline.transcribe(tone(), max_new_tokens=4) == whole.transcribe(tone(), max_new_tokens=4)
        before, after = (one(tone(), generator=seeds(1), output_type="pt").images for one in (whole, pipeline))
        torch.testing.assert_close(after.cpu(), before.cpu(), rtol=0, atol=0.02)
