"""Distances over pairs of features, and intervals, against clean-fid, torch-fidelity, torchmetrics and prdc."""

import numpy as np
import pytest
import torch
from cleanfid import fid as cleanfid
from torchmetrics.image.kid import poly_mmd

from transfusion_mot.errors import UserError
from transfusion_mot.evaluation import row_blocks as blocks
from transfusion_mot.evaluation.distances.manifold import manifold_scores
from transfusion_mot.evaluation.distances.mmd import gaussian_distance, kernel_distance
from transfusion_mot.evaluation.intervals import mean_interval

pytest.importorskip("scipy")
pytest.importorskip("prdc")
pytest.importorskip("torch_fidelity")
import scipy.spatial
import scipy.stats
from prdc import compute_prdc
from torch_fidelity.metric_kid import mmd2
from torch_fidelity.metric_prc import calculate_precision_recall_full


def _features(count, num_features, seed, shift=0.0):
    """Correlated, skewed, non-negative like pooled activations."""
    generator = np.random.default_rng(seed)
    mixing = np.random.default_rng(7).normal(size=(num_features, num_features)) / num_features**0.5
    features = np.maximum(generator.normal(size=(count, num_features)) @ mixing + 0.3 + shift, 0)
    return torch.from_numpy(features.astype(np.float32))


@pytest.fixture(params=[None, 1000])
def block(request, monkeypatch):
    """Everything at once, and a few rows at a time."""
    if request.param is not None:
        monkeypatch.setattr(blocks, "_ELEMENTS", request.param)


@pytest.mark.usefixtures("block")
def test_kernel_distance_equals_official_implementations():
    x, y = _features(200, 32, 0), _features(200, 32, 1, 0.1)
    distance = kernel_distance(x, y)
    assert distance.value == pytest.approx(poly_mmd(x.double(), y.double()).item(), rel=1e-10)
    assert distance.value == pytest.approx(cleanfid.kernel_distance(x.numpy(), y.numpy(), num_subsets=1), rel=1e-5)
    kernels = (((a.double() @ b.double().T / 32 + 1) ** 3).numpy() for a, b in ((x, x), (x, y), (y, y)))
    assert distance.value == pytest.approx(mmd2(*kernels), rel=1e-8)


def test_kernel_distance_is_what_subsets_estimate():
    x, y = _features(900, 32, 0), _features(600, 32, 1, 0.1)
    distance = kernel_distance(x, y)
    np.random.seed(0)
    # clean-fid takes random subsets of at most 1000; of 100 here, their mean is good to a few percent.
    by_subsets = cleanfid.kernel_distance(x.numpy(), y.numpy(), num_subsets=200, max_subset_size=100)
    assert distance.value == pytest.approx(by_subsets, rel=0.05)
    shuffled = kernel_distance(x.flip(0), y[torch.randperm(600, generator=torch.Generator().manual_seed(0))])
    assert distance.value == pytest.approx(shuffled.value, rel=1e-12)


def test_standard_error_of_a_kernel_distance():
    drawn = [kernel_distance(_features(120, 16, 2 * i), _features(120, 16, 2 * i + 1, 0.3)) for i in range(300)]
    spread = np.std([distance.value for distance in drawn])
    assert np.mean([distance.standard_error for distance in drawn]) == pytest.approx(spread, rel=0.08)


@pytest.mark.usefixtures("block")
def test_gaussian_distance_is_cmmd():
    x, y = _features(50, 16, 0), _features(70, 16, 1, 0.2)
    unit_x, unit_y = (scipy_rows / np.linalg.norm(scipy_rows, axis=1, keepdims=True) for scipy_rows in (x, y))

    def mean_kernel(a, b):
        return np.exp(-scipy.spatial.distance.cdist(a, b, "sqeuclidean") / 200).mean()

    expected = mean_kernel(unit_x, unit_x) + mean_kernel(unit_y, unit_y) - 2 * mean_kernel(unit_x, unit_y)
    assert gaussian_distance(x, y).value == pytest.approx(1000 * expected, rel=1e-6)
    assert gaussian_distance(x, 5 * x).value == pytest.approx(0, abs=1e-9)


@pytest.mark.usefixtures("block")
def test_manifolds_equal_official_implementations(capsys):
    real, generated = _features(150, 16, 0), _features(110, 16, 1, 0.2)
    scores = manifold_scores(real, generated)
    by_prdc = {k: compute_prdc(real.numpy(), generated.numpy(), k) for k in (3, 5)}
    capsys.readouterr()
    assert scores.precision == pytest.approx(by_prdc[3]["precision"], abs=1e-12)
    assert scores.recall == pytest.approx(by_prdc[3]["recall"], abs=1e-12)
    assert scores.density == pytest.approx(by_prdc[5]["density"], abs=1e-12)
    assert scores.coverage == pytest.approx(by_prdc[5]["coverage"], abs=1e-12)
    assert 0.1 < min(scores.precision, scores.recall, scores.coverage) < 0.95
    by_torch_fidelity = calculate_precision_recall_full(generated, real, neighborhood=3)
    assert (scores.precision, scores.recall) == pytest.approx(by_torch_fidelity, abs=1e-6)
    assert scores.inside.double().mean().item() == scores.precision
    assert scores.covered.double().mean().item() == scores.coverage


def test_manifolds_of_known_sets():
    grid = torch.cartesian_prod(torch.arange(10.0), torch.arange(10.0))
    same = manifold_scores(grid, grid)
    assert (same.precision, same.recall, same.coverage) == (1, 1, 1)
    far = manifold_scores(grid, grid + 100)
    assert (far.precision, far.recall, far.density, far.coverage) == (0, 0, 0, 0)
    # One point repeated, as a collapsed model paints: all of it is real, and little of the real is covered.
    collapsed = manifold_scores(grid, grid[55] + 0.01 * torch.randn(50, 2, generator=torch.Generator().manual_seed(0)))
    assert collapsed.precision == 1
    assert collapsed.coverage < 0.1
    with pytest.raises(UserError, match="more than 5 images"):
        manifold_scores(grid, grid[:5])


def test_too_few_for_a_kernel_distance():
    with pytest.raises(UserError, match="at least 2 images"):
        kernel_distance(_features(1, 4, 0), _features(5, 4, 0))


def test_mean_interval():
    values = np.random.default_rng(0).gamma(2, size=400)
    low, high = mean_interval(values)
    theirs = scipy.stats.bootstrap((values,), np.mean, method="percentile", rng=0).confidence_interval
    assert (low, high) == pytest.approx((theirs.low, theirs.high), rel=0.01)
    # As the theory of the mean says, and whatever the order.
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.05)
    assert (low, high) == mean_interval(values[::-1])
    assert mean_interval([3.0]) is None
    assert mean_interval([]) is None
    # Losses over lengths: documents of twice the length count twice.
    lengths = np.random.default_rng(1).integers(1, 30, size=400)
    low, high = mean_interval(values * lengths, lengths)
    theirs = scipy.stats.bootstrap(
        (values * lengths, lengths), _ratio, paired=True, method="percentile", rng=0
    ).confidence_interval
    assert (low, high) == pytest.approx((theirs.low, theirs.high), rel=0.01)


@pytest.mark.parametrize(("right", "count"), [(0, 20), (20, 20), (7, 20), (1, 2)])
def test_interval_of_a_share_is_that_of_wilson(right, count):
    theirs = scipy.stats.binomtest(right, count).proportion_ci(method="wilson")
    low, high = mean_interval([1.0] * right + [0.0] * (count - right))
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=1e-4)
    assert low < high


def _ratio(values, lengths, axis=-1):
    return values.sum(axis) / lengths.sum(axis)
