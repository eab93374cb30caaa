"""Layout of a document as slots. Only this file inserts delimiters, labels and clean copies.

Training, validation, guards and the sampler all use it.

| item | slots |
| --- | --- |
| text | its tokens |
| media of latents | begin token (text), a media slot, a second one if it has a clean copy, end token (text) |
| media of codes | begin token (text), `start` and the codes (their own stream), end token (text) |
| a condition | the same, with one media slot or with codes without labels |

Clean copies and conditions take slots of the modality that reads their latents, if there is one.

The label of a token is the token that follows it in its own stream. So no label crosses modalities: the begin token
before media has none (Transfusion, footnote 8), and the label of the last code is `end`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from transfusion_mot.config import TEXT
from transfusion_mot.data.tokenizer import TextTokenizer
from transfusion_mot.losses import IGNORE_INDEX


@dataclass(frozen=True)
class Media:
    """An item of a document that is not text.

    Attributes:
        modality: Its modality, a key of `model.modalities`.
        content: Codes with their end id (`next_token`), or any object that represents latents (`diffusion`).
        copied: Whether later items see a clean copy of its latents.
        is_condition: Whether it is only read: it is clean and has no loss.
        reader: Modality whose slots hold its clean latents; None is its own.
    """

    modality: str
    content: Any
    copied: bool = False
    is_condition: bool = False
    reader: str | None = None

    @property
    def is_codes(self) -> bool:
        """Whether it is a run of codes; otherwise it is a slot of latents."""
        return isinstance(self.content, list)

    @property
    def slots(self) -> dict[str, int]:
        """Number of its slots in each modality: codes, or media slots."""
        if self.is_codes:
            return {self.modality: len(self.content) - 1}
        slots: dict[str, int] = {}
        for span in self.spans:
            slots[span.modality] = slots.get(span.modality, 0) + 1
        return slots

    @property
    def spans(self) -> list["LatentSpan"]:
        """The media slots of its latents, in reading order."""
        return [LatentSpan(self, is_copy=False), *([LatentSpan(self, is_copy=True)] if self.copied else [])]


# Token ids, or media.
Segment = list[int] | Media


class TokenRun(NamedTuple):
    """Consecutive tokens of one modality.

    Attributes:
        modality: Modality of the ids.
        ids: Input tokens.
        labels: The next token of each, or `IGNORE_INDEX`.
        is_last: Whether they are codes of the document's last item, which no later item reads.
    """

    modality: str
    ids: list[int]
    labels: list[int]
    is_last: bool = False


class LatentSpan(NamedTuple):
    """One media slot.

    Attributes:
        media: Its media.
        is_copy: Whether it is the clean copy, with the position of the media before it.
    """

    media: Media
    is_copy: bool

    @property
    def modality(self) -> str:
        """The modality of the slot."""
        is_clean = self.is_copy or self.media.is_condition
        return (self.media.reader if is_clean else None) or self.media.modality


def lay_out(
    segments: Sequence[Segment],
    tokenizer: TextTokenizer,
    next_token: int = IGNORE_INDEX,
    stream: str = TEXT,
    *,
    has_token_loss: bool = True,
) -> Iterator[TokenRun | LatentSpan]:
    """Segments in reading order => runs of slots in reading order.

    Args:
        segments: Segments of a document, or of a piece of one.
        tokenizer: Tokenizer with the begin and end token of each modality.
        next_token: Label of the last token.
        stream: Modality of the tokens outside of media; another one than text has no media between them.
        has_token_loss: Whether the tokens outside of media have labels.
    """

    def outside(ids: list[int], following: int) -> TokenRun:
        labels = [*ids[1:], following] if has_token_loss else [IGNORE_INDEX] * len(ids)
        # Codes without text are the only item of their document.
        return TokenRun(stream, ids, labels, is_last=stream != TEXT)

    last = _last_item(segments, tokenizer, next_token)
    run: list[int] = []
    for index, segment in enumerate(segments):
        if not isinstance(segment, Media):
            run = run + segment if run else segment
            continue
        run = [*run, tokenizer.begin_ids[segment.modality]]
        yield outside(run, IGNORE_INDEX)
        if segment.is_codes:
            ids, following = segment.content[:-1], segment.content[1:]
            labels = [IGNORE_INDEX] * len(ids) if segment.is_condition else following
            yield TokenRun(segment.modality, ids, labels, is_last=index == last)
        else:
            yield from segment.spans
        run = [tokenizer.end_ids[segment.modality]]
    if run:
        yield outside(run, next_token)


def _last_item(segments: Sequence[Segment], tokenizer: TextTokenizer, next_token: int) -> int | None:
    """Index of the document's last item; None if it is in another piece.

    The end token of media and EOS are not items, because they follow media whatever it contains.
    """
    if next_token not in (IGNORE_INDEX, tokenizer.eos_id):
        return None
    for index in range(len(segments) - 1, -1, -1):
        segment = segments[index]
        if isinstance(segment, Media) or any(token != tokenizer.eos_id for token in segment):
            return index
    return None
