"""The interval of a Frechet distance, against new images drawn from the same distribution."""

import numpy as np
import pytest

from transfusion_mot.evaluation.frechet import frechet_distance, frechet_interval, gaussian_of

NUM_FEATURES = 12


def drawn(rng: np.random.Generator, count: int) -> np.ndarray:
    """Correlated features that are not quite the reference's."""
    mixing = np.random.default_rng(5).standard_normal((NUM_FEATURES, NUM_FEATURES))
    return (rng.standard_normal((count, NUM_FEATURES)) @ mixing + 0.3).astype(np.float32)


REFERENCE = gaussian_of(drawn(np.random.default_rng(9), 4000) * 1.1 - 3)


@pytest.mark.parametrize("count", [8, 300])
def test_the_middle_is_the_distance(count: int) -> None:
    """With fewer images than features, and with more."""
    features = drawn(np.random.default_rng(0), count)
    low, high = frechet_interval(REFERENCE, features)
    assert (low + high) / 2 == pytest.approx(frechet_distance(REFERENCE, gaussian_of(features)), rel=1e-9)
    assert low < high


def test_it_is_as_wide_as_distances_of_new_images_spread() -> None:
    rng = np.random.default_rng(0)
    # Near a distance of zero it is wider than need be.
    distances = [frechet_distance(REFERENCE, gaussian_of(drawn(rng, 300))) for _ in range(300)]
    intervals = [frechet_interval(REFERENCE, drawn(rng, 300), seed=seed) for seed in range(20)]
    half = np.mean([high - low for low, high in intervals]) / 2
    assert half == pytest.approx(1.96 * np.std(distances), rel=0.15)


def test_resamples_are_those_of_the_definition() -> None:
    """The same draws, each measured as a set of its own."""
    features = drawn(np.random.default_rng(0), 50)
    generator = np.random.default_rng(3)
    distances = [frechet_distance(REFERENCE, gaussian_of(features[generator.integers(50, size=50)])) for _ in range(10)]
    low, high = frechet_interval(REFERENCE, features, resamples=10, seed=3)
    assert (high - low) / 2 == pytest.approx(1.96 * np.std(distances, ddof=1), rel=1e-9)
