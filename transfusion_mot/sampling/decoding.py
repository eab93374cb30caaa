"""Choice of the next token.

Shapes: B rows, V vocabulary.
"""

import math
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor

from transfusion_mot.errors import UserError


@dataclass(frozen=True)
class Decoding:
    """Settings for choosing tokens.

    Attributes:
        max_new_tokens: Maximum number of written tokens, including the end of the text.
        temperature: Divides the logits; 0 takes the most probable token.
        top_k: Tokens are drawn from this many most probable ones; 0 is all.
        top_p: Tokens are drawn from the smallest set with a total probability of at least this, in (0, 1] (nucleus
            sampling, arXiv 1904.09751), after `temperature` and before `top_k`.

    Raises:
        UserError: A value is out of its range.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        check_count(self.max_new_tokens, "max_new_tokens")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(
                f"temperature is {self.temperature}; it must be 0 (the most probable token) or a positive number"
            )
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if not isinstance(self.top_k, int) or self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}; it must be a whole number, 0 for all tokens")


def check_count(number: object, what: str, least: int = 1) -> None:
    """Refuse an argument that does not count something.

    Raises:
        UserError: It is not a whole number, or too small.
    """
    if not isinstance(number, Integral):
        raise UserError(f"{what} is {number!r}; it must be a whole number, at least {least}")
    if number < least:
        raise UserError(f"{what} is {number}; it must be at least {least}")


def choose_tokens(logits: Tensor, decoding: Decoding, uniform: Tensor) -> Tensor:
    """Logits [B, V], numbers in [0, 1) [B] => token ids [B], the inverse of the distribution function."""
    if decoding.temperature == 0:
        return logits.argmax(dim=-1)
    probabilities, ids = (logits.float() / decoding.temperature).softmax(dim=-1).sort(dim=-1, descending=True)
    below = probabilities.cumsum(dim=-1) - probabilities
    kept = torch.where(below < decoding.top_p, probabilities, 0.0)
    if decoding.top_k:
        kept[:, decoding.top_k :] = 0.0
    cumulative = kept.cumsum(dim=-1)
    drawn = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:])
    return ids.gather(1, drawn)[:, 0]
