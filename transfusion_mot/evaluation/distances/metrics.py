"""Distances between real and generated images in the features of a network, as numbers with their protocols."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tqdm import tqdm

from transfusion_mot.evaluation.distances.frechet import (
    FEW_EXTRAPOLATED,
    extrapolated_distance,
    frechet_scores,
    standard_error,
)
from transfusion_mot.evaluation.distances.manifold import DENSITY_NEIGHBOURS, PRECISION_NEIGHBOURS, manifold_scores
from transfusion_mot.evaluation.features.network import FeatureNetwork
from transfusion_mot.evaluation.features.sets import FeatureSet, SavedStatistics, feature_set
from transfusion_mot.evaluation.images import ImageSource
from transfusion_mot.evaluation.intervals import DEVIATIONS, mean_interval
from transfusion_mot.evaluation.report.content import Metric

_logger = logging.getLogger(__name__)


def image_distance(
    real: Sequence[ImageSource] | SavedStatistics,
    generated: Sequence[ImageSource],
    network: FeatureNetwork,
    *,
    batch_size: int | None = None,
    num_workers: int = 0,
    image_size: int | None = None,
    processes: PartialState | None = None,
    cache_dir: str | Path | None = None,
) -> list[Metric]:
    """The metrics of `set_distance`; arguments as in `feature_set`.

    With `processes` all of them call this; only the main one receives the metrics.

    Raises:
        UserError: A side has fewer than two images, one cannot be read, or statistics are not of this network.
    """
    shared: dict[str, Any] = {
        "batch_size": batch_size,
        "num_workers": num_workers,
        "image_size": image_size,
        "processes": processes,
    }
    # References are reused, generated images are not.
    real_set = feature_set(real, network, **shared, description=f"{network.name}: real images", cache_dir=cache_dir)
    generated_set = feature_set(generated, network, **shared, description=f"{network.name}: generated images")
    if processes is not None and not processes.is_main_process:
        return []
    return set_distance(real_set, generated_set, network, image_size)


def set_distance(
    real_set: FeatureSet, generated_set: FeatureSet, network: FeatureNetwork, image_size: int | None
) -> list[Metric]:
    """Frechet and kernel distance, precision, recall, density and coverage of two sets of features of `network`.

    Saved statistics without features give only the Frechet distance. With at least five generated images for each
    feature it is also extrapolated to infinitely many. `image_size` is the size of the images, for the protocol.
    """
    assert generated_set.features is not None
    count, num_features = generated_set.features.shape
    fewest = min(count, count if real_set.features is None else len(real_set.features))
    if fewest <= num_features:
        _logger.warning(
            "%s real and %d generated images are few for %d features: %s is biased upwards, so compare it only with "
            "numbers from as many images",
            "unknown" if real_set.features is None else len(real_set.features),
            count,
            num_features,
            network.frechet_name,
        )
    protocol: dict[str, Any] = {
        **({} if real_set.features is None else {"real": len(real_set.features)}),
        "generated": count,
        "features": network.description,
        "weights": network.weights,
        "image size": "as stored" if image_size is None else image_size,
        **({} if image_size is None else {"crop": "centre square, whole pixels, Lanczos"}),
        "resize": network.resize,
        **real_set.protocol,
    }
    # With many features and images each step takes up to minutes.
    steps: tqdm[Any] = tqdm(total=4, desc=f"{network.name}: distances", unit="step", leave=False)
    scores = frechet_scores(real_set.gaussian, generated_set.features)
    steps.update()
    distance = float(scores.mean())
    interval = _interval(distance, standard_error(scores), lowest=0.0)
    metrics = [Metric(network.frechet_name, distance, protocol, interval, tuple(scores.tolist()))]
    extrapolated = extrapolated_distance(real_set.gaussian, generated_set.features)
    if extrapolated is not None:
        if count < FEW_EXTRAPOLATED * num_features:
            _logger.warning(
                "%d generated images are few for %s at infinite N with %d features: %d or more are better",
                count,
                network.frechet_name,
                num_features,
                FEW_EXTRAPOLATED * num_features,
            )
        subsets = f"{extrapolated.num_subsets} of {extrapolated.smallest} to {count}"
        name = f"{network.frechet_name}, infinite N"
        interval = _interval(extrapolated.distance, extrapolated.standard_error)
        metrics.append(Metric(name, extrapolated.distance, {**protocol, "subsets": subsets}, interval))
    steps.update()
    metrics += _pairwise(real_set, generated_set, network, protocol, steps)
    steps.close()
    return metrics


def pairs_device(device: torch.device) -> torch.device:
    """Device for distances of pairs, which need float64; Apple's GPUs do not have it."""
    return torch.device("cpu") if device.type == "mps" else device


def _interval(value: float, error: float, lowest: float = -math.inf) -> tuple[float, float]:
    return max(lowest, value - DEVIATIONS * error), value + DEVIATIONS * error


def _pairwise(
    real_set: FeatureSet,
    generated_set: FeatureSet,
    network: FeatureNetwork,
    protocol: dict[str, Any],
    steps: "tqdm[Any]",
) -> list[Metric]:
    """The metrics that need the features of every image."""
    if real_set.features is None:
        return []
    device = pairs_device(network.device)
    real = torch.from_numpy(real_set.features).to(device)
    generated = torch.from_numpy(generated_set.features).to(device)
    kernel = network.kernel(real, generated)
    steps.update()
    interval = _interval(kernel.value, kernel.standard_error)
    metrics = [Metric(network.kernel_name, kernel.value, {**protocol, "pairs": "all"}, interval)]
    if min(len(real), len(generated)) <= DENSITY_NEIGHBOURS:
        return metrics
    scores = manifold_scores(real, generated)
    steps.update()
    inside = tuple(scores.inside.double().tolist())
    for name, value, neighbours, per_image in (
        ("precision", scores.precision, PRECISION_NEIGHBOURS, inside),
        ("recall", scores.recall, PRECISION_NEIGHBOURS, None),
        ("density", scores.density, DENSITY_NEIGHBOURS, None),
        ("coverage", scores.coverage, DENSITY_NEIGHBOURS, None),
    ):
        measured = {**protocol, "nearest neighbours": neighbours}
        of_share = mean_interval(per_image) if per_image is not None else None
        metrics.append(Metric(f"{name} ({network.name})", value, measured, of_share, per_image))
    return metrics
