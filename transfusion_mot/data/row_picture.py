"""A picture of one row: what stands in its slots, its documents in reading order, and who attends to whom."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from transfusion_mot.data.batch import Batch
from transfusion_mot.data.images import ImageArray
from transfusion_mot.data.tokenizer import TextTokenizer
from transfusion_mot.models.attention import SlotIds, dense_mask

Colour = tuple[int, int, int]

_WHITE, _INK, _FAINT, _PADDING = (255, 255, 255), (38, 42, 51), (120, 126, 138), (226, 228, 232)
_TEXT, _IMAGE = (52, 101, 164), (232, 126, 46)
# What a query of a modality reads: its own modality in the full colour, the other one lighter.
_TEXT_READS_IMAGE, _IMAGE_READS_TEXT = (158, 190, 228), (249, 200, 158)
_DOCUMENTS: list[Colour] = [
    *((91, 143, 214), (240, 162, 79), (102, 178, 120), (214, 106, 120), (148, 124, 196)),
    *((84, 180, 186), (196, 150, 92), (222, 140, 190), (140, 160, 80), (120, 132, 150)),
]
_WIDTH, _MARGIN, _MASK = 2000, 50, 860
_STRIP, _THUMBNAIL, _LINE = 26, 52, 62
_MOST_LINES = 4


@dataclass
class _Row:
    """The slots of a row, as arrays [S]."""

    documents: npt.NDArray[np.int64]
    order: npt.NDArray[np.int64]
    spans: npt.NDArray[np.int64]
    text_ids: npt.NDArray[np.int64]
    is_copy: npt.NDArray[np.bool_]

    @property
    def num_images(self) -> int:
        return len(self.is_copy)

    @property
    def text_slots(self) -> int:
        return len(self.text_ids)

    def reading_order(self, document: int) -> npt.NDArray[np.int64]:
        """Slots of a document, first to last."""
        slots = np.flatnonzero(self.documents == document)
        return slots[np.argsort(self.order[slots])]


def draw_row(
    batch: Batch, tokenizer: TextTokenizer, thumbnails: Sequence[ImageArray | None], title: str, path: Path
) -> None:
    """Draw a row to a PNG.

    Args:
        batch: Of one row.
        tokenizer: Says what its ids mean.
        thumbnails: The image in every image slot, or None.
        title: Stands on top.
        path: Where the PNG goes.
    """
    documents, order, spans, text_ids = (
        getattr(batch, name)[0].numpy() for name in ("document_ids", "order", "span_ids", "text_ids")
    )
    is_copy = np.zeros(batch.latents.shape[1], dtype=np.bool_) if batch.copies is None else batch.copies[0].numpy()
    row = _Row(documents, order, spans, text_ids, is_copy)
    slots = SlotIds.from_spans(batch.document_ids, batch.order, batch.span_ids, batch.copies)
    mask = dense_mask(slots, slots)[0].numpy()
    canvas = Image.new("RGB", (_WIDTH, 2400), _WHITE)
    draw = ImageDraw.Draw(canvas)
    draw.text((_MARGIN, 40), title, fill=_INK, font=_font(34, bold=True))
    bottom = _draw_stored(canvas, draw, row, thumbnails, top=110)
    ends = _draw_mask(canvas, draw, row, mask, top=bottom + 40)
    ends = max(ends, _draw_documents(canvas, draw, row, tokenizer, thumbnails, bottom + 40, ends))
    canvas.crop((0, 0, _WIDTH, ends + 30)).save(path)


def _draw_stored(
    canvas: Image.Image, draw: ImageDraw.ImageDraw, row: _Row, thumbnails: Sequence[ImageArray | None], top: int
) -> int:
    """The row as it is stored: all text slots, then all image slots => where it ends."""
    patches = (len(row.documents) - row.text_slots) // row.num_images
    used = int((row.documents[: row.text_slots] >= 0).sum())
    size = min(150, 900 // row.num_images - 10)
    width = _WIDTH - 2 * _MARGIN - row.num_images * (size + 10) - 30
    draw.text((_MARGIN, top), f"text slots: {used} of {row.text_slots} used", fill=_TEXT, font=_font(24, bold=True))
    left = _MARGIN + width + 30
    heading = f"image slots of {patches} patches"
    anchor = min(left, _WIDTH - _MARGIN - int(_font(24, bold=True).getlength(heading)))
    draw.text((anchor, top), heading, fill=_IMAGE, font=_font(24, bold=True))
    top += 42
    edges = _MARGIN + np.round(np.arange(row.text_slots + 1) * width / row.text_slots).astype(int)
    middle = top + size // 2
    for first, last in _runs(row.documents[: row.text_slots]):
        document = int(row.documents[first])
        box = (int(edges[first]), middle - 34, int(edges[last + 1]) - 2, middle + 34)
        draw.rectangle(box, fill=_colour(document) if document >= 0 else _PADDING)
        label = str(document + 1) if document >= 0 else "padding"
        if _font(22, bold=True).getlength(label) < box[2] - box[0] - 4:
            fill = _WHITE if document >= 0 else _FAINT
            draw.text(((box[0] + box[2]) / 2, middle), label, fill=fill, font=_font(22, bold=True), anchor="mm")
    for slot in range(row.num_images):
        document = int(row.documents[row.text_slots + slot * patches])
        box = (left, top, left + size - 1, top + size - 1)
        thumbnail = thumbnails[slot]
        if document < 0:
            draw.rectangle(box, fill=_PADDING)
            draw.text((left + size / 2, middle), "padding", fill=_FAINT, font=_font(18), anchor="mm")
        else:
            draw.rectangle(box, fill=_colour(document))
            if thumbnail is not None:
                _paste(canvas, thumbnail, left + 6, top + 6, size - 12)
            _badge(draw, left + size - 18, top + 18, document)
        left += size + 10
    return top + max(size, 68)


def _draw_mask(canvas: Image.Image, draw: ImageDraw.ImageDraw, row: _Row, mask: npt.NDArray[np.bool_], top: int) -> int:
    """The attention mask with its slots in reading order, which is how one thinks of it => where it ends."""
    heading, font = "who attends to whom", _font(24, bold=True)
    draw.text((_MARGIN, top), heading, fill=_INK, font=font)
    below = "in reading order: a line attends to its coloured columns"
    draw.text((_MARGIN + font.getlength(f"{heading}  "), top + 4), below, fill=_FAINT, font=_font(20))
    documents = range(int(row.documents.max()) + 1)
    order = np.concatenate([row.reading_order(document) for document in documents])
    is_image = row.spans[order] >= 0
    pairs = np.stack([_TEXT, _TEXT_READS_IMAGE, _IMAGE_READS_TEXT, _IMAGE]).astype(np.uint8)
    kind = 2 * is_image[:, None] + is_image[None, :]
    pixels = np.where(mask[np.ix_(order, order)][..., None], pairs[kind.astype(int)], np.uint8(250))
    left, top = _MARGIN + _STRIP + 6, top + 48 + _STRIP + 6
    side = _MASK - _STRIP
    method = Image.Resampling.NEAREST if len(order) <= side else Image.Resampling.BOX
    canvas.paste(Image.fromarray(pixels).resize((side, side), method), (left, top))
    edges = np.round(np.arange(len(order) + 1) * side / len(order)).astype(int)
    for first, last in _runs(is_image.astype(np.int64)):
        fill = _IMAGE if is_image[first] else _TEXT
        draw.rectangle((left + edges[first], top - _STRIP - 4, left + edges[last + 1] - 1, top - 5), fill=fill)
        draw.rectangle((left - _STRIP - 4, top + edges[first], left - 5, top + edges[last + 1] - 1), fill=fill)
    for first, last in _runs(row.documents[order]):
        box = (left + edges[first], top + edges[first], left + edges[last + 1], top + edges[last + 1])
        draw.rectangle(box, outline=_FAINT, width=2)
        # Beside the square on the side of the later documents' keys, where nothing attends.
        x = box[2] + 24 if box[2] + 40 < left + side else box[0] - 24
        if box[3] - box[1] > 30:
            _badge(draw, x, (box[1] + box[3]) // 2, int(row.documents[order[first]]))
    draw.rectangle((left - 1, top - 1, left + side, top + side), outline=_FAINT)
    top += side + 20
    legend = (
        (_TEXT, "text reads text before it"),
        (_TEXT_READS_IMAGE, "text reads images before it"),
        (_IMAGE, "patch reads all of its image, and images before"),
        (_IMAGE_READS_TEXT, "patch reads text before it"),
    )
    for index, (colour, label) in enumerate(legend):
        x, y = left + (index // 2) * 380, top + (index % 2) * 36
        draw.rectangle((x, y, x + 24, y + 24), fill=colour)
        draw.text((x + 34, y + 12), label, fill=_INK, font=_font(19), anchor="lm")
    return top + 80


def _draw_documents(
    canvas: Image.Image,
    draw: ImageDraw.ImageDraw,
    row: _Row,
    tokenizer: TextTokenizer,
    thumbnails: Sequence[ImageArray | None],
    top: int,
    limit: int,
) -> int:
    """The documents as one reads them, as many as there is room for => where they end."""
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
            width = _THUMBNAIL if word.image is not None else int(font.getlength(word.text))
            width += 16 * word.is_special
            if x + width > right - 30 and x > left:
                if lines == _MOST_LINES:
                    draw.text((x, y), "...", fill=_INK, font=_font(22), anchor="lm")
                    break
                x, y, lines = left, y + _LINE, lines + 1
            if word.image is not None:
                half = _THUMBNAIL // 2
                draw.rectangle((x, y - half, x + 2 * half - 1, y + half - 1), fill=_IMAGE)
                if (thumbnail := thumbnails[word.image]) is not None:
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
    text: str
    is_special: bool = False
    image: int | None = None


def _words(row: _Row, document: int, tokenizer: TextTokenizer) -> Iterator[_Word]:
    """What a document shows from left to right: words, special tokens, images."""
    special = {
        tokenizer.bos_id: "BOS",
        tokenizer.eos_id: "EOS",
        tokenizer.boi_id: "BOI",
        tokenizer.eoi_id: "EOI",
    }
    run: list[int] = []
    slots = row.reading_order(document).tolist()
    if slots[0] >= row.text_slots or int(row.text_ids[slots[0]]) != tokenizer.bos_id:
        yield _Word("goes on from the row before", is_special=True)
    for slot, next_slot in zip(slots, [*slots[1:], None], strict=True):
        if slot < row.text_slots and (token := int(row.text_ids[slot])) not in special:
            run.append(token)
            if next_slot is not None:
                continue
        yield from (_Word(word) for word in tokenizer.decode(run).split())
        run = []
        if slot >= row.text_slots:
            if next_slot is None or row.spans[next_slot] != row.spans[slot]:
                image = int(row.spans[slot])
                if row.is_copy[image]:
                    yield _Word("clean copy", is_special=True)
                yield _Word("", image=image)
        elif token in special:
            yield _Word(special[token], is_special=True)
    if slots[-1] < row.text_slots and int(row.text_ids[slots[-1]]) not in special:
        yield _Word("goes on in the next row", is_special=True)


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
