"""Paint prompts, or caption images, with a trained model.

    python sample.py --checkpoint runs/emoji "a red apple" "an octopus"
    python sample.py --checkpoint runs/emoji --prompts-file prompts.txt --num-images 4 --output samples/all
    python sample.py --checkpoint runs/emoji --caption photo.jpg drawing.png

Pictures are written as PNG files, with grid.png, which shows the first of them side by side, and metadata.jsonl, which
makes the folder an image folder as Hugging Face datasets and evaluate/clip_score.py read it.

Every picture has a seed of its own, made from --seed, its prompt and its number among the pictures of that prompt: it
stays the same whatever other prompts there are, in whatever order, and whatever --batch-size is. It is written down as
image_seed, and TransfusionPipeline.from_pretrained(SNAPSHOT)(PROMPT,
generator=torch.Generator().manual_seed(IMAGE_SEED)) paints the picture again.
"""

import argparse
import hashlib
import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from transfusion_mot.data.images import grid, load_image
from transfusion_mot.diffusion import make_sampling_scheduler
from transfusion_mot.errors import UserError, exit_on_user_error
from transfusion_mot.pipeline import TransfusionPipeline
from transfusion_mot.training.checkpoint import find_snapshot

GRID_IMAGES = 64
GRID_COLUMNS = 8
SLUG_LENGTH = 48


@dataclass(frozen=True)
class Picture:
    """One picture to paint: its prompt, the seed of its own, and the name of its file."""

    prompt: str
    image_seed: int
    file_name: str


class OneLineParser(argparse.ArgumentParser):
    """A parser that says in one sentence what is wrong."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists the options")


def parse_arguments() -> argparse.Namespace:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="what to paint")
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="FOLDER",
        help="a run folder of train.py (its newest snapshot is used), or a snapshot",
    )
    parser.add_argument("--output", metavar="FOLDER", help="a new or empty folder for the results (default: samples)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: a GPU if there is one)")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="images at a time (default: 16)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="same seed, same results (default: 0)")
    paint = parser.add_argument_group("painting")
    paint.add_argument(
        "--prompts-file", metavar="FILE", help="text file with a prompt on each line; empty lines are skipped"
    )
    paint.add_argument("--num-images", type=int, default=1, metavar="N", help="pictures of each prompt (default: 1)")
    paint.add_argument(
        "--num-inference-steps", type=int, metavar="N", help="reverse steps (default: what the checkpoint says)"
    )
    paint.add_argument(
        "--guidance-scale",
        type=float,
        metavar="X",
        help="how strongly to follow the prompt; 1 is off and takes half the time (default: what the checkpoint says)",
    )
    paint.add_argument(
        "--scheduler", metavar="NAME", help="diffusers scheduler to sample with (default: that of the checkpoint)"
    )
    caption = parser.add_argument_group("captioning")
    caption.add_argument("--caption", nargs="+", default=[], metavar="IMAGE", help="image files to caption")
    caption.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="longest caption (default: 64)")
    caption.add_argument(
        "--temperature", type=float, default=0.0, metavar="X", help="0 takes the most probable words (default: 0)"
    )
    caption.add_argument(
        "--top-p", type=float, default=1.0, metavar="X", help="share of the probability to draw from (default: 1)"
    )
    return parser.parse_intermixed_args()


def read_prompts(arguments: argparse.Namespace) -> list[str]:
    """Prompts of the command line, then those of the file.

    Raises:
        UserError: A prompt is empty, the file cannot be read, or there are none at all.
    """
    prompts = [prompt.strip() for prompt in arguments.prompts]
    if "" in prompts:
        raise UserError(f"prompt {prompts.index('') + 1} is empty; say what to paint")
    if arguments.prompts_file is not None:
        try:
            lines = Path(arguments.prompts_file).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"prompts file '{arguments.prompts_file}' cannot be read as UTF-8 text: {error}") from None
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(
            "there is nothing to do; give a prompt, --prompts-file with at least one line, or --caption IMAGE"
        )
    return prompts


def derived_seed(seed: int, name: str, number: int) -> int:
    """Seed of the result `number` of `name`; 32 bits are all that torch's CPU generator uses."""
    return int.from_bytes(hashlib.sha256(f"{seed}\n{number}\n{name}".encode()).digest()[:4])


def plan_pictures(prompts: list[str], num_images: int, seed: int) -> list[Picture]:
    """Every picture to paint, those of a prompt together; a prompt given twice goes on counting."""
    counts: Counter[str] = Counter()
    digits = max(4, len(str(len(prompts) * num_images - 1)))
    pictures: list[Picture] = []
    for prompt in prompts:
        slug = re.sub(r"[\W_]+", "-", prompt.lower()).strip("-")[:SLUG_LENGTH].strip("-") or "image"
        for _ in range(num_images):
            image_seed = derived_seed(seed, prompt, counts[prompt])
            pictures.append(Picture(prompt, image_seed, f"{len(pictures):0{digits}d}-{slug}.png"))
            counts[prompt] += 1
    return pictures


def new_folder(path: str) -> Path:
    """Create the folder.

    Raises:
        UserError: It holds something, which would end up among the results.
    """
    folder = Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"output '{path}' is there and is not an empty folder; give another --output, or remove it")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output folder '{path}' cannot be made: {error}") from None
    return folder


def paint(pipeline: TransfusionPipeline, prompts: list[str], arguments: argparse.Namespace) -> None:
    """Paint all prompts; the folder is in order after every batch."""
    pipeline.check_prompts(prompts)
    if arguments.num_images < 1:
        raise UserError(f"--num-images is {arguments.num_images}; it must be at least 1")
    if arguments.scheduler is not None:
        pipeline.scheduler = make_sampling_scheduler(pipeline.scheduler, arguments.scheduler)
    steps, scale = pipeline.sampling_settings(arguments.num_inference_steps, arguments.guidance_scale)
    settings = {
        "seed": arguments.seed,
        "num_inference_steps": steps,
        "guidance_scale": scale,
        "scheduler": type(pipeline.scheduler).__name__,
        "checkpoint": str(pipeline.name_or_path),
    }
    pictures = plan_pictures(prompts, arguments.num_images, arguments.seed)
    folder = new_folder(arguments.output or "samples")
    metadata = folder / "metadata.jsonl"
    shown: list[Image.Image] = []
    with tqdm(total=len(pictures), desc="painting", unit="image") as bar, metadata.open("w", encoding="utf-8") as file:
        for batch in batches(pictures, arguments.batch_size):
            images = pipeline(
                [picture.prompt for picture in batch],
                num_inference_steps=steps,
                guidance_scale=scale,
                generator=[torch.Generator().manual_seed(picture.image_seed) for picture in batch],
            ).images
            for picture, image in zip(batch, images, strict=True):
                details = {"image_seed": picture.image_seed, **settings}
                save_png(image, folder / picture.file_name, {"prompt": picture.prompt, **details})
                line = {"file_name": picture.file_name, "text": picture.prompt, **details}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            shown += images[: GRID_IMAGES - len(shown)]
            bar.update(len(batch))
    labels = [picture.prompt for picture in pictures[: len(shown)]]
    grid(shown, labels, columns=min(GRID_COLUMNS, len(shown))).save(folder / "grid.png")
    print(f"{len(pictures)} images and metadata.jsonl in {folder}; the first {len(shown)} in {folder / 'grid.png'}")


def save_png(image: Image.Image, path: Path, details: dict[str, Any]) -> None:
    """Write a picture with text chunks that say how it was made."""
    chunks = PngInfo()
    for key, value in details.items():
        chunks.add_text(key, str(value))
    image.save(path, pnginfo=chunks)


def caption(pipeline: TransfusionPipeline, arguments: argparse.Namespace) -> None:
    """Print a caption for each image file, and write captions.jsonl if there is an output folder."""
    paths: list[str] = arguments.caption
    # All before the first caption, so that a file that is no image is found at once.
    images = [Image.fromarray(load_image(path, pipeline.config.image_size)) for path in paths]
    folder = new_folder(arguments.output) if arguments.output else None
    lines: list[dict[str, str]] = []
    with tqdm(total=len(paths), desc="captioning", unit="image") as bar:
        for batch in batches(list(zip(paths, images, strict=True)), arguments.batch_size):
            captions = pipeline.caption(
                [image for _, image in batch],
                max_new_tokens=arguments.max_new_tokens,
                temperature=arguments.temperature,
                top_p=arguments.top_p,
                generator=[torch.Generator().manual_seed(derived_seed(arguments.seed, path, 0)) for path, _ in batch],
            )
            lines += [{"file_name": path, "text": text} for (path, _), text in zip(batch, captions, strict=True)]
            bar.update(len(batch))
    for line in lines:
        print(f"{line['file_name']}: {line['text']}")
    if folder is not None:
        path = folder / "captions.jsonl"
        path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
        print(f"{len(lines)} captions in {path}")


def batches(items: list[Any], size: int) -> list[list[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def load_pipeline(checkpoint: str, device: str | None) -> TransfusionPipeline:
    """The pipeline of a run or snapshot on the device, or on a GPU if none is named and there is one.

    Raises:
        UserError: There is no such snapshot or device.
    """
    pipeline = TransfusionPipeline.from_pretrained(find_snapshot(checkpoint))
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return pipeline.to(torch.device(chosen))
    # torch asserts where it was built without CUDA.
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device '{chosen}' cannot be used ({str(error).splitlines()[0]}); try --device cpu") from None


def main() -> None:
    arguments = parse_arguments()
    if arguments.batch_size < 1:
        raise UserError(f"--batch-size is {arguments.batch_size}; it must be at least 1")
    if arguments.caption and (arguments.prompts or arguments.prompts_file):
        raise UserError("both prompts and --caption are given; paint and caption in two commands")
    prompts = [] if arguments.caption else read_prompts(arguments)
    pipeline = load_pipeline(arguments.checkpoint, arguments.device)
    pipeline.set_progress_bar_config(desc="step", leave=False)
    if arguments.caption:
        caption(pipeline, arguments)
    else:
        paint(pipeline, prompts, arguments)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
