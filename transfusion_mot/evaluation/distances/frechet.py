"""Frechet distance between Gaussians fitted to two sets of feature vectors, also extrapolated to infinite N."""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from transfusion_mot.errors import UserError

Array = npt.NDArray[np.float64]
Features = npt.NDArray[np.floating]


@dataclass(frozen=True)
class Gaussian:
    """Mean `[D]` and unbiased covariance `[D, D]` of feature vectors, in float64.

    Attributes:
        vectors: `[N, D]`, the feature vectors minus their mean, if they are known and fewer than D; then `factor` needs
            no eigenvectors.
    """

    mean: Array
    covariance: Array
    vectors: Array | None = None

    @cached_property
    def factor(self) -> Array:
        """A `[D, *]` with A A^T = covariance; cached, because references need it more than once."""
        if self.vectors is not None:
            return self.vectors.T / np.sqrt(len(self.vectors) - 1)
        values, vectors = np.linalg.eigh(self.covariance)
        # The square roots of eigenvalues that are only rounding errors would matter.
        kept = values > values.max(initial=0.0) * len(values) * np.finfo(np.float64).eps
        return np.asarray(vectors[:, kept] * np.sqrt(values[kept]))


class GaussianStatistics:
    """Mean and covariance of feature vectors, accumulated over batches in float64.

    Batches are merged by their means and centred second moments (Chan et al. 1979), which stays accurate where the mean
    is large against the spread, unlike sums of squares.
    """

    def __init__(self, num_features: int) -> None:
        self._count = 0
        self._mean = np.zeros(num_features)
        self._scatter = np.zeros((num_features, num_features))

    def update(self, features: Features) -> None:
        """Add features `[B, D]`."""
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
    # Rounding can make the distance of identical sets slightly negative.
    return max(0.0, float(distance))


@dataclass(frozen=True)
class Extrapolation:
    """A Frechet distance extrapolated to infinitely many generated images.

    Attributes:
        distance: Value of the line at 1/N = 0.
        standard_error: Standard error of the distance, from the line and from the drawn images.
        slope: Slope of the distance against 1/N.
        smallest: Number of images in the smallest subset.
        num_subsets: Number of points of the line.
    """

    distance: float
    standard_error: float
    slope: float
    smallest: int
    num_subsets: int


# Generated images for each feature: with fewer than this there is no extrapolation,
_FEWEST_EXTRAPOLATED = 5
# and with fewer than this a warning.
FEW_EXTRAPOLATED = 10


def extrapolated_distance(
    reference: Gaussian, features: Features, num_subsets: int = 15, seed: int = 0
) -> Extrapolation | None:
    """FID-infinity of generated features `[N, D]` (Chong & Forsyth, arXiv 1911.07023).

    The bias of the distance is linear in 1/N if there are many images for each feature. So the distance is measured on
    random subsets of 5,000 to N images (N/2 to N if N < 10,000) and extrapolated by least squares. None if N < 5 D,
    where the bias is not linear and the result would be far too low.
    """
    count, num_features = features.shape
    if count < _FEWEST_EXTRAPOLATED * num_features:
        return None
    sizes = np.linspace(5000 if count >= 10_000 else count // 2, count, num_subsets).astype(int)
    generator = np.random.default_rng(seed)
    distances = []
    for size in tqdm(sizes, desc="infinite N", unit="subset", leave=False):
        chosen = features[np.sort(generator.choice(count, size, replace=False))]
        distances.append(frechet_distance(reference, gaussian_of(chosen)))
    (slope, intercept), covariance = np.polyfit(1 / sizes, distances, 1, cov=True)
    of_images = standard_error(frechet_scores(reference, features))
    error = float(np.hypot(of_images, np.sqrt(covariance[1, 1])))
    return Extrapolation(float(intercept), error, float(slope), int(sizes[0]), num_subsets)


def frechet_scores(reference: Gaussian, features: Features) -> Array:
    """One value for each generated image of features `[N, D]` => [N]; their mean is the Frechet distance.

    They are the distance plus its influence function at each image: the change of the distance with more images like
    this one. With c the features minus their mean m, A the factor of the reference's covariance, w and v the
    eigenvalues and eigenvectors of the covariance of c A, it is

        |c|^2 - sum_j (c A v_j)^2 / sqrt(w_j) - 2 c (m_ref - m)

    less its mean. So the standard error of the distance is that of the mean of these values. It does not include the
    bias of a small N, and it treats the references as fixed.
    """
    rows = features.astype(np.float64)
    mean = rows.mean(axis=0)
    rows -= mean
    # In this basis the overlap is the sum of the roots of one covariance's eigenvalues, see `frechet_distance`.
    projected = rows @ reference.factor
    values, vectors = np.linalg.eigh(projected.T @ projected / (len(rows) - 1))
    kept = values > values.max(initial=0.0) * len(values) * np.finfo(np.float64).eps
    overlap = ((projected @ vectors[:, kept]) ** 2 / np.sqrt(values[kept])).sum(axis=1)
    influence = (rows**2).sum(axis=1) - overlap - 2 * rows @ (reference.mean - mean)
    distance = frechet_distance(reference, gaussian_of(features))
    return np.asarray(distance + influence - influence.mean())


def standard_error(scores: Array) -> float:
    """Standard error of the mean of values `[N]`."""
    return float(np.std(scores, ddof=1) / np.sqrt(len(scores)))


def gaussian_of(features: Features, rows: int = 4096) -> Gaussian:
    """Moments of features `[N, D]`, a few rows at a time so that no float64 copy of all is made."""
    statistics = GaussianStatistics(features.shape[1])
    for start in range(0, len(features), rows):
        statistics.update(features[start : start + rows])
    gaussian = statistics.gaussian()
    if len(features) >= features.shape[1]:
        return gaussian
    return replace(gaussian, vectors=features.astype(np.float64) - gaussian.mean)
