"""The pipeline on a GPU with the memory savers of diffusers: weights are moved to the device in parts."""

from pathlib import Path

import pytest
import torch
from test_pipeline import seeds, tiny_pipeline

from transfusion_mot.pipeline import TransfusionPipeline

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("how", ["enable_model_cpu_offload", "enable_sequential_cpu_offload", "device_map"])
def test_pictures_and_captions_do_not_depend_on_where_weights_wait(how: str, tmp_path: Path) -> None:
    whole = tiny_pipeline()
    whole.save_pretrained(tmp_path)
    if how == "device_map":
        pipeline = TransfusionPipeline.from_pretrained(tmp_path, device_map="balanced")
    else:
        pipeline = TransfusionPipeline.from_pretrained(tmp_path)
        getattr(pipeline, how)()
    whole.to("cuda")
    for _ in range(2):
        expected, painted = (
            p(["sun", "an octopus"], generator=seeds(1, 2), output_type="pt").images for p in (whole, pipeline)
        )
        torch.testing.assert_close(painted.cpu(), expected.cpu(), rtol=0, atol=0.02)
        picture = whole("sun", generator=seeds(1)).images[0]
        assert pipeline.caption(picture, max_new_tokens=4) == whole.caption(picture, max_new_tokens=4)
    waits_on = {parameter.device.type for parameter in pipeline.transformer.parameters()}
    elsewhere = {"enable_model_cpu_offload": {"cpu"}, "enable_sequential_cpu_offload": {"meta"}, "device_map": {"cuda"}}
    assert waits_on == elsewhere[how]
