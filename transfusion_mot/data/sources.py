"""Data sources: images with captions, and text documents; each split in training and held-out by name."""

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from transfusion_mot.config import DataConfig, SourceConfig
from transfusion_mot.data.emoji import emoji_captions, emoji_versions, rendered_emoji
from transfusion_mot.data.images import ImageArray, load_image
from transfusion_mot.errors import UserError

Split = Literal["train", "held_out"]

_logger = logging.getLogger(__name__)
_NUM_EXAMPLES = 3


class CaptionedImages(Protocol):
    """Images with a caption each, of one source and split.

    Attributes:
        name: What to call the source in messages and logs.
        captions: Caption of every image.
        fingerprint: Hash of what decides the pixels: the images' identity and order, and their size.
        skipped: What was left out while the source was opened: reason to count.
    """

    name: str
    captions: list[str]
    fingerprint: str
    skipped: dict[str, int]

    def __len__(self) -> int: ...

    def image(self, index: int) -> ImageArray:
        """One image, `uint8 [image_size, image_size, 3]`.

        Raises:
            UserError: The image cannot be read.
        """
        ...


@dataclass
class SkippedItems:
    """Items that were left out: how many for each reason, and where the first few are."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, where: str) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < _NUM_EXAMPLES:
            examples.append(where)

    def __str__(self) -> str:
        """For example "2 missing file (a.png; b.png), 1 empty caption (metadata.jsonl:4)"."""
        parts = []
        for reason, count in self.counts.items():
            more = "; ..." if count > _NUM_EXAMPLES else ""
            parts.append(f"{count} {reason} ({'; '.join(self.examples[reason])}{more})")
        return ", ".join(parts)

    def warn(self, name: str, num_items: int) -> None:
        """Log what was skipped of `num_items`, if anything."""
        if self.counts:
            _logger.warning("%s: skipped %d of %d: %s", name, sum(self.counts.values()), num_items, self)


@dataclass
class EmojiImages:
    """`CaptionedImages` of drawn emoji: rows `indices` of an array of all of them."""

    name: str
    captions: list[str]
    fingerprint: str
    skipped: dict[str, int]
    images_uint8: ImageArray
    indices: list[int]

    def __len__(self) -> int:
        return len(self.captions)

    def image(self, index: int) -> ImageArray:
        return np.array(self.images_uint8[self.indices[index]])


@dataclass
class ImageFiles:
    """`CaptionedImages` of files, decoded whenever they are asked for."""

    name: str
    captions: list[str]
    fingerprint: str
    skipped: dict[str, int]
    paths: list[str]
    image_size: int

    def __len__(self) -> int:
        return len(self.captions)

    def image(self, index: int) -> ImageArray:
        return load_image(self.paths[index], self.image_size)


class TextDocuments:
    """Texts without images, of one source and split.

    All texts lie in one array of UTF-8 bytes: worker processes share it, where a list of strings would be copied into
    each of them, little by little, by reference counting.

    Attributes:
        name: What to call the source in messages and logs.
        fingerprint: Hash of the texts and their order.
        skipped: What was left out: reason to count.
    """

    def __init__(self, name: str, texts: Sequence[str], skipped: dict[str, int]) -> None:
        encoded = [text.encode("utf-8") for text in texts]
        self.name = name
        self.skipped = skipped
        self._bytes: npt.NDArray[np.uint8] = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self._ends = np.cumsum([len(text) for text in encoded], dtype=np.int64)
        self.fingerprint = _fingerprint(self._bytes.tobytes(), self._ends.tobytes())

    def __len__(self) -> int:
        return len(self._ends)

    def text(self, index: int) -> str:
        """One document, never empty."""
        start = self._ends[index - 1] if index > 0 else 0
        return self._bytes[start : self._ends[index]].tobytes().decode("utf-8")


def load_captioned_images(source: SourceConfig, data: DataConfig, split: Split) -> CaptionedImages:
    """Open a source of images with captions.

    A source whose held-out share is empty (few items, or `held_out_fraction` 0) gives an object of length 0 for it.

    Raises:
        UserError: The source is of another kind, is missing, cannot be understood, or has nothing to train on.
    """
    if source.kind == "openmoji":
        images: CaptionedImages = _open_emoji(data, split)
    elif source.kind == "imagefolder":
        images = _open_imagefolder(_existing_path(source), data, split)
    else:
        raise UserError(f"source '{source.kind}' holds no images; use 'openmoji' or 'imagefolder'")
    if split == "train" and len(images) == 0:
        raise UserError(
            f"source '{images.name}' has no image to train on (skipped: {images.skipped or 'none'}; "
            f"held_out_fraction is {data.held_out_fraction})"
        )
    return images


def load_text_documents(source: SourceConfig, data: DataConfig, split: Split) -> TextDocuments:
    """Open a source of text: a `.txt` file (a document is a paragraph; blank lines divide them), a `.jsonl` file (a
    document is the field `text` of a line), or a folder with such files anywhere below it.

    Raises:
        UserError: The source is of another kind, is missing, is not UTF-8 text, cannot be understood, or has nothing to
            train on.
    """
    if source.kind != "text":
        raise UserError(f"source '{source.kind}' is not a source of text; use 'text'")
    path = _existing_path(source)
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix in (".txt", ".jsonl"))
    if not files or any(file.suffix not in (".txt", ".jsonl") for file in files):
        raise UserError(f"text source '{path}' must be a .txt or .jsonl file, or a folder that holds some")
    texts, skipped, num_items = [], SkippedItems(), 0
    for file in files:
        for where, text in _paragraphs(file) if file.suffix == ".txt" else _jsonl_texts(file):
            if split_of(text, data) != split:
                continue
            num_items += 1
            if text:
                texts.append(text)
            else:
                skipped.add("empty text", where)
    skipped.warn(str(path), num_items)
    if split == "train" and not texts:
        raise UserError(f"text source '{path}' has no document to train on (skipped: {skipped.counts or 'none'})")
    return TextDocuments(str(path), texts, skipped.counts)


def split_of(text: str, data: DataConfig) -> Split:
    """The side of the held-out split that a caption or document is on.

    It depends on the text and `split_seed` alone: other items, their order and their number do not move it, and the
    same caption is on one side wherever it occurs.
    """
    digest = hashlib.sha256(f"{data.split_seed}\n{text}".encode()).digest()
    share = int.from_bytes(digest[:8]) / 2**64
    return "held_out" if share < data.held_out_fraction else "train"


def read_images(
    images: CaptionedImages, indices: Sequence[int], skipped: SkippedItems, pool: Executor
) -> dict[int, ImageArray]:
    """The images among `indices` that can be read, by index, decoded in `pool`; the others are counted in `skipped`."""
    readable = {}
    for index, future in [(index, pool.submit(images.image, index)) for index in indices]:
        try:
            readable[index] = future.result()
        except UserError as error:
            skipped.add("unreadable image", str(error))
    return readable


def _open_emoji(data: DataConfig, split: Split) -> EmojiImages:
    all_captions = list(emoji_captions().values())
    indices = [index for index, caption in enumerate(all_captions) if split_of(caption, data) == split]
    return EmojiImages(
        name="openmoji",
        captions=[all_captions[index] for index in indices],
        fingerprint=_fingerprint(emoji_versions().encode(), json.dumps([data.image_size, indices]).encode()),
        skipped={},
        images_uint8=rendered_emoji(data.image_size, data.cache_dir),
        indices=indices,
    )


def _open_imagefolder(folder: Path, data: DataConfig, split: Split) -> ImageFiles:
    metadata = folder / "metadata.jsonl"
    if not metadata.is_file():
        raise UserError(
            f"image folder '{folder}' has no metadata.jsonl; it needs one line for each image, such as "
            '{"file_name": "apple.png", "text": "a red apple"}'
        )
    captions, paths, identities, skipped, num_items = [], [], [], SkippedItems(), 0
    for where, entry in _jsonl_entries(metadata):
        file_name = entry.get("file_name")
        if not isinstance(file_name, str):
            raise UserError(f"{where}: needs a field 'file_name' with the path of an image, got {file_name!r}")
        caption = _text_field(entry, ("text", "caption"), where)
        if split_of(caption, data) != split:
            continue
        num_items += 1
        path = folder / file_name
        if not caption:
            skipped.add("empty caption", where)
        elif not path.is_file():
            skipped.add("missing file", file_name)
        else:
            status = path.stat()
            captions.append(caption)
            paths.append(str(path))
            # Reading every byte would take as long as encoding; an edit changes size or time.
            identities.append((file_name, status.st_size, status.st_mtime_ns))
    skipped.warn(str(folder), num_items)
    return ImageFiles(
        name=str(folder),
        captions=captions,
        fingerprint=_fingerprint(os.fsencode(folder.resolve()), json.dumps([data.image_size, identities]).encode()),
        skipped=skipped.counts,
        paths=paths,
        image_size=data.image_size,
    )


def _existing_path(source: SourceConfig) -> Path:
    if source.path is None:
        raise UserError(f"a source of kind '{source.kind}' needs 'path'")
    path = Path(source.path)
    wrong = not path.exists() if source.kind == "text" else not path.is_dir()
    if wrong:
        raise UserError(f"source path '{path}' is not a {'file or folder' if source.kind == 'text' else 'folder'}")
    return path


def _paragraphs(file: Path) -> Iterator[tuple[str, str]]:
    """Paragraphs of a text file, each with its place ("file:line")."""
    paragraph: list[str] = []
    start = 1
    for number, line in _lines(file):
        if line:
            if not paragraph:
                start = number
            paragraph.append(line)
        elif paragraph:
            yield f"{file}:{start}", "\n".join(paragraph).strip()
            paragraph = []
    if paragraph:
        yield f"{file}:{start}", "\n".join(paragraph).strip()


def _jsonl_texts(file: Path) -> Iterator[tuple[str, str]]:
    for where, entry in _jsonl_entries(file):
        yield where, _text_field(entry, ("text",), where)


def _text_field(entry: dict[str, Any], names: tuple[str, ...], where: str) -> str:
    """The first of the named fields that is there; null is the empty text."""
    for name in names:
        if name in entry:
            text = entry[name] if entry[name] is not None else ""
            if not isinstance(text, str):
                raise UserError(f"{where}: the field '{name}' must be a text, got {text!r}")
            # JSON can escape half of a surrogate pair, which no UTF-8 encoder takes.
            return text.encode("utf-8", errors="replace").decode("utf-8").strip()
    raise UserError(f"{where}: needs a field {' or '.join(repr(name) for name in names)}; it has {sorted(entry)}")


def _jsonl_entries(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Objects of a JSON-lines file, each with its place ("file:line")."""
    for number, line in _lines(file):
        if not line:
            continue
        where = f"{file}:{number}"
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: not a line of JSON ({error})") from None
        if not isinstance(entry, dict):
            raise UserError(f"{where}: must be a JSON object, got {type(entry).__name__}")
        yield where, entry


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Lines of a UTF-8 file without the white space at their ends, numbered from 1."""
    with file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                # "utf-8-sig": some editors put a byte-order mark before the first line.
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip()
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{file}:{number}: not UTF-8 text ({error.reason}); convert the file to UTF-8"
                ) from None


def _fingerprint(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8))
        digest.update(part)
    return digest.hexdigest()[:16]
