"""State of a lane between rows, as a vector of integers of fixed size."""

from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

LaneArray = NDArray[np.int64]
_NOTHING = (-1, -1, -1)


class Waiting(NamedTuple):
    """A document, or what is left of one, that has been taken from its pool and is not (wholly) in a row.

    Attributes:
        pool: Where it was taken from.
        number: How many documents the lane had taken from the pool before it.
        used: Tokens of text, codes and media slots of it that are in rows.
    """

    pool: int
    number: int
    used: int


class LaneSizes(NamedTuple):
    """What the length of a lane's state follows from.

    Attributes:
        pools: Number of pools.
        streams: Modalities of tokens, of which a document can be cut at the end of a row.
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
        taken: Documents taken from each pool.
        begun: Of each modality of tokens, the document that was cut where the last row ended.
        waiting: Documents with media that had no room, of each bucket; the one that has waited longest comes first.
    """

    taken: list[int]
    begun: list[Waiting | None]
    waiting: list[list[Waiting]]

    @classmethod
    def initial(cls, sizes: LaneSizes) -> Self:
        """Of a lane that has read nothing."""
        return cls([0] * sizes.pools, [None] * sizes.streams, [[] for _ in range(sizes.buckets)])

    @classmethod
    def from_array(cls, array: LaneArray, sizes: LaneSizes) -> Self:
        """The state that `to_array` made `array` of."""
        entries = [Waiting(*entry) for entry in array[sizes.pools :].reshape(-1, 3).tolist()]
        starts = range(sizes.streams, len(entries), sizes.lookahead)
        return cls(
            array[: sizes.pools].tolist(),
            [entry if entry != _NOTHING else None for entry in entries[: sizes.streams]],
            [[entry for entry in entries[start : start + sizes.lookahead] if entry != _NOTHING] for start in starts],
        )

    def to_array(self, sizes: LaneSizes) -> LaneArray:
        """[pools + 3 * (streams + buckets * lookahead)], the same size whatever waits."""
        entries = [entry or _NOTHING for entry in self.begun]
        for waiting in self.waiting:
            entries += waiting + [_NOTHING] * (sizes.lookahead - len(waiting))
        return np.array([*self.taken, *(number for entry in entries for number in entry)], dtype=np.int64)
