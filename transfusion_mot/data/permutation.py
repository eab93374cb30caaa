"""A shuffled order as a function of the position, without an array, for any number of items."""

from collections.abc import Sequence

_BITS = 2**64 - 1
# Rounds of the network. Four make it look random to any polynomial test (Luby and Rackoff 1988) where halves are wide;
# those of a small source are a few bits.
NUM_ROUNDS = 8


def permuted(position: int, length: int, round_keys: Sequence[int]) -> int:
    """The item at `position` of a shuffled `range(length)`; other keys of 64 bits shuffle it another way.

    A Feistel network is a bijection of the numbers of an even number of bits, and following it until it comes back
    below `length` one of `range(length)` (cycle walking; Black and Rogaway 2002), after four turns on average at most.
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
