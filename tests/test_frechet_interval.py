"""The interval of a Frechet distance, against new images drawn from the same distribution."""

import logging
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from transfusion_mot.evaluation.distances.frechet import (
    extrapolated_distance,
    frechet_distance,
    frechet_scores,
    gaussian_of,
    standard_error,
)
from transfusion_mot.evaluation.distances.metrics import set_distance
from transfusion_mot.evaluation.distances.mmd import kernel_distance
from transfusion_mot.evaluation.features.sets import FeatureSet
from transfusion_mot.evaluation.report.comparison import difference
from transfusion_mot.evaluation.report.content import Metric

NUM_FEATURES = 24


def drawn(rng: np.random.Generator, count: int, shift: float = 0.3) -> np.ndarray:
    """Correlated, skewed features that are not quite the reference's."""
    mixing = np.random.default_rng(5).standard_normal((NUM_FEATURES, NUM_FEATURES))
    mixing *= np.linspace(0.1, 1.5, NUM_FEATURES) / NUM_FEATURES**0.5
    return np.abs(rng.standard_normal((count, NUM_FEATURES))) @ mixing + shift


REFERENCE = gaussian_of(drawn(np.random.default_rng(9), 6000) * 1.1 - 0.2)


@pytest.mark.parametrize("count", [NUM_FEATURES // 4, NUM_FEATURES, 4 * NUM_FEATURES])
def test_intervals_hold_the_distance_that_so_many_images_have_on_average(count: int) -> None:
    """With fewer images than features, as many, and more."""
    rng = np.random.default_rng(0)
    distances, errors = [], []
    for _ in range(400):
        features = drawn(rng, count)
        scores = frechet_scores(REFERENCE, features)
        assert scores.mean() == pytest.approx(frechet_distance(REFERENCE, gaussian_of(features)), rel=1e-9)
        distances.append(scores.mean())
        errors.append(standard_error(scores))
    held = np.abs(np.array(distances) - np.mean(distances)) < 1.96 * np.array(errors)
    # 95 %, less or more three standard errors of 400 draws; of few images an error is itself a rough number.
    assert 0.90 < held.mean() < 0.985
    assert np.mean(errors) == pytest.approx(np.std(distances), rel=0.25)


def test_scores_say_what_more_images_of_a_kind_would_do() -> None:
    """The influence function by its definition: the distance with a little more weight on one image."""
    features = drawn(np.random.default_rng(0), 60)
    scores = frechet_scores(REFERENCE, features)
    distance = frechet_distance(REFERENCE, gaussian_of(features))
    copies = 400
    for index in (0, 7, 31):
        heavier = np.concatenate([np.repeat(features, copies, axis=0), features[[index]]])
        plain = frechet_distance(REFERENCE, gaussian_of(np.repeat(features, copies, axis=0)))
        moved = (frechet_distance(REFERENCE, gaussian_of(heavier)) - plain) * len(heavier)
        assert scores[index] - distance == pytest.approx(moved, rel=0.05)


def test_equal_prompts_find_smaller_differences_than_separate_images() -> None:
    """Two models whose pictures of a prompt have most in common."""
    rng = np.random.default_rng(0)
    common = drawn(rng, 400)
    paintings = [common + 0.05 * rng.standard_normal(common.shape) + shift for shift in (0.0, 0.015)]
    protocol = {"prompts": "the same", "captioned images": None}

    def metric(features: np.ndarray, is_paired: bool) -> Metric:
        scores = frechet_scores(REFERENCE, features)
        half = 1.96 * standard_error(scores)
        interval = (scores.mean() - half, scores.mean() + half)
        return Metric("FD", scores.mean(), protocol, interval, tuple(scores) if is_paired else None)

    paired = difference(*(metric(features, True) for features in paintings))
    separate = difference(*(metric(features, False) for features in paintings))
    assert paired.verdict == "worse"
    assert separate.verdict == "within noise"
    same = difference(metric(paintings[0], True), metric(paintings[0], True))
    assert same.verdict == "within noise"


@pytest.mark.parametrize("count", [NUM_FEATURES, 4 * NUM_FEATURES])
def test_equal_models_differ_by_noise(count: int) -> None:
    """Two paintings of each prompt: one in twenty pairs of lists differs by chance."""
    rng = np.random.default_rng(1)
    verdicts = []
    for _ in range(200):
        common = drawn(rng, count)
        pair = []
        for _ in range(2):
            scores = frechet_scores(REFERENCE, common + 0.3 * rng.standard_normal(common.shape))
            pair.append(Metric("FD", scores.mean(), {"prompts": "the same"}, None, tuple(scores)))
        verdicts.append(difference(*pair).verdict)
    assert 180 <= verdicts.count("within noise") < 200


def test_extrapolated_intervals_hold_the_distance_of_infinitely_many() -> None:
    rng = np.random.default_rng(0)
    whole = frechet_distance(REFERENCE, gaussian_of(drawn(np.random.default_rng(3), 300_000)))
    found = [extrapolated_distance(REFERENCE, drawn(rng, 10 * NUM_FEATURES), seed=seed) for seed in range(120)]
    held = [abs(one.distance - whole) < 1.96 * one.standard_error for one in found]
    assert 0.87 < np.mean(held) <= 1
    assert np.mean([one.distance for one in found]) == pytest.approx(whole, rel=0.1)


@pytest.mark.parametrize("each", [4, 7, 10])
def test_numbers_of_a_report_have_their_intervals_and_scores(
    each: int, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """Generated images for each feature: too few for infinite N, few, and enough."""
    # Apple's GPUs have no float64, which distances of pairs need.
    device = torch.device("mps")
    names = {
        "name": "toy",
        "frechet_name": "FD",
        "kernel_name": "KD",
        "description": "toy",
        "weights": "",
        "resize": "",
    }
    network: Any = SimpleNamespace(**names, device=device, kernel=kernel_distance)
    count = each * NUM_FEATURES
    real, generated = (drawn(np.random.default_rng(count), count, shift).astype(np.float32) for shift in (0.2, 0.3))
    sets = [FeatureSet(gaussian_of(features), features, {}) for features in (real, generated)]
    with caplog.at_level(logging.WARNING):
        found = {metric.name: metric for metric in set_distance(*sets, network, None)}
    shown = capsys.readouterr().err
    assert "toy: distances" in shown
    assert ("infinite N" in shown) == (each >= 5)
    distance = found["FD"]
    assert distance.value == pytest.approx(frechet_distance(*(one.gaussian for one in sets)))
    assert np.mean(distance.scores) == pytest.approx(distance.value)
    half = 1.96 * np.std(distance.scores, ddof=1) / count**0.5
    assert distance.interval == pytest.approx((max(0.0, distance.value - half), distance.value + half))
    kernel = kernel_distance(*map(torch.from_numpy, (real, generated)))
    half = 1.96 * kernel.standard_error
    assert found["KD"].interval == pytest.approx((kernel.value - half, kernel.value + half))
    assert ("FD, infinite N" in found) == (each >= 5)
    if each >= 5:
        whole = extrapolated_distance(sets[0].gaussian, generated)
        half = 1.96 * whole.standard_error
        assert found["FD, infinite N"].interval == pytest.approx((whole.distance - half, whole.distance + half))
    warning = f"{count} generated images are few for FD at infinite N with 24 features: 240 or more are better"
    assert (warning in caplog.text) == (each == 7)
