"""Features of images: computed, cached, or read as saved statistics."""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from accelerate import PartialState

from transfusion_mot.errors import UserError
from transfusion_mot.evaluation.distances.frechet import Gaussian, gaussian_of
from transfusion_mot.evaluation.features.network import FeatureNetwork
from transfusion_mot.evaluation.images import ImageSource, TarImage, device_batches, find_images, image_list_hash
from transfusion_mot.evaluation.processes import shared_rows
from transfusion_mot.evaluation.weights import file_sha256

# Key of a metric's protocol that identifies its references.
REAL_IMAGES = "real images"

FeatureArray = npt.NDArray[np.float32]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FeatureSet:
    """Features or statistics of one side of a distance.

    Attributes:
        gaussian: Moments of the features.
        features: `[N, D]`; None for saved statistics with only moments.
        protocol: Part of a metric's protocol that describes this side.
        images: Images of the features, in their order; none for given statistics.
    """

    gaussian: Gaussian
    features: FeatureArray | None
    protocol: dict[str, Any]
    images: tuple[ImageSource, ...] = ()

    def of(self, images: Sequence[ImageSource]) -> FeatureArray | None:
        """Features `[N, D]` of some of its images; None if an image is missing."""
        places = {str(image): place for place, image in enumerate(self.images)}
        found = [places[name] for name in map(str, images) if name in places]
        return None if self.features is None or len(found) < len(images) else self.features[found]


@dataclass(frozen=True)
class SavedStatistics:
    """A file of statistics: published `mu` `[D]` and `sigma` `[D, D]`, or one from our cache."""

    path: Path


def open_reference(place: str | Path) -> Sequence[ImageSource] | SavedStatistics:
    """The reference of generated images: a folder of images, a tar file, or saved statistics (.npz).

    Raises:
        UserError: The path is none of these.
    """
    return SavedStatistics(Path(place)) if Path(place).suffix == ".npz" else find_images(place)


@torch.inference_mode()
def image_features(
    images: Sequence[ImageSource],
    network: FeatureNetwork,
    *,
    batch_size: int | None = None,
    num_workers: int = 0,
    image_size: int | None = None,
    description: str = "features",
    processes: PartialState | None = None,
    quiet: bool = False,
) -> FeatureArray:
    """Features `[N, D]` of images, in their order; computed in float32 without TF32.

    Args:
        images: Files, members of tar files or pictures.
        network: Network of the features.
        batch_size: Images at a time; does not change the features. None: chosen by the device.
        num_workers: Images decoded at a time, by other processes; with 0 one at a time, by this process.
        image_size: Resize images to this size first, like training data; None keeps their own sizes.
        description: Label of the progress bar.
        processes: Processes that share the images; all call this, and all receive all features.
        quiet: Without a progress bar.

    Raises:
        UserError: An image cannot be read; with `processes`, on all of them.
    """

    def batches(rank: int, world: int) -> Iterator[torch.Tensor]:
        part = device_batches(
            images[rank::world],
            # A copy, because arrays of Pillow are read-only, and torch warns about that.
            torch.tensor,
            network.device,
            batch_size=batch_size,
            num_workers=num_workers,
            description=description,
            image_size=image_size,
            quiet=quiet or rank > 0,
        )
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            for batch in part:
                yield network.features(batch)

    features = shared_rows(batches, len(images), network.num_features, network.device, processes)
    return cast(FeatureArray, features.cpu().numpy())


def feature_set(
    images: Sequence[ImageSource] | SavedStatistics,
    network: FeatureNetwork,
    *,
    batch_size: int | None = None,
    num_workers: int = 0,
    image_size: int | None = None,
    description: str = "features",
    processes: PartialState | None = None,
    cache_dir: str | Path | None = None,
) -> FeatureSet:
    """Features and their moments of one side of a distance; other arguments as in `image_features`.

    Args:
        images: Images, at least two, or a file of statistics.
        network: Network of the features.
        cache_dir: Cache of features of files. An entry belongs to a list of files with their sizes and times, the
            network, its weights and the resize.

    Raises:
        UserError: There are too few images, one cannot be read, or statistics are not of this network.
    """
    if isinstance(images, SavedStatistics):
        return _read_statistics(images.path, network)
    if len(images) < 2:
        raise UserError(f"an image distance needs at least 2 images on each side, but there are {len(images)}")
    files = [image for image in images if isinstance(image, Path | TarImage)]
    path = None
    if len(files) == len(images):
        # Random subsets are drawn in this order, so they do not depend on the given order of images.
        images = files = sorted(files, key=str)
        if cache_dir is not None:
            path = Path(cache_dir) / f"{_cache_key(files, network, image_size)}.npz"
            if path.is_file():
                _logger.info("%s: from %s", description, path)
                kept = _read_statistics(path, network)
                return replace(kept, images=tuple(files), protocol={REAL_IMAGES: image_list_hash(files)})
    features = image_features(
        images,
        network,
        batch_size=batch_size,
        num_workers=num_workers,
        image_size=image_size,
        description=description,
        processes=processes,
    )
    result = FeatureSet(gaussian_of(features), features, {REAL_IMAGES: image_list_hash(images)}, tuple(images))
    if path is not None and (processes is None or processes.is_main_process):
        _save_statistics(result, network, image_size, path)
        _logger.info("%s: kept in %s", description, path)
    return result


def _cache_key(images: Sequence[Path | TarImage], network: FeatureNetwork, image_size: int | None) -> str:
    described: list[Any] = [network.description, network.weights, network.resize, image_size]
    if image_size is not None:
        described.append("whole pixels")
    tars: dict[Path, os.stat_result] = {}
    for image in images:
        if isinstance(image, TarImage):
            if image.tar not in tars:
                tars[image.tar] = image.tar.stat()
            found = tars[image.tar]
        else:
            found = image.stat()
        described.append([str(image), found.st_size, found.st_mtime_ns])
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:24]


def _save_statistics(features: FeatureSet, network: FeatureNetwork, image_size: int | None, path: Path) -> None:
    """Write to a temporary file and rename it, so that a killed run leaves no partial file."""
    assert features.features is not None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
            np.savez(
                file,
                mu=features.gaussian.mean,
                sigma=features.gaussian.covariance,
                features=features.features,
                weights=network.weights,
                real_images=features.protocol[REAL_IMAGES],
                resize=network.resize,
                image_size=image_size or 0,
            )
        Path(file.name).replace(path)
    except OSError as error:
        raise UserError(f"cannot keep features in '{path.parent}': {error.strerror}") from None


def _read_statistics(path: Path, network: FeatureNetwork) -> FeatureSet:
    """Published statistics (`mu`, `sigma`) are not checked; those of the cache say how they were computed."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            content = {name: arrays[name] for name in arrays.files}
        mean, covariance = (content[name].astype(np.float64) for name in ("mu", "sigma"))
    except OSError as error:
        raise UserError(f"cannot read the statistics '{path}': {error.strerror or error}") from None
    # numpy raises these and the zip reader's own error on other and damaged files.
    except Exception as error:
        reason = f"no array {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(
            f"'{path}' is not a file of statistics ({reason}); give an .npz with mu [D] and sigma [D, D]"
        ) from None
    size = network.num_features
    if mean.shape != (size,) or covariance.shape != (size, size):
        raise UserError(
            f"'{path}' has mu {list(mean.shape)} and sigma {list(covariance.shape)}, but {network.description} has "
            f"{size} features; give statistics of that network"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise UserError(f"'{path}' holds values that are not finite; compute the statistics again")
    for name, ours in (("weights", network.weights), ("resize", network.resize)):
        if name in content and str(content[name]) != ours:
            raise UserError(
                f"'{path}' was computed with {name} '{content[name]}', but the network has '{ours}'; "
                "give the images, or statistics of this network"
            )
    features = content.get("features")
    if features is not None:
        # Older files do not identify their images.
        known = {REAL_IMAGES: str(content["real_images"])} if "real_images" in content else {}
        return FeatureSet(Gaussian(mean, covariance), features, known)
    return FeatureSet(
        Gaussian(mean, covariance), None, {"real statistics": f"{path.name}, sha256 {file_sha256(path)[:12]}"}
    )
