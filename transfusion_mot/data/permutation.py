"""A shuffled order as a function of the position, without an array, for any number of items."""

from collections.abc import Sequence

_BITS = 2**64 - 1
# Number of rounds. Four are enough for wide halves (Luby and Rackoff 1988: no polynomial test sees a difference from a
# random order), but the halves of a small source have only a few bits.
NUM_ROUNDS = 8


def permuted(position: int, length: int, round_keys: Sequence[int]) -> int:
    """The item at `position` of a shuffled `range(length)`; each 64-bit key gives another order.

    A Feistel network is a bijection of numbers with an even number of bits. Repeating it until the result is below
    `length` is a bijection of `range(length)` (cycle walking; Black and Rogaway 2002). This takes at most four rounds
    on average.
    """
    half = max(2, ((length - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = position >> half, position & mask
        for key in round_keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        position = left << half | right
        if position < length:
            return position


def _mixed(value: int) -> int:
    """Every bit of the result depends on every bit of the value (the finaliser of SplitMix64, Steele et al. 2014)."""
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & _BITS
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & _BITS
    return value ^ value >> 31
