"""Intervals of means over images, for other images of the same kind."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

# Half-width of the central 95 % of a standard normal distribution.
DEVIATIONS = 1.96
_BLOCK = 2**22


def mean_interval(
    values: Sequence[float] | npt.NDArray[np.floating],
    weights: Sequence[float] | npt.NDArray[np.floating] | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float] | None:
    """The 95 % confidence interval (low, high) of a mean; None with fewer than two values.

    It is a percentile bootstrap. For shares (all values are 0 or 1) it is Wilson's score interval (1927), which has a
    width even if all values are equal. The order of the values does not matter, and the seed fixes the draws.

    Args:
        values: One number for each image (or document).
        weights: None for the mean; else the interval of sum of values / sum of weights, for example losses of documents
            over their lengths.
        resamples: Number of bootstrap samples.
        seed: Seed of the draws.
    """
    if len(values) < 2:
        return None
    if weights is None and np.isin(values, (0, 1)).all():
        return _wilson(float(np.mean(values)), len(values))
    pairs = np.stack([values, np.ones(len(values)) if weights is None else weights]).astype(np.float64)
    count = pairs.shape[1]
    pairs = pairs[:, np.lexsort(pairs)]
    generator = np.random.default_rng(seed)
    rows = max(1, _BLOCK // count)
    means = []
    for start in range(0, resamples, rows):
        drawn = generator.integers(count, size=(min(rows, resamples - start), count))
        means.append(pairs[0][drawn].sum(axis=1) / pairs[1][drawn].sum(axis=1))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(low), float(high)


def _wilson(share: float, count: int) -> tuple[float, float]:
    squared = DEVIATIONS**2 / count
    middle = (share + squared / 2) / (1 + squared)
    half = math.sqrt(share * (1 - share) * squared + squared**2 / 4) / (1 + squared)
    return max(0.0, middle - half), min(1.0, middle + half)
