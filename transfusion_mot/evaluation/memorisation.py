"""Nearest training images in feature space: to find painted copies, and as a baseline of copied captions."""

import bisect
import functools
import itertools
import logging
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from accelerate import PartialState
from PIL import Image

from transfusion_mot.config import DataConfig
from transfusion_mot.data.mixture import open_documents
from transfusion_mot.data.sources.base import CaptionedImages
from transfusion_mot.errors import UserError
from transfusion_mot.evaluation.defaults import default_num_workers
from transfusion_mot.evaluation.features.network import FeatureNetwork
from transfusion_mot.evaluation.features.sets import FeatureArray, image_features
from transfusion_mot.evaluation.processes import shared_rows
from transfusion_mot.evaluation.protocol.prompts import Prompt
from transfusion_mot.evaluation.report.content import Neighbour
from transfusion_mot.evaluation.scoring import nearest, unit_length

# Maximum number of painted images to compare.
MOST_PAINTED = 2000
# Bytes of training images in the memory of a process at a time, and number of pairs to keep.
_BYTES_AT_ONCE, _KEPT = 2**28, 16

# A source and the index of an image in it.
Item = tuple[CaptionedImages, int]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingImages:
    """A fixed random sample of training images; all processes create one and call its method.

    The data are opened and the features computed at the first call, and then kept.

    Attributes:
        data: Training data of the model.
        most: Maximum number of images.
        network: Distances are 1 - cosine of its features.
        image_size: Size of all images; None uses the size of each in training.
        processes: Processes that share the images.
    """

    data: DataConfig
    most: int
    network: FeatureNetwork
    image_size: int | None
    processes: PartialState

    def nearest(self, features: FeatureArray) -> tuple[list[Item], npt.NDArray[np.float32]]:
        """The training image nearest to each image of `features` [N, D], and 1 - cosine of the two [N].

        Raises:
            UserError: The training data cannot be opened or have no image with a caption.
        """
        places, theirs = self._features
        if not len(places):
            raise UserError("the training data have no image with a caption that can be read")
        indices, distances = nearest(unit_length(features), theirs)
        return [self._items[place] for place in places[indices]], distances

    @functools.cached_property
    def _items(self) -> list[Item]:
        documents = [source.documents for source in open_documents(self.data, "train")]
        captioned = [images for images in documents if isinstance(images, CaptionedImages)]
        ends = list(itertools.accumulate(map(len, captioned)))
        # Places are drawn, not items, because there may be many millions of items.
        total = ends[-1] if ends else 0
        places = random.Random(0).sample(range(total), min(self.most, total))
        return [
            (images := captioned[(number := bisect.bisect(ends, place))], place - ends[number] + len(images))
            for place in places
        ]

    @functools.cached_property
    def _features(self) -> tuple[npt.NDArray[np.int64], FeatureArray]:
        """Places in `_items` of the readable images [n], and their features of length one [n, D]."""
        network = self.network
        shared = shared_rows(self._batches, len(self._items), network.num_features, network.device, self.processes)
        rows = cast(FeatureArray, shared.cpu().numpy())
        places = np.flatnonzero(np.isfinite(rows).all(axis=1))
        return places, unit_length(rows[places])

    def _batches(self, rank: int, world: int) -> Iterator[torch.Tensor]:
        """Features of the images of one process, for `shared_rows`; NaN for images that cannot be read."""
        largest = max(height * width for height, width in self.data.image_sizes)
        at_once = max(1, _BYTES_AT_ONCE // (3 * largest))
        mine = self._items[rank::world]
        for start in range(0, len(mine), at_once):
            part = mine[start : start + at_once]
            pictures, places = [], []
            for place, (images, index) in enumerate(part):
                try:
                    pictures.append(Image.fromarray(images.image(index)))
                    places.append(place)
                except UserError as error:
                    _logger.warning("left out of the training images: %s", error)
            rows = torch.full((len(part), self.network.num_features), math.nan)
            if pictures:
                features = image_features(
                    pictures,
                    self.network,
                    num_workers=default_num_workers(),
                    image_size=self.image_size,
                    description="training images",
                    quiet=rank > 0,
                )
                rows[places] = torch.from_numpy(features)
            yield rows


def nearest_training_images(
    prompts: Sequence[Prompt], painted: Path, features: FeatureArray, training: TrainingImages, output: Path
) -> list[Neighbour]:
    """The painted images that are nearest to a training image, the closest first; called by all processes.

    Args:
        prompts: Painted prompts; the first `MOST_PAINTED` are compared.
        painted: Folder of the painted images.
        features: `[N, D]` of at least these, in the network of `training`.
        training: Training images to compare with.
        output: Folder in which `nearest/` is written, the training images of the pairs.

    Raises:
        UserError: As for `TrainingImages.nearest`.
    """
    prompts = prompts[:MOST_PAINTED]
    items, distances = training.nearest(features[: len(prompts)])
    if not training.processes.is_main_process:
        return []
    (output / "nearest").mkdir(parents=True, exist_ok=True)
    pairs = []
    for rank, place in enumerate(itertools.islice(np.argsort(distances, kind="stable"), _KEPT)):
        images, index = items[place]
        file = f"nearest/{rank:02d}.png"
        Image.fromarray(images.image(index)).save(output / file)
        prompt = prompts[place]
        painted_file = str((painted / prompt.file_name).relative_to(output))
        caption = images.captions(index)[0]
        pairs.append(Neighbour(painted_file, prompt.text, file, caption, float(distances[place])))
    return pairs


def nearest_captions(features: FeatureArray, training: TrainingImages) -> list[str]:
    """For each image the caption of the nearest training image, as a baseline of captioning.

    Arguments, processes and errors as for `nearest_training_images`; the images are known by their `features` [N, D].
    """
    items, _ = training.nearest(features)
    return [source.captions(index)[0] for source, index in items]
