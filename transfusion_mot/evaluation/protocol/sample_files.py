"""Painting and captioning many images: shared by processes, stored on disk, resumed after a kill.

Images are painted in batches that depend only on the list. An incomplete batch is painted again as a whole. So every
image is bit-identical for any number of processes and after any interruption.
"""

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from transfusion_mot.errors import UserError
from transfusion_mot.evaluation.protocol.prompts import CaptionedImage, Prompt
from transfusion_mot.outputs import claim

# A batch => its pictures.
Make = Callable[[Sequence[Prompt]], list[Image.Image]]
# Image files => their captions.
Describe = Callable[[list[Path]], list[str]]

_SETTINGS_FILE = "settings.json"


def claim_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Create a folder for samples of these settings, or continue one; called by the main process first.

    Raises:
        UserError: It holds samples of other settings, or cannot be written to.
    """
    path = folder / _SETTINGS_FILE
    settings = json.loads(json.dumps(settings))
    if folder.is_dir() and any(folder.iterdir()) and not path.exists():
        raise UserError(
            f"'{folder}' holds files but no {_SETTINGS_FILE} of this command; give another folder or remove it"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        before = claim(path, settings)
    except OSError as error:
        raise UserError(f"'{folder}' cannot be written to: {error}; give another folder") from None
    different = sorted(key for key in before.keys() | settings.keys() if before.get(key) != settings.get(key))
    if different:
        changes = ", ".join(f"{key} ({before.get(key)} there, {settings.get(key)} now)" for key in different)
        raise UserError(f"'{folder}' holds samples of other settings: {changes}; give another folder or remove it")


def write_images(
    prompts: Sequence[Prompt],
    folder: Path,
    make: Make,
    *,
    batch_size: int,
    description: str,
    rank: int = 0,
    num_ranks: int = 1,
) -> None:
    """Make this process's share of the images that `folder` does not have yet, and write them as PNG.

    Args:
        prompts: All images.
        folder: Claimed by `claim_folder`.
        make: Paints a batch.
        batch_size: Images of a batch; with other batches, images differ in rounding.
        description: Label of the progress bar.
        rank: Of this process.
        num_ranks: Number of processes.
    """
    batches = [prompts[start : start + batch_size] for start in range(0, len(prompts), batch_size)]
    # Divided by their places in the list, because the missing images change while other processes begin.
    mine = [
        batch
        for batch in batches[rank::num_ranks]
        if not all((folder / prompt.file_name).is_file() for prompt in batch)
    ]
    # Compressing a batch takes as long as a few reverse steps, so it is done while the next batch is painted.
    with (
        ThreadPoolExecutor(4) as pool,
        tqdm(total=sum(map(len, mine)), desc=description, unit="image", disable=rank > 0) as bar,
    ):
        writing: list[Future[None]] = []
        for batch in mine:
            images = make(batch)
            for written in writing:
                written.result()
            writing = [
                pool.submit(_save_png, image, folder / prompt.file_name)
                for prompt, image in zip(batch, images, strict=True)
            ]
            bar.update(len(batch))
        for written in writing:
            written.result()


def write_metadata(prompts: Sequence[Prompt], path: Path) -> None:
    """Write metadata.jsonl, which makes its folder an image folder for the other scripts."""
    lines = [
        {"file_name": prompt.file_name, "text": prompt.text, "image_seed": prompt.image_seed}
        | ({} if prompt.image_id is None else {"image_id": prompt.image_id})
        for prompt in prompts
    ]
    _write(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def caption_all(
    images: Sequence[CaptionedImage],
    folder: Path,
    describe: Describe,
    *,
    batch_size: int,
    rank: int = 0,
    num_ranks: int = 1,
) -> None:
    """Caption this process's share of images: write a file for each batch in `folder`, except existing ones.

    Args:
        images: All images.
        folder: Claimed by `claim_folder`.
        describe: Captions a batch.
        batch_size: Images of a batch.
        rank: Of this process.
        num_ranks: Number of processes.

    Raises:
        UserError: An image cannot be read.
    """
    starts = range(0, len(images), batch_size)[rank::num_ranks]
    mine = [start for start in starts if not _part(folder, start).is_file()]
    with tqdm(total=len(mine) * batch_size, desc="captioning", unit="image", disable=rank > 0) as bar:
        for start in mine:
            batch = [item.image for item in images[start : start + batch_size]]
            _write(_part(folder, start), json.dumps(describe(batch), ensure_ascii=False))
            bar.update(len(batch))


def read_written_captions(images: Sequence[CaptionedImage], folder: Path, batch_size: int) -> list[str]:
    """The captions of all images, after all processes have written theirs."""
    return [
        caption
        for start in range(0, len(images), batch_size)
        for caption in json.loads(_part(folder, start).read_text(encoding="utf-8"))
    ]


def write_captions(images: Sequence[CaptionedImage], captions: Sequence[str], path: Path) -> None:
    """Write a caption for each image as JSON lines for evaluate/captioning.py."""
    lines = [
        {"image_id": item.image_id, "caption": caption, "references": item.captions}
        for item, caption in zip(images, captions, strict=True)
    ]
    _write(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _part(folder: Path, start: int) -> Path:
    return folder / f"{start:06d}.json"


def _save_png(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    image.save(partial, format="PNG")
    os.replace(partial, path)


def _write(path: Path, text: str) -> None:
    """Write and rename, so that a killed process leaves the complete file or none."""
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
