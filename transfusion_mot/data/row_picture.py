"""A picture of one row: its slots, its documents in reading order, and the attention mask."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from transfusion_mot.config import TEXT, ModelConfig
from transfusion_mot.data.batch import Batch
from transfusion_mot.data.images import ImageArray
from transfusion_mot.data.row_arrays import Block, RowShape
from transfusion_mot.data.tokenizer import TextTokenizer
from transfusion_mot.models.attention import dense_mask, slot_ids
from transfusion_mot.models.inputs import TokenInput

Colour = tuple[int, int, int]
# For each modality of latents: the picture in every media slot, or None.
Thumbnails = Mapping[str, Sequence[ImageArray | None]]

_WHITE, _INK, _FAINT, _PADDING = (255, 255, 255), (38, 42, 51), (120, 126, 138), (226, 228, 232)
# Colour of each modality, in the order of their slots, and a lighter one for queries that attend to another modality.
_MODALITIES: list[tuple[Colour, Colour]] = [
    ((52, 101, 164), (158, 190, 228)),
    ((232, 126, 46), (249, 200, 158)),
    ((64, 140, 84), (170, 212, 180)),
    ((136, 92, 170), (206, 186, 224)),
]
_DOCUMENTS: list[Colour] = [
    *((91, 143, 214), (240, 162, 79), (102, 178, 120), (214, 106, 120), (148, 124, 196)),
    *((84, 180, 186), (196, 150, 92), (222, 140, 190), (140, 160, 80), (120, 132, 150)),
]
_WIDTH, _MARGIN, _MASK = 2000, 50, 860
_STRIP, _THUMBNAIL, _LINE = 26, 52, 62
_MOST_LINES = 4


@dataclass
class _Row:
    """The slots of a row.

    Attributes:
        blocks: The slots of each modality.
        documents, order, spans: [S] ids.
        modalities: [S] place of each slot's modality in `blocks`.
        ids: Tokens of each modality of tokens.
        clean_spans: What to call spans without noise: copies and conditions.
    """

    blocks: dict[str, Block]
    documents: npt.NDArray[np.int64]
    order: npt.NDArray[np.int64]
    spans: npt.NDArray[np.int64]
    modalities: npt.NDArray[np.int64]
    ids: dict[str, npt.NDArray[np.int64]]
    clean_spans: dict[int, str]

    def reading_order(self, document: int) -> npt.NDArray[np.int64]:
        """Slots of a document, first to last."""
        slots = np.flatnonzero(self.documents == document)
        return slots[np.argsort(self.order[slots])]

    def modality(self, slot: int) -> str:
        """Modality of a slot."""
        return list(self.blocks)[int(self.modalities[slot])]

    def token(self, slot: int) -> int | None:
        """Token of text in a slot."""
        is_text = self.modality(slot) == TEXT
        return int(self.ids[TEXT][slot - self.blocks[TEXT].start]) if is_text else None

    def media_slot(self, slot: int) -> int:
        """Index of a patch's media slot among those of its modality."""
        block = self.blocks[self.modality(slot)]
        return (slot - block.start) // block.slots_each


def draw_row(
    batch: Batch, model: ModelConfig, tokenizer: TextTokenizer, *, thumbnails: Thumbnails, title: str, path: Path
) -> None:
    """Draw a row to a PNG.

    Args:
        batch: A batch of one row.
        model: The modalities.
        tokenizer: Decodes text ids.
        thumbnails: Pictures in media slots.
        title: Title of the picture.
        path: The PNG to write.
    """
    row = _row(batch, model)
    canvas = Image.new("RGB", (_WIDTH, 4000), _WHITE)
    draw = ImageDraw.Draw(canvas)
    draw.text((_MARGIN, 40), title, fill=_INK, font=_font(34, bold=True))
    bottom = _draw_stored(canvas, draw, row, thumbnails, top=110)
    ends = _draw_mask(canvas, draw, row, _attends(batch, model), top=bottom + 40)
    ends = max(ends, _draw_documents(canvas, draw, row, tokenizer, thumbnails, bottom + 40, ends))
    canvas.crop((0, 0, _WIDTH, ends + 30)).save(path)


def _row(batch: Batch, model: ModelConfig) -> _Row:
    blocks = RowShape.of_batch(model, batch).blocks
    ids, clean_spans, spans = {}, dict[int, str](), 0
    for name, given in batch.inputs.items():
        if isinstance(given, TokenInput):
            ids[name] = given.ids[0].numpy()
            continue
        for what, clean in (("clean copy", given.copies), ("condition", given.conditions)):
            if clean is not None:
                clean_spans |= {spans + slot: what for slot in np.flatnonzero(clean[0].numpy()).tolist()}
        spans += blocks[name].capacity
    documents, order, span_ids = (
        tensor[0].numpy() for tensor in (batch.slots.document_ids, batch.slots.order, batch.slots.span_ids)
    )
    modalities = np.repeat(np.arange(len(blocks)), [block.num_slots for block in blocks.values()])
    return _Row(blocks, documents, order, span_ids, modalities, ids, clean_spans)


def _attends(batch: Batch, model: ModelConfig) -> npt.NDArray[np.bool_]:
    """[S, S] whether a slot of the first row attends to another."""
    slots = slot_ids(model, batch.inputs, batch.slots)
    return dense_mask(slots, slots)[0].numpy()


def _draw_stored(canvas: Image.Image, draw: ImageDraw.ImageDraw, row: _Row, thumbnails: Thumbnails, top: int) -> int:
    """Draw the row as it is stored: one modality after the other, media beside tokens => bottom of the drawing."""
    lines: list[list[str]] = []
    for name in row.blocks:
        is_beside = name not in row.ids and lines and lines[-1][-1] in row.ids
        lines = [*lines[:-1], [*lines[-1], name]] if is_beside else [*lines, [name]]
    places = {name: place for place, name in enumerate(row.blocks)}
    for line in lines:
        left = _MARGIN
        of_media = sum(row.blocks[name].capacity for name in line if name not in row.ids)
        for name in line:
            colour = _MODALITIES[places[name] % len(_MODALITIES)][0]
            if name in row.ids:
                width = _WIDTH - 2 * _MARGIN - (of_media * (_media_size(of_media) + 10) + 30 if of_media else 0)
                _draw_tokens(draw, row, name, colour, (left, top, width))
                left += width + 30
            else:
                _draw_media(canvas, draw, row, name, thumbnails.get(name), colour, (left, top))
        top += 42 + 150
    return top


def _media_size(count: int) -> int:
    """Side of a media slot in the picture."""
    return min(150, 900 // count - 10)


def _draw_tokens(draw: ImageDraw.ImageDraw, row: _Row, name: str, colour: Colour, place: tuple[int, int, int]) -> None:
    """Draw a strip of documents at (left, top, width)."""
    left, top, width = place
    block = row.blocks[name]
    documents = row.documents[block.start : block.start + block.num_slots]
    used = int((documents >= 0).sum())
    heading = f"{name} slots: {used} of {block.capacity} used"
    draw.text((left, top), heading, fill=colour, font=_font(24, bold=True))
    top += 42
    edges = left + np.round(np.arange(block.capacity + 1) * width / block.capacity).astype(int)
    middle = top + 75
    for first, last in _runs(documents):
        document = int(documents[first])
        box = (int(edges[first]), middle - 34, max(int(edges[first]), int(edges[last + 1]) - 2), middle + 34)
        draw.rectangle(box, fill=_colour(document) if document >= 0 else _PADDING)
        label = str(document + 1) if document >= 0 else "padding"
        if _font(22, bold=True).getlength(label) < box[2] - box[0] - 4:
            fill = _WHITE if document >= 0 else _FAINT
            draw.text(((box[0] + box[2]) / 2, middle), label, fill=fill, font=_font(22, bold=True), anchor="mm")


def _draw_media(
    canvas: Image.Image,
    draw: ImageDraw.ImageDraw,
    row: _Row,
    name: str,
    thumbnails: Sequence[ImageArray | None] | None,
    colour: Colour,
    place: tuple[int, int],
) -> None:
    """Draw media slots, starting at (left, top)."""
    left, top = place
    block = row.blocks[name]
    size = _media_size(block.capacity)
    heading = f"{name} slots of {block.slots_each} patches"
    anchor = min(left, _WIDTH - _MARGIN - int(_font(24, bold=True).getlength(heading)))
    draw.text((anchor, top), heading, fill=colour, font=_font(24, bold=True))
    top += 42
    for slot in range(block.capacity):
        document = int(row.documents[block.start + slot * block.slots_each])
        box = (left, top, left + size - 1, top + size - 1)
        thumbnail = thumbnails[slot] if thumbnails else None
        if document < 0:
            draw.rectangle(box, fill=_PADDING)
            draw.text((left + size / 2, top + size / 2), "padding", fill=_FAINT, font=_font(18), anchor="mm")
        else:
            draw.rectangle(box, fill=_colour(document))
            if thumbnail is not None:
                _paste(canvas, thumbnail, left + 6, top + 6, size - 12)
            _badge(draw, left + size - 18, top + 18, document)
        left += size + 10


def _draw_mask(canvas: Image.Image, draw: ImageDraw.ImageDraw, row: _Row, mask: npt.NDArray[np.bool_], top: int) -> int:
    """Draw the attention mask with its slots in reading order => bottom of the drawing."""
    heading, font = "attention mask", _font(24, bold=True)
    draw.text((_MARGIN, top), heading, fill=_INK, font=font)
    below = "in reading order: each row attends to its coloured columns"
    draw.text((_MARGIN + font.getlength(f"{heading}  "), top + 4), below, fill=_FAINT, font=_font(20))
    documents = range(int(row.documents.max()) + 1)
    order = np.concatenate([row.reading_order(document) for document in documents])
    kinds = row.modalities[order]
    colours = np.array(_MODALITIES, dtype=np.uint8)[kinds % len(_MODALITIES)]
    is_own = (kinds[:, None] == kinds[None, :])[..., None]
    pairs = np.where(is_own, colours[:, None, 0], colours[:, None, 1])
    pixels = np.where(mask[np.ix_(order, order)][..., None], pairs, np.uint8(250))
    left, top = _MARGIN + _STRIP + 6, top + 48 + _STRIP + 6
    side = _MASK - _STRIP
    method = Image.Resampling.NEAREST if len(order) <= side else Image.Resampling.BOX
    canvas.paste(Image.fromarray(pixels).resize((side, side), method), (left, top))
    edges = np.round(np.arange(len(order) + 1) * side / len(order)).astype(int)
    for first, last in _runs(kinds):
        fill = _MODALITIES[int(kinds[first]) % len(_MODALITIES)][0]
        # At least one pixel; in a long row several slots share a pixel.
        start, end = edges[first], max(edges[first], edges[last + 1] - 1)
        draw.rectangle((left + start, top - _STRIP - 4, left + end, top - 5), fill=fill)
        draw.rectangle((left - _STRIP - 4, top + start, left - 5, top + end), fill=fill)
    for first, last in _runs(row.documents[order]):
        box = (left + edges[first], top + edges[first], left + edges[last + 1], top + edges[last + 1])
        draw.rectangle(box, outline=_FAINT, width=2)
        # The number is to the right of the square, where keys of later documents are not attended to.
        x = box[2] + 24 if box[2] + 40 < left + side else box[0] - 24
        if box[3] - box[1] > 30:
            _badge(draw, x, (box[1] + box[3]) // 2, int(row.documents[order[first]]))
    draw.rectangle((left - 1, top - 1, left + side, top + side), outline=_FAINT)
    top += side + 20
    own = [
        f"{name} reads {name} before it" + ("" if block.latent_shape is None else " and its span")
        for name, block in row.blocks.items()
    ]
    second = max(420, 64 + int(max(map(_font(19).getlength, own))))
    for place, (name, first_label) in enumerate(zip(row.blocks, own, strict=True)):
        for column, label in enumerate((first_label, f"{name} reads other modalities before it")):
            x, y = left + column * second, top + place * 36
            draw.rectangle((x, y, x + 24, y + 24), fill=_MODALITIES[place % len(_MODALITIES)][column])
            draw.text((x + 34, y + 12), label, fill=_INK, font=_font(19), anchor="lm")
    return top + 36 * len(row.blocks) + 8


def _draw_documents(
    canvas: Image.Image,
    draw: ImageDraw.ImageDraw,
    row: _Row,
    tokenizer: TextTokenizer,
    thumbnails: Thumbnails,
    top: int,
    limit: int,
) -> int:
    """Draw the documents in reading order, as many as fit => bottom of the drawing."""
    left, right = _MARGIN + _MASK + 90, _WIDTH - _MARGIN
    draw.text((left - 46, top), "documents, in reading order", fill=_INK, font=_font(24, bold=True))
    y = top + 80
    num_documents = int(row.documents.max()) + 1
    for document in range(num_documents):
        if y + 2 * _LINE > limit and document < num_documents - 1:
            draw.text((left, y), f"... and {num_documents - document} more", fill=_FAINT, font=_font(22), anchor="lm")
            return y + _LINE
        _badge(draw, left - 28, y, document)
        x, lines = left, 1
        for word in _words(row, document, tokenizer):
            font = _font(17, bold=True) if word.is_special else _font(22)
            width = _THUMBNAIL if word.media is not None else int(font.getlength(word.text))
            width += 16 * word.is_special
            if x + width > right - 30 and x > left:
                if lines == _MOST_LINES:
                    draw.text((x, y), "...", fill=_INK, font=_font(22), anchor="lm")
                    break
                x, y, lines = left, y + _LINE, lines + 1
            if word.media is not None:
                name, slot = word.media
                half, place = _THUMBNAIL // 2, list(row.blocks).index(name)
                box = (x, y - half, x + 2 * half - 1, y + half - 1)
                draw.rectangle(box, fill=_MODALITIES[place % len(_MODALITIES)][0])
                if name in thumbnails and (thumbnail := thumbnails[name][slot]) is not None:
                    _paste(canvas, thumbnail, x + 3, y - half + 3, 2 * half - 6)
            elif word.is_special:
                draw.rounded_rectangle((x, y - 14, x + width, y + 14), radius=8, fill=_PADDING)
                draw.text((x + 8, y), word.text, fill=_FAINT, font=font, anchor="lm")
            else:
                draw.text((x, y), word.text, fill=_INK, font=font, anchor="lm")
            x += width + 8
        y += _LINE + 10
    return y


@dataclass(frozen=True)
class _Word:
    """The displayed parts of a document.

    Attributes:
        text: The text to draw.
        is_special: Whether it is not text of the document.
        media: Modality and media slot.
    """

    text: str
    is_special: bool = False
    media: tuple[str, int] | None = None


def _words(row: _Row, document: int, tokenizer: TextTokenizer) -> Iterator[_Word]:
    """Parts of a document from left to right: words, special tokens, media."""
    special = {tokenizer.bos_id: "BOS", tokenizer.eos_id: "EOS"}
    special |= {token: f"begin of {name}" for name, token in tokenizer.begin_ids.items()}
    special |= {token: f"end of {name}" for name, token in tokenizer.end_ids.items()}
    slots = row.reading_order(document)
    if tokenizer.document_start and row.token(slots[0]) not in (tokenizer.bos_id, None):
        yield _Word("continues from the previous row", is_special=True)
    # One run for each text, special token, media slot or span of codes.
    keys = [
        (row.modalities[slot], row.spans[slot], row.token(slot) if row.token(slot) in special else -1) for slot in slots
    ]
    starts = [place for place, key in enumerate(keys) if place == 0 or key != keys[place - 1]]
    for first, end in zip(starts, [*starts[1:], len(slots)], strict=True):
        run, name = slots[first:end], row.modality(slots[first])
        token = row.token(run[0])
        if token in special:
            yield from (_Word(special[token], is_special=True) for _ in run)
        elif token is not None:
            words = tokenizer.decode([int(row.ids[TEXT][slot - row.blocks[TEXT].start]) for slot in run]).split()
            yield from (_Word(word) for word in words)
        elif name in row.ids:
            yield _Word(f"{len(run)} {name} tokens", is_special=True)
        else:
            if (what := row.clean_spans.get(int(row.spans[run[0]]))) is not None:
                yield _Word(what, is_special=True)
            yield _Word("", media=(name, row.media_slot(run[0])))
    last = row.token(slots[-1])
    if last is not None and last not in special:
        yield _Word("continues in the next row", is_special=True)


def _runs(values: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """First and last index of every run of equal values."""
    starts = np.flatnonzero(np.diff(values, prepend=values[0] - 1))
    yield from zip(starts.tolist(), [*(starts[1:] - 1).tolist(), len(values) - 1], strict=True)


def _colour(document: int) -> Colour:
    return _DOCUMENTS[document % len(_DOCUMENTS)]


def _badge(draw: ImageDraw.ImageDraw, x: float, y: float, document: int) -> None:
    """The number of a document, counted from 1, in its colour."""
    draw.ellipse((x - 17, y - 17, x + 17, y + 17), fill=_colour(document), outline=_WHITE, width=2)
    draw.text((x, y), str(document + 1), fill=_WHITE, font=_font(18, bold=True), anchor="mm")


def _paste(canvas: Image.Image, images_uint8: ImageArray, left: int, top: int, side: int) -> None:
    """A picture, shrunk or enlarged to fit a square on white."""
    picture = Image.fromarray(images_uint8)
    scale = side / max(picture.size)
    picture = picture.resize(
        (max(1, round(picture.width * scale)), max(1, round(picture.height * scale))), Image.Resampling.LANCZOS
    )
    square = Image.new("RGB", (side, side), _WHITE)
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    canvas.paste(square, (left, top))


@cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    # Pillow's built-in font knows Latin letters only; matplotlib brings DejaVu Sans.
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, size)
