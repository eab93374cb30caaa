"""Is a painted image a copy? The nearest training images in the features of a network."""

import itertools
import logging
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from accelerate import PartialState
from PIL import Image

from transfusion_mot.config import DataConfig
from transfusion_mot.data.mixture import open_documents
from transfusion_mot.data.sources.base import CaptionedImages
from transfusion_mot.errors import UserError
from transfusion_mot.evaluation.feature_network import FeatureNetwork
from transfusion_mot.evaluation.features import FeatureArray, image_features
from transfusion_mot.evaluation.images import default_num_workers
from transfusion_mot.evaluation.prompts import Prompt
from transfusion_mot.evaluation.report import Neighbour
from transfusion_mot.evaluation.scoring import nearest, unit_length

# Painted images that are looked at.
MOST_PAINTED = 2000
# Training images in memory at a time, and pairs that are kept.
_AT_ONCE, _KEPT = 512, 16

_logger = logging.getLogger(__name__)


def nearest_training_images(
    prompts: Sequence[Prompt],
    painted: Path,
    features: FeatureArray,
    data: DataConfig,
    most: int,
    network: FeatureNetwork,
    image_size: int,
    processes: PartialState,
    output: Path,
) -> list[Neighbour]:
    """The painted images that are nearest to a training image, the closest first; called by all processes.

    Args:
        prompts: What was painted, of which the first `MOST_PAINTED` are looked at.
        painted: Folder of the painted images.
        features: `[N, D]` of at least these, in `network`.
        data: That the model was trained on.
        most: Training images that are looked at, drawn at random, always the same ones.
        network: Distances are 1 - cosine of its features.
        image_size: All images are brought to it.
        processes: Which share the images.
        output: Folder that receives `nearest/`, the training images of the pairs.

    Raises:
        UserError: The training data cannot be opened.
    """
    documents = [source.documents for source in open_documents(data, "train")]
    captioned = [images for images in documents if isinstance(images, CaptionedImages)]
    items = [(images, index) for images in captioned for index in range(len(images))]
    items = random.Random(0).sample(items, min(most, len(items)))
    prompts = prompts[:MOST_PAINTED]
    queries = unit_length(features[: len(prompts)])
    distances = np.full(len(prompts), np.inf)
    found = np.zeros(len(prompts), dtype=np.int64)
    for start in range(0, len(items), _AT_ONCE):
        pictures, places = [], []
        for place, (images, index) in enumerate(items[start : start + _AT_ONCE], start=start):
            try:
                pictures.append(Image.fromarray(images.image(index)))
                places.append(place)
            except UserError as error:
                _logger.warning("left out of the training images: %s", error)
        if not pictures:
            continue
        theirs = image_features(
            pictures,
            network,
            num_workers=default_num_workers(),
            image_size=image_size,
            description="training images",
            processes=processes,
        )
        indices, distance = nearest(queries, unit_length(theirs))
        closer = distance < distances
        distances[closer], found[closer] = distance[closer], np.array(places)[indices[closer]]
    if not processes.is_main_process:
        return []
    (output / "nearest").mkdir(parents=True, exist_ok=True)
    pairs = []
    for rank, place in enumerate(itertools.islice(np.argsort(distances, kind="stable"), _KEPT)):
        images, index = items[found[place]]
        file = f"nearest/{rank:02d}.png"
        Image.fromarray(images.image(index)).save(output / file)
        prompt = prompts[place]
        painted_file = str((painted / prompt.file_name).relative_to(output))
        caption = images.captions(index)[0]
        pairs.append(Neighbour(painted_file, prompt.text, file, caption, float(distances[place])))
    return pairs
