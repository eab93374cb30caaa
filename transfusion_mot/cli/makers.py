"""Makers of the results of sample.py: pictures, captions, texts, and documents of text and pictures."""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

from PIL import Image

from transfusion_mot.cli.items import Item, Maker
from transfusion_mot.cli.outputs import Denoising, ResultFolder, save_png
from transfusion_mot.data.audio import decode_audio
from transfusion_mot.data.images import displayed_size, load_image
from transfusion_mot.errors import UserError
from transfusion_mot.pipeline import TransfusionPipeline
from transfusion_mot.schedulers import make_sampling_scheduler, sampler_name

# Painting settings that are arguments of a pipeline call.
DRAWING = ("num_inference_steps", "guidance_scale", "code_temperature", "code_top_p", "code_top_k")


def painter(pipeline: TransfusionPipeline, arguments: argparse.Namespace) -> tuple[Maker, dict[str, Any]]:
    """A maker that paints prompts or edits a picture by instruction, and its settings."""
    if arguments.edit:
        pipeline.check_can_edit()
    if (arguments.strip or arguments.gif) and pipeline.codec.kind == "codes":
        raise UserError("--strip and --gif show denoising, but this model writes its pictures as codes; leave them out")
    settings = painting_settings(pipeline, arguments)
    how = {
        "guidance_interval": tuple(arguments.guidance_interval),
        "guidance_rescale": arguments.guidance_rescale,
        "guidance_renorm": arguments.guidance_renorm,
        "negative_prompt": arguments.negative_prompt,
    }
    settings |= {key: value for key, value in how.items() if value not in (None, False, 0.0, (0.0, 1.0))}
    how |= {name: settings[name] for name in DRAWING if name in settings}
    editing: dict[str, Any] = {}
    given = arguments.edit or arguments.image
    pictures = [open_picture(given)] if given else []
    settings |= image_size(pipeline, arguments, pictures)
    make: Callable[..., Any] = pipeline
    if arguments.edit:
        make = partial(pipeline.edit, pictures[0], image_guidance_scale=arguments.image_guidance_scale)
        settings |= {"edit": arguments.edit, "image_guidance_scale": arguments.image_guidance_scale}
    if arguments.image:
        editing = {"image": pictures[0], "strength": arguments.strength}
        settings |= {"image": arguments.image, "strength": arguments.strength}
    if arguments.mask:
        editing["mask_image"] = open_picture(arguments.mask)
        settings["mask"] = arguments.mask

    def paint(items: list[Item], folder: ResultFolder | None) -> list[dict[str, Any]]:
        assert folder is not None
        denoising = Denoising() if arguments.strip or arguments.gif else None
        images = make(
            [decode_audio(item.prompt) if arguments.speech else item.prompt for item in items],
            generator=[item.generator() for item in items],
            callback_on_step_end=denoising,
            height=arguments.height,
            width=arguments.width,
            **how,
            **editing,
        ).images
        folder.make()
        lines = []
        for item, image in zip(items, images, strict=True):
            details = {"image_seed": item.seed, **settings}
            save_png(image, folder.path / f"{item.name}.png", {"prompt": item.prompt, **details})
            key = "audio" if arguments.speech else "text"
            lines.append({"file_name": f"{item.name}.png", key: item.prompt, **details})
        if denoising is not None:
            paths = [folder.path / "denoising" / item.name for item in items]
            denoising.save(pipeline, images, paths, arguments.strip, arguments.gif)
        return lines

    return paint, settings


def painting_settings(pipeline: TransfusionPipeline, arguments: argparse.Namespace) -> dict[str, Any]:
    """Set the requested scheduler and return the painting settings, which each result records.

    Raises:
        UserError: A value is out of range, the scheduler does not fit, or the model has no reverse steps.
    """
    asked = (arguments.num_inference_steps, arguments.guidance_scale)
    steps, scale = pipeline.sampling_settings(pipeline.image_modality, *asked)
    settings: dict[str, Any] = {"seed": arguments.seed, "guidance_scale": scale}
    if pipeline.codec.kind == "codes":
        for name in ("num_inference_steps", "scheduler"):
            if getattr(arguments, name) is not None:
                option = name.replace("_", "-")
                raise UserError(f"--{option} is given, but this model writes its pictures as codes; leave it out")
        settings |= {name: getattr(arguments, name) for name in ("code_temperature", "code_top_p", "code_top_k")}
    else:
        for name, default in {"code_temperature": 1.0, "code_top_p": 1.0, "code_top_k": 0}.items():
            if getattr(arguments, name) != default:
                option = name.replace("_", "-")
                raise UserError(f"--{option} is given, and this model paints by diffusion, without codes; leave it out")
        name = arguments.scheduler or sampler_name(pipeline.scheduler)
        if arguments.scheduler is not None:
            pipeline.scheduler = make_sampling_scheduler(pipeline.scheduler, name)
        settings |= {"num_inference_steps": steps, "scheduler": name}
    return settings | snapshot_settings(pipeline)


def snapshot_settings(pipeline: TransfusionPipeline) -> dict[str, str]:
    """The model that makes the results, and its number format."""
    dtype = str(pipeline.transformer.dtype).removeprefix("torch.")
    return {"dtype": dtype, "checkpoint": str(pipeline.name_or_path)}


def image_size(
    pipeline: TransfusionPipeline, arguments: argparse.Namespace, pictures: list[Image.Image]
) -> dict[str, int]:
    """Height and width of the requested images, checked before painting.

    Raises:
        UserError: They cannot be painted.
    """
    pipeline.sizes.painted(arguments.height, arguments.width, pictures)
    given = {"height": arguments.height, "width": arguments.width}
    return {side: pixels for side, pixels in given.items() if pixels is not None}


def captioner(pipeline: TransfusionPipeline, arguments: argparse.Namespace) -> tuple[Maker, dict[str, Any]]:
    """A maker that captions image files, and its settings."""
    settings = writing_settings(arguments)

    def caption(items: list[Item], folder: ResultFolder | None) -> list[dict[str, Any]]:
        captions = pipeline.caption(
            [Image.fromarray(pipeline.sizes.read(item.prompt)) for item in items],
            generator=[item.generator() for item in items],
            **settings,
        )
        return [{"file_name": item.prompt, "text": text} for item, text in zip(items, captions, strict=True)]

    return caption, settings


def writer(pipeline: TransfusionPipeline, arguments: argparse.Namespace) -> tuple[Maker, dict[str, Any]]:
    """A maker that continues texts, and its settings."""
    settings = writing_settings(arguments)

    def write(items: list[Item], folder: ResultFolder | None) -> list[dict[str, Any]]:
        texts = pipeline.complete(
            [item.prompt for item in items], generator=[item.generator() for item in items], **settings
        )
        return [{"prompt": item.prompt, "text": text} for item, text in zip(items, texts, strict=True)]

    return write, settings


def document_writer(pipeline: TransfusionPipeline, arguments: argparse.Namespace) -> tuple[Maker, dict[str, Any]]:
    """A maker that continues a document with texts and pictures, as the model decides, and its settings."""
    painting = painting_settings(pipeline, arguments)
    settings = writing_settings(arguments) | {
        **{name: painting[name] for name in DRAWING if name in painting},
        "max_images": arguments.max_images,
    }
    before = [open_picture(arguments.image)] if arguments.image else []
    settings |= image_size(pipeline, arguments, before)

    def tell(items: list[Item], folder: ResultFolder | None) -> list[dict[str, Any]]:
        assert folder is not None
        lines = []
        for item in items:
            segments = pipeline.interleave([*before, item.prompt], generator=item.generator(), **settings)
            folder.make()
            told: list[dict[str, str]] = []
            for number, segment in enumerate(segments):
                if isinstance(segment, str):
                    told.append({"text": segment})
                else:
                    told.append({"file_name": f"{item.name}-{number}.png"})
                    details = {"prompt": item.prompt, "seed": item.seed, **settings}
                    save_png(segment, folder.path / told[-1]["file_name"], details)
            lines.append({"prompt": item.prompt, "seed": item.seed, "segments": told})
        return lines

    return tell, {**painting, **settings, "image": arguments.image}


def writing_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Settings of writing texts."""
    return {name: getattr(arguments, name) for name in ("max_new_tokens", "temperature", "top_p", "top_k")}


def open_picture(path: str) -> Image.Image:
    """A picture in its own size.

    Raises:
        UserError: The file is not a picture.
    """
    return Image.fromarray(load_image(path, displayed_size(path)))
