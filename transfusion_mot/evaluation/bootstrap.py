"""How far a mean over images would move if other images had been drawn."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_BLOCK = 2**22


def bootstrap_interval(
    values: Sequence[float] | npt.NDArray[np.floating],
    weights: Sequence[float] | npt.NDArray[np.floating] | None = None,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap of a mean: (low, high) that holds it with the given confidence.

    The order of the values does not matter, and the draws are fixed by the seed.

    Args:
        values: One number an image (or document), at least one; of a single one the interval is that number.
        weights: Null for the mean; else the interval is of sum of values / sum of weights, for example of the losses
            of documents over their lengths.
        confidence: Share of the resampled means inside the interval.
        resamples: Number of times that as many values are drawn with replacement.
        seed: Of the draws.
    """
    pairs = np.stack([values, np.ones(len(values)) if weights is None else weights]).astype(np.float64)
    count = pairs.shape[1]
    assert count
    pairs = pairs[:, np.lexsort(pairs)]
    generator = np.random.default_rng(seed)
    rows = max(1, _BLOCK // count)
    means = []
    for start in range(0, resamples, rows):
        drawn = generator.integers(count, size=(min(rows, resamples - start), count))
        means.append(pairs[0][drawn].sum(axis=1) / pairs[1][drawn].sum(axis=1))
    low, high = np.quantile(np.concatenate(means), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
