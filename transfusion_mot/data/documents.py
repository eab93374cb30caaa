"""Documents: items of a source => segments, cut into pieces that fit a row."""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple, TypeVar

import numpy as np

from transfusion_mot.config import TEXT, DataConfig
from transfusion_mot.data.draws import weighted_index
from transfusion_mot.data.encoded_media import EncodedCodes
from transfusion_mot.data.images import ImageArray, UnreadableImage
from transfusion_mot.data.layout import Media, Segment
from transfusion_mot.data.mixture import Source
from transfusion_mot.data.sources.base import MediaItem, Text
from transfusion_mot.data.tokenizer import TextTokenizer
from transfusion_mot.losses import IGNORE_INDEX

_logger = logging.getLogger(__name__)
# Maximum number of unreadable media of a source that a process names; all are counted.
_NUM_NAMED = 10

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class LatentMedia:
    """Media as latents: their index in the source, and their maximum noise.

    Attributes:
        index: Index in the media of the source.
        flipped: Whether they are mirrored.
        max_timestep: Highest timestep to which they are noised.
        pixels: `uint8 [H, W, 3]` if they are encoded on the device, else None.
    """

    index: int
    flipped: bool
    max_timestep: float
    pixels: ImageArray | None


class Piece(NamedTuple):
    """The part of a document in one row: the whole document, unless it is too long.

    Attributes:
        segments: Segments in reading order.
        slots: Number of slots in each modality.
        next_token: First token of the rest, the label of the piece's last token; `IGNORE_INDEX` at the document's end.
        used: Tokens and media of the document in this piece and the previous ones.
    """

    segments: list[Segment]
    slots: dict[str, int]
    next_token: int
    used: int

    @property
    def media(self) -> list[str]:
        """Modality of each media item, without copies."""
        return [segment.modality for segment in self.segments if isinstance(segment, Media)]


@dataclass
class Document:
    """One training item.

    Attributes:
        segments: Segments in reading order; empty if no item is readable.
        stream: Modality of its tokens outside of media.
        has_token_loss: Whether these tokens have a loss.
        caption_cut: Whether its caption or instruction was longer than a row.
        unreadable: Number of unreadable media, which are left out.
        too_long: Number of codes longer than a row, which are left out.
    """

    segments: list[Segment] = field(default_factory=list)
    stream: str = TEXT
    has_token_loss: bool = True
    caption_cut: bool = False
    unreadable: int = 0
    too_long: int = 0

    def piece(self, used: int, room: dict[str, int], begin_ids: dict[str, int]) -> Piece:
        """The next piece after the first `used` tokens and media; it has at most this many slots of each modality.

        It ends between two segments; only a segment of tokens that does not fit alone is cut inside.
        """
        segments: list[Segment] = []
        slots = {self.stream: 0}
        passed = 0
        for segment in self.segments:
            length = 1 if isinstance(segment, Media) else len(segment)
            skipped = max(0, used - passed)
            passed += length
            if skipped >= length:
                continue
            if isinstance(segment, Media):
                taken = slots.copy()
                for name, count in segment.slots.items():
                    taken[name] = taken.get(name, 0) + count
                # Begin and end token.
                taken[self.stream] += 2
                if any(taken[name] > room[name] for name in taken):
                    return Piece(segments, slots, begin_ids[segment.modality], passed - 1)
                segments.append(segment)
                slots = taken
                continue
            if slots[self.stream] + length - skipped > room[self.stream]:
                end = skipped if segments else skipped + room[self.stream]
                if end > skipped:
                    segments.append(segment[skipped:end])
                slots[self.stream] += end - skipped
                return Piece(segments, slots, segment[end], passed - length + end)
            segments.append(segment[skipped:])
            slots[self.stream] += length - skipped
        return Piece(segments, slots, IGNORE_INDEX, passed)


def join_texts(items: Iterable[str | _Item]) -> list[str | _Item]:
    """Join neighbouring texts of a list of texts and media, with a space unless there is already white space."""
    joined: list[str | _Item] = []
    for item in items:
        last = joined[-1] if joined else None
        if isinstance(item, str) and isinstance(last, str):
            gap = " " if last[-1:].strip() and item[:1].strip() else ""
            joined[-1] = f"{last}{gap}{item}"
        else:
            joined.append(item)
    return joined


class DocumentReader:
    """Reads documents of sources and arranges their items by one of six templates.

    | template | segments |
    | --- | --- |
    | caption first | `BOS caption` media `EOS`; no `EOS` behind latents that have a clean context |
    | prompt dropped | `BOS` media |
    | media first | `BOS` media `caption EOS` |
    | one of `data.orders` | `BOS` items in that order `EOS` (as above); with the prompt dropped, `BOS` last item |
    | in reading order | `BOS text` media `text ... EOS` |
    | edit | `BOS` condition `instruction` media; the condition, the instruction or both may be dropped |

    Args:
        tokenizer: The text tokenizer.
        config: Chances of the templates, and the maximum length of a caption.
        readers: Modality => the `read` modality whose slots hold its clean latents, if it has one.
    """

    def __init__(
        self, tokenizer: TextTokenizer, config: DataConfig, readers: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self.readers = readers
        self._orders: dict[tuple[str, ...], float] | None = None
        if config.orders is not None:
            self._orders = {tuple(order.split()): chance for order, chance in config.orders.items()}
        self._named: dict[str, set[str]] = {}

    def read(self, source: Source, index: int, rng: np.random.Generator) -> Document:
        """Read a document; its layout is drawn from `rng`."""
        items = source.documents.document(index)
        if source.documents.is_paired:
            return self._paired(source, items, rng)
        if isinstance(items[0], MediaItem) and items[0].is_condition:
            return self._edit(source, items, rng)
        if source.stream in (None, TEXT):
            return self._in_reading_order(source, items, rng)
        return self._codes_alone(source, items)

    def _paired(self, source: Source, items: list[Text | MediaItem], rng: np.random.Generator) -> Document:
        """The text and the media of an item, in a random order."""
        config, eos = self.config, self.tokenizer.eos_id
        draws = rng.random(4).tolist()
        flipped = draws[3] < 0.5
        document = Document()
        if self._orders is None:
            ordered: list[Text | MediaItem | Media]
            ordered, is_dropped = self._caption_first_or_last(items, draws, rng)
        else:
            ordered = self._drawn_order(source, items, self._orders, draws[0], flipped, document)
            is_dropped = bool(ordered) and not isinstance(ordered[-1], Text) and draws[1] < config.prompt_dropout_prob
            ordered = ordered[-1:] if is_dropped else ordered
        parts: list[Text | Media] = []
        # The last item is read first: only if it is readable does an item follow the others.
        for item in reversed(ordered):
            if not isinstance(item, MediaItem):
                parts.append(item)
                continue
            # Less noise if a later item depends on it (Transfusion, section 4.3.4).
            limit = config.image_first_max_timestep if parts and not config.has_copies else 1.0
            copied = config.has_copies and bool(parts)
            parts += self._media(source, item, flipped, limit, copied, document)
        parts.reverse()
        num_media = sum(isinstance(part, Media) for part in parts)
        if not num_media:
            return document
        segments: list[Segment] = [list(self.tokenizer.document_start)]
        for part in parts:
            if isinstance(part, Media):
                segments.append(part)
                continue
            caption = self.tokenizer.encode(part.choices[int(draws[2] * len(part.choices))])
            # Begin and end token of each further item.
            most = config.max_caption_tokens - 2 * (num_media - 1)
            document.caption_cut = len(caption) > most
            segments.append(caption[:most])
        # Latents without a copy have no EOS label after them. Only noised images would be followed by EOS, and clean
        # images never, so the model would learn never to end after an image. A copy for this label would cost a slot.
        # With a dropped prompt there is no EOS either: the model should not learn that media have no caption.
        last = parts[-1]
        is_hidden = isinstance(last, Media) and config.has_copies and not last.is_codes
        document.segments = [*segments, *([] if is_hidden or is_dropped else [[eos]])]
        return document

    def _caption_first_or_last(
        self, items: list[Text | MediaItem], draws: list[float], rng: np.random.Generator
    ) -> tuple[list[Text | MediaItem | Media], bool]:
        """All items, with the text first or last and the media in random order, and whether the text was dropped."""
        wanted: list[MediaItem] = [item for item in items if isinstance(item, MediaItem)]
        if len(wanted) > 1:
            wanted = [wanted[place] for place in rng.permutation(len(wanted))]
        text = [item for item in items if isinstance(item, Text)]
        if draws[0] >= self.config.caption_first_prob:
            return [*wanted, *text], False
        is_dropped = draws[1] < self.config.prompt_dropout_prob
        return [*([] if is_dropped else text), *wanted], is_dropped

    def _drawn_order(
        self,
        source: Source,
        items: list[Text | MediaItem],
        orders: Mapping[tuple[str, ...], float],
        draw: float,
        flipped: bool,
        document: Document,
    ) -> list[Text | MediaItem | Media]:
        """The items in a random fitting order of `data.orders`, with codes read; empty if there is none."""
        by_modality: dict[str, list[Text | MediaItem | Media]] = {}
        for item in items:
            encoded = source.encoded.get(item.modality) if isinstance(item, MediaItem) else None
            if isinstance(item, Text):
                by_modality.setdefault(TEXT, []).append(item)
            # The choice must not depend on whether latents are readable, which is not always known before they are
            # read.
            elif encoded is None or encoded.kind != "codes":
                by_modality.setdefault(item.modality, []).append(item)
            elif (codes := self._codes(encoded, item, flipped and self.config.random_flip, document)) is not None:
                by_modality.setdefault(item.modality, []).append(codes)
        chances = {order: chance for order, chance in orders.items() if by_modality.keys() >= set(order)}
        if not any(chances.values()):
            return []
        order = list(chances)[weighted_index(list(chances.values()), draw)]
        return [item for name in order for item in by_modality[name]]

    def _edit(self, source: Source, items: list[Text | MediaItem], rng: np.random.Generator) -> Document:
        """A source image, an instruction, and the target; only the target has a loss.

        A document with dropped parts trains an unconditional prediction for guidance.
        """
        before, text, after = items
        assert isinstance(before, MediaItem)
        assert isinstance(text, Text)
        assert isinstance(after, MediaItem)
        draws, dropout = rng.random(3), self.config.edit_dropout
        flipped = bool(draws[0] < 0.5)
        document = Document(has_token_loss=False)
        condition = self._media(source, before, flipped, 0.0, False, document)
        target = self._media(source, after, flipped, 1.0, False, document)
        if not condition or not target:
            # A single image of a pair is useless.
            return document
        instruction = self.tokenizer.encode(text.choices[int(draws[1] * len(text.choices))])
        # Begin and end token of the condition.
        most = self.config.max_caption_tokens - 2
        document.caption_cut = len(instruction) > most
        # 0: the instruction is left out, 1: the source, 2: both, 3: nothing.
        left_out = np.searchsorted(np.cumsum([dropout.instruction, dropout.source, dropout.both]), draws[2], "right")
        condition = condition if left_out in (0, 3) else []
        slots = Counter[str]()
        for media in (*condition, *target):
            slots.update(media.slots)
        if any(count > self.config.slots[name] for name, count in slots.items()):
            document.too_long += 1
            return document
        document.segments = [
            self.tokenizer.document_start,
            *condition,
            instruction[:most] if left_out in (1, 3) else [],
            *target,
        ]
        return document

    def _in_reading_order(self, source: Source, items: list[Text | MediaItem], rng: np.random.Generator) -> Document:
        # One draw for all images of a document, because they belong together.
        flipped = bool(rng.random() < 0.5)
        document = Document()
        readable: list[str | Media] = []
        for item in items:
            if isinstance(item, Text):
                readable.append(item.choices[0])
            else:
                readable += self._media(source, item, flipped, 1.0, self.config.has_copies, document)
        segments: list[Segment] = []
        text = list(self.tokenizer.document_start)
        for part in join_texts(readable):
            if isinstance(part, str):
                text += self.tokenizer.encode(part)
            else:
                segments += [text, part] if text else [part]
                text = []
        if readable:
            document.segments = [*segments, [*text, self.tokenizer.eos_id]]
        return document

    def _codes_alone(self, source: Source, items: list[Text | MediaItem]) -> Document:
        """Codes without a text: they fill the remaining slots of their stream, like texts."""
        (item,) = items
        assert isinstance(item, MediaItem)
        encoded = source.encoded[item.modality]
        assert encoded.kind == "codes"
        if not encoded.readable[item.index]:
            return Document(stream=item.modality, unreadable=1)
        return Document([encoded.span(item.index)], stream=item.modality)

    def _media(
        self, source: Source, item: MediaItem, flipped: bool, max_timestep: float, copied: bool, document: Document
    ) -> list[Media]:
        """Media, or none if they cannot be decoded or their codes are longer than a row; `document` counts both cases.

        Raises:
            UserError: The system failed to read them.
        """
        flipped = flipped and self.config.random_flip
        encoded, reader = source.encoded.get(item.modality), self.readers.get(item.modality)
        if encoded is None:
            media = source.documents.media[item.modality]
            assert media.medium != "audio"
            try:
                pixels = media.image(item.index)
            except UnreadableImage as error:
                self._name(source.documents.name, item.modality, str(error))
                document.unreadable += 1
                return []
            pixels = pixels[:, ::-1] if flipped else pixels
            content = LatentMedia(item.index, flipped, max_timestep, pixels)
            return [Media(item.modality, content, copied, item.is_condition, reader)]
        if encoded.kind == "codes":
            codes = self._codes(encoded, item, flipped, document)
            return [] if codes is None else [codes]
        if not encoded.readable[item.index]:
            document.unreadable += 1
            return []
        content = LatentMedia(item.index, flipped, max_timestep, None)
        return [Media(item.modality, content, copied, item.is_condition, reader)]

    def _codes(self, encoded: EncodedCodes, item: MediaItem, flipped: bool, document: Document) -> Media | None:
        """Codes, or None if they cannot be read or are longer than a row; both cases are counted in the document."""
        if not encoded.readable[item.index]:
            document.unreadable += 1
            return None
        codes = Media(item.modality, encoded.span(item.index, flipped), is_condition=item.is_condition)
        if codes.slots[item.modality] > self.config.slots[item.modality]:
            document.too_long += 1
            return None
        return codes

    def _name(self, source: str, modality: str, problem: str) -> None:
        """Log unreadable media only once, because they come again in every epoch."""
        named = self._named.setdefault(source, set())
        if problem not in named and len(named) < _NUM_NAMED:
            named.add(problem)
            more = "; more items of this source are only counted" if len(named) == _NUM_NAMED else ""
            _logger.warning("%s: skipped an unreadable %s: %s%s", source, modality, problem, more)
