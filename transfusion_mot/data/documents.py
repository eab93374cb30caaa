"""Documents: what a source holds => segments of text and images, and the pieces of them that fit a row."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import numpy as np

from transfusion_mot.config import DataConfig
from transfusion_mot.data.images import ImageArray, UnreadableImage
from transfusion_mot.data.mixture import Source
from transfusion_mot.data.sources.base import CaptionedImages, InterleavedDocuments, TextDocuments
from transfusion_mot.data.tokenizer import TextTokenizer
from transfusion_mot.losses import IGNORE_INDEX


@dataclass(frozen=True)
class ImageSegment:
    """An image of a document; it takes a text slot before it (BOI) and one behind it (EOI).

    With `data.image_context: clean` nothing but the image itself sees its noised patches. Where there is a label behind
    it, it takes a second image slot for a clean copy of itself, which what follows sees.

    Attributes:
        index: Of the image in its source.
        flipped: Whether it is mirrored.
        max_timestep: Highest timestep it is noised to.
        pixels: `uint8 [H, W, 3]` where images are encoded on the device, else None.
        copied: Whether it has a clean copy.
    """

    index: int
    flipped: bool
    max_timestep: float
    pixels: ImageArray | None
    copied: bool

    @property
    def num_slots(self) -> int:
        """Image slots it takes."""
        return 1 + self.copied


_logger = logging.getLogger(__name__)
# Unreadable images of a source that a process names; all are counted.
_NUM_NAMED = 10

# Token ids of text, or an image.
Segment = list[int] | ImageSegment
_Image = TypeVar("_Image")


class Piece(NamedTuple):
    """What a row takes of a document at once: all of it, unless it is too long.

    Attributes:
        segments: In reading order.
        num_tokens, image_slots: Text slots and image slots it takes.
        next_token: First token of the rest, the label of the piece's last token; `IGNORE_INDEX` at the document's end.
        used: Tokens of text and images of the document in this piece and those before.
    """

    segments: list[Segment]
    num_tokens: int
    image_slots: int
    next_token: int
    used: int

    @property
    def num_images(self) -> int:
        """Images in it; their copies are none."""
        return sum(isinstance(segment, ImageSegment) for segment in self.segments)


@dataclass
class Document:
    """One training item.

    Attributes:
        segments: In reading order; none if nothing of it can be read.
        caption_cut: Whether its caption was longer than a row.
        unreadable_images: Images of it that cannot be read, and so are left out.
    """

    segments: list[Segment] = field(default_factory=list)
    caption_cut: bool = False
    unreadable_images: int = 0

    def piece(self, used: int, text_slots: int, image_slots: int, boi_id: int) -> Piece:
        """What fits so many slots of the document behind its first `used` tokens of text and images.

        It ends between two segments; only a text that is longer than that by itself is cut inside.
        """
        segments: list[Segment] = []
        num_tokens = used_image_slots = passed = 0
        for segment in self.segments:
            length = 1 if isinstance(segment, ImageSegment) else len(segment)
            skipped = max(0, used - passed)
            passed += length
            if skipped >= length:
                continue
            if isinstance(segment, ImageSegment):
                if used_image_slots + segment.num_slots > image_slots or num_tokens + 2 > text_slots:
                    return Piece(segments, num_tokens, used_image_slots, boi_id, passed - 1)
                segments.append(segment)
                used_image_slots += segment.num_slots
                num_tokens += 2
                continue
            if num_tokens + length - skipped > text_slots:
                end = skipped if segments else skipped + text_slots
                if end > skipped:
                    segments.append(segment[skipped:end])
                return Piece(
                    segments, num_tokens + end - skipped, used_image_slots, segment[end], passed - length + end
                )
            segments.append(segment[skipped:])
            num_tokens += length - skipped
        return Piece(segments, num_tokens, used_image_slots, IGNORE_INDEX, passed)


def join_texts(items: Iterable[str | _Image]) -> list[str | _Image]:
    """Texts and images => the same with neighbouring texts joined: by a space, unless there is white space already."""
    joined: list[str | _Image] = []
    for item in items:
        last = joined[-1] if joined else None
        if isinstance(item, str) and isinstance(last, str):
            gap = " " if last[-1:].strip() and item[:1].strip() else ""
            joined[-1] = f"{last}{gap}{item}"
        else:
            joined.append(item)
    return joined


class DocumentReader:
    """Reads documents of sources.

    Args:
        tokenizer: Turns text into ids and knows the special ones.
        config: Draws that shape documents, and how long a caption may be.
    """

    def __init__(self, tokenizer: TextTokenizer, config: DataConfig) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self._named: dict[str, set[str]] = {}

    def read(self, source: Source, index: int, rng: np.random.Generator) -> Document:
        """A document; what is drawn about its layout comes from `rng`."""
        if source.captioned is not None:
            return self._captioned_image(source, source.captioned, index, rng)
        if source.interleaved is not None:
            return self._interleaved(source, source.interleaved, index, rng)
        assert isinstance(source.documents, TextDocuments)
        tokens = self.tokenizer.encode(source.documents.text(index))
        return Document([[self.tokenizer.bos_id, *tokens, self.tokenizer.eos_id]])

    def _captioned_image(
        self, source: Source, documents: CaptionedImages, index: int, rng: np.random.Generator
    ) -> Document:
        config, bos, eos = self.config, self.tokenizer.bos_id, self.tokenizer.eos_id
        draws = rng.random(4)
        caption_first, prompt_dropped = draws[0] < config.caption_first_prob, draws[1] < config.prompt_dropout_prob
        # Noised less where the caption stands behind it and must be read off it (Transfusion, section 4.3.4).
        max_timestep = 1.0 if caption_first or config.has_copies else config.image_first_max_timestep
        copied = config.has_copies and not caption_first
        image = self._image(source, index, bool(draws[3] < 0.5), max_timestep, copied)
        if image is None:
            return Document(unreadable_images=1)
        if caption_first and prompt_dropped:
            # Ends at EOI, without a label there: that the image has no caption is not for the model to learn.
            return Document([[bos], image])
        captions = documents.captions(index)
        caption = self.tokenizer.encode(captions[int(draws[2] * len(captions))])
        caption_cut = len(caption) > config.max_caption_tokens
        caption = caption[: config.max_caption_tokens]
        if caption_first:
            # Without a copy there is no label at EOI: EOS behind images that are not seen, and something else behind
            # all that are, would teach never to end behind an image. A copy would cost an image slot for one label.
            behind: list[Segment] = [] if config.has_copies else [[eos]]
            return Document([[bos, *caption], image, *behind], caption_cut)
        return Document([[bos], image, [*caption, eos]], caption_cut)

    def _interleaved(
        self, source: Source, documents: InterleavedDocuments, index: int, rng: np.random.Generator
    ) -> Document:
        # Together: of a picture and its edit the one must not be mirrored without the other.
        flipped = bool(rng.random() < 0.5)
        items: list[str | ImageSegment] = []
        unreadable = 0
        for item in documents.segments(index):
            if isinstance(item, str):
                items.append(item)
            elif (image := self._image(source, item, flipped, 1.0, self.config.has_copies)) is None:
                unreadable += 1
            else:
                items.append(image)
        segments: list[Segment] = []
        text = [self.tokenizer.bos_id]
        for part in join_texts(items):
            if isinstance(part, str):
                text += self.tokenizer.encode(part)
            else:
                segments += [text, part] if text else [part]
                text = []
        if not segments and len(text) == 1:
            return Document(unreadable_images=unreadable)
        return Document([*segments, [*text, self.tokenizer.eos_id]], unreadable_images=unreadable)

    def _image(
        self, source: Source, index: int, flipped: bool, max_timestep: float, copied: bool
    ) -> ImageSegment | None:
        """An image, or None if it cannot be decoded, which is told.

        Raises:
            UserError: The system fails to read it.
        """
        flipped = flipped and self.config.random_flip
        if source.latents is not None:
            return ImageSegment(index, flipped, max_timestep, None, copied) if source.latents.readable[index] else None
        try:
            pixels = source.images.image(index)
        except UnreadableImage as error:
            self._name(source.documents.name, str(error))
            return None
        return ImageSegment(index, flipped, max_timestep, pixels[:, ::-1] if flipped else pixels, copied)

    def _name(self, source: str, problem: str) -> None:
        """Log that an image cannot be read, once: it comes again in every epoch."""
        named = self._named.setdefault(source, set())
        if problem not in named and len(named) < _NUM_NAMED:
            named.add(problem)
            more = "; more of this source are counted only" if len(named) == _NUM_NAMED else ""
            _logger.warning("%s: skipped an unreadable image: %s%s", source, problem, more)
