"""Pack documents into rows. The row of a lane at a step is a pure function of (seed, lane, step, state of the lane).

Lane r of R takes documents r, r + R, r + 2R, ... of every pool's shuffled sequence, so that all lanes together read
each document once per epoch.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray

from transfusion_mot.config import TEXT, DataConfig, ModelConfig
from transfusion_mot.data.batch import Rows
from transfusion_mot.data.documents import Document, DocumentReader, Piece
from transfusion_mot.data.draws import weighted_index
from transfusion_mot.data.lanes import LaneArray, LaneSizes, LaneState, Waiting
from transfusion_mot.data.mixture import Pool, Sources, counter
from transfusion_mot.data.permutation import NUM_ROUNDS, permuted
from transfusion_mot.data.row_arrays import CodeNoise, Row, RowArrays, RowShape
from transfusion_mot.data.tokenizer import TextTokenizer
from transfusion_mot.errors import UserError
from transfusion_mot.losses import IGNORE_INDEX

# Seeds of layouts, sources, buckets and epochs; larger than any step, which is the seed of rows in the same place.
_LAYOUT_DRAWS = 2**62
_SOURCE_DRAWS = 2**62 + 1
_BUCKET_DRAWS = 2**62 + 2
_EPOCH_DRAWS = 2**63

# Minimum text tokens of a document with media: BOS, EOS or a word, begin token and end token.
_SHORTEST_DOCUMENT = 3
# More successive unreadable documents than this are not an accident.
_MOST_DROPPED = 1000


def counted_by(model: ModelConfig) -> list[str]:
    """Counters of rows, in addition to the counters of sources: documents that filled a stream, used slots of each
    modality (with copies), empty slots, cut captions, and media of each modality."""
    return [
        *(f"{name}_documents" for name in model.of_objective("next_token")),
        *(f"{name}_slots" for name in model.stream_order),
        *(f"{name}_items" for name in model.made if name != TEXT),
        "pad_slots",
        "truncated_captions",
    ]


class Packer:
    """Builds rows.

    Args:
        sources: Sources of the documents.
        tokenizer: The text tokenizer.
        config: Slots of a row, and the chances of document templates.
        model: Modalities, rotary positions and patch sizes.
        num_lanes: Rows R of a global batch.
        seed: The run's seed.
        timesteps_from_uniform: The objective's distribution of timesteps.
        code_noise: Modality => noise of its codes. Only training has noise.
        most_documents: Maximum number of documents with media in a row; None is any number.
    """

    def __init__(
        self,
        sources: Sources,
        tokenizer: TextTokenizer,
        config: DataConfig,
        model: ModelConfig,
        *,
        num_lanes: int,
        seed: int,
        timesteps_from_uniform: Callable[[torch.Tensor], torch.Tensor],
        code_noise: Mapping[str, CodeNoise] = MappingProxyType({}),
        most_documents: int | None = None,
    ) -> None:
        self.sources = sources
        self.tokenizer = tokenizer
        self.config = config
        self.model = model
        self.num_lanes = num_lanes
        self.seed = seed
        self.timesteps_from_uniform = timesteps_from_uniform
        self.code_noise = dict(code_noise)
        self.most_documents = most_documents
        self.token_modalities = model.of_objective("next_token")
        self.lane_sizes = LaneSizes(
            len(sources.pools), len(self.token_modalities), len(sources.media_pools), config.lookahead
        )
        # Modalities of the documents of each bucket besides text; held-out documents may be only texts.
        self._media = [
            {name for pool in pools for name in sources.sources[sources.pools[pool].source].documents.media}
            for pools in sources.media_pools
        ]
        self._reader = DocumentReader(tokenizer, config, model.readers)
        # One generator for all draws, which is reseeded: making a new one takes eight times as long.
        self._generator = np.random.Generator(np.random.Philox(0))
        self._round_keys: dict[tuple[int, int], list[int]] = {}
        # Cache of documents that wait or are cut, so that they are not read again for every row.
        self._read: dict[tuple[int, int, int], Document] = {}

    def initial_state(self) -> LaneArray:
        """State of a lane that has read nothing."""
        return LaneState.initial(self.lane_sizes).to_array(self.lane_sizes)

    def bucket(self, step: int) -> int:
        """The bucket of all media of a step."""
        shares = self.sources.bucket_shares
        return 0 if len(shares) == 1 else weighted_index(shares, self._rng(0, _BUCKET_DRAWS, step).random())

    def row_shape(self, bucket: int) -> RowShape:
        """Slots of a row with media of a bucket."""
        return RowShape.of(self.model, self.config.slots, self.sources.latent_shapes, bucket)

    def num_slots(self, bucket: int) -> int:
        """Slots S of a row with media of a bucket."""
        return self.row_shape(bucket).num_slots

    def rows(
        self, lanes: Sequence[int], step: int, states: NDArray[np.int64], bucket: int | None = None
    ) -> tuple[Rows, NDArray[np.int64], Counter[str]]:
        """The rows of `lanes` at `step`, given their states [lanes, n] => (rows, states after them, counters).

        Args:
            bucket: Bucket of the media; None means the bucket of the step.

        Raises:
            UserError: No document of a source can be read.
        """
        bucket = self.bucket(step) if bucket is None else bucket
        shape = self.row_shape(bucket)
        arrays = RowArrays(shape, len(lanes), self.tokenizer, self.config, bucket, self.code_noise)
        counts: Counter[str] = Counter()
        new_states = np.empty_like(states)
        for position, lane in enumerate(lanes):
            state = LaneState.from_array(states[position], self.lane_sizes)
            row = Row(arrays, position)
            self._add_documents(row, lane, state, bucket, counts)
            for place, name in enumerate(self.token_modalities):
                # A text of one token would have no label.
                while self.sources.stream_pools.get(name) and row.free[name] >= 2:
                    self._add_to_stream(row, lane, state, place, counts)
            row.finish(self.sources, self._rng(lane, step), self.timesteps_from_uniform)
            new_states[position] = state.to_array(self.lane_sizes)
            for name, block in shape.blocks.items():
                counts[f"{name}_slots"] += (block.capacity - row.free[name]) * block.slots_each
                counts["pad_slots"] += row.free[name] * block.slots_each
        return arrays.rows(), new_states, counts

    def _add_documents(self, row: Row, lane: int, state: LaneState, bucket: int, counts: Counter[str]) -> None:
        """Fill the slots of media: first with waiting documents in their order, then with new ones.

        A document that does not fit waits for a later row while others are tried. The first one always fits, so none
        waits forever.
        """
        waiting: list[Waiting] = []
        for entry in state.waiting[bucket]:
            waiting += self._place(row, lane, entry, counts)
        while (
            any(row.free[name] for name in self._media[bucket])
            and row.free[TEXT] >= _SHORTEST_DOCUMENT
            and len(waiting) < self.config.lookahead
            and (self.most_documents is None or row.num_documents < self.most_documents)
        ):
            entry = self._take(lane, state, self.sources.media_pools[bucket], bucket, counts)
            waiting += self._place(row, lane, entry, counts)
        state.waiting[bucket] = waiting

    def _place(self, row: Row, lane: int, entry: Waiting, counts: Counter[str]) -> list[Waiting]:
        """Add a document, or the next piece of one longer than a row, if it fits => the part that still waits."""
        document = self._document(lane, entry)
        piece = document.piece(entry.used, self.config.slots, self.tokenizer.begin_ids)
        if not piece.segments:
            # Its media were readable when it was taken, but no longer after the run was resumed.
            self._drop(lane, entry, counts)
            return []
        if any(count > row.free[name] for name, count in piece.slots.items()):
            return [entry]
        return self._add(row, lane, entry, document, piece, counts)

    def _add_to_stream(self, row: Row, lane: int, state: LaneState, place: int, counts: Counter[str]) -> None:
        """Add the next document of one modality of tokens, cut at the end of the row; the rest begins the next row."""
        name = self.token_modalities[place]
        kind = len(state.waiting) + place
        entry = state.begun[place] or self._take(lane, state, self.sources.stream_pools[name], kind, counts)
        document = self._document(lane, entry)
        piece = document.piece(entry.used, {name: row.free[name]}, self.tokenizer.begin_ids)
        rest = self._add(row, lane, entry, document, piece, counts)
        state.begun[place] = rest[0] if rest else None
        counts[f"{name}_documents"] += not rest

    def _add(
        self, row: Row, lane: int, entry: Waiting, document: Document, piece: Piece, counts: Counter[str]
    ) -> list[Waiting]:
        source = self.sources.pools[entry.pool].source
        name = self.sources.names[source]
        row.add(piece, document, source)
        for modality in piece.media:
            counts[f"{modality}_items"] += 1
        counts[counter(name, "items")] += len(piece.media)
        counts[counter(name, "tokens")] += piece.slots[document.stream]
        # The token after a cut is the label of the last token before it, and the first input of the rest.
        if piece.next_token != IGNORE_INDEX:
            counts[counter(name, "cut_documents")] += entry.used == 0
            return [entry._replace(used=piece.used)]
        counts[counter(name, "documents")] += 1
        counts[counter(name, "cut_captions")] += document.caption_cut
        counts["truncated_captions"] += document.caption_cut
        del self._read[lane, entry.pool, entry.number]
        return []

    def _take(self, lane: int, state: LaneState, pools: list[int], kind: int, counts: Counter[str]) -> Waiting:
        """Take the lane's next document with a readable item from `pools`, whose number is `kind`.

        The pool depends on the number of documents that the lane has taken from them, not on the row.
        """
        for _ in range(_MOST_DROPPED):
            pool = pools[0]
            if len(pools) > 1:
                taken = sum(state.taken[pool] for pool in pools)
                draw = self._rng(lane, _SOURCE_DRAWS, taken, kind).random()
                pool = pools[weighted_index([self.sources.shares[pool] for pool in pools], draw)]
            entry = Waiting(pool, state.taken[pool], 0)
            state.taken[pool] += 1
            name = self.sources.names[self.sources.pools[pool].source]
            document = self._document(lane, entry)
            counts[counter(name, "taken")] += 1
            counts[counter(name, "unreadable_items")] += document.unreadable
            counts[counter(name, "too_long_items")] += document.too_long
            if document.segments:
                return entry
            self._drop(lane, entry, counts)
        place = self.sources.sources[self.sources.pools[pool].source].documents.name
        raise UserError(
            f"{_MOST_DROPPED} successive documents have no readable item, the last in source '{place}'; check that "
            "its folder still exists and is complete"
        )

    def _drop(self, lane: int, entry: Waiting, counts: Counter[str]) -> None:
        counts[counter(self.sources.names[self.sources.pools[entry.pool].source], "dropped_documents")] += 1
        del self._read[lane, entry.pool, entry.number]

    def _document(self, lane: int, entry: Waiting) -> Document:
        """The document; its layout has separate draws, which stay the same while the document waits."""
        key = lane, entry.pool, entry.number
        if key not in self._read:
            pool = self.sources.pools[entry.pool]
            item = pool.item(self._position(pool, entry.pool, lane, entry.number))
            rng = self._rng(lane, _LAYOUT_DRAWS, entry.number, entry.pool)
            self._read[key] = self._reader.read(self.sources.sources[pool.source], item, rng)
        return self._read[key]

    def _position(self, pool: Pool, index: int, lane: int, number: int) -> int:
        """Index of the lane's next item in a pool: lanes share one global shuffled order for each epoch."""
        epoch, position = divmod(lane + number * self.num_lanes, pool.length)
        if (index, epoch) not in self._round_keys:
            # Lanes are seldom more than one epoch of a pool apart; older keys can be drawn again.
            self._round_keys = {
                key: value for key, value in self._round_keys.items() if key[0] != index or key[1] >= epoch - 1
            }
            keys = self._rng(0, _EPOCH_DRAWS, epoch, index).integers(2**64, size=NUM_ROUNDS, dtype=np.uint64)
            self._round_keys[index, epoch] = keys.tolist()
        return permuted(position, pool.length, self._round_keys[index, epoch])

    def _rng(self, lane: int, purpose: int, number: int = 0, kind: int = 0) -> np.random.Generator:
        """A generator with a separate seed for each purpose: a step of a row, a layout, a choice of source, an epoch.

        It is valid until the next call.
        """
        self._generator.bit_generator.state = {
            "bit_generator": "Philox",
            "state": {"key": [self.seed, lane], "counter": [0, number, kind, purpose]},
            # Reseeding removes all state of earlier draws.
            "buffer": [0, 0, 0, 0],
            "buffer_pos": 4,
            "has_uint32": 0,
            "uinteger": 0,
        }
        return self._generator
