"""The one format of documents, spelt out; packing and sampling are compared with each other in test_interleaved."""

from typing import NamedTuple

from transfusion_mot.data.layout import ImageSlot, TextRun, lay_out
from transfusion_mot.losses import IGNORE_INDEX as NONE


class Named(NamedTuple):
    name: str
    copied: bool = False


def test_delimiters_labels_and_copies(byte_tokenizer) -> None:
    boi, eoi = byte_tokenizer.boi_id, byte_tokenizer.eoi_id
    one, two = Named("one", copied=True), Named("two")
    assert list(lay_out([[1, 2], [3], one, two, [4]], byte_tokenizer, next_token=5)) == [
        TextRun([1, 2, 3, boi], [2, 3, boi, NONE]),
        ImageSlot(one, is_copy=False),
        ImageSlot(one, is_copy=True),
        TextRun([eoi, boi], [boi, NONE]),
        ImageSlot(two, is_copy=False),
        TextRun([eoi, 4], [4, 5]),
    ]


def test_a_document_may_begin_or_end_with_an_image_and_have_none(byte_tokenizer) -> None:
    image = Named("image")
    assert list(lay_out([image], byte_tokenizer)) == [
        TextRun([byte_tokenizer.boi_id], [NONE]),
        ImageSlot(image, is_copy=False),
        TextRun([byte_tokenizer.eoi_id], [NONE]),
    ]
    assert list(lay_out([[7, 8]], byte_tokenizer)) == [TextRun([7, 8], [8, NONE])]
    assert list(lay_out([], byte_tokenizer)) == []
