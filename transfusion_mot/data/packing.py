"""Documents into full rows: the row of a lane at a step is a pure function of (seed, lane, step, cursors of the lane).

Lane r of R takes documents r, r + R, r + 2R, ... of every source's shuffled sequence, so that all lanes together read
each document once per epoch. A lane's whole state is one cursor pair per source.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from transfusion_mot.config import DataConfig
from transfusion_mot.data.batch import Batch
from transfusion_mot.data.latents import LatentCache
from transfusion_mot.data.sources import TextDocuments
from transfusion_mot.data.tokenizer import TextTokenizer
from transfusion_mot.losses import IGNORE_INDEX
from transfusion_mot.models.positions import PositionCounter

Cursors = NDArray[np.int64]

# Keeps the draws of layouts and of epochs apart from those of rows, which count steps in the same place.
_LAYOUT_DRAWS = 2**62
_SOURCE_DRAWS = 2**62 + 1
_EPOCH_DRAWS = 2**63

# What a row reports: documents with and without image, text slots filled, slots left empty, captions cut.
COUNTED = ("images", "texts", "text_tokens", "pad_slots", "truncated_captions")


@dataclass(frozen=True)
class Sources:
    """What rows are filled from: captioned images and texts, each with its relative weight."""

    images: list[LatentCache]
    image_weights: list[float]
    texts: list[TextDocuments] = field(default_factory=list)
    text_weights: list[float] = field(default_factory=list)

    @property
    def count(self) -> int:
        """Number of sources, images before texts."""
        return len(self.images) + len(self.texts)


@dataclass
class Document:
    """One training item: text before an image, the image, text behind it; or text alone.

    Attributes:
        before, behind: Token ids; `behind` is empty for text alone.
        image: (source, index) of the latents, or None.
        max_timestep: Highest timestep of the image.
        truncated: Whether its caption was cut.
    """

    before: list[int]
    behind: list[int] = field(default_factory=list)
    image: tuple[int, int] | None = None
    max_timestep: float = 1.0
    truncated: bool = False


class Packer:
    """Builds rows.

    Args:
        sources: What rows are filled from.
        tokenizer: Turns text into ids and knows the special ones.
        config: Layout of a row and the draws that shape documents.
        rope: Kind of rotary positions.
        patch_size: Latent pixels per side of a patch.
        num_lanes: Rows R of a global batch.
        seed: Of the run.
        timesteps_from_uniform: The objective's distribution of timesteps.
    """

    def __init__(
        self,
        sources: Sources,
        tokenizer: TextTokenizer,
        config: DataConfig,
        rope: Literal["1d", "3d"],
        patch_size: int,
        num_lanes: int,
        seed: int,
        timesteps_from_uniform: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        self.sources = sources
        self.tokenizer = tokenizer
        self.config = config
        self.rope: Literal["1d", "3d"] = rope
        self.num_lanes = num_lanes
        self.seed = seed
        self.timesteps_from_uniform = timesteps_from_uniform
        self.latent_shape = sources.images[0].mean.shape[1:]
        self.patch_rows, self.patch_columns = (size // patch_size for size in self.latent_shape[1:])
        self.patches = self.patch_rows * self.patch_columns
        self._permutations: dict[tuple[int, int], NDArray[np.int64]] = {}
        self._texts_begun: dict[int, tuple[int, int, list[int]]] = {}

    def initial_cursors(self) -> Cursors:
        """Cursors of a lane that has read nothing: [sources, 2], documents taken and tokens of the next one used."""
        return np.zeros((self.sources.count, 2), dtype=np.int64)

    def row(self, lane: int, step: int, cursors: Cursors) -> tuple[Batch, Cursors, Counter[str]]:
        """The row of `lane` at `step` => (batch of one row, cursors behind it, what was counted)."""
        rng = self._rng(lane, step)
        cursors = cursors.copy()
        counts: Counter[str] = Counter()
        row = _Row(self)
        while row.images < self.config.images_per_row:
            taken = int(cursors[: len(self.sources.images), 0].sum())
            source = self._choose(self.sources.image_weights, lane, taken, 0)
            document = self._image_document(source, lane, int(cursors[source, 0]))
            if len(document.before) + len(document.behind) > row.free_text_slots:
                break  # The cursors stay as they are: it comes first in the next row.
            row.add(document)
            cursors[source, 0] += 1
            counts["images"] += 1
            counts["truncated_captions"] += document.truncated
        # A text of one token would have no label.
        while self.sources.texts and row.free_text_slots >= 2:
            self._add_text(lane, row, cursors, counts)
        counts["text_tokens"] += self.config.text_slots - row.free_text_slots
        counts["pad_slots"] += row.free_text_slots + (self.config.images_per_row - row.images) * self.patches
        return row.finish(rng), cursors, counts

    def _image_document(self, source: int, lane: int, taken: int) -> Document:
        """The lane's next document of a source of images.

        Its layout has draws of its own, which do not change while it waits for a row with room.
        """
        config, tokenizer = self.config, self.tokenizer
        index = self._index(source, len(self.sources.images[source]), lane, taken)
        rng = self._rng(lane, _LAYOUT_DRAWS, taken, source)
        caption_first, prompt_dropped = rng.random(2) < (config.caption_first_prob, config.prompt_dropout_prob)
        caption = tokenizer.encode(self.sources.images[source].captions[index])
        truncated = len(caption) > config.max_caption_tokens
        caption = caption[: config.max_caption_tokens]
        bos, eos, boi, eoi = tokenizer.bos_id, tokenizer.eos_id, tokenizer.boi_id, tokenizer.eoi_id
        image = (source, index)
        if not caption_first:
            # Noised less, so that the caption can be read off it (Transfusion, section 4.3.4).
            behind, max_timestep = [eoi, *caption, eos], config.image_first_max_timestep
            return Document([bos, boi], behind, image, max_timestep, truncated)
        if prompt_dropped:
            # Ends at EOI, without a label there: that the image has no caption is not for the model to learn.
            return Document([bos, boi], [eoi], image)
        return Document([bos, *caption, boi], [eoi, eos], image, truncated=truncated)

    def _rng(self, lane: int, purpose: int, number: int = 0, source: int = 0) -> np.random.Generator:
        """Draws of their own for every purpose: a step of a row, a layout, a choice of source, an epoch."""
        return np.random.Generator(np.random.Philox(key=[self.seed, lane], counter=[0, number, source, purpose]))

    def _choose(self, weights: list[float], lane: int, taken: int, first: int) -> int:
        """Which source, counted from source `first`, the lane's next document comes from.

        A function of how many documents it has taken, not of the row.
        """
        if len(weights) == 1:
            return 0
        rng = self._rng(lane, _SOURCE_DRAWS, taken, first)
        cumulative = np.cumsum(weights)
        return int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))

    def _add_text(self, lane: int, row: "_Row", cursors: Cursors, counts: Counter[str]) -> None:
        """Add the next text, cut where the row ends; its rest begins the lane's next row."""
        first = len(self.sources.images)
        begun = np.flatnonzero(cursors[first:, 1])
        total = int(cursors[first:, 0].sum())
        choice = int(begun[0]) if len(begun) else self._choose(self.sources.text_weights, lane, total, first)
        source = first + choice
        taken, used = cursors[source]
        tokens = self._text_tokens(lane, choice, self._index(source, len(self.sources.texts[choice]), lane, taken))
        tokens = tokens[used:]
        room = row.free_text_slots
        # The token behind the cut is still the label of the last one before it, and the first input of the rest.
        row.add(Document(tokens[:room]), next_token=tokens[room] if len(tokens) > room else IGNORE_INDEX)
        if len(tokens) > room:
            cursors[source, 1] += room
        else:
            cursors[source] = taken + 1, 0
            counts["texts"] += 1

    def _text_tokens(self, lane: int, choice: int, index: int) -> list[int]:
        """Token ids of a text; kept until the lane asks for another, because a long one fills many rows."""
        kept = self._texts_begun.get(lane)
        if kept is None or kept[:2] != (choice, index):
            tokenizer = self.tokenizer
            tokens = [tokenizer.bos_id, *tokenizer.encode(self.sources.texts[choice].text(index)), tokenizer.eos_id]
            kept = self._texts_begun[lane] = (choice, index, tokens)
        return kept[2]

    def _index(self, source: int, length: int, lane: int, taken: int) -> int:
        """Which item of a source is the lane's next: one global permutation per epoch, dealt out to the lanes."""
        epoch, position = divmod(lane + int(taken) * self.num_lanes, length)
        if (source, epoch) not in self._permutations:
            # Lanes are seldom more than an epoch of a source apart; what is older can be drawn again.
            self._permutations = {
                key: value for key, value in self._permutations.items() if key[0] != source or key[1] >= epoch - 1
            }
            self._permutations[source, epoch] = self._rng(0, _EPOCH_DRAWS, epoch, source).permutation(length)
        return int(self._permutations[source, epoch][position])


class _Row:
    """A row being filled."""

    def __init__(self, packer: Packer) -> None:
        self.packer = packer
        config = packer.config
        self.text_slots, self.image_slots = config.text_slots, config.images_per_row
        slots = self.text_slots + self.image_slots * packer.patches
        self.text_ids = np.full(self.text_slots, packer.tokenizer.pad_id)
        self.text_labels = np.full(self.text_slots, IGNORE_INDEX)
        self.document_ids = np.full(slots, -1)
        self.order = np.zeros(slots, dtype=np.int64)
        self.span_ids = np.full(slots, -1)
        self.rope_positions = np.zeros((slots,) if packer.rope == "1d" else (slots, 3), dtype=np.int64)
        self.image_items: list[tuple[int, int]] = []
        self.max_timesteps = np.ones(self.image_slots, dtype=np.float32)
        self.text_used = 0
        self.documents = 0

    @property
    def images(self) -> int:
        return len(self.image_items)

    @property
    def free_text_slots(self) -> int:
        return self.text_slots - self.text_used

    def add(self, document: Document, next_token: int = IGNORE_INDEX) -> None:
        """Place a document; `next_token` is the label of its last token."""
        packer = self.packer
        counter = PositionCounter(packer.rope)
        self._add_text(document.before, counter)
        if document.image is None:
            self.text_labels[self.text_used - 1] = next_token
        else:
            # The input BOI has no label: what follows it is an image (Transfusion, footnote 8).
            start = self.text_slots + self.images * packer.patches
            slots = slice(start, start + packer.patches)
            self.order[slots], self.rope_positions[slots] = counter.image(packer.patch_rows, packer.patch_columns)
            self.document_ids[slots] = self.documents
            self.span_ids[slots] = self.images
            self.max_timesteps[self.images] = document.max_timestep
            self.image_items.append(document.image)
            self._add_text(document.behind, counter)
        self.documents += 1

    def _add_text(self, tokens: list[int], counter: PositionCounter) -> None:
        slots = slice(self.text_used, self.text_used + len(tokens))
        self.text_ids[slots] = tokens
        self.text_labels[slots] = [*tokens[1:], IGNORE_INDEX]
        self.order[slots], self.rope_positions[slots] = counter.text(len(tokens))
        self.document_ids[slots] = self.documents
        self.text_used += len(tokens)

    def finish(self, rng: np.random.Generator) -> Batch:
        """Draw what is random about the images => a batch of one row."""
        packer = self.packer
        shape = (self.image_slots, *packer.latent_shape)
        # Always the same number of draws, so that a row's draws do not depend on how full it is.
        uniform = torch.from_numpy(rng.random(self.image_slots, dtype=np.float32))
        posterior_noise = rng.standard_normal(shape, dtype=np.float32)
        noise = rng.standard_normal(shape, dtype=np.float32)
        latents = np.zeros(shape, dtype=np.float32)
        for slot, (source, index) in enumerate(self.image_items):
            documents = packer.sources.images[source]
            latents[slot] = documents.mean[index] + documents.std[index] * posterior_noise[slot]
        fields = {
            "text_ids": torch.from_numpy(self.text_ids),
            "text_labels": torch.from_numpy(self.text_labels),
            "latents": torch.from_numpy(latents),
            "noise": torch.from_numpy(noise),
            "timesteps": packer.timesteps_from_uniform(uniform) * torch.from_numpy(self.max_timesteps),
            "document_ids": torch.from_numpy(self.document_ids),
            "order": torch.from_numpy(self.order),
            "span_ids": torch.from_numpy(self.span_ids),
            "rope_positions": torch.from_numpy(self.rope_positions),
        }
        return Batch(**{name: value[None] for name, value in fields.items()})
