"""What sample.py does once its options are read: prompts to pictures, pictures to captions, texts and documents."""

import argparse
import hashlib
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from PIL import Image
from tqdm import tqdm

from transfusion_mot.cli.loading import load_pipeline
from transfusion_mot.cli.options import EDIT, PAINT, TASKS
from transfusion_mot.cli.outputs import Denoising, ResultFolder, save_png
from transfusion_mot.data.images import displayed_size, grid, load_image
from transfusion_mot.errors import UserError
from transfusion_mot.evaluation.prompts import derived_seed
from transfusion_mot.files import check_writable_folder, lines_of
from transfusion_mot.pipeline import TransfusionPipeline
from transfusion_mot.schedulers import make_sampling_scheduler, sampler_name

GRID_IMAGES = 64
GRID_COLUMNS = 8
SLUG_LENGTH = 48
# A process waits at the end for the slowest one.
TIMEOUT = timedelta(hours=24)


@dataclass(frozen=True)
class Item:
    """One result to make: its prompt, the seed of its own, and the beginning of the names of its files."""

    prompt: str
    seed: int
    name: str

    def generator(self) -> torch.Generator:
        """Its own randomness, on the CPU, so that every device draws the same."""
        return torch.Generator().manual_seed(self.seed)


def read_prompts(arguments: argparse.Namespace, state: PartialState) -> list[str]:
    """Prompts of the command line, then those of the file or of standard input.

    Raises:
        UserError: A prompt is empty, the file cannot be read, or there are none at all.
    """
    prompts = [prompt.strip() for prompt in arguments.prompts]
    if "" in prompts:
        raise UserError(f"prompt {prompts.index('') + 1} is empty; say what to paint")
    if arguments.prompts_file is not None:
        prompts += [line.strip() for line in _lines_of(arguments.prompts_file, state) if line.strip()]
    if not prompts:
        raise UserError(
            "there is nothing to do; give a prompt, --prompts-file with at least one line, or --caption IMAGE"
        )
    return prompts


def _lines_of(file: str, state: PartialState) -> list[str]:
    if file == "-" and state.num_processes > 1:
        raise UserError("several processes cannot share standard input; write the prompts into a file")
    try:
        content = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        return lines_of(content.decode("utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompts file '{file}' cannot be read as UTF-8 text: {error}") from None


def plan(prompts: list[str], num_images: int, seed: int, first: int = 0) -> list[Item]:
    """Everything to make, what belongs to a prompt together; a prompt given twice goes on counting.

    Args:
        prompts: What to make.
        num_images: Results of each.
        seed: Of all of them together.
        first: Number in the name of the first result.
    """
    counts: Counter[str] = Counter()
    digits = max(4, len(str(first + len(prompts) * num_images - 1)))
    items: list[Item] = []
    for prompt in prompts:
        slug = re.sub(r"[\W_]+", "-", prompt.lower()).strip("-")[:SLUG_LENGTH].strip("-") or "image"
        for _ in range(num_images):
            items.append(
                Item(prompt, derived_seed(seed, prompt, counts[prompt]), f"{first + len(items):0{digits}d}-{slug}")
            )
            counts[prompt] += 1
    return items


# Of the settings of painting, the arguments of a call of the pipeline.
DRAWING = ("num_inference_steps", "guidance_scale", "code_temperature", "code_top_p", "code_top_k")

# A maker turns some items into the lines that tell of them; files go into the folder.
Maker = Callable[[list[Item], ResultFolder | None], list[dict[str, Any]]]


def painter(pipeline: TransfusionPipeline, arguments: argparse.Namespace) -> tuple[Maker, dict[str, Any]]:
    """What paints prompts or edits a picture as they say, and the settings that it does it with."""
    if arguments.edit:
        pipeline.check_can_edit()
    if (arguments.strip or arguments.gif) and pipeline.codec.kind == "codes":
        raise UserError("--strip and --gif show denoising, and this model writes its pictures as codes; leave them out")
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
            [item.prompt for item in items],
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
            lines.append({"file_name": f"{item.name}.png", "text": item.prompt, **details})
        if denoising is not None:
            paths = [folder.path / "denoising" / item.name for item in items]
            denoising.save(pipeline, images, paths, arguments.strip, arguments.gif)
        return lines

    return paint, settings


def painting_settings(pipeline: TransfusionPipeline, arguments: argparse.Namespace) -> dict[str, Any]:
    """The scheduler asked for is put into the pipeline => what each result tells of how it was made.

    Raises:
        UserError: A value is out of its range, the scheduler does not fit, or the model has no reverse steps.
    """
    steps, scale = pipeline.sampling_settings(arguments.num_inference_steps, arguments.guidance_scale)
    settings: dict[str, Any] = {"seed": arguments.seed, "guidance_scale": scale}
    if pipeline.codec.kind == "codes":
        for name in ("num_inference_steps", "scheduler"):
            if getattr(arguments, name) is not None:
                option = name.replace("_", "-")
                raise UserError(f"--{option} is given, and this model writes its pictures as codes; leave it out")
        settings |= {name: getattr(arguments, name) for name in ("code_temperature", "code_top_p", "code_top_k")}
    else:
        name = arguments.scheduler or sampler_name(pipeline.scheduler)
        if arguments.scheduler is not None:
            pipeline.scheduler = make_sampling_scheduler(pipeline.scheduler, name)
        settings |= {"num_inference_steps": steps, "scheduler": name}
    dtype = str(pipeline.transformer.dtype).removeprefix("torch.")
    return settings | {"dtype": dtype, "checkpoint": str(pipeline.name_or_path)}


def image_size(
    pipeline: TransfusionPipeline, arguments: argparse.Namespace, pictures: list[Image.Image]
) -> dict[str, int]:
    """The sides of the images that are asked for, which are painted from pictures.

    Raises:
        UserError: They cannot be painted.
    """
    pipeline.sizes.painted(arguments.height, arguments.width, pictures)
    given = {"height": arguments.height, "width": arguments.width}
    return {side: pixels for side, pixels in given.items() if pixels is not None}


def captioner(pipeline: TransfusionPipeline, arguments: argparse.Namespace) -> tuple[Maker, dict[str, Any]]:
    """What captions image files, and the settings that it does it with."""
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
    """What goes on with texts, and the settings that it does it with."""
    settings = writing_settings(arguments)

    def write(items: list[Item], folder: ResultFolder | None) -> list[dict[str, Any]]:
        texts = pipeline.complete(
            [item.prompt for item in items], generator=[item.generator() for item in items], **settings
        )
        return [{"prompt": item.prompt, "text": text} for item, text in zip(items, texts, strict=True)]

    return write, settings


def teller(pipeline: TransfusionPipeline, arguments: argparse.Namespace) -> tuple[Maker, dict[str, Any]]:
    """What goes on with a document in words and pictures, as the model decides, and the settings of it."""
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
    """How texts are written."""
    return {name: getattr(arguments, name) for name in ("max_new_tokens", "temperature", "top_p", "top_k")}


def open_picture(path: str) -> Image.Image:
    """A picture in its own size.

    Raises:
        UserError: The file is no picture.
    """
    return Image.fromarray(load_image(path, displayed_size(path)))


MAKERS = dict(zip(TASKS, (painter, painter, captioner, writer, teller), strict=True))
RESULTS = dict(
    zip(TASKS, ("metadata.jsonl", "metadata.jsonl", "captions.jsonl", "texts.jsonl", "documents.jsonl"), strict=True)
)
VERBS = dict(zip(TASKS, ("painting", "editing", "captioning", "writing", "telling"), strict=True))


def sample(
    pipeline: TransfusionPipeline, prompts: list[str], arguments: argparse.Namespace, state: PartialState
) -> None:
    """Make everything that is asked for, together with the other processes."""
    task = arguments.task
    if task == "caption":
        # All before the first caption, so that a file that is no image is found at once.
        for path in prompts:
            displayed_size(path)
    else:
        pipeline.check_prompts(prompts)
    make, settings = MAKERS[task](pipeline, arguments)
    count = len(prompts) * arguments.num_images
    folder = None
    if arguments.output is not None:
        digest = hashlib.sha256("\n".join(prompts).encode()).hexdigest()
        command = {
            "task": task,
            "prompts": f"{len(prompts)} with SHA-256 {digest[:16]}",
            "checkpoint": str(pipeline.name_or_path),
            "dtype": str(pipeline.transformer.dtype).removeprefix("torch."),
            **{name: getattr(arguments, name) for name in ("num_images", "seed", "strip", "gif")},
            **settings,
        }
        folder = ResultFolder(arguments.output, command, RESULTS[task], count, state)
    items = plan(prompts, arguments.num_images, arguments.seed, 0 if folder is None else folder.first)
    missing = range(count) if folder is None else folder.missing()
    lines: list[dict[str, Any]] = []
    with tqdm(total=len(missing), desc=VERBS[task], disable=not state.is_main_process) as bar:
        for start in range(0, len(missing), arguments.batch_size):
            batch = missing[start : start + arguments.batch_size]
            made = make([items[index] for index in batch], folder)
            if folder is None:
                lines += made
            else:
                folder.add(dict(zip(batch, made, strict=True)))
            bar.update(len(batch))
    if folder is not None:
        folder.finish()
    if state.is_main_process:
        show(task, lines if folder is None else folder.read(), folder)


def show(task: str, lines: Iterable[dict[str, Any]], folder: ResultFolder | None) -> None:
    """Print what was written, and put the first pictures side by side."""
    count = 0
    shown: list[dict[str, Any]] = []
    for line in lines:
        count += 1
        if task in (PAINT, EDIT):
            shown += [line] if len(shown) < GRID_IMAGES else []
        elif task == "caption":
            print(f"{line['file_name']}: {line['text']}")
        elif task == "text":
            print(f"{line['prompt']}{line['text']}")
        else:
            print(
                "".join([line["prompt"], *(part.get("text") or f"[{part['file_name']}]" for part in line["segments"])])
            )
    if folder is None:
        return
    said = f"{count} results in {folder.results}"
    if task in (PAINT, EDIT):
        images = [Image.open(folder.path / line["file_name"]) for line in shown]
        sheet = grid(images, [line["text"] for line in shown], columns=min(GRID_COLUMNS, len(shown)))
        sheet.save(folder.path / "grid.png")
        said = (
            f"{count} images and metadata.jsonl in {folder.path}; the first {len(shown)} in {folder.path / 'grid.png'}"
        )
    print(said)


def run(arguments: argparse.Namespace) -> None:
    """What sample.py does, with the options that it was given."""
    cpu = arguments.device == "cpu" or parse_flag_from_env("ACCELERATE_USE_CPU")
    state = PartialState(cpu=cpu, timeout=TIMEOUT)
    prompts = arguments.caption or read_prompts(arguments, state)
    if arguments.device not in (None, "cpu") and state.num_processes > 1:
        raise UserError(f"--device {arguments.device} is one device for several processes; leave it out")
    if arguments.output is None and state.num_processes > 1:
        raise UserError("several processes need a folder to write into; give --output FOLDER")
    if arguments.output is not None:
        check_writable_folder(arguments.output, "output")
    pipeline = load_pipeline(
        arguments.checkpoint,
        arguments.device or state.device,
        arguments.dtype,
        lora=arguments.lora,
        lora_scale=arguments.lora_scale,
    )
    pipeline.set_progress_bar_config(desc="step", leave=False, disable=not state.is_main_process)
    sample(pipeline, prompts, arguments, state)
    state.destroy_process_group()
