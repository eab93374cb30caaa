"""What a lane remembers from one row to the next, as a vector of integers of fixed size."""

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
        used: Tokens of text and images of it that are in rows.
    """

    pool: int
    number: int
    used: int


@dataclass
class LaneState:
    """State of a lane.

    Attributes:
        taken: Documents taken from each pool.
        begun: The text that was cut where the last row ended.
        waiting: Documents with images that had no room, of each bucket; the one that has waited longest comes first.
    """

    taken: list[int]
    begun: Waiting | None
    waiting: list[list[Waiting]]

    @classmethod
    def initial(cls, num_pools: int, num_buckets: int) -> Self:
        """Of a lane that has read nothing."""
        return cls([0] * num_pools, None, [[] for _ in range(num_buckets)])

    @classmethod
    def from_array(cls, array: LaneArray, num_pools: int, num_buckets: int) -> Self:
        """The state that `to_array` made `array` of."""
        entries = [Waiting(*entry) for entry in array[num_pools:].reshape(-1, 3).tolist()]
        per_bucket = (len(entries) - 1) // num_buckets
        waiting = [
            [entry for entry in entries[start : start + per_bucket] if entry != _NOTHING]
            for start in range(1, len(entries), per_bucket)
        ]
        return cls(array[:num_pools].tolist(), entries[0] if entries[0] != _NOTHING else None, waiting)

    def to_array(self, lookahead: int) -> LaneArray:
        """[pools + 3 * (1 + buckets * lookahead)], the same size whatever waits."""
        entries = [self.begun or _NOTHING]
        for waiting in self.waiting:
            entries += waiting + [_NOTHING] * (lookahead - len(waiting))
        return np.array([*self.taken, *(number for entry in entries for number in entry)], dtype=np.int64)
