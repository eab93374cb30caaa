"""Distances between feature sets, against closed forms and against clean-fid, torchmetrics and SciPy."""

import numpy as np
import pytest
import scipy.linalg
import torch
from cleanfid import fid as cleanfid
from torchmetrics.image.fid import _compute_fid
from torchmetrics.image.kid import poly_mmd

from transfusion_mot.errors import UserError
from transfusion_mot.evaluation.frechet import Gaussian, GaussianStatistics, frechet_distance, kernel_distance


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


def test_kernel_distance_of_whole_sets_equals_official_implementations():
    x, y = _features(200, 32, 0), _features(200, 32, 1)
    distance = kernel_distance(x, y)
    assert (distance.num_subsets, distance.subset_size) == (1, 200)
    assert distance.mean == pytest.approx(cleanfid.kernel_distance(x, y, num_subsets=1), rel=1e-5)
    by_torchmetrics = poly_mmd(torch.from_numpy(x).double(), torch.from_numpy(y).double())
    assert distance.mean == pytest.approx(by_torchmetrics.item(), rel=1e-10)


def test_kernel_distance_by_subsets():
    x, y = _features(400, 32, 0), _features(300, 32, 1)
    whole = poly_mmd(torch.from_numpy(x[:300]).double(), torch.from_numpy(y).double()).item()
    distance = kernel_distance(x, y, num_subsets=50, max_subset_size=100)
    assert (distance.num_subsets, distance.subset_size) == (50, 100)
    assert abs(distance.mean - whole) < 4 * distance.std / 50**0.5
    assert distance == kernel_distance(x, y, num_subsets=50, max_subset_size=100)
    # Unbiased: sets of one distribution are at zero on average, not at a small positive distance.
    same = kernel_distance(_features(2000, 32, 0), _features(4000, 32, 0)[2000:], num_subsets=50, max_subset_size=100)
    assert abs(same.mean) < 0.05 * distance.mean


def test_one_image_is_refused():
    with pytest.raises(UserError, match="at least 2 images"):
        _gaussian(_features(1, 4, 0))
    with pytest.raises(UserError, match="at least 2 images"):
        kernel_distance(_features(1, 4, 0), _features(5, 4, 0))
