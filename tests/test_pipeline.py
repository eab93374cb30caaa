"""The pipeline for a user who knows diffusers but not the training."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image
from test_sampling import tiny_model, tiny_tokenizer
from torch._subclasses.fake_tensor import FakeTensorMode

from transfusion_mot.data.images import load_image
from transfusion_mot.data.tokenizer import train_tokenizer
from transfusion_mot.errors import UserError
from transfusion_mot.models.positions import PositionCounter
from transfusion_mot.pipeline import TransfusionPipeline
from transfusion_mot.schedulers import FLOW_SCHEDULERS, make_sampling_scheduler, make_scheduler

IMAGE_SIZE = 8
NOTHING = Image.new("RGB", (0, 0))


def tiny_vae(latent_channels: int = 3) -> AutoencoderKL:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=[8, 8],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=latent_channels,
        norm_num_groups=4,
        latents_mean=[0.1, -0.2, 0.3][:latent_channels],
        latents_std=[0.5, 1.5, 2.0][:latent_channels],
    )
    return vae.eval()


def tiny_pipeline(scheduler: str = "FlowMatchEulerDiscreteScheduler", **replaced: object) -> TransfusionPipeline:
    tokenizer = tiny_tokenizer()
    parts = {
        "transformer": tiny_model(tokenizer.vocab_size).float(),
        "vae": tiny_vae(),
        "scheduler": make_scheduler(scheduler, {}),
        "tokenizer": tokenizer.hf,
        "image_size": IMAGE_SIZE,
        "max_prompt_tokens": 8,
        "num_inference_steps": 4,
        "guidance_scale": 2.0,
    }
    pipeline = TransfusionPipeline(**{**parts, **replaced})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def pipeline() -> TransfusionPipeline:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def snapshot(pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("snapshot")
    pipeline.save_pretrained(folder)
    return folder


def seeds(*values: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(value) for value in values]


def test_documents_with_too_many_rotary_positions_are_refused() -> None:
    pipeline = tiny_pipeline()
    architecture = pipeline.transformer.architecture
    side = IMAGE_SIZE // pipeline.codec.downsampling // architecture.modalities["image"].patch_size
    counter = PositionCounter(architecture.rope)
    counter.text(2 + len(pipeline.text_tokenizer.encode("sun")))
    counter.image(side, side)
    picture = pipeline("sun").images[0]
    architecture.max_position_embeddings = counter.position
    pipeline("sun")
    architecture.max_position_embeddings -= 1
    with pytest.raises(UserError, match=f"needs up to {counter.position} rotary positions"):
        pipeline("sun")
    with pytest.raises(UserError, match="rotary positions, but the model has"):
        pipeline.caption([picture, picture], max_new_tokens=counter.position)


def test_a_snapshot_paints_the_same_image(pipeline, snapshot):
    index = json.loads((snapshot / "model_index.json").read_text())
    assert index["transformer"] == ["transfusion_mot.models.transfusion", "TransfusionMoT"]
    assert index["max_prompt_tokens"] == 8
    loaded = TransfusionPipeline.from_pretrained(snapshot)
    for key in ("image_size", "max_prompt_tokens", "num_inference_steps", "guidance_scale"):
        assert loaded.config[key] == pipeline.config[key]
    before = pipeline("sun", generator=seeds(1), output_type="latent").images
    assert torch.equal(before, loaded("sun", generator=seeds(1), output_type="latent").images)
    picture = loaded("sun", generator=seeds(1)).images[0]
    assert picture.size == (IMAGE_SIZE, IMAGE_SIZE)
    assert np.asarray(picture).std() > 1


def test_bfloat16_paints_nearly_the_same(pipeline, snapshot):
    half = TransfusionPipeline.from_pretrained(snapshot, torch_dtype=torch.bfloat16)
    half.set_progress_bar_config(disable=True)
    assert half.transformer.dtype == half.vae.dtype == torch.bfloat16
    expected, painted = (p("sun", generator=seeds(1), output_type="np").images for p in (pipeline, half))
    assert np.abs(expected - painted).mean() < 0.05
    logits = [first_logits_of_a_caption(p, Image.new("RGB", (9, 9))) for p in (pipeline, half)]
    assert logits[0].std() > 0.3
    torch.testing.assert_close(logits[1].float(), logits[0], rtol=0, atol=0.1)


def first_logits_of_a_caption(pipeline: TransfusionPipeline, picture: Image.Image) -> torch.Tensor:
    seen = []
    handle = pipeline.transformer.modalities["text"].head.register_forward_hook(
        lambda _module, _inputs, out: seen.append(out)
    )
    pipeline.caption(picture, max_new_tokens=1)
    handle.remove()
    return seen[0].flatten()


@pytest.mark.parametrize("scheduler", ["FlowMatchEulerDiscreteScheduler", "DDPMScheduler"])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_the_same_seed_gives_the_same_image_whatever_the_batch_size(scheduler, guidance_scale):
    pipeline = tiny_pipeline(scheduler)
    prompts = ["sun", "an octopus", "a red apple", "", "sun"]
    settings = {"guidance_scale": guidance_scale, "output_type": "latent"}
    together = pipeline(prompts, generator=seeds(1, 2, 3, 4, 5), **settings).images
    alone = torch.cat(
        [
            pipeline(prompt, generator=generator, **settings).images
            for prompt, generator in zip(prompts, seeds(1, 2, 3, 4, 5), strict=True)
        ]
    )
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together[0], together[4], atol=0.1)


def test_an_empty_prompt_is_the_unconditional_image(pipeline):
    """Guidance 0 gives the same, with any prompt."""
    empty = pipeline("", guidance_scale=1.0, generator=seeds(1), output_type="latent").images
    unguided = pipeline("an octopus", guidance_scale=0.0, generator=seeds(1), output_type="latent").images
    torch.testing.assert_close(empty, unguided)
    assert not torch.allclose(
        empty, pipeline("an octopus", guidance_scale=1.0, generator=seeds(1), output_type="latent").images, atol=1e-2
    )


def test_output_types_show_the_same_pixels(pipeline):
    latents, pt, array, pil = (
        pipeline("sun", generator=seeds(1), output_type=kind).images for kind in ("latent", "pt", "np", "pil")
    )
    config = pipeline.vae.config
    raw = latents * torch.tensor(config.latents_std).view(-1, 1, 1) + torch.tensor(config.latents_mean).view(-1, 1, 1)
    with torch.no_grad():
        expected = pipeline.vae.decode(raw).sample.clamp(-1, 1) / 2 + 0.5
    torch.testing.assert_close(pt, expected)
    np.testing.assert_allclose(array, expected.permute(0, 2, 3, 1).numpy(), atol=1e-6)
    assert np.abs(np.asarray(pil[0]) / 255 - array[0]).max() < 0.5 / 255 + 1e-6
    assert isinstance(pipeline("sun", return_dict=False), tuple)


def test_images_of_a_prompt_stand_together(pipeline):
    images = pipeline(
        ["sun", "an octopus"], num_images_per_prompt=2, generator=seeds(1, 2, 3, 4), output_type="latent"
    ).images
    third = pipeline("an octopus", generator=seeds(3), output_type="latent").images
    torch.testing.assert_close(images[2:3], third, rtol=1e-4, atol=1e-4)


def test_latents_are_the_initial_noise(pipeline):
    noise = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    given = pipeline("sun", latents=noise, output_type="latent").images
    assert torch.equal(given, pipeline("sun", generator=seeds(1), output_type="latent").images)


def test_a_call_runs_where_diffusers_says():
    """In the memory of a device that is not there, and where a hook brings the weights to it."""
    pipeline = tiny_pipeline()
    theirs = DiffusionPipeline._execution_device.fget
    assert pipeline._execution_device == theirs(pipeline) == torch.device("cpu")
    pipeline.transformer._hf_hook = SimpleNamespace(execution_device="cuda:1")
    assert pipeline._execution_device == theirs(pipeline) == torch.device("cuda:1")
    del pipeline.transformer._hf_hook
    with FakeTensorMode():
        for module in pipeline.transformer.modules():
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, torch.nn.Parameter(torch.empty(parameter.shape, device="cuda:2")))
    assert pipeline._execution_device == theirs(pipeline) == torch.device("cuda:2")


def test_an_error_frees_the_cache(pipeline):
    def stop(*_):
        raise KeyboardInterrupt

    pipeline("sun", output_type="latent")
    assert pipeline.workspace._cache is not None
    with pytest.raises(KeyboardInterrupt):
        pipeline("sun", callback_on_step_end=stop)
    assert pipeline.workspace._cache is None
    pipeline("sun", output_type="latent")


def test_the_callback_sees_every_step_and_can_replace_latents(pipeline):
    seen = []

    def record(pipe, step, timestep, tensors):
        seen.append((pipe, step, float(timestep)))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 3 else {}

    images = pipeline("sun", callback_on_step_end=record, output_type="latent").images
    assert seen == [(pipeline, step, float(t)) for step, t in enumerate(pipeline.scheduler.timesteps)]
    assert len(seen) == 4
    assert not images.any()


def test_the_progress_bar_ends_full_with_a_second_order_scheduler(capsys):
    pipeline = tiny_pipeline()
    pipeline.scheduler = make_sampling_scheduler(pipeline.scheduler, "FlowMatchHeunDiscreteScheduler")
    pipeline.set_progress_bar_config(disable=False)
    pipeline("sun")
    assert "7/7" in capsys.readouterr().err


@pytest.fixture(scope="module")
def fine_image(pipeline):
    return pipeline("sun", num_inference_steps=100, generator=seeds(1), output_type="latent").images


@pytest.mark.parametrize("name", FLOW_SCHEDULERS)
def test_every_fitting_scheduler_paints_the_same_image(name, fine_image):
    pipeline = tiny_pipeline()
    pipeline.scheduler = make_sampling_scheduler(pipeline.scheduler, name)
    image = pipeline("sun", num_inference_steps=40, generator=seeds(1), output_type="latent").images
    assert (image - fine_image).abs().mean() < 0.1 * fine_image.abs().mean()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1", "CMYK", "I;16"])
def test_pictures_of_any_mode_and_size_are_captioned(pipeline, mode):
    pictures = [Image.new("RGB", size, colour).convert(mode) for size, colour in (((37, 21), "red"), ((8, 8), "white"))]
    arrays = [Image.fromarray(load_image(picture, IMAGE_SIZE)) for picture in pictures]
    captions = pipeline.caption(pictures, max_new_tokens=4)
    assert captions == pipeline.caption(arrays, max_new_tokens=4)
    assert all(captions)


def test_captions_depend_on_the_picture_and_the_generator(pipeline):
    gradient = np.linspace(0, 255, 8 * 8 * 3).reshape(8, 8, 3).astype(np.uint8)
    pictures = [Image.fromarray(gradient), Image.fromarray(255 - gradient)]
    first, second = pipeline.caption(pictures)
    assert first != second
    assert pipeline.caption(pictures[0]) == [first]
    settings = {"temperature": 1.0, "max_new_tokens": 8}
    drawn = pipeline.caption(pictures, **settings, generator=seeds(1, 2))
    assert drawn[1:] == pipeline.caption(pictures[1], **settings, generator=seeds(2))


def test_text_is_continued(pipeline):
    both = pipeline.complete(["a red", "sun"], max_new_tokens=4)
    assert pipeline.complete("a red", max_new_tokens=4) == both[:1]
    assert both[0] != both[1]
    assert all(both)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p([]), "no prompt"),
        (lambda p: p([3]), "must be text, got int"),
        (lambda p: p("octopus " * 9), r"has \d+ tokens; the model was trained on at most 8"),
        (lambda p: p("sun", num_inference_steps=0), "num_inference_steps is 0"),
        (lambda p: p("sun", num_inference_steps=1001), "from 1 to 1000"),
        (lambda p: p("sun", num_inference_steps=2.5), "num_inference_steps is 2.5; it must be a whole number"),
        (lambda p: p("sun", negative_prompt=["a", "b"]), "2 negative prompts for 1 prompts"),
        (lambda p: p("sun", negative_prompt="octopus " * 9), r"has \d+ tokens; the model was trained on at most 8"),
        (lambda p: p("sun", guidance_interval=(0.5, 0.1)), "guidance_interval is"),
        (lambda p: p("sun", guidance_rescale=2.0), "guidance_rescale is 2.0"),
        (lambda p: p("sun", guidance_scale=float("nan")), "guidance_scale is nan"),
        (lambda p: p("sun", guidance_scale=float("inf")), "guidance_scale is inf"),
        (lambda p: p("sun", num_images_per_prompt=0), "num_images_per_prompt is 0"),
        (lambda p: p("sun", generator=seeds(1, 2)), "2 generators for 1"),
        (lambda p: p("sun", latents=torch.zeros(1, 3, 8, 8)), r"must have \[1, 3, 4, 4\]"),
        (lambda p: p("sun", output_type="jpg"), "known: pil, np, pt, latent"),
        (lambda p: p.caption([]), "no image"),
        (lambda p: p.caption(Image.new("RGB", (8, 8)), top_p=0), "top_p is 0"),
        (lambda p: p.caption(Image.new("RGB", (8, 8)), ["a", "b"]), "2 prompts for 1 images"),
        (lambda p: p.complete([]), "no prompt"),
        (lambda p: p.complete("octopus " * 9), r"has \d+ tokens"),
        (lambda p: p.interleave("sun"), "must be a list of texts and images, got str"),
        (lambda p: p.interleave([3]), "texts and PIL images, got int"),
        (lambda p: p.interleave(["sun"], max_images=-1), "max_images is -1"),
        (lambda p: p.interleave(["sun"], guidance_scale=float("nan")), "guidance_scale is nan"),
        (lambda p: p.interleave(["octopus " * 9]), r"has \d+ tokens"),
        (lambda p: p.interleave(["sun"] * 40), r"the document has \d+ tokens in all; .* at most 8: shorten it"),
        (lambda p: p.interleave([Image.new("RGB", (8, 8))] * 6), "the document has 10 tokens in all"),
    ],
)
def test_mistakes_in_a_call_are_named(pipeline, call, message):
    with pytest.raises(UserError, match=message):
        call(pipeline)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda p: p(None), "prompt is None; give one, or a list of them"),
        (lambda p: p("sun", generator=5), "generator is 5; give a torch.Generator, such as"),
        (lambda p: p(["sun"] * 2, generator=[torch.Generator(), 5]), "generator is 5; give a torch.Generator"),
        (lambda p: p("sun", num_images_per_prompt=1.5), "num_images_per_prompt is 1.5; it must be a whole number"),
        (lambda p: p("sun", num_images_per_prompt=0), "num_images_per_prompt is 0; it must be at least 1"),
        (lambda p: p("sun", image=Image.new("RGB", (16, 16)), strength="0.5"), "strength is 0.5; it must be above 0"),
        (lambda p: p("sun", image=Image.new("RGB", (0, 5))), "has 0 x 5 pixels; it needs at least one"),
        (lambda p: p("sun", image=NOTHING, mask_image=NOTHING), "has 0 x 0 pixels; it needs at least one"),
        (lambda p: p.caption(Image.new("RGB", (5, 0))), "has 5 x 0 pixels; it needs at least one"),
        (lambda p: p.caption(np.zeros((0, 5, 3))), "images has the shape [0, 5, 3]; it must be [H, W, C]"),
        (lambda p: p.caption(torch.zeros(1, 3, 5, 0)), "images has the shape [1, 3, 5, 0]; it must be [C, H, W]"),
        (lambda p: p.interleave(["sun", NOTHING]), "has 0 x 0 pixels; it needs at least one"),
        (lambda p: p.generate([["sun", NOTHING]], "text"), "has 0 x 0 pixels; it needs at least one"),
        (lambda p: p.caption(Image.new("RGB", (16, 16)), max_new_tokens=1.5), "max_new_tokens is 1.5; it must be a"),
        (lambda p: p.caption(Image.new("RGB", (16, 16)), prompt=3), "prompt is 3; give one, or a list of them"),
        (lambda p: p.complete(None), "text is None; give one, or a list of them"),
        (lambda p: p.interleave(["sun"], max_images=None), "max_images is None; it must be a whole number"),
        (lambda p: p.interleave(["sun"], max_images=-1), "max_images is -1; it must be at least 0"),
        (lambda p: p.interleave(["sun"], generator=[torch.Generator()]), "1 generators for one document"),
        (lambda p: p.interleave(["sun"], generator=0), "generator is 0; give a torch.Generator"),
    ],
)
def test_arguments_of_a_wrong_type_are_refused(pipeline, call, told):
    with pytest.raises(UserError, match=re.escape(told)):
        call(pipeline)


def test_parts_that_do_not_belong_together_are_refused():
    with pytest.raises(UserError, match="vae has 2 latent channels, but the transformer was trained on 3"):
        tiny_pipeline(vae=tiny_vae(latent_channels=2))
    with pytest.raises(UserError, match=r"tokenizer has \d+ ids, but the transformer was trained with"):
        tiny_pipeline(tokenizer=train_tokenizer(["ab"], 262, ("text", "image")).hf)
    with pytest.raises(UserError, match="image_size is 10; it must be a multiple of 4"):
        tiny_pipeline(image_size=10)


def test_a_run_folder_stands_for_its_newest_snapshot(pipeline, snapshot, tmp_path):
    for step, steps in (("0000009", 1), ("0000010", 2)):
        copied = tmp_path / "run" / "snapshots" / f"step-{step}"
        shutil.copytree(snapshot, copied)
        index = json.loads((copied / "model_index.json").read_text())
        (copied / "model_index.json").write_text(json.dumps(index | {"num_inference_steps": steps}))
    loaded = TransfusionPipeline.from_pretrained(tmp_path / "run")
    assert loaded.config.num_inference_steps == 2
    assert str(loaded.name_or_path).endswith("run/snapshots/step-0000010")


def test_a_folder_that_is_no_snapshot_is_refused_in_one_sentence(pipeline, tmp_path):
    def refusal() -> str:
        with pytest.raises(UserError) as caught:
            TransfusionPipeline.from_pretrained(tmp_path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "holds no snapshot (neither model_index.json nor snapshots/step-N)" in refusal()
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "DiTPipeline"}))
    assert "holds a DiTPipeline; give a snapshot of a TransfusionPipeline" in refusal()
    (tmp_path / "model_index.json").write_text("{")
    assert "no pipeline can be loaded" in refusal()
    pipeline.save_pretrained(tmp_path)
    weights = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert "no pipeline can be loaded" in refusal()
    weights.unlink()
    assert "no pipeline can be loaded" in refusal()
    weights.write_bytes(whole)
    config = tmp_path / "transformer" / "config.json"
    sizes = config.read_text()
    config.write_text("")
    assert "no pipeline can be loaded" in refusal()
    config.write_text(sizes)
    tiny_vae(latent_channels=2).save_pretrained(tmp_path / "vae")
    assert "2 latent channels" in refusal()


def test_a_name_that_is_neither_folder_nor_on_the_hub_is_refused(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="no pipeline can be loaded from nobody/nothing"):
        TransfusionPipeline.from_pretrained("nobody/nothing")


@pytest.mark.parametrize("kind", [str, Path])
def test_a_missing_folder_is_refused(pipeline, tmp_path, kind):
    missing = kind(tmp_path / "a" / "b")
    told = f"'{tmp_path}/a/b' does not exist; there is '{tmp_path}', but no 'a/b' in it"
    for load, what in ((TransfusionPipeline.from_pretrained, "snapshot"), (pipeline.load_lora_weights, "adapter")):
        with pytest.raises(UserError, match=re.escape(f"{what} {told}")):
            load(missing)


@pytest.mark.parametrize("given", [None, 3, b"a", ["a"], {}, ""])
def test_what_is_no_path_is_refused(pipeline, given):
    shown = "empty" if given == "" else repr(given)
    for load, what in ((TransfusionPipeline.from_pretrained, "snapshot"), (pipeline.load_lora_weights, "adapter")):
        with pytest.raises(UserError, match=re.escape(f"{what} is {shown}; give a folder or a name on the")):
            load(given)
    if given != "":
        with pytest.raises(UserError, match=re.escape(f"save_directory is {shown}; give a folder")):
            pipeline.save_pretrained(given)


@pytest.mark.parametrize(
    "scheduler_class", [DPMSolverMultistepScheduler, UniPCMultistepScheduler, FlowMatchHeunDiscreteScheduler]
)
def test_the_idiom_of_diffusers_paints_the_same_image(scheduler_class, fine_image):
    pipeline = tiny_pipeline()
    pipeline.scheduler = scheduler_class.from_config(pipeline.scheduler.config)
    image = pipeline("sun", num_inference_steps=40, generator=seeds(1), output_type="latent").images
    assert (image - fine_image).abs().mean() < 0.1 * fine_image.abs().mean()


def test_a_scheduler_that_does_not_fit_is_refused_and_the_old_one_stays(pipeline):
    before = pipeline.scheduler
    with pytest.raises(UserError, match="'EulerDiscreteScheduler' does not fit a model trained with flow"):
        pipeline.scheduler = EulerDiscreteScheduler.from_config(before.config)
    assert pipeline.scheduler is before
    assert pipeline.config["scheduler"] == ("diffusers", "FlowMatchEulerDiscreteScheduler")


@pytest.mark.parametrize("older", [False, True])
def test_a_snapshot_knows_what_it_was_trained_for(older, tmp_path):
    """Also if it samples with another class, and one from before this was saved by its scheduler."""
    parts = {
        **tiny_pipeline().components,
        "scheduler": make_scheduler("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    }
    pipeline = TransfusionPipeline(**parts, image_size=IMAGE_SIZE)
    pipeline.scheduler = make_sampling_scheduler(pipeline.scheduler, "UniPCMultistepScheduler")
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    trained_for = {"prediction_type": "flow", "num_train_timesteps": 1000, "shift": 3.0}
    assert index["trained_for"] == trained_for
    if older:
        del index["trained_for"]
        (tmp_path / "model_index.json").write_text(json.dumps(index))
    for given in (
        {},
        {"scheduler": DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, flow_shift=3.0)},
    ):
        loaded = TransfusionPipeline.from_pretrained(tmp_path, **given)
        assert loaded.config["trained_for"] == trained_for
        assert loaded.scheduler.config.use_flow_sigmas
        assert loaded.scheduler.config.flow_shift == 3.0
    with pytest.raises(UserError, match="'DDIMScheduler' does not fit"):
        TransfusionPipeline.from_pretrained(tmp_path, scheduler=DDIMScheduler())


def test_other_scheduler_objects_are_taken_over_by_assignment(pipeline):
    """As in every diffusers pipeline: `pipeline.scheduler = ...`."""
    other = tiny_pipeline("DDPMScheduler")
    other.scheduler = make_sampling_scheduler(other.scheduler, "DDIMScheduler")
    assert isinstance(other.scheduler, DDIMScheduler)
    assert other.config["scheduler"] == ("diffusers", "DDIMScheduler")
    assert other("sun", output_type="latent", generator=seeds(1)).images.isfinite().all()
