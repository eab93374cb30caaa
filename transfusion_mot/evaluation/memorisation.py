"""Nearest training images in feature space: to find painted copies, and as a baseline of copied captions."""

import bisect
import functools
import itertools
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from accelerate import PartialState
from PIL import Image

from transfusion_mot.config import DataConfig
from transfusion_mot.data.mixture import open_documents
from transfusion_mot.data.sources.base import CaptionedImages
from transfusion_mot.errors import UserError
from transfusion_mot.evaluation.defaults import default_num_workers
from transfusion_mot.evaluation.features.network import FeatureNetwork
from transfusion_mot.evaluation.features.sets import FeatureArray, image_features
from transfusion_mot.evaluation.protocol.prompts import Prompt
from transfusion_mot.evaluation.report.content import Neighbour
from transfusion_mot.evaluation.scoring import nearest, unit_length

# Maximum number of painted images to compare.
MOST_PAINTED = 2000
# Bytes of training images in memory at a time, and number of pairs to keep.
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

    def nearest(self, features: FeatureArray) -> tuple[list[Item], npt.NDArray[np.float64]]:
        """The training image nearest to each image of `features` [N, D], and 1 - cosine of the two [N].

        Raises:
            UserError: The training data cannot be opened or have no image with a caption.
        """
        if not self._features:
            raise UserError("the training data have no image with a caption that can be read")
        queries = unit_length(features)
        distances = np.full(len(queries), np.inf)
        found = np.zeros(len(queries), dtype=np.int64)
        for places, theirs in self._features:
            indices, distance = nearest(queries, theirs)
            closer = distance < distances
            distances[closer], found[closer] = distance[closer], places[indices[closer]]
        return [self._items[place] for place in found], distances

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
    def _features(self) -> list[tuple[npt.NDArray[np.int64], FeatureArray]]:
        """Parts: places in `_items` [n], and features of length one [n, D]."""
        parts = []
        largest = max(height * width for height, width in self.data.image_sizes)
        at_once = max(1, _BYTES_AT_ONCE // (3 * largest))
        for start in range(0, len(self._items), at_once):
            pictures, places = [], []
            for place, (images, index) in enumerate(self._items[start : start + at_once], start=start):
                try:
                    pictures.append(Image.fromarray(images.image(index)))
                    places.append(place)
                except UserError as error:
                    _logger.warning("left out of the training images: %s", error)
            if not pictures:
                continue
            features = image_features(
                pictures,
                self.network,
                num_workers=default_num_workers(),
                image_size=self.image_size,
                description="training images",
                processes=self.processes,
            )
            parts.append((np.array(places), unit_length(features)))
        return parts


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
