"""Frechet distance between Gaussians fitted to two sets of feature vectors, and what it is for infinitely many."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from transfusion_mot.errors import UserError

Array = npt.NDArray[np.float64]
Features = npt.NDArray[np.floating]


@dataclass(frozen=True)
class Gaussian:
    """Mean `[D]` and unbiased covariance `[D, D]` of feature vectors, in float64."""

    mean: Array
    covariance: Array

    @cached_property
    def factor(self) -> Array:
        """A `[D, rank]` with A A^T = covariance; of references it is needed more than once."""
        values, vectors = np.linalg.eigh(self.covariance)
        # What rounding leaves of zero eigenvalues would count by its square root.
        kept = values > values.max(initial=0.0) * len(values) * np.finfo(np.float64).eps
        return np.asarray(vectors[:, kept] * np.sqrt(values[kept]))


class GaussianStatistics:
    """Mean and covariance of feature vectors that come in batches, accumulated in float64.

    Batches are merged by their means and centred second moments (Chan et al. 1979), which stays accurate where the mean
    is large against the spread, unlike sums of squares.
    """

    def __init__(self, num_features: int) -> None:
        self._count = 0
        self._mean = np.zeros(num_features)
        self._scatter = np.zeros((num_features, num_features))

    def update(self, features: Features) -> None:
        """Take in features `[B, D]`."""
        batch = features.astype(np.float64)
        batch_mean = batch.mean(axis=0)
        centred = batch - batch_mean
        delta = batch_mean - self._mean
        total = self._count + len(batch)
        self._scatter += centred.T @ centred + np.outer(delta, delta) * (self._count * len(batch) / total)
        self._mean += delta * (len(batch) / total)
        self._count = total

    def gaussian(self) -> Gaussian:
        """The Gaussian with the moments seen so far.

        Raises:
            UserError: Fewer than two vectors were seen; a covariance needs two.
        """
        if self._count < 2:
            raise UserError(f"a Frechet distance needs at least 2 images on each side, but one side has {self._count}")
        return Gaussian(self._mean, self._scatter / (self._count - 1))


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """Squared Frechet distance |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) (arXiv 1706.08500, equation 6).

    With C = A A^T, the eigenvalues of C1 C2 are the squared singular values of A1^T A2, so the trace of the root is
    their sum. This takes only symmetric eigenproblems and a singular value decomposition, is real, and holds for
    covariances without full rank (fewer images than features).
    """
    difference = first.mean - second.mean
    overlap = np.linalg.svd(first.factor.T @ second.factor, compute_uv=False).sum()
    distance = difference @ difference + np.trace(first.covariance) + np.trace(second.covariance) - 2 * overlap
    # Rounding can leave identical sets a hair below zero.
    return max(0.0, float(distance))


@dataclass(frozen=True)
class Extrapolation:
    """A Frechet distance extrapolated to infinitely many generated images.

    Attributes:
        distance: Where the line meets 1/N = 0.
        slope: Of the distance against 1/N.
        smallest: The fewest images of a subset.
        num_subsets: Points on the line.
    """

    distance: float
    slope: float
    smallest: int
    num_subsets: int


def extrapolated_distance(
    reference: Gaussian, features: Features, num_subsets: int = 15, seed: int = 0
) -> Extrapolation | None:
    """FID-infinity of generated features `[N, D]` (Chong & Forsyth, arXiv 1911.07023).

    The bias of the distance is linear in 1/N: it is measured on random subsets of 5,000 to N images (of N/2 to N where
    there are fewer than 10,000) and extrapolated by least squares. None where N < 2 D: below D images the bias is
    another one.
    """
    count, num_features = features.shape
    if count < 2 * num_features:
        return None
    sizes = np.linspace(5000 if count >= 10_000 else count // 2, count, num_subsets).astype(int)
    generator = np.random.default_rng(seed)
    distances = []
    for size in sizes:
        chosen = features[np.sort(generator.choice(count, size, replace=False))]
        distances.append(frechet_distance(reference, gaussian_of(chosen)))
    slope, intercept = np.polyfit(1 / sizes, distances, 1)
    return Extrapolation(float(intercept), float(slope), int(sizes[0]), num_subsets)


def frechet_interval(
    reference: Gaussian, features: Features, resamples: int = 25, seed: int = 0
) -> tuple[float, float]:
    """The distance of generated features `[N, D]`, less and plus 1.96 standard errors: (low, high).

    The standard error is that of bootstrap resamples of the generated images; the references stay as they are. Their
    quantiles would not do: a resample holds images twice, which raises its distance as a smaller N does.
    """
    rows = features.astype(np.float64)
    squares = (rows**2).sum(axis=1)
    # In this basis the overlap is the sum of the roots of one covariance's eigenvalues, see `frechet_distance`.
    projected = rows @ reference.factor

    def distance(chosen: npt.NDArray[np.int64]) -> float:
        count, mean = len(chosen), rows[chosen].mean(axis=0)
        difference = reference.mean - mean
        trace = (squares[chosen].sum() - count * mean @ mean) / (count - 1)
        centred = projected[chosen]
        centred -= centred.mean(axis=0)
        wide = count < centred.shape[1]
        values = np.linalg.eigvalsh((centred @ centred.T if wide else centred.T @ centred) / (count - 1))
        overlap = np.sqrt(values.clip(min=0)).sum()
        return float(difference @ difference + np.trace(reference.covariance) + trace - 2 * overlap)

    generator = np.random.default_rng(seed)
    drawn = [distance(generator.integers(len(rows), size=len(rows))) for _ in range(resamples)]
    half = 1.96 * float(np.std(drawn, ddof=1))
    value = max(0.0, distance(np.arange(len(rows))))
    return max(0.0, value - half), value + half


def gaussian_of(features: Features, rows: int = 4096) -> Gaussian:
    """Moments of features `[N, D]`, a few rows at a time so that no float64 copy of all is made."""
    statistics = GaussianStatistics(features.shape[1])
    for start in range(0, len(features), rows):
        statistics.update(features[start : start + rows])
    return statistics.gaussian()
