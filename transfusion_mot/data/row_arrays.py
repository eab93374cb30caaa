"""Arrays of a batch on the host, and filling of rows with the slots of documents."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray

from transfusion_mot.config import TEXT, DataConfig, ModelConfig
from transfusion_mot.data.batch import Batch, Rows
from transfusion_mot.data.documents import Document, LatentMedia, Piece
from transfusion_mot.data.layout import LatentSpan, Media, lay_out
from transfusion_mot.data.mixture import Sources
from transfusion_mot.data.tokenizer import TextTokenizer
from transfusion_mot.losses import IGNORE_INDEX
from transfusion_mot.models.inputs import LatentInput, ModalityInput, Slots, TokenInput
from transfusion_mot.models.positions import PositionCounter


@dataclass(frozen=True)
class Block:
    """The slots of one modality in a row.

    Attributes:
        start: Its first slot among those of all modalities.
        capacity: Tokens, or media slots K.
        latent_shape: [C, Y, X] of a media slot; None for tokens.
        grid: Rows and columns of patches of a media slot; (1, 1) for tokens.
        is_read: Whether it holds clean media of another modality, without a loss.
    """

    start: int
    capacity: int
    latent_shape: tuple[int, int, int] | None = None
    grid: tuple[int, int] = (1, 1)
    is_read: bool = False

    @property
    def slots_each(self) -> int:
        """Slots of a token (1) or of a media slot (its patches)."""
        return self.grid[0] * self.grid[1]

    @property
    def num_slots(self) -> int:
        """Slots of the modality in a row."""
        return self.capacity * self.slots_each


@dataclass(frozen=True)
class RowShape:
    """The layout of a row.

    Attributes:
        blocks: Block of each modality, in the order of their slots.
        rope: Kind of rotary positions, `1d` or `3d`.
    """

    blocks: dict[str, Block]
    rope: Literal["1d", "3d"]

    @classmethod
    def of(
        cls,
        model: ModelConfig,
        slots: dict[str, int],
        latent_shapes: dict[str, list[tuple[int, int, int]]],
        bucket: int,
    ) -> Self:
        """Rows of a model whose latents have these shapes [C, Y, X] in each bucket; latents that are only read have the
        shape of their modality."""
        blocks, start = {}, 0
        for name in model.stream_order:
            modality = model.modalities[name]
            block = Block(start, slots[name])
            if modality.objective != "next_token":
                shape, patch = latent_shapes[model.content_of(name)][bucket], modality.patch_size
                grid = shape[1] // patch, shape[2] // patch
                block = Block(start, slots[name], shape, grid, is_read=modality.objective == "read")
            blocks[name] = block
            start += block.num_slots
        return cls(blocks, model.rope)

    @classmethod
    def of_batch(cls, model: ModelConfig, batch: Batch) -> Self:
        """The rows of a batch."""
        slots: dict[str, int] = {}
        latent_shapes: dict[str, list[tuple[int, int, int]]] = {}
        for name, given in batch.inputs.items():
            if isinstance(given, TokenInput):
                slots[name] = given.ids.shape[1]
            else:
                slots[name], channels, height, width = given.latents.shape[1:]
                latent_shapes[name] = [(channels, height, width)]
        return cls.of(model, slots, latent_shapes, 0)

    @property
    def num_slots(self) -> int:
        """Slots S of a row."""
        return sum(block.num_slots for block in self.blocks.values())

    @property
    def causal_pairs(self) -> float:
        """Maximum number of attending pairs of slots: a row is one document with bidirectional spans."""
        inside = sum(b.capacity * b.slots_each * (b.slots_each - 1) / 2 for b in self.blocks.values())
        return self.num_slots * (self.num_slots + 1) / 2 + inside

    def __str__(self) -> str:
        """For example "48 text tokens + 4 image slots of 64 patches"."""
        return " + ".join(
            f"{block.capacity} {name} tokens"
            if block.latent_shape is None
            else f"{block.capacity} {name} slots of {block.slots_each} patches"
            for name, block in self.blocks.items()
        )


class CodeNoise(NamedTuple):
    """Noise of the codes of a modality, see `ModalityConfig.code_noise_prob`.

    Attributes:
        prob: Chance that a random code replaces a code.
        num_codes: Number of codes; higher ids, such as `start`, are kept.
    """

    prob: float
    num_codes: int


class RowArrays:
    """The arrays of some rows."""

    def __init__(
        self,
        shape: RowShape,
        num_rows: int,
        tokenizer: TextTokenizer,
        config: DataConfig,
        bucket: int,
        code_noise: Mapping[str, CodeNoise],
    ) -> None:
        self.shape = shape
        self.tokenizer = tokenizer
        self.code_noise = code_noise
        slots = shape.num_slots
        self.document_ids = np.full((num_rows, slots), -1)
        self.order = np.zeros((num_rows, slots), dtype=np.int64)
        self.span_ids = np.full((num_rows, slots), -1)
        self.source_ids = np.full((num_rows, slots), -1, dtype=np.int16)
        self.rope_positions = np.zeros((num_rows, slots, 3)[: 2 if shape.rope == "1d" else 3], dtype=np.int64)
        self.ids: dict[str, NDArray[np.int64]] = {}
        self.labels: dict[str, NDArray[np.int64]] = {}
        self.latents: dict[str, NDArray[np.float32]] = {}
        self.noise: dict[str, NDArray[np.float32]] = {}
        self.timesteps: dict[str, torch.Tensor] = {}
        self.mask: dict[str, NDArray[np.bool_]] = {}
        self.copies: dict[str, NDArray[np.bool_]] = {}
        self.conditions: dict[str, NDArray[np.bool_]] = {}
        self.media: dict[str, NDArray[np.uint8]] = {}
        # Id of the first span of each modality of latents.
        self.first_span: dict[str, int] = {}
        spans = 0
        for name, block in shape.blocks.items():
            rows = num_rows, block.capacity
            if block.latent_shape is None:
                self.ids[name] = np.full(rows, tokenizer.pad_id if name == TEXT else 0)
                self.labels[name] = np.full(rows, IGNORE_INDEX)
                continue
            self.first_span[name] = spans
            spans += block.capacity
            self.latents[name] = np.zeros((*rows, *block.latent_shape), dtype=np.float32)
            self.timesteps[name] = torch.zeros(rows)
            if not block.is_read:
                self.noise[name] = np.empty_like(self.latents[name])
            self.mask[name] = np.zeros(rows, dtype=np.bool_)
            if config.has_copies:
                self.copies[name] = np.zeros(rows, dtype=np.bool_)
            if config.has_edits:
                self.conditions[name] = np.zeros(rows, dtype=np.bool_)
            if config.latents == "online":
                height, width = config.image_sizes[bucket]
                self.media[name] = np.zeros((*rows, height, width, 3), dtype=np.uint8)

    def rows(self) -> Rows:
        """The rows as tensors."""
        inputs: dict[str, ModalityInput] = {}
        for name, block in self.shape.blocks.items():
            if block.latent_shape is None:
                inputs[name] = TokenInput(torch.from_numpy(self.ids[name]), torch.from_numpy(self.labels[name]))
                continue
            inputs[name] = LatentInput(
                torch.from_numpy(self.latents[name]),
                self.timesteps[name],
                torch.from_numpy(self.noise[name]) if name in self.noise else None,
                torch.from_numpy(self.mask[name]),
                torch.from_numpy(self.copies[name]) if name in self.copies else None,
                torch.from_numpy(self.conditions[name]) if name in self.conditions else None,
            )
        slots = Slots(**{field: torch.from_numpy(getattr(self, field)) for field in Slots._fields})
        return Rows(Batch(inputs, slots), {name: torch.from_numpy(array) for name, array in self.media.items()})


class Row:
    """A row being filled.

    Attributes:
        free: Remaining tokens or media slots, by modality.
        num_documents: Number of its documents, or pieces of them.
    """

    def __init__(self, arrays: RowArrays, row: int) -> None:
        self.arrays = arrays
        self.row = row
        self.free = {name: block.capacity for name, block in arrays.shape.blocks.items()}
        # Source, media, and media slot of each of its spans in its modality.
        self._media: dict[str, list[tuple[int, Media, list[int]]]] = {name: [] for name in arrays.noise}
        # Tokens of each modality, written at once at the end.
        self._ids: dict[str, list[int]] = {name: [] for name in arrays.ids}
        self._labels: dict[str, list[int]] = {name: [] for name in arrays.labels}
        # Tokens that may be replaced by random ones.
        self._replaceable: dict[str, list[slice]] = {name: [] for name in arrays.code_noise}
        self.num_documents = 0

    def add(self, piece: Piece, document: Document, source: int) -> None:
        """Place a piece of a document of a source."""
        positions = PositionCounter(self.arrays.shape.rope)
        # Rotary positions of the previous media slot; its copy has the same.
        rope_positions: NDArray[np.int64] | None = None
        laid_out = lay_out(
            piece.segments,
            self.arrays.tokenizer,
            piece.next_token,
            document.stream,
            has_token_loss=document.has_token_loss,
        )
        for part in laid_out:
            if not isinstance(part, LatentSpan):
                self._take(part.modality, len(part.ids), source, *positions.text(len(part.ids)))
                if part.is_last and part.modality in self._replaceable:
                    first = len(self._ids[part.modality])
                    self._replaceable[part.modality].append(slice(first, first + len(part.ids)))
                self._ids[part.modality] += part.ids
                self._labels[part.modality] += part.labels
                continue
            name = part.modality
            block = self.arrays.shape.blocks[name]
            slot = block.capacity - self.free[name]
            if part.is_copy:
                assert rope_positions is not None
                order = positions.take_order(block.slots_each)
                self._media[part.media.modality][-1][2].append(slot)
            else:
                order, rope_positions = positions.image(*block.grid)
                self._media[part.media.modality].append((source, part.media, [slot]))
            self._take(name, 1, source, order, rope_positions)
            first = block.start + slot * block.slots_each
            self.arrays.span_ids[self.row, first : first + block.slots_each] = self.arrays.first_span[name] + slot
        self.num_documents += 1

    def _take(
        self,
        name: str,
        count: int,
        source: int,
        order: NDArray[np.int64],
        rope_positions: NDArray[np.int64],
    ) -> None:
        """Set the ids of the next `count` tokens or media slots of a modality."""
        block = self.arrays.shape.blocks[name]
        used = block.capacity - self.free[name]
        self.free[name] -= count
        first = block.start + used * block.slots_each
        where = self.row, slice(first, first + count * block.slots_each)
        arrays = self.arrays
        arrays.order[where], arrays.rope_positions[where] = order, rope_positions
        arrays.document_ids[where] = self.num_documents
        arrays.source_ids[where] = source

    def finish(
        self,
        sources: Sources,
        rng: np.random.Generator,
        timesteps_from_uniform: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        """Write the tokens, draw noise and timesteps of the latents, then replace codes, one modality at a time."""
        for name, ids in self._ids.items():
            self.arrays.ids[name][self.row, : len(ids)] = ids
            self.arrays.labels[name][self.row, : len(ids)] = self._labels[name]
        for name, media in self._media.items():
            self._draw(name, media, sources, rng, timesteps_from_uniform)
        for name, noise in self.arrays.code_noise.items():
            self._replace_codes(self.arrays.ids[name][self.row], self._replaceable[name], noise, rng)

    @staticmethod
    def _replace_codes(
        ids: NDArray[np.int64], replaceable: list[slice], noise: CodeNoise, rng: np.random.Generator
    ) -> None:
        """Replace some codes [T] in place. Labels keep the true codes."""
        is_replaced = np.zeros(len(ids), dtype=np.bool_)
        for where in replaceable:
            is_replaced[where] = True
        is_replaced &= (ids < noise.num_codes) & (rng.random(len(ids)) < noise.prob)
        ids[is_replaced] = rng.integers(noise.num_codes, size=is_replaced.sum())

    def _draw(
        self,
        name: str,
        placed: list[tuple[int, Media, list[int]]],
        sources: Sources,
        rng: np.random.Generator,
        timesteps_from_uniform: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        arrays, row = self.arrays, self.row
        noise = arrays.noise[name][row]
        max_timesteps = torch.ones(len(noise))
        # The number of draws is constant, so that they do not depend on how full the row is.
        uniform = torch.from_numpy(rng.random(len(noise), dtype=np.float32))
        posterior_noise = rng.standard_normal(noise.shape, dtype=np.float32)
        rng.standard_normal(dtype=np.float32, out=noise)
        for source, media, slots in placed:
            content: LatentMedia = media.content
            # As in sampling, media that are only read have no noise and use the mean of the posterior.
            spread = 0.0 if media.is_condition else posterior_noise[slots[0]]
            latents = spread
            encoded = sources.sources[source].encoded.get(name)
            if encoded is not None:
                assert encoded.kind == "latents"
                mean, std = encoded.posterior(content.index, content.flipped)
                latents = mean + std * spread
            for span, slot in zip(media.spans, slots, strict=True):
                where = row, slot
                arrays.latents[span.modality][where] = latents
                if content.pixels is not None:
                    # The device computes the latents from these draws and the pixels.
                    arrays.media[span.modality][where] = content.pixels
                if span.is_copy:
                    arrays.copies[span.modality][where] = True
                elif media.is_condition:
                    arrays.conditions[span.modality][where] = True
                else:
                    arrays.mask[span.modality][where] = True
                if span.modality == name:
                    max_timesteps[slot] = 0.0 if span.is_copy else content.max_timestep
        arrays.timesteps[name][row] = timesteps_from_uniform(uniform) * max_timesteps
