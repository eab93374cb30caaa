"""Prompts of COCO, of GenEval or of a text file, and images with reference captions.

The choice of prompts depends only on a seed and on the data, not on the order of a file or on a random generator:
the images of COCO are ordered by sha256("{seed} {image id}") and the first N are taken, each with one of its captions.
A list has a hash, which stands beside every number; two runs with the same hash painted the same prompts with the same
noise.
"""

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from transfusion_mot.errors import UserError
from transfusion_mot.files import lines_of


@dataclass(frozen=True)
class Prompt:
    """An image to paint.

    Attributes:
        file_name: File of the image, relative to the folder of painted images.
        text: The prompt.
        image_seed: Seed of its noise.
        image: The real image of the text, if there is one.
        image_id: Name of that image in its data set.
    """

    file_name: str
    text: str
    image_seed: int
    image: Path | None = None
    image_id: str | None = None


@dataclass(frozen=True)
class CaptionedImage:
    """A real image with its captions.

    Attributes:
        image: Its file.
        captions: At least one caption.
        image_id: Name of the image in its data set.
    """

    image: Path
    captions: list[str]
    image_id: str


def derived_seed(seed: int, text: str, number: int) -> int:
    """Seed of result `number` of a text, independent of other results; torch's CPU generator uses only 32 bits."""
    return int.from_bytes(hashlib.sha256(f"{seed}\n{number}\n{text}".encode()).digest()[:4])


def list_hash(entries: Iterable[Sequence[Any]]) -> str:
    """Hash of a list of prompts or captioned images, independent of the folders of files."""
    digest = hashlib.sha256()
    for entry in entries:
        digest.update((json.dumps(list(entry), ensure_ascii=False) + "\n").encode())
    return f"sha256 {digest.hexdigest()[:12]}"


def prompts_hash(prompts: Sequence[Prompt]) -> str:
    """Hash of texts, seeds and their images, in order."""
    return list_hash((prompt.text, prompt.image_seed, prompt.image_id) for prompt in prompts)


def captioned_hash(images: Sequence[CaptionedImage]) -> str:
    """Hash of names and captions, in their order."""
    return list_hash((image.image_id, image.captions) for image in images)


def prompts_of(
    texts: Sequence[str], images_per_prompt: int, seed: int, of: Sequence[CaptionedImage] | None = None
) -> list[Prompt]:
    """One or several images to paint for each text; a repeated text continues the numbers of its results.

    Args:
        texts: The prompts.
        images_per_prompt: Images of each text.
        seed: Seed of all images.
        of: The real image of each text.
    """
    counts: defaultdict[str, int] = defaultdict(int)
    prompts: list[Prompt] = []
    for index, text in enumerate(texts):
        for _ in range(images_per_prompt):
            own = derived_seed(seed, text, counts[text])
            counts[text] += 1
            image, image_id = (of[index].image, of[index].image_id) if of is not None else (None, None)
            prompts.append(Prompt(f"{len(prompts):05d}.png", text, own, image, image_id))
    return prompts


def read_coco(annotations: str, images: str) -> list[CaptionedImage]:
    """Images of a captions file of COCO with their captions, in the order of their ids.

    Raises:
        UserError: A file is missing or has another form, or an image has no caption.
    """
    content = _read_json(Path(annotations))
    try:
        captions = defaultdict(list)
        for annotation in sorted(content["annotations"], key=lambda annotation: annotation["id"]):
            captions[annotation["image_id"]].append(annotation["caption"].strip())
        entries = sorted(content["images"], key=lambda entry: entry["id"])
        found = [
            CaptionedImage(Path(images) / entry["file_name"], captions[entry["id"]], str(entry["id"]))
            for entry in entries
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"'{annotations}' is not a captions file of COCO ({error} is missing or wrong); give "
            "annotations/captions_val2014.json"
        ) from None
    without = [image.image_id for image in found if not any(image.captions)]
    if without or not found:
        raise UserError(f"'{annotations}': {len(without)} of {len(found)} images have no caption, first {without[:1]}")
    return _all_there(found)


def choose_coco_prompts(
    images: Sequence[CaptionedImage], num_images: int | None, seed: int, images_per_prompt: int = 1
) -> list[Prompt]:
    """One caption of each of `num_images` distinct images (None: all), chosen as described at the top of this module.

    Raises:
        UserError: There are fewer images.
    """
    count = len(images) if num_images is None else num_images
    if count > len(images):
        raise UserError(f"{count} prompts of distinct images are requested, but there are only {len(images)} images")

    def draw(what: str) -> int:
        return int.from_bytes(hashlib.sha256(f"{seed} {what}".encode()).digest()[:8])

    chosen = sorted(images, key=lambda image: draw(image.image_id))[:count]
    texts = [image.captions[draw(f"{image.image_id} caption") % len(image.captions)] for image in chosen]
    return prompts_of(texts, images_per_prompt, seed, chosen)


def read_karpathy(path: str, images: str, split: str = "test") -> list[CaptionedImage]:
    """Images of a split of Karpathy's `dataset_coco.json`, with all their captions, in the order of their ids.

    Raises:
        UserError: The file is missing or has another form, or an image does not exist.
    """
    content = _read_json(Path(path))
    try:
        found = [
            CaptionedImage(
                Path(images) / entry["filepath"] / entry["filename"],
                [sentence["raw"].strip() for sentence in entry["sentences"]],
                str(entry["cocoid"]),
            )
            for entry in sorted(content["images"], key=lambda entry: entry["cocoid"])
            if entry["split"] == split
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"'{path}' is not a file of Karpathy's splits ({error} is missing or wrong); give dataset_coco.json"
        ) from None
    if not found:
        raise UserError(f"'{path}' has no images in the split '{split}'")
    return _all_there(found)


def read_text_prompts(path: str) -> list[str]:
    """Prompts of a text file, one on each line; empty lines are skipped.

    Raises:
        UserError: The file cannot be read or holds none.
    """
    texts = [line.strip() for line in lines_of(_read(Path(path))) if line.strip()]
    if not texts:
        raise UserError(f"'{path}' holds no prompts; write one on each line")
    return texts


def read_geneval(path: str) -> list[dict[str, Any]]:
    """The lines of GenEval's `evaluation_metadata.jsonl`; each has a `prompt`.

    Raises:
        UserError: The file cannot be read or a line is not of that form.
    """
    lines = []
    for number, line in enumerate(lines_of(_read(Path(path))), start=1):
        try:
            entry = json.loads(line)
            entry["prompt"].strip()
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(
                f"'{path}', line {number}: not a JSON object with a 'prompt'; give GenEval's evaluation_metadata.jsonl"
            ) from None
        lines.append(entry)
    if not lines:
        raise UserError(f"'{path}' holds no prompts")
    return lines


def geneval_prompts(lines: Sequence[dict[str, Any]], images_per_prompt: int, seed: int) -> list[Prompt]:
    """Images to paint, named for GenEval's evaluation: `00012/samples/00003.png`."""
    prompts = prompts_of([line["prompt"] for line in lines], images_per_prompt, seed)
    return [
        replace(prompt, file_name=f"{index // images_per_prompt:05d}/samples/{index % images_per_prompt:05d}.png")
        for index, prompt in enumerate(prompts)
    ]


def dpg_prompts(folder: str, num_prompts: int | None, images_per_prompt: int, seed: int) -> list[Prompt]:
    """Images to paint of DPG-Bench (arXiv 2403.05135), whose prompts are text files: `NAME/0.png`, by name.

    Raises:
        UserError: The folder holds no text files, or one cannot be read.
    """
    files = sorted(Path(folder).glob("*.txt"))[:num_prompts]
    if not files:
        raise UserError(f"'{folder}' holds no .txt files; give dpg_bench/prompts of github.com/TencentQQGYLab/ELLA")
    prompts = prompts_of([_read(file).strip() for file in files], images_per_prompt, seed)
    return [
        replace(prompt, file_name=f"{files[place // images_per_prompt].stem}/{place % images_per_prompt}.png")
        for place, prompt in enumerate(prompts)
    ]


def write_dpg_pictures(prompts: Sequence[Prompt], painted: Path, folder: Path) -> None:
    """Write `NAME.png` of each prompt for DPG-Bench's program: four pictures as a square, a single one unchanged."""
    folder.mkdir(parents=True, exist_ok=True)
    by_name: defaultdict[str, list[Path]] = defaultdict(list)
    for prompt in prompts:
        by_name[Path(prompt.file_name).parent.name].append(painted / prompt.file_name)
    for name, files in by_name.items():
        pictures = [Image.open(file) for file in files]
        (width, height), across = pictures[0].size, math.isqrt(len(pictures))
        square = Image.new("RGB", (across * width, across * height))
        for place, picture in enumerate(pictures):
            square.paste(picture, (place % across * width, place // across * height))
        square.save(folder / f"{name}.png")


def write_geneval_metadata(lines: Sequence[dict[str, Any]], folder: Path) -> None:
    """Write `00012/metadata.jsonl` of each prompt, which GenEval's evaluation reads beside the samples."""
    for index, line in enumerate(lines):
        path = folder / f"{index:05d}" / "metadata.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(line, ensure_ascii=False) + "\n", encoding="utf-8")


def read_painted(folder: str | Path) -> list[tuple[dict[str, Any], Path]]:
    """Lines and pictures of a folder as GenEval's evaluation wants it: `00012/metadata.jsonl`, `00012/samples/*.png`.

    Raises:
        UserError: There are none, or a line is not of GenEval's form.
    """
    painted = []
    for metadata in sorted(Path(folder).glob("*/metadata.jsonl")):
        lines = read_geneval(str(metadata))
        if len(lines) > 1:
            raise UserError(f"'{metadata}' has {len(lines)} lines; GenEval's format has a folder for each prompt")
        painted += [(lines[0], picture) for picture in sorted((metadata.parent / "samples").glob("*.png"))]
    if not painted:
        raise UserError(
            f"'{folder}' holds no 00000/metadata.jsonl with 00000/samples/; give the folder generated/ of "
            "evaluate/benchmark.py --config configs/eval/geneval.yaml, or configs/eval/composition.yaml"
        )
    return painted


def _all_there(images: list[CaptionedImage]) -> list[CaptionedImage]:
    missing = [image.image for image in images if not image.image.is_file()]
    if missing:
        raise UserError(f"{len(missing)} of {len(images)} images do not exist, first '{missing[0]}'")
    return images


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"'{path}' cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"'{path}' cannot be read as UTF-8 text: {error}") from None


def _read_json(path: Path) -> Any:
    try:
        return json.loads(_read(path))
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"'{path}' is not a JSON file ({error}); was it downloaded whole?") from None
