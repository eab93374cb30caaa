"""Documents into full rows: the row of a lane at a step is a pure function of (seed, lane, step, state of the lane).

Lane r of R takes documents r, r + R, r + 2R, ... of every pool's shuffled sequence, so that all lanes together read
each document once per epoch.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from transfusion_mot.config import DataConfig
from transfusion_mot.data.batch import Batch, Rows
from transfusion_mot.data.documents import Document, DocumentReader, ImageSegment, Piece
from transfusion_mot.data.lanes import LaneArray, LaneState, Waiting
from transfusion_mot.data.layout import TextRun, lay_out
from transfusion_mot.data.mixture import Pool, Sources, counter
from transfusion_mot.data.permutation import NUM_ROUNDS, permuted
from transfusion_mot.data.tokenizer import TextTokenizer
from transfusion_mot.errors import UserError
from transfusion_mot.losses import IGNORE_INDEX
from transfusion_mot.models.positions import PositionCounter

# Keeps the draws of layouts, sources, buckets and epochs apart from those of rows, which count steps in the same place.
_LAYOUT_DRAWS = 2**62
_SOURCE_DRAWS = 2**62 + 1
_BUCKET_DRAWS = 2**62 + 2
_EPOCH_DRAWS = 2**63

# What rows report besides the counters of sources: images, texts, slots filled with text and with patches (those of
# copies, too), slots left empty, captions cut.
COUNTED = ("images", "texts", "text_tokens", "image_tokens", "pad_slots", "truncated_captions")

# BOS or EOS or a word, BOI and EOI: nothing with an image is shorter.
_SHORTEST_DOCUMENT = 3
# So many documents in turn without anything readable are no accident.
_MOST_DROPPED = 1000


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
        self.patch_size = patch_size
        self.num_lanes = num_lanes
        self.seed = seed
        self.timesteps_from_uniform = timesteps_from_uniform
        self._reader = DocumentReader(tokenizer, config)
        self._round_keys: dict[tuple[int, int], list[int]] = {}
        # Documents that wait or are cut, so that they are not read again for every row.
        self._read: dict[tuple[int, int, int], Document] = {}

    def initial_state(self) -> LaneArray:
        """State of a lane that has read nothing."""
        state = LaneState.initial(len(self.sources.pools), len(self.sources.image_pools))
        return state.to_array(self.config.lookahead)

    def bucket(self, step: int) -> int:
        """The bucket of all images of a step."""
        shares = self.sources.bucket_shares
        return 0 if len(shares) == 1 else _pick(shares, self._rng(0, _BUCKET_DRAWS, step))

    def patch_grid(self, bucket: int) -> tuple[int, int]:
        """Rows and columns of patches of an image of a bucket."""
        _, height, width = self.sources.latent_shapes[bucket]
        return height // self.patch_size, width // self.patch_size

    def num_slots(self, bucket: int) -> int:
        """Slots S of a row with images of a bucket."""
        rows, columns = self.patch_grid(bucket)
        return self.config.text_slots + self.config.images_per_row * rows * columns

    def rows(
        self, lanes: Sequence[int], step: int, states: NDArray[np.int64], bucket: int | None = None
    ) -> tuple[Rows, NDArray[np.int64], Counter[str]]:
        """The rows of `lanes` at `step`, given their states [lanes, n] => (rows, states behind them, what was counted).

        Args:
            bucket: Of the images; that of the step if None.

        Raises:
            UserError: Nothing of a source can be read.
        """
        bucket = self.bucket(step) if bucket is None else bucket
        arrays = _RowArrays(self, len(lanes), bucket)
        counts: Counter[str] = Counter()
        new_states = np.empty_like(states)
        num_pools, num_buckets = len(self.sources.pools), len(self.sources.image_pools)
        for position, lane in enumerate(lanes):
            state = LaneState.from_array(states[position], num_pools, num_buckets)
            row = _Row(arrays, position)
            self._add_documents(row, lane, state, bucket, counts)
            # A text of one token would have no label.
            while self.sources.text_pools and row.free_text_slots >= 2:
                self._add_text(row, lane, state, counts)
            row.finish(self._rng(lane, step))
            new_states[position] = state.to_array(self.config.lookahead)
            counts["text_tokens"] += self.config.text_slots - row.free_text_slots
            counts["image_tokens"] += row.image_slots_used * arrays.patches
            counts["pad_slots"] += row.free_text_slots + row.free_image_slots * arrays.patches
        return arrays.rows(), new_states, counts

    def _add_documents(self, row: "_Row", lane: int, state: LaneState, bucket: int, counts: Counter[str]) -> None:
        """Fill the image slots: first with documents that wait, in the order in which they came, then with new ones.

        What does not fit waits for a later row while others are tried. The first one always fits, and so none waits for
        ever.
        """
        waiting: list[Waiting] = []
        pools = self.sources.image_pools[bucket]
        for entry in state.waiting[bucket]:
            waiting += self._place(row, lane, entry, counts)
        while (
            pools  # Held-out texts may be without images.
            and row.free_image_slots
            and row.free_text_slots >= _SHORTEST_DOCUMENT
            and len(waiting) < self.config.lookahead
        ):
            entry = self._take(lane, state, pools, bucket, counts)
            waiting += self._place(row, lane, entry, counts)
        state.waiting[bucket] = waiting

    def _place(self, row: "_Row", lane: int, entry: Waiting, counts: Counter[str]) -> list[Waiting]:
        """Add a document, or the next piece of one that is longer than a row, if there is room => what still waits."""
        config = self.config
        document = self._document(lane, entry)
        piece = document.piece(entry.used, config.text_slots, config.images_per_row, self.tokenizer.boi_id)
        if not piece.segments:
            # Its image could be read when it was taken, and after the run was resumed it cannot.
            self._drop(lane, entry, counts)
            return []
        if piece.num_tokens > row.free_text_slots or piece.image_slots > row.free_image_slots:
            return [entry]
        return self._add(row, lane, entry, document, piece, counts)

    def _add_text(self, row: "_Row", lane: int, state: LaneState, counts: Counter[str]) -> None:
        """Add the next text, cut where the row ends; its rest begins the lane's next row."""
        entry = state.begun or self._take(lane, state, self.sources.text_pools, len(state.waiting), counts)
        document = self._document(lane, entry)
        piece = document.piece(entry.used, row.free_text_slots, 0, self.tokenizer.boi_id)
        rest = self._add(row, lane, entry, document, piece, counts)
        state.begun = rest[0] if rest else None
        counts["texts"] += not rest

    def _add(
        self, row: "_Row", lane: int, entry: Waiting, document: Document, piece: Piece, counts: Counter[str]
    ) -> list[Waiting]:
        source = self.sources.pools[entry.pool].source
        name = self.sources.names[source]
        row.add(piece, source)
        counts["images"] += piece.num_images
        counts[counter(name, "images")] += piece.num_images
        counts[counter(name, "tokens")] += piece.num_tokens
        # The token behind a cut is still the label of the last one before it, and the first input of the rest.
        if piece.next_token != IGNORE_INDEX:
            counts[counter(name, "cut_documents")] += entry.used == 0
            return [entry._replace(used=piece.used)]
        counts[counter(name, "documents")] += 1
        counts[counter(name, "cut_captions")] += document.caption_cut
        counts["truncated_captions"] += document.caption_cut
        del self._read[lane, entry.pool, entry.number]
        return []

    def _take(self, lane: int, state: LaneState, pools: list[int], kind: int, counts: Counter[str]) -> Waiting:
        """Take the lane's next document of which something can be read from `pools`, which are numbered `kind`.

        Which pool it comes from is a function of how many documents the lane has taken from them, not of the row.
        """
        for _ in range(_MOST_DROPPED):
            pool = pools[0]
            if len(pools) > 1:
                taken = sum(state.taken[pool] for pool in pools)
                rng = self._rng(lane, _SOURCE_DRAWS, taken, kind)
                pool = pools[_pick([self.sources.shares[pool] for pool in pools], rng)]
            entry = Waiting(pool, state.taken[pool], 0)
            state.taken[pool] += 1
            name = self.sources.names[self.sources.pools[pool].source]
            document = self._document(lane, entry)
            counts[counter(name, "taken")] += 1
            counts[counter(name, "unreadable_images")] += document.unreadable_images
            if document.segments:
                return entry
            self._drop(lane, entry, counts)
        place = self.sources.sources[self.sources.pools[pool].source].documents.name
        raise UserError(
            f"nothing of {_MOST_DROPPED} documents in turn can be read, the last of source '{place}'; is its folder "
            "still there and whole?"
        )

    def _drop(self, lane: int, entry: Waiting, counts: Counter[str]) -> None:
        counts[counter(self.sources.names[self.sources.pools[entry.pool].source], "dropped_documents")] += 1
        del self._read[lane, entry.pool, entry.number]

    def _document(self, lane: int, entry: Waiting) -> Document:
        """The document; its layout has draws of its own, which do not change while it waits for a row with room."""
        key = lane, entry.pool, entry.number
        if key not in self._read:
            pool = self.sources.pools[entry.pool]
            item = pool.item(self._position(pool, entry.pool, lane, entry.number))
            rng = self._rng(lane, _LAYOUT_DRAWS, entry.number, entry.pool)
            self._read[key] = self._reader.read(self.sources.sources[pool.source], item, rng)
        return self._read[key]

    def _position(self, pool: Pool, index: int, lane: int, number: int) -> int:
        """Which item of a pool is the lane's next: one global shuffled order per epoch, dealt out to the lanes."""
        epoch, position = divmod(lane + number * self.num_lanes, pool.length)
        if (index, epoch) not in self._round_keys:
            # Lanes are seldom more than an epoch of a pool apart; what is older can be drawn again.
            self._round_keys = {
                key: value for key, value in self._round_keys.items() if key[0] != index or key[1] >= epoch - 1
            }
            keys = self._rng(0, _EPOCH_DRAWS, epoch, index).integers(2**64, size=NUM_ROUNDS, dtype=np.uint64)
            self._round_keys[index, epoch] = keys.tolist()
        return permuted(position, pool.length, self._round_keys[index, epoch])

    def _rng(self, lane: int, purpose: int, number: int = 0, kind: int = 0) -> np.random.Generator:
        """Draws of their own for every purpose: a step of a row, a layout, a choice of source, an epoch."""
        return np.random.Generator(np.random.Philox(key=[self.seed, lane], counter=[0, number, kind, purpose]))


def _pick(weights: list[float], rng: np.random.Generator) -> int:
    """An index, drawn by weight."""
    cumulative = np.cumsum(weights)
    return int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))


class _RowArrays:
    """The arrays of some rows."""

    def __init__(self, packer: Packer, num_rows: int, bucket: int) -> None:
        self.packer = packer
        config = packer.config
        self.text_slots, self.image_slots = config.text_slots, config.images_per_row
        shape = packer.sources.latent_shapes[bucket]
        self.patch_rows, self.patch_columns = packer.patch_grid(bucket)
        self.patches = self.patch_rows * self.patch_columns
        slots = packer.num_slots(bucket)
        self.text_ids = np.full((num_rows, self.text_slots), packer.tokenizer.pad_id)
        self.text_labels = np.full((num_rows, self.text_slots), IGNORE_INDEX)
        self.document_ids = np.full((num_rows, slots), -1)
        self.order = np.zeros((num_rows, slots), dtype=np.int64)
        self.span_ids = np.full((num_rows, slots), -1)
        self.source_ids = np.full((num_rows, slots), -1, dtype=np.int16)
        self.rope_positions = np.zeros((num_rows, slots, 3)[: 2 if packer.rope == "1d" else 3], dtype=np.int64)
        self.timesteps = torch.empty(num_rows, self.image_slots)
        self.latents = np.zeros((num_rows, self.image_slots, *shape), dtype=np.float32)
        self.noise = np.empty_like(self.latents)
        self.copies = None
        if config.has_copies:
            self.copies = np.zeros((num_rows, self.image_slots), dtype=np.bool_)
        self.images_uint8: NDArray[np.uint8] | None = None
        if config.latents == "online":
            height, width = config.image_sizes[bucket]
            self.images_uint8 = np.zeros((num_rows, self.image_slots, height, width, 3), dtype=np.uint8)

    def rows(self) -> Rows:
        """As tensors."""
        ids = ("document_ids", "order", "span_ids", "rope_positions", "source_ids")
        names = ("text_ids", "text_labels", "latents", "noise", *ids)
        tensors = {name: torch.from_numpy(getattr(self, name)) for name in names}
        copies = None if self.copies is None else torch.from_numpy(self.copies)
        images = None if self.images_uint8 is None else torch.from_numpy(self.images_uint8)
        return Rows(Batch(timesteps=self.timesteps, copies=copies, **tensors), images)


class _Row:
    """A row being filled."""

    def __init__(self, arrays: _RowArrays, row: int) -> None:
        self.arrays = arrays
        self.row = row
        # Source, image and first of the slots of each.
        self.images: list[tuple[int, ImageSegment, int]] = []
        self.image_slots_used = 0
        self.text_used = 0
        self.documents = 0

    @property
    def free_image_slots(self) -> int:
        return self.arrays.image_slots - self.image_slots_used

    @property
    def free_text_slots(self) -> int:
        return self.arrays.text_slots - self.text_used

    def add(self, piece: Piece, source: int) -> None:
        """Place a piece of a document of a source."""
        arrays = self.arrays
        positions = PositionCounter(arrays.packer.rope)
        # Those of the image slot before, which its copy has, too.
        rope_positions: NDArray[np.int64] | None = None
        for part in lay_out(piece.segments, arrays.packer.tokenizer, piece.next_token):
            if isinstance(part, TextRun):
                self._add_run(part, positions, source)
            elif part.is_copy:
                assert rope_positions is not None
                self._add_patches(positions.take_order(arrays.patches), rope_positions, source)
            else:
                self.images.append((source, part.image, self.image_slots_used))
                order, rope_positions = positions.image(arrays.patch_rows, arrays.patch_columns)
                self._add_patches(order, rope_positions, source)
        self.documents += 1

    def _add_run(self, run: TextRun, positions: PositionCounter, source: int) -> None:
        """Place tokens that follow each other, with their labels."""
        arrays, end = self.arrays, self.text_used + len(run.ids)
        where = self.row, slice(self.text_used, end)
        arrays.text_ids[where], arrays.text_labels[where] = run.ids, run.labels
        arrays.order[where], arrays.rope_positions[where] = positions.text(len(run.ids))
        arrays.document_ids[where] = self.documents
        arrays.source_ids[where] = source
        self.text_used = end

    def _add_patches(self, order: NDArray[np.int64], rope_positions: NDArray[np.int64], source: int) -> None:
        """Fill the next image slot."""
        arrays = self.arrays
        start = arrays.text_slots + self.image_slots_used * arrays.patches
        where = self.row, slice(start, start + arrays.patches)
        arrays.order[where], arrays.rope_positions[where] = order, rope_positions
        arrays.document_ids[where] = self.documents
        arrays.span_ids[where] = self.image_slots_used
        arrays.source_ids[where] = source
        self.image_slots_used += 1

    def finish(self, rng: np.random.Generator) -> None:
        """Draw what is random about the images."""
        arrays, packer = self.arrays, self.arrays.packer
        latents, noise = arrays.latents[self.row], arrays.noise[self.row]
        max_timesteps = torch.ones(arrays.image_slots)
        # Always the same number of draws, so that a row's draws do not depend on how full it is.
        uniform = torch.from_numpy(rng.random(arrays.image_slots, dtype=np.float32))
        posterior_noise = rng.standard_normal(latents.shape, dtype=np.float32)
        rng.standard_normal(dtype=np.float32, out=noise)
        for source, image, slot in self.images:
            max_timesteps[slot] = image.max_timestep
            cache = packer.sources.sources[source].latents
            if cache is not None:
                mean, std = cache.posterior(image.index, image.flipped)
                latents[slot] = mean + std * posterior_noise[slot]
            elif arrays.images_uint8 is not None and image.pixels is not None:
                # The latents are made of it and the pixels on the device.
                latents[slot] = posterior_noise[slot]
                arrays.images_uint8[self.row, slot] = image.pixels
            if image.copied:
                assert arrays.copies is not None
                arrays.copies[self.row, slot + 1] = True
                latents[slot + 1] = latents[slot]
                max_timesteps[slot + 1] = 0.0
                if arrays.images_uint8 is not None:
                    arrays.images_uint8[self.row, slot + 1] = arrays.images_uint8[self.row, slot]
        arrays.timesteps[self.row] = packer.timesteps_from_uniform(uniform) * max_timesteps
