"""Distances between two sets of feature vectors: Frechet distance of Gaussians, and kernel distance (KID's MMD)."""

from dataclasses import dataclass

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
    overlap = np.linalg.svd(_factor(first.covariance).T @ _factor(second.covariance), compute_uv=False).sum()
    distance = difference @ difference + np.trace(first.covariance) + np.trace(second.covariance) - 2 * overlap
    # Rounding can leave identical sets a hair below zero.
    return max(0.0, float(distance))


def _factor(covariance: Array) -> Array:
    """A `[D, rank]` with A A^T = covariance."""
    values, vectors = np.linalg.eigh(covariance)
    # What rounding leaves of zero eigenvalues would count by its square root.
    kept = values > values.max(initial=0.0) * len(values) * np.finfo(np.float64).eps
    return np.asarray(vectors[:, kept] * np.sqrt(values[kept]))


@dataclass(frozen=True)
class KernelDistance:
    """Mean and standard deviation of the squared MMD over `num_subsets` pairs of subsets of `subset_size` vectors."""

    mean: float
    std: float
    num_subsets: int
    subset_size: int


def kernel_distance(
    first: Features, second: Features, num_subsets: int = 100, max_subset_size: int = 1000, seed: int = 0
) -> KernelDistance:
    """Kernel distance of two sets of features `[N1, D]` and `[N2, D]` (KID; arXiv 1801.01401, section 3).

    The unbiased estimate of the squared maximum mean discrepancy under the kernel (x.y / D + 1)^3, averaged over random
    subsets as clean-fid and torchmetrics do. Where both sets fit into one subset there is only one, with them whole.

    Raises:
        UserError: A set has fewer than two vectors.
    """
    size = min(len(first), len(second), max_subset_size)
    if size < 2:
        raise UserError(f"a kernel distance needs at least 2 images on each side, but one side has {size}")
    if len(first) == len(second) == size:
        num_subsets = 1
    generator = np.random.default_rng(seed)
    values = []
    for _ in range(num_subsets):
        x = first[generator.choice(len(first), size, replace=False)].astype(np.float64)
        y = second[generator.choice(len(second), size, replace=False)].astype(np.float64)
        values.append(_squared_mmd(x, y))
    return KernelDistance(float(np.mean(values)), float(np.std(values)), num_subsets, size)


def _squared_mmd(x: Array, y: Array) -> float:
    size, num_features = x.shape
    within = (x @ x.T / num_features + 1) ** 3 + (y @ y.T / num_features + 1) ** 3
    between = (x @ y.T / num_features + 1) ** 3
    return float((within.sum() - np.trace(within)) / (size * (size - 1)) - 2 * between.mean())
