"""One sampler for every task: documents are read, then text is written and media are made until they end.

Shapes: B documents, C latent channels, Y and X latent height and width, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from transfusion_mot.config import TEXT
from transfusion_mot.data.documents import join_texts
from transfusion_mot.data.layout import LatentSpan, Media, TokenRun, lay_out
from transfusion_mot.data.tokenizer import TextTokenizer
from transfusion_mot.errors import UserError
from transfusion_mot.models.modalities import TokenModality
from transfusion_mot.models.transfusion import TransfusionMoT
from transfusion_mot.sampling.decoding import Decoding
from transfusion_mot.sampling.guidance import Guidance
from transfusion_mot.sampling.per_row import random_rows
from transfusion_mot.sampling.session import Session
from transfusion_mot.sampling.workspace import Workspace

AUTO = "auto"
Predict = Callable[[Tensor, Tensor], Tensor]
Denoise = Callable[[Predict, list[int]], Tensor]


@dataclass
class OpenDocument:
    """A document during sampling: the given items and those that the model adds, in reading order.

    Attributes:
        given: Initial items: texts, and media whose content is clean latents [C, Y, X] or codes.
        negative: Text that replaces the empty text of the unconditional prediction.
        added: Items added by the model.
    """

    given: list[str | Media]
    negative: str = ""
    added: list[str | Media] = field(default_factory=list)

    @property
    def made(self) -> list[Any]:
        """Contents of the added media."""
        return [item.content for item in self.added if isinstance(item, Media)]


class Making(NamedTuple):
    """Settings for making media of one modality.

    Attributes:
        most: Maximum number in a document.
        num_slots: Slots of one item: patches, or `start` and codes; a maximum if the model decides the length.
        denoise: For latents: (predict, indices of B documents) => clean latents [B, C, Y, X]. `predict` is (noisy
            latents [B, C, Y, X], timestep []) => guided prediction; the timestep is on the CPU, so that no step waits
            for the device.
        decoding: For codes: how they are chosen.
        is_ragged: For codes: whether the model decides how many there are.
    """

    most: int
    num_slots: int
    denoise: Denoise | None = None
    decoding: Decoding | None = None
    is_ragged: bool = False


class Sampler:
    """Continues documents until each of them ends.

    Each document is in the phase of one modality, and those in the same phase are processed together: token modalities
    write, diffusion modalities denoise. In text, a begin token changes the phase; the end of media returns to text. The
    target decides what follows:

    | target | what follows |
    | --- | --- |
    | a modality other than text | its begin token, and one of its media |
    | `text` | text until `EOS`; behind media that is their caption |
    | `auto` | text until `EOS` or a begin token, as the model decides; behind that media, their end token, text again |

    For guidance, a document has a second row with its next media alone, after no text or the negative text. That is the
    only unconditional context of training. Edits have another row between these two, with the source image and without
    the text, or with the negative one.

    Args:
        model, tokenizer: Model and tokenizer of the pipeline.
        workspace: Memory that is kept for the next sampler.
        documents: Documents of any lengths.
        target: See above.
        device: Device of the model.
        generators: One for each document, for drawing text tokens and codes.
        decoding: Choice of text tokens; the maximum number of tokens covers all texts of a document together.
        making: Settings for making media of each modality; modalities that are missing here are not made.
        guidance: Guidance of media.
    """

    def __init__(
        self,
        model: TransfusionMoT,
        tokenizer: TextTokenizer,
        workspace: Workspace,
        documents: Sequence[OpenDocument],
        *,
        target: str,
        device: torch.device,
        generators: Sequence[torch.Generator | None] = (),
        decoding: Decoding | None = None,
        making: dict[str, Making] | None = None,
        guidance: Guidance | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.workspace = workspace
        self.documents = documents
        self.target = target
        self.decoding = decoding
        self.generators = generators
        self.making = making or {}
        self.guidance = guidance or Guidance()
        self.branches = self.guidance.branches if self.making else 1
        count = len(documents)
        max_new_tokens = decoding.max_new_tokens if decoding is not None else 0
        self._text_vocab_size = cast(TokenModality, model.modality(TEXT)).vocab_size
        self._tokens_left = [max_new_tokens] * count
        self._media_left = {name: [making.most] * count for name, making in self.making.items()}
        # Drawn in advance, so that a document's random numbers do not depend on when others end.
        self._uniform = torch.zeros(count, max_new_tokens)
        if decoding is not None and decoding.temperature > 0:
            self._uniform = random_rows(torch.rand, (max_new_tokens,), generators)

        rows = [self._laid_out(document.given) for document in documents]
        if target in (TEXT, AUTO) and not all(rows):
            raise UserError("there is nothing to continue: this model's tokenizer has no begin of text; give a prompt")
        less = [self._context(row) for row in range(count, count * self.branches)]
        longest = max(sum(map(self._num_slots, row)) for row in (*rows, *less))
        # Each item has a begin and an end token.
        media = sum(making.most * (making.num_slots + 2) for making in self.making.values())
        capacity = longest + max_new_tokens + media
        self.session = Session(model, workspace, rows=count * self.branches, capacity=capacity, device=device)
        for row, parts in enumerate(rows):
            self.session.feed(row, *parts)

    def run(self) -> None:
        """Write texts and make media, and add them to the documents. After an error the workspace is empty."""
        try:
            self._write_and_make()
        except BaseException:
            # If the memory was too small, a smaller batch needs all of it; and a step may be half recorded.
            self.workspace.release()
            raise
        self.workspace.finish()

    def _write_and_make(self) -> None:
        # The modality with which each document continues.
        phases = dict.fromkeys(range(len(self.documents)), TEXT if self.target == AUTO else self.target)
        while phases:
            for name in [TEXT, *self.making]:
                rows = [row for row, phase in phases.items() if phase == name]
                if not rows:
                    continue
                following = self._write_text(rows) if name == TEXT else self._make(name, rows)
                for row in rows:
                    del phases[row]
                phases |= following

    def _write_text(self, rows: list[int]) -> dict[int, str]:
        """Write in these documents => the modality with which each of them continues, unless it has ended."""
        assert self.decoding is not None
        eos, begins = self.tokenizer.eos_id, {self.tokenizer.begin_ids[name]: name for name in self.making}
        may_begin = {
            name: torch.tensor([self.target == AUTO and left[row] > 0 for row in rows])
            for name, left in self._media_left.items()
        }
        steps = max(self._tokens_left[row] for row in rows)
        # Each document continues its own random numbers; tokens beyond its remaining number are cut off.
        used = [self.decoding.max_new_tokens - self._tokens_left[row] for row in rows]
        uniform = torch.stack([self._uniform[row].roll(-first)[:steps] for row, first in zip(rows, used, strict=True)])
        written = self.session.write(
            TEXT,
            [rows],
            forbidden=forbidden_tokens(self.tokenizer, self._text_vocab_size, len(rows), may_begin),
            ends=[eos, *begins],
            decoding=self.decoding,
            uniform=uniform,
        )
        following = {}
        for row, ids in zip(rows, written, strict=True):
            ids = ids[: self._tokens_left[row]]
            self._tokens_left[row] -= len(ids)
            if text := self.tokenizer.decode(ids):
                self.documents[row].added.append(text)
            if ids[-1] in begins:
                following[row] = begins[ids[-1]]
        return following

    def _make(self, name: str, rows: list[int]) -> dict[int, str]:
        """Make one item of a modality in each of these documents => the documents that continue with text."""
        session, making = self.session, self.making[name]
        count = len(self.documents)
        branches = [[branch * count + row for row in rows] for branch in range(self.branches)]
        every_row = [row for branch in branches for row in branch]
        for row in every_row[len(rows) :]:
            session.clear(row)
            session.feed(row, *self._context(row))
        for row in every_row:
            session.feed(row, TokenRun(TEXT, [self.tokenizer.begin_ids[name]], []))
        contents: list[Tensor | list[int]]
        if making.denoise is not None:
            session.read(every_row)
            contents = list(making.denoise(self._predict(name, branches), rows))
        else:
            contents = list(self._write_codes(name, branches))
        goes_on = self.target == AUTO
        for place, row in enumerate(rows):
            media = Media(name, contents[place])
            self.documents[row].added.append(media)
            self._media_left[name][row] -= 1
            if goes_on:
                # Codes were fed while they were written.
                if making.denoise is not None:
                    session.feed(row, LatentSpan(media, is_copy=False))
                session.feed(row, TokenRun(TEXT, [self.tokenizer.end_ids[name]], []))
        return {row: TEXT for row in rows if goes_on and self._tokens_left[row]}

    def _write_codes(self, name: str, branches: list[list[int]]) -> list[list[int]]:
        """Write the codes of one item for each document of the first branch, including `start` and `end`."""
        making, modality = self.making[name], cast(TokenModality, self.model.modality(name))
        assert making.decoding is not None
        start, end = modality.start_id, modality.end_id
        rows = branches[0]
        for row in (row for branch in branches for row in branch):
            self.session.feed(row, TokenRun(name, [start], []))
        forbidden = torch.zeros(len(rows), modality.vocab_size, dtype=torch.bool)
        forbidden[:, start] = True
        forbidden[:, end] = not making.is_ragged
        most_codes = making.num_slots - 1
        uniform = torch.zeros(len(rows), most_codes)
        if making.decoding.temperature > 0:
            uniform = random_rows(torch.rand, (most_codes,), [self.generators[row] for row in rows])
        written = self.session.write(
            name,
            branches,
            forbidden=forbidden,
            ends=[end] if making.is_ragged else [],
            decoding=making.decoding,
            uniform=uniform,
            guidance=self.guidance if len(branches) > 1 else None,
        )
        for row, ids in zip(rows, written, strict=True):
            if ids[-1] != end:
                # Written, but not read yet.
                self.session.feed(row, TokenRun(name, ids[-1:], []))
        return [[start, *(ids if ids[-1] != end else ids[:-1]), end] for ids in written]

    def _predict(self, name: str, branches: list[list[int]]) -> Predict:
        """The guided prediction for the next latents of the first branch's rows."""
        denoisers: dict[bool, Callable[[Tensor, float], Tensor]] = {}

        def predict(noisy_latents: Tensor, timestep: Tensor) -> Tensor:
            time = float(timestep)
            guided = self.guidance.at(time)
            if guided not in denoisers:
                rows = [row for branch in branches for row in branch] if guided else branches[0]
                denoisers[guided] = self.session.denoiser(name, rows, noisy_latents)
            prediction = denoisers[guided](noisy_latents, time)
            return self.guidance.combine(prediction.chunk(len(branches))) if guided else prediction

        return predict

    def _context(self, row: int) -> list[TokenRun | LatentSpan]:
        """The context of the next media in an unconditional row."""
        branch, number = divmod(row, len(self.documents))
        document = self.documents[number]
        kept = [item for item in document.given if isinstance(item, Media)] if self.guidance.has_source(branch) else []
        return self._laid_out([*kept, document.negative])

    def _laid_out(self, items: Sequence[str | Media]) -> list[TokenRun | LatentSpan]:
        """Texts and media as in training, without the end of the document."""
        segments = [self.tokenizer.encode(item) if isinstance(item, str) else item for item in join_texts(items)]
        return list(lay_out([self.tokenizer.document_start, *segments], self.tokenizer))

    def _num_slots(self, part: TokenRun | LatentSpan) -> int:
        if isinstance(part, TokenRun):
            return len(part.ids)
        _, height, width = part.media.content.shape
        return height * width // self.model.architecture.modalities[part.media.modality].patch_size ** 2


def forbidden_tokens(tokenizer: TextTokenizer, vocab_size: int, count: int, may_begin: dict[str, Tensor]) -> Tensor:
    """Tokens that rows may not write: special tokens, and ids that the tokenizer does not know.

    Allowed special tokens are the end of the text, and the begin tokens in `may_begin`.

    Args:
        tokenizer: The model's tokenizer.
        vocab_size: The model's vocabulary size.
        count: Number of rows B.
        may_begin: For each modality whose media may begin: bool [B], the rows in which they may.

    Returns:
        Bool [B, V].
    """
    forbidden = torch.zeros(count, vocab_size, dtype=torch.bool)
    forbidden[:, tokenizer.vocab_size :] = True
    forbidden[:, tokenizer.special_ids] = True
    forbidden[:, tokenizer.eos_id] = False
    for name, allowed in may_begin.items():
        forbidden[:, tokenizer.begin_ids[name]] = ~allowed
    return forbidden
