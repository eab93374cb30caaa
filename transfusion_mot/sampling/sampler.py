"""One way through every task: documents are read, then text is written and images are painted until they end.

Shapes: B images, C latent channels, Y and X latent height and width.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from transfusion_mot.data.documents import join_texts
from transfusion_mot.data.layout import TextRun, lay_out
from transfusion_mot.data.tokenizer import TextTokenizer
from transfusion_mot.models.transfusion import TransfusionMoT
from transfusion_mot.sampling.guidance import Guidance
from transfusion_mot.sampling.rows import random_rows
from transfusion_mot.sampling.session import Segment, Session
from transfusion_mot.sampling.text import Decoding
from transfusion_mot.sampling.workspace import Workspace

Task = Literal["image", "text", "auto"]
Predict = Callable[[Tensor, Tensor], Tensor]
Denoise = Callable[[Predict, list[int]], Tensor]


@dataclass
class Document:
    """What is given of a document, and what the model adds to it: texts and clean latents [C, Y, X] in reading order.

    Attributes:
        given: What it begins with.
        negative: Text that guidance leads away from, in place of no text.
        added: What follows.
    """

    given: list[str | Tensor]
    negative: str = ""
    added: list[str | Tensor] = field(default_factory=list)


class _Given(NamedTuple):
    """The latents [C, Y, X] of an image that is read clean, so that it needs no copy."""

    latents: Tensor
    copied: bool = False


class Sampler:
    """Goes on with documents until each of them ends.

    Each is in one of two phases, writing and painting, and those in the same phase go on together. The task decides
    what follows:

    | task | what follows |
    | --- | --- |
    | `image` | `BOI`, an image |
    | `text` | text until `EOS`; behind an image that is its caption |
    | `auto` | text until `EOS` or `BOI`, as the model decides; behind `BOI` an image, `EOI`, and text again |

    For guidance, a document has a second row, in which its next image stands alone, behind no text or the negative one:
    the only context that training drops to, whatever is before an image.

    Args:
        model, tokenizer: Of the pipeline.
        workspace: Memory that stays for the next sampler.
        documents: Of any lengths.
        task: See above.
        latent_shape: [C, Y, X] of an image to paint.
        generators: One a document, for what is drawn in writing.
        decoding: Of writing; its number of tokens is for all texts of a document together.
        denoise: Does the painting: (predict, numbers of B documents) => clean latents [B, C, Y, X]. `predict` is
            (noisy latents [B, C, Y, X], timestep []) => guided prediction; a timestep on the CPU waits for no device.
        guidance: Of painting.
        max_images: Most images painted in a document.
        device: Where the model is.
    """

    def __init__(
        self,
        model: TransfusionMoT,
        tokenizer: TextTokenizer,
        workspace: Workspace,
        documents: Sequence[Document],
        task: Task,
        latent_shape: tuple[int, int, int],
        device: torch.device,
        *,
        generators: Sequence[torch.Generator | None] = (),
        decoding: Decoding | None = None,
        denoise: Denoise | None = None,
        guidance: Guidance | None = None,
        max_images: int = 0,
    ) -> None:
        self.tokenizer = tokenizer
        self.workspace = workspace
        self.documents = documents
        self.task = task
        self.decoding = decoding
        self.denoise = denoise
        self.guidance = guidance or Guidance()
        self.branches = self.guidance.branches if max_images else 1
        count = len(documents)
        max_new_tokens = decoding.max_new_tokens if decoding is not None else 0
        self._tokens_left = [max_new_tokens] * count
        self._images_left = [max_images] * count
        # All at once, so that a document's numbers do not depend on when others end.
        self._uniform = torch.zeros(count, max_new_tokens)
        if decoding is not None and decoding.temperature > 0:
            self._uniform = random_rows(torch.rand, (max_new_tokens,), generators)

        patch_size = model.architecture.patch_size

        def slots(part: Segment) -> int:
            return len(part) if isinstance(part, list) else math.prod(part.shape[1:]) // patch_size**2

        rows = [laid_out(tokenizer, document.given) for document in documents]
        alone = [laid_out(tokenizer, [document.negative]) for document in documents] if self.branches > 1 else []
        longest = max(sum(map(slots, row)) for row in (*rows, *alone))
        # Each image comes with BOI and EOI.
        capacity = longest + max_new_tokens + max_images * (math.prod(latent_shape[1:]) // patch_size**2 + 2)
        self.session = Session(model, workspace, count * self.branches, capacity, device)
        for row, segments in enumerate(rows):
            self.session.feed(row, *segments)

    def run(self) -> None:
        """Write and paint; what is added stands in the documents."""
        everyone = list(range(len(self.documents)))
        writing: list[int] = [] if self.task == "image" else everyone
        painting: list[int] = everyone if self.task == "image" else []
        while writing or painting:
            if writing:
                painting = self._write(writing)
            if painting:
                self._paint(painting)
            writing = [row for row in painting if self.task == "auto" and self._tokens_left[row]]
            painting = []
        self.workspace.finish()

    def _write(self, rows: list[int]) -> list[int]:
        """Write in these documents => those that go on with an image."""
        assert self.decoding is not None
        eos, boi = self.tokenizer.eos_id, self.tokenizer.boi_id
        may_paint = [self.task == "auto" and self._images_left[row] > 0 for row in rows]
        steps = max(self._tokens_left[row] for row in rows)
        # Each goes on with its numbers where it stopped; what is written beyond the tokens it has left is cut off.
        used = [self.decoding.max_new_tokens - self._tokens_left[row] for row in rows]
        uniform = torch.stack([self._uniform[row].roll(-first)[:steps] for row, first in zip(rows, used, strict=True)])
        forbidden = forbidden_tokens(self.tokenizer, may_paint)
        painting = []
        written = self.session.write(rows, forbidden, [eos, boi], self.decoding, uniform)
        for row, ids in zip(rows, written, strict=True):
            ids = ids[: self._tokens_left[row]]
            self._tokens_left[row] -= len(ids)
            if text := self.tokenizer.decode(ids):
                self.documents[row].added.append(text)
            if ids[-1] == boi:
                painting.append(row)
        return painting

    def _paint(self, rows: list[int]) -> None:
        """Paint an image in each of these documents."""
        session, count = self.session, len(self.documents)
        branches = [[branch * count + row for row in rows] for branch in range(self.branches)]
        for row in (row for branch in branches[1:] for row in branch):
            session.clear(row)
            session.feed(row, *laid_out(self.tokenizer, [self.documents[row % count].negative]))
        every_row = [row for branch in branches for row in branch]
        for row in every_row:
            session.feed(row, [self.tokenizer.boi_id])
        session.read(every_row)
        assert self.denoise is not None
        latents = self.denoise(self._predict(branches), rows)
        for row, image in zip(rows, latents, strict=True):
            self.documents[row].added.append(image)
            self._images_left[row] -= 1
        if self.task == "auto":
            for row, image in zip(rows, latents, strict=True):
                session.feed(row, image, [self.tokenizer.eoi_id])

    def _predict(self, branches: list[list[int]]) -> Predict:
        """The guided prediction for the next image of the first branch's rows."""
        denoisers: dict[bool, Callable[[Tensor, float], Tensor]] = {}

        def predict(noisy_latents: Tensor, timestep: Tensor) -> Tensor:
            time = float(timestep)
            guided = self.guidance.at(time)
            if guided not in denoisers:
                rows = [row for branch in branches for row in branch] if guided else branches[0]
                denoisers[guided] = self.session.denoiser(rows, noisy_latents)
            prediction = denoisers[guided](noisy_latents, time)
            return self.guidance.combine(prediction.chunk(len(branches))) if guided else prediction

        return predict


def laid_out(tokenizer: TextTokenizer, items: Sequence[str | Tensor]) -> list[Segment]:
    """Texts and latents => segments as in training, without the end of the document."""
    given = [_Given(item) if isinstance(item, Tensor) else tokenizer.encode(item) for item in join_texts(items)]
    parts = lay_out([[tokenizer.bos_id], *given], tokenizer)
    return [part.ids if isinstance(part, TextRun) else part.image.latents for part in parts]


def forbidden_tokens(tokenizer: TextTokenizer, may_paint: Sequence[bool]) -> Tensor:
    """Which special tokens rows may not write: all but the end of the text, and of an image's begin where it may be.

    Returns:
        Bool [B, V].
    """
    forbidden = torch.zeros(len(may_paint), tokenizer.vocab_size, dtype=torch.bool)
    forbidden[:, tokenizer.special_ids] = True
    forbidden[:, tokenizer.eos_id] = False
    forbidden[:, tokenizer.boi_id] = ~torch.tensor(may_paint)
    return forbidden
