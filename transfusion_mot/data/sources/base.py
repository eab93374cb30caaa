"""Interface of sources: documents of texts and media on one side of the held-out split."""

import hashlib
import logging
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeVar, runtime_checkable

import numpy as np
import numpy.typing as npt
from PIL import Image

from transfusion_mot.data.audio import Audio
from transfusion_mot.data.images import ImageArray, UnreadableImage
from transfusion_mot.data.sources.keys import Keys

Split = Literal["train", "held_out"]
Medium = Literal["image", "audio"]
# Name of one media item in messages.
NOUNS: dict[Medium, str] = {"image": "image", "audio": "audio clip"}

_Item = TypeVar("_Item")

_logger = logging.getLogger(__name__)
_NUM_EXAMPLES = 3


@dataclass(frozen=True, slots=True)
class Text:
    """Text of a document.

    Attributes:
        choices: One of them is used, such as one of several captions; at least one, none empty.
    """

    choices: Sequence[str]


@dataclass(frozen=True, slots=True)
class MediaItem:
    """An item of a document that is not text, as a source gives it.

    Attributes:
        modality: Its modality, a key of `model.modalities`.
        index: Its index among the media of this modality in the source.
        is_condition: Whether it is only read, like the source image of an edit: it has no loss.
    """

    modality: str
    index: int
    is_condition: bool = False


class _Media(Protocol):
    """Media of one source and split, which are encoded and cached.

    Attributes:
        name: Name of the source in messages and logs.
        fingerprint: Hash of everything that decides the encoded data: the stamps and order of media, and size, buckets
            and fit of images; not captions.
        skipped: Media skipped when the source was opened: reason => count.
        buckets: [N] index of each image's size in `data.image_sizes`; 0 for audio.
    """

    name: str
    fingerprint: str
    skipped: dict[str, int]
    buckets: npt.NDArray[np.int16]

    @property
    def stamps(self) -> Keys:
        """[N, 2] keys of the location and modification time of each; unchanged stamps mean unchanged media."""
        ...

    def __len__(self) -> int: ...

    def content(self, index: int) -> bytes | Image.Image:
        """One stored media item: an encoded image or audio clip, or a picture.

        Raises:
            UnreadableMedia: It does not exist.
            FileNotFoundError: Its file was removed after the source was opened.
            UserError: The system failed to read it.
        """
        ...

    def where(self, index: int) -> str:
        """Place of an item, for messages."""
        ...


class ImageSet(_Media, Protocol):
    """Images of one source and split."""

    medium: Literal["image"]

    def image(self, index: int, content: bytes | Image.Image | None = None) -> ImageArray:
        """One image, `uint8 [height, width, 3]` of its bucket; decoded from `content`, if given.

        Raises:
            UnreadableImage: It does not exist or cannot be decoded.
            UserError: The system failed to read it.
        """
        ...


class AudioSet(_Media, Protocol):
    """Audio clips of one source and split, none longer than `data.max_audio_seconds`.

    Attributes:
        seconds: [N] duration of each by its header; 0 if the header cannot be read.
    """

    medium: Literal["audio"]
    seconds: npt.NDArray[np.float64]

    def audio(self, index: int, content: bytes | Image.Image | None = None) -> Audio:
        """One audio clip, at its own sample rate; decoded from `content`, if given.

        Raises:
            UnreadableAudio: It does not exist or cannot be decoded.
            UserError: The system failed to read it.
        """
        ...


MediaSet = ImageSet | AudioSet


@runtime_checkable
class Documents(Protocol):
    """Documents of one source and split.

    Attributes:
        name: Name of the source in messages and logs.
        skipped: Items skipped when the source was opened: reason => count.
        documents_fingerprint: Hash of the texts, the places of the media between them, and the order of the documents.
        media: The media of each modality; empty for texts. Images of one document have the same bucket.
        modalities: Modalities of the documents. Documents of only codes fill the stream of their modality, like texts
            fill the text stream.
        is_paired: Whether a document is a text and media without a fixed order, such as a caption and an image. Other
            documents are in reading order, or, if they begin with a condition, edits: a source image, an instruction,
            the result.
    """

    name: str
    skipped: dict[str, int]
    documents_fingerprint: str
    is_paired: bool

    @property
    def media(self) -> Mapping[str, MediaSet]: ...

    @property
    def modalities(self) -> Sequence[str]: ...

    def __len__(self) -> int: ...

    def document(self, index: int) -> list[Text | MediaItem]:
        """One document: its texts and media, in reading order unless it is paired."""
        ...


def own_media(documents: Documents) -> str | None:
    """The modality whose item i belongs to document i; None if there is none."""
    everything: Mapping[str, object] = documents.media
    return next((name for name, media in everything.items() if media is documents), None)


@runtime_checkable
class CaptionedImages(ImageSet, Documents, Protocol):
    """Images with captions: document i is image i and its captions."""

    def captions(self, index: int) -> list[str]:
        """The captions of one image: at least one, none empty."""
        ...


@dataclass
class SkippedItems:
    """Skipped items: their number for each reason, and the places of the first few."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, where: str) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < _NUM_EXAMPLES:
            examples.append(where)

    def update(self, other: "SkippedItems") -> None:
        """Add the counts and examples of another object."""
        for reason, count in other.counts.items():
            self.counts[reason] = self.counts.get(reason, 0) + count
            self.examples[reason] = (self.examples.get(reason, []) + other.examples[reason])[:_NUM_EXAMPLES]

    def __str__(self) -> str:
        """For example "2 missing files (a.png; b.png), 1 empty caption (metadata.jsonl:4)"."""
        parts = []
        for reason, count in self.counts.items():
            more = "; ..." if count > _NUM_EXAMPLES else ""
            parts.append(f"{counted({reason: count})} ({'; '.join(self.examples[reason])}{more})")
        return ", ".join(parts)

    def warn(self, name: str, kept: int, what: str) -> None:
        """Log skipped items, if there are any, and the number of remaining items, which are called `what`."""
        if self.counts:
            items = counted({what: kept})
            _logger.warning("%s: skipped %d and kept %s: %s", name, sum(self.counts.values()), items, self)


def counted(counts: Mapping[str, int]) -> str:
    """As text: {"sample without a caption": 2, "missing file": 1} => "2 samples without a caption, 1 missing file"."""
    parts = []
    for thing, count in counts.items():
        # The noun to put into the plural comes before these words.
        many = re.sub(r"^.+?(?= without | not | of |$)", r"\g<0>s", thing)
        parts.append(f"{count:,} {thing if count == 1 else many}")
    return ", ".join(parts)


def share_of(text: str, split_seed: int) -> float:
    """A number in [0, 1) for a text, which is held out if the number is below `held_out_fraction`.

    It depends only on the text and `split_seed`, not on other items, their order or their number.
    """
    digest = hashlib.sha256(f"{split_seed}\n{text}".encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64


def picked(items: Sequence[_Item], text: str, seed: int) -> _Item:
    """One of several items, which depends only on a text and a seed."""
    return items[int(share_of(text, seed) * len(items))]


def read_images(
    images: ImageSet, indices: Sequence[int], skipped: SkippedItems, pool: Executor
) -> dict[int, ImageArray]:
    """Readable images among `indices`, by index, decoded in `pool`; the others are counted in `skipped`."""
    readable = {}
    for index, future in [(index, pool.submit(images.image, index)) for index in indices]:
        try:
            readable[index] = future.result()
        except UnreadableImage as error:
            skipped.add("unreadable image", str(error))
    return readable


def fingerprint_of(*parts: bytes | npt.NDArray[np.generic]) -> str:
    """Hash of a sequence of parts; moving bytes from one part to the next changes it."""
    digest = hashlib.sha256()
    for part in parts:
        # Bytes in one dimension; an empty array of several dimensions has no such view.
        content = part if isinstance(part, bytes) else np.ascontiguousarray(part).reshape(-1).view(np.uint8).data
        digest.update(len(content).to_bytes(8))
        digest.update(content)
    return digest.hexdigest()[:16]
