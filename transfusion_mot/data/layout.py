"""What a document looks like as slots: the one place where delimiters, labels and clean copies are inserted.

Rows of training, of validation and of the guards are laid out here, and so is what the sampler reads.

| item | slots |
| --- | --- |
| text | its tokens |
| image | `BOI` (text), an image slot, a second one if it has a clean copy, `EOI` (text) |

The label of a token is the token behind it. `BOI` has none: an image stands behind it (Transfusion, footnote 8).
"""

from collections.abc import Iterator, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar

from transfusion_mot.data.tokenizer import TextTokenizer
from transfusion_mot.losses import IGNORE_INDEX


class LaidOutImage(Protocol):
    """An image, whatever stands for it."""

    @property
    def copied(self) -> bool:
        """Whether what follows sees a clean copy of it."""
        ...


Image = TypeVar("Image", bound=LaidOutImage)


class TextRun(NamedTuple):
    """Tokens that are read one after the other.

    Attributes:
        ids: Input tokens.
        labels: The token behind each, or `IGNORE_INDEX`.
    """

    ids: list[int]
    labels: list[int]


class ImageSlot(NamedTuple, Generic[Image]):
    """One image slot.

    Attributes:
        image: What it holds.
        is_copy: Whether it is the clean copy, in the place of the one before it. It is read behind that, so that the
            image does not see it.
    """

    image: Image
    is_copy: bool


def lay_out(
    segments: Sequence[list[int] | Image], tokenizer: TextTokenizer, next_token: int = IGNORE_INDEX
) -> Iterator[TextRun | ImageSlot[Image]]:
    """Segments in reading order => slots in reading order.

    Args:
        segments: Token ids of text, and images: of a document, or of the piece of one that a row takes.
        tokenizer: Knows the delimiters.
        next_token: Label of the last token.
    """
    run: list[int] = []
    for segment in segments:
        if isinstance(segment, list):
            run = run + segment if run else segment
            continue
        run = [*run, tokenizer.boi_id]
        yield TextRun(run, [*run[1:], IGNORE_INDEX])
        yield ImageSlot(segment, is_copy=False)
        if segment.copied:
            yield ImageSlot(segment, is_copy=True)
        run = [tokenizer.eoi_id]
    if run:
        yield TextRun(run, [*run[1:], next_token])
