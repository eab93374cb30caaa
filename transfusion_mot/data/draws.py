"""Random choices that depend only on a seed, in every process and on every machine."""

import random
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import TypeVar

_Item = TypeVar("_Item")


def weighted_index(weights: Sequence[float], draw: float) -> int:
    """Index whose share of the weights contains `draw`, a number in [0, 1)."""
    cumulative = list(accumulate(weights))
    return bisect_right(cumulative, draw * cumulative[-1])


class Draws:
    """Random choices that depend only on the parts of a seed."""

    def __init__(self, *seed: object) -> None:
        # The only method of Python's generator that gives the same numbers in all versions.
        self._random = random.Random("/".join(map(str, seed))).random

    def chance(self, probability: float) -> bool:
        """True with a probability."""
        return self._random() < probability

    def between(self, low: float, high: float) -> float:
        """A uniform number in a range."""
        return low + (high - low) * self._random()

    def pick(self, items: Sequence[_Item]) -> _Item:
        """One of several items."""
        return items[int(self._random() * len(items))]

    def weighted(self, items: Sequence[tuple[_Item, float]]) -> _Item:
        """One item of (item, weight) pairs."""
        left = self._random() * sum(weight for _, weight in items)
        for item, weight in items:
            left -= weight
            if left < 0:
                return item
        return items[-1][0]

    def some(self, items: Sequence[_Item], count: int) -> list[_Item]:
        """`count` different items, or all if there are fewer."""
        left = list(items)
        return [left.pop(int(self._random() * len(left))) for _ in range(min(count, len(left)))]
