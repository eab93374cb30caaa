"""State of a lane between rows, as a vector of integers of fixed size."""

from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

LaneArray = NDArray[np.int64]
_NOTHING = (-1, -1, -1)


class Waiting(NamedTuple):
    """A document, or the rest of one, that was taken from its pool but is not (completely) in a row.

    Attributes:
        pool: Pool of the document.
        number: Number of documents that the lane had taken from the pool before it.
        used: Its text tokens, codes and media slots that are already in rows.
    """

    pool: int
    number: int
    used: int


class LaneSizes(NamedTuple):
    """Sizes that determine the length of a lane's state.

    Attributes:
        pools: Number of pools.
        streams: Modalities of tokens, whose documents can be cut at the end of a row.
        buckets: Number of buckets.
        lookahead: Documents with media that may wait, for each bucket.
    """

    pools: int
    streams: int
    buckets: int
    lookahead: int


@dataclass
class LaneState:
    """State of a lane.

    Attributes:
        taken: Number of documents taken from each pool.
        begun: For each modality of tokens, the document that was cut at the end of the last row.
        waiting: For each bucket, documents with media that did not fit; the one that has waited longest comes first.
    """

    taken: list[int]
    begun: list[Waiting | None]
    waiting: list[list[Waiting]]

    @classmethod
    def initial(cls, sizes: LaneSizes) -> Self:
        """State of a lane that has read nothing."""
        return cls([0] * sizes.pools, [None] * sizes.streams, [[] for _ in range(sizes.buckets)])

    @classmethod
    def from_array(cls, array: LaneArray, sizes: LaneSizes) -> Self:
        """The state from an array of `to_array`."""
        entries = [Waiting(*entry) for entry in array[sizes.pools :].reshape(-1, 3).tolist()]
        starts = range(sizes.streams, len(entries), sizes.lookahead)
        return cls(
            array[: sizes.pools].tolist(),
            [entry if entry != _NOTHING else None for entry in entries[: sizes.streams]],
            [[entry for entry in entries[start : start + sizes.lookahead] if entry != _NOTHING] for start in starts],
        )

    def to_array(self, sizes: LaneSizes) -> LaneArray:
        """[pools + 3 * (streams + buckets * lookahead)]; the size does not depend on the waiting documents."""
        entries = [entry or _NOTHING for entry in self.begun]
        for waiting in self.waiting:
            entries += waiting + [_NOTHING] * (sizes.lookahead - len(waiting))
        return np.array([*self.taken, *(number for entry in entries for number in entry)], dtype=np.int64)
