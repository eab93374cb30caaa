"""Positions of slots in their documents: reading order for the mask, rotary positions for the heads."""

import functools
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Positions = tuple[NDArray[np.int64], NDArray[np.int64]]


class PositionCounter:
    """Counts the slots of one document, segment after segment, in training and sampling.

    With `1d` rotary positions every slot advances by one, patches left to right and top to bottom (Transfusion,
    section 3). With `3d` a token at p has (p, p, p), the patch in row y and column x of an image that begins at p has
    (p, p + y, p + x), and what follows begins at p + max(rows, columns) (M-RoPE, arXiv 2409.12191, section 2.1).

    Args:
        rope: Kind of rotary positions.
    """

    def __init__(self, rope: Literal["1d", "3d"]) -> None:
        self.rope = rope
        self.order = 0
        self.position = 0

    def text(self, length: int) -> Positions:
        """The next `length` tokens => (order [length], rotary positions [length] or [length, 3])."""
        positions = self.position + np.arange(length)
        self.position += length
        return self.take_order(length), positions if self.rope == "1d" else np.repeat(positions[:, None], 3, axis=1)

    def image(self, rows: int, columns: int) -> Positions:
        """The next image of rows x columns patches => (order [P], rotary positions [P] or [P, 3])."""
        start, patches = self.position, rows * columns
        if self.rope == "1d":
            self.position += patches
            return self.take_order(patches), start + np.arange(patches)
        self.position += max(rows, columns)
        return self.take_order(patches), start + _grid(rows, columns)

    def take_order(self, length: int) -> NDArray[np.int64]:
        """Order [length] of the next slots, whose rotary positions are given elsewhere."""
        order = self.order + np.arange(length)
        self.order += length
        return order


@functools.cache
def _grid(rows: int, columns: int) -> NDArray[np.int64]:
    """(0, y, x) of every patch [P, 3]."""
    y, x = np.divmod(np.arange(rows * columns), columns)
    return np.stack([np.zeros_like(y), y, x], axis=1)
