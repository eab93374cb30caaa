"""Idioms of diffusers with the pipeline: generic loader, callbacks, images as tensors, and damaged folders."""

import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from PIL import Image
from safetensors.torch import load_file, save_file
from test_pipeline import IMAGE_SIZE, seeds, tiny_pipeline

from transfusion_mot.codecs.autoencoder_kl import Autoencoder
from transfusion_mot.errors import UserError
from transfusion_mot.pipeline import TransfusionPipeline
from transfusion_mot.sampling.variations import as_pictures

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def pipeline() -> TransfusionPipeline:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def saved(pipeline, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def copied(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copied"))


def latents(pipeline, **arguments):
    return pipeline("sun", generator=seeds(1), output_type="latent", **arguments).images


@pytest.mark.parametrize("custom", [False, True])
def test_the_generic_loader_finds_the_class(pipeline, saved, custom) -> None:
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(saved)
    named = {"custom_pipeline": str(saved)} if custom else {}
    loaded = DiffusionPipeline.from_pretrained(saved, trust_remote_code=True, **named)
    assert isinstance(loaded, TransfusionPipeline)
    assert torch.equal(latents(loaded), latents(pipeline))


def test_our_own_loader_runs_no_code_of_the_folder(copied) -> None:
    (copied / "pipeline.py").write_text("raise RuntimeError('code of a stranger')\n")
    assert TransfusionPipeline.from_pretrained(copied).config.image_size == IMAGE_SIZE


def test_folders_of_earlier_versions_load(pipeline, copied) -> None:
    index = json.loads((copied / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "TransfusionPipeline"]
    (copied / "model_index.json").write_text(json.dumps(index | {"_class_name": "TransfusionPipeline"}))
    (copied / "pipeline.py").unlink()
    assert torch.equal(latents(TransfusionPipeline.from_pretrained(copied)), latents(pipeline))


# --- Callbacks. ---


class Noting(PipelineCallback):
    """Notes what it is given, and halves the latents."""

    tensor_inputs = ["latents"]  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, int, list[str]]] = []

    def callback_fn(self, pipeline, step_index, timesteps, callback_kwargs):
        self.seen.append((step_index, pipeline.num_timesteps, list(callback_kwargs)))
        return {"latents": callback_kwargs["latents"] / 2}


def test_callback_objects_of_diffusers(pipeline) -> None:
    one, two = Noting(), Noting()
    alone = latents(pipeline, callback_on_step_end=one)
    assert one.seen == [(step, 4, ["latents"]) for step in range(4)]
    both = latents(pipeline, callback_on_step_end=MultiPipelineCallbacks([two, Noting()]))
    assert len(two.seen) == 4
    assert not torch.equal(alone, both)
    by_function = latents(pipeline, callback_on_step_end=lambda p, s, t, tensors: {"latents": tensors["latents"] / 2})
    assert torch.equal(alone, by_function)


def test_a_callback_gets_the_tensors_it_asks_for(pipeline) -> None:
    seen: list[dict] = []
    settings = {"callback_on_step_end": lambda p, s, t, tensors: seen.append(tensors)}
    latents(pipeline, **settings)
    assert [list(tensors) for tensors in seen] == [["latents", "clean"]] * 4
    seen.clear()
    latents(pipeline, **settings, callback_on_step_end_tensor_inputs=["clean"])
    assert [list(tensors) for tensors in seen] == [["clean"]] * 4
    with pytest.raises(UserError, match="prompt_embeds; known: latents and clean"):
        latents(pipeline, **settings, callback_on_step_end_tensor_inputs=["prompt_embeds"])


def test_a_callback_can_end_the_painting(pipeline) -> None:
    seen: list[torch.Tensor] = []

    def stop_after_two(pipeline, step, timestep, tensors) -> None:
        seen.append(tensors["latents"].clone())
        pipeline._interrupt = step == 1

    painted = latents(pipeline, callback_on_step_end=stop_after_two)
    assert len(seen) == 2
    assert torch.equal(painted, seen[-1])
    assert pipeline.interrupt
    # The next painting begins anew.
    assert not torch.equal(latents(pipeline), painted)
    assert not pipeline.interrupt


# --- Images that are no PIL images. ---


@pytest.mark.parametrize("kind", ["bytes", "array", "tensor"])
def test_images_may_be_arrays_and_tensors(pipeline, kind) -> None:
    """As diffusers has them: arrays [H, W, 3] or [B, H, W, 3], tensors [3, H, W] or [B, 3, H, W], in [0, 1]."""
    images_uint8 = np.random.default_rng(0).integers(256, size=(2, 12, 12, 3), dtype=np.uint8)
    pictures = [Image.fromarray(image) for image in images_uint8]
    scaled = images_uint8.astype(np.float32) / 255
    given = {
        "bytes": images_uint8,
        "array": scaled,
        "tensor": torch.from_numpy(scaled).permute(0, 3, 1, 2),
    }[kind]
    prompts = ["sun", "an octopus"]
    settings = {"output_type": "latent", "strength": 0.5}
    expected = pipeline(prompts, image=pictures, generator=seeds(1, 2), **settings).images
    assert torch.equal(pipeline(prompts, image=given, generator=seeds(1, 2), **settings).images, expected)
    assert torch.equal(pipeline(prompts, image=list(given), generator=seeds(1, 2), **settings).images, expected)
    one = pipeline("sun", image=given[0], generator=seeds(1), **settings).images
    torch.testing.assert_close(one, expected[:1], rtol=1e-4, atol=1e-4)
    assert pipeline.caption(given, max_new_tokens=4) == pipeline.caption(pictures, max_new_tokens=4)


def test_a_tensor_without_channels_is_grey() -> None:
    """Also one with a gradient, or on a GPU."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    values = torch.rand(5, 4)
    (expected,) = as_pictures(values.expand(3, 5, 4), "mask_image")
    for device in devices:
        (picture,) = as_pictures(values.to(device).requires_grad_(), "mask_image")
        assert np.array_equal(picture, expected)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4, 3)) - 1, "outside of 0 to 1"),
        (np.zeros((4, 4, 2)), "shape"),
        (torch.zeros(4, 4, 3), "shape"),
        (torch.full((3, 4, 4), torch.nan), "outside of 0 to 1"),
        ("sun.png", "str"),
    ],
)
def test_what_is_no_image_is_refused(pipeline, image, message) -> None:
    with pytest.raises(UserError, match=message):
        pipeline("sun", image=image)


# --- Damaged folders. ---


LOADERS = (
    TransfusionPipeline.from_pretrained,
    functools.partial(DiffusionPipeline.from_pretrained, trust_remote_code=True),
)


def changed(file: Path, change) -> None:
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


@pytest.mark.parametrize("part", ["vae", "transformer"])
def test_missing_and_infinite_weights_are_named(copied, part) -> None:
    file = copied / part / WEIGHTS
    name = sorted(load_file(file))[0]
    changed(file, lambda weights: weights[name].view(-1)[:1].fill_(torch.nan))
    with pytest.raises(UserError, match=f"{part} of .*not finite, such as {name}"):
        TransfusionPipeline.from_pretrained(copied)
    changed(file, lambda weights: weights.pop(name))
    for load in LOADERS:
        with pytest.raises(UserError, match=name):
            load(copied)


def test_an_index_without_a_size_is_refused(copied) -> None:
    index = json.loads((copied / "model_index.json").read_text())
    del index["image_size"]
    (copied / "model_index.json").write_text(json.dumps(index))
    for load in LOADERS:
        with pytest.raises(UserError, match="the snapshot has no image_size"):
            load(copied)
        assert load(copied, image_size=IMAGE_SIZE).config.image_size == IMAGE_SIZE


def test_an_index_that_is_none_is_refused(copied) -> None:
    (copied / "model_index.json").write_text("[1]")
    with pytest.raises(UserError, match="is not the index of a pipeline"):
        TransfusionPipeline.from_pretrained(copied)


def test_a_pickle_is_not_read_in_place_of_missing_weights(pipeline, copied) -> None:
    (copied / "vae" / WEIGHTS).unlink()
    torch.save(pipeline.vae.state_dict(), copied / "vae" / "diffusion_pytorch_model.bin")
    for load in (TransfusionPipeline.from_pretrained, lambda folder: Autoencoder.load(str(folder / "vae"), "cpu")):
        with pytest.raises(UserError, match=r"diffusion_pytorch_model\.safetensors"):
            load(copied)
    loaded = TransfusionPipeline.from_pretrained(copied, use_safetensors=None)
    assert torch.equal(loaded.vae.decoder.conv_in.weight, pipeline.vae.decoder.conv_in.weight)


def test_a_link_that_was_copied_without_its_file_is_told(copied) -> None:
    file = copied / "vae" / WEIGHTS
    file.unlink()
    file.symlink_to("../../elsewhere/weights")
    for load in (TransfusionPipeline.from_pretrained, lambda folder: Autoencoder.load(str(folder / "vae"), "cpu")):
        with pytest.raises(UserError, match="cp -rL"):
            load(copied)


def test_latents_that_are_not_finite_are_no_black_picture(pipeline) -> None:
    with pytest.raises(UserError, match="not finite"):
        pipeline("sun", callback_on_step_end=lambda p, s, t, tensors: {"latents": tensors["latents"] * torch.nan})


def test_no_kernel_reads_weights_that_wait_elsewhere(monkeypatch) -> None:
    """As diffusers' sequential offload does it: between calls of their module the weights are on `meta`."""
    whole, offloaded = tiny_pipeline(), tiny_pipeline()
    expected = whole("sun", generator=seeds(1), output_type="latent").images
    cpu_offload(offloaded.transformer, torch.device("cpu"))
    # What the kernels are chosen by. With a weight on `meta` torch starts none and returns memory as it is.
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    torch.testing.assert_close(offloaded("sun", generator=seeds(1), output_type="latent").images, expected)
