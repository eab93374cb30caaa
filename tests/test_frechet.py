"""Frechet distances between feature sets, against closed forms and against clean-fid, torchmetrics and SciPy."""

import numpy as np
import pytest
import torch
from cleanfid import fid as cleanfid
from torchmetrics.image.fid import _compute_fid

from transfusion_mot.errors import UserError
from transfusion_mot.evaluation.distances.frechet import (
    Gaussian,
    GaussianStatistics,
    extrapolated_distance,
    frechet_distance,
    gaussian_of,
)

pytest.importorskip("scipy")
import scipy.linalg
import scipy.stats


def _features(count, num_features, seed):
    """Correlated, skewed, non-negative like pooled activations."""
    generator = np.random.default_rng(seed)
    mixing = np.random.default_rng(7).normal(size=(num_features, num_features)) / num_features**0.5
    return np.maximum(generator.normal(size=(count, num_features)) @ mixing + 0.3 + 0.1 * seed, 0).astype(np.float32)


def _gaussian(features, batch_size=10_000):
    statistics = GaussianStatistics(features.shape[1])
    for start in range(0, len(features), batch_size):
        statistics.update(features[start : start + batch_size])
    return statistics.gaussian()


def test_closed_form_of_two_known_gaussians():
    # Covariances with the same eigenvectors: |m1 - m2|^2 + sum (sqrt(a) - sqrt(b))^2.
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))[0]
    a, b = np.array([4.0, 1, 9, 0.25, 0]), np.array([1.0, 16, 4, 0, 0.04])
    first = Gaussian(np.array([1.0, 0, 0, 0, 0]), rotation @ np.diag(a) @ rotation.T)
    second = Gaussian(np.array([0.0, 2, 0, 0, 0]), rotation @ np.diag(b) @ rotation.T)
    assert frechet_distance(first, second) == pytest.approx(5 + ((a**0.5 - b**0.5) ** 2).sum(), rel=1e-12)


@pytest.mark.parametrize("count", [400, 40])
def test_frechet_distance_equals_official_implementations(count):
    first, second = (_gaussian(_features(count, 64, seed)) for seed in (0, 1))
    ours = frechet_distance(first, second)
    moments = first.mean, first.covariance, second.mean, second.covariance
    assert ours == pytest.approx(_compute_fid(*map(torch.from_numpy, moments)).item(), rel=1e-5)
    # With fewer images than features the matrix root that the others take is itself only good to a few digits.
    tolerance = 1e-8 if count > 64 else 1e-4
    root = scipy.linalg.sqrtm(first.covariance @ second.covariance).real
    difference = first.mean - second.mean
    by_scipy = difference @ difference + np.trace(first.covariance + second.covariance - 2 * root)
    assert ours == pytest.approx(by_scipy, rel=tolerance)
    try:
        by_cleanfid = cleanfid.frechet_distance(*moments)
    except TypeError:
        pytest.skip("this SciPy no longer has the sqrtm that clean-fid 0.1.35 calls")
    assert ours == pytest.approx(by_cleanfid, rel=tolerance)


def test_fewer_images_than_features_is_exact():
    # tr (C1 C2)^(1/2) straight from the centred features, without any covariance.
    x, y = _features(20, 128, 0).astype(np.float64), _features(30, 128, 1).astype(np.float64)
    centred_x, centred_y = (x - x.mean(0)) / 19**0.5, (y - y.mean(0)) / 29**0.5
    overlap = np.linalg.svd(centred_x @ centred_y.T, compute_uv=False).sum()
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + (centred_x**2).sum() + (centred_y**2).sum() - 2 * overlap
    assert frechet_distance(_gaussian(x), _gaussian(y)) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(_gaussian(x), _gaussian(x)) == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("batch_size", [1, 7, 500])
def test_streamed_moments_equal_numpy_far_from_zero(batch_size):
    features = _features(500, 16, 0).astype(np.float64) + 1e5
    gaussian = _gaussian(features, batch_size)
    np.testing.assert_allclose(gaussian.mean, features.mean(0), rtol=1e-13)
    np.testing.assert_allclose(gaussian.covariance, np.cov(features, rowvar=False), rtol=1e-8, atol=1e-10)


def test_extrapolation_finds_the_distance_of_infinitely_many():
    # Samples of the reference itself: all of their distance is bias, which falls as 1/N.
    reference = Gaussian(np.zeros(32), np.eye(32))
    features = np.random.default_rng(0).normal(size=(4000, 32))
    whole = frechet_distance(reference, _gaussian(features))
    found = extrapolated_distance(reference, features)
    assert found.smallest == 2000
    assert found.slope == pytest.approx(4000 * whole, rel=0.2)
    assert abs(found.distance) < 0.2 * whole
    assert found == extrapolated_distance(reference, features)
    assert extrapolated_distance(reference, features[:160]) is not None
    assert extrapolated_distance(reference, features[:159]) is None


def test_extrapolation_equals_the_published_recipe():
    features = _features(300, 32, 1)
    reference = _gaussian(_features(400, 32, 0))
    generator = np.random.default_rng(0)
    sizes = np.linspace(150, 300, 15).astype(np.int32)
    distances = []
    for size in sizes:
        chosen = features[generator.choice(300, size, replace=False)].astype(np.float64)
        moments = reference.mean, reference.covariance, chosen.mean(0), np.cov(chosen, rowvar=False)
        distances.append(_compute_fid(*map(torch.from_numpy, moments)).item())
    line = scipy.stats.linregress(1 / sizes, distances)
    found = extrapolated_distance(reference, features)
    assert found.distance == pytest.approx(line.intercept, rel=1e-5)
    assert found.slope == pytest.approx(line.slope, rel=1e-4)


def test_one_image_is_refused():
    with pytest.raises(UserError, match="at least 2 images"):
        _gaussian(_features(1, 4, 0))


@pytest.mark.parametrize("count", [7, 15, 16, 40])
def test_factor_is_a_root_of_the_covariance(count: int) -> None:
    """Of the vectors themselves where they are fewer than features, else of eigenvectors."""
    features = np.random.default_rng(count).normal(3.0, 2.0, (count, 16)).astype(np.float32)
    factor = gaussian_of(features).factor
    np.testing.assert_allclose(factor @ factor.T, np.cov(features.astype(np.float64).T), rtol=0, atol=1e-12)
