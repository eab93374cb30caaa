"""Edits of held-out pairs, and their distances to the targets."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from tqdm import tqdm

from transfusion_mot.data.images import to_pixels
from transfusion_mot.data.mixture import Source
from transfusion_mot.data.sources.base import ImageSet, Text
from transfusion_mot.data.sources.edit_pairs import EditPairs
from transfusion_mot.errors import UserError
from transfusion_mot.evaluation.features.network import FeatureNetwork
from transfusion_mot.evaluation.features.sets import image_features
from transfusion_mot.evaluation.intervals import mean_interval
from transfusion_mot.evaluation.protocol.prompts import derived_seed
from transfusion_mot.evaluation.report.content import Metric
from transfusion_mot.pipeline import TransfusionPipeline
from transfusion_mot.sampling.sizes import Size, by_size

# Kind of image that is compared with the targets => distances [N].
Distances = dict[str, npt.NDArray[np.float64]]
# Distances [N] between paired images.
Distance = Callable[[list[Image.Image], list[Image.Image]], npt.NDArray[np.float64]]


@dataclass(frozen=True)
class HeldOutEdits:
    """Held-out pairs of a source, with all images at the size at which the model reads them.

    Attributes:
        name: Name of the source.
        before: Source images.
        instructions: Instruction of each pair.
        after: Target images.
    """

    name: str
    before: list[Image.Image]
    instructions: list[str]
    after: list[Image.Image]


def held_out_edits(pipeline: TransfusionPipeline, name: str, source: Source, count: int | None) -> HeldOutEdits | None:
    """Evenly spaced held-out pairs of a source, with their first instructions.

    Unreadable pairs are skipped, and pairs with an instruction that the pipeline refuses because it is too long.

    Args:
        pipeline: The model that will edit them.
        name: Name of the source.
        source: The held-out side of the source.
        count: Maximum number of pairs; None is all.

    Returns:
        None if the source has no pairs.
    """
    pairs = source.documents
    if not isinstance(pairs, EditPairs):
        return None
    found = HeldOutEdits(name, [], [], [])
    images = cast(ImageSet, pairs.media[pairs.modality])
    for index in np.unique(np.linspace(0, len(pairs) - 1, min(count or len(pairs), len(pairs))).round().astype(int)):
        before, text, after = pairs.document(int(index))
        assert isinstance(text, Text)
        try:
            pictures = [
                Image.fromarray(images.image(item.index)) for item in (before, after) if not isinstance(item, Text)
            ]
        except UserError:
            continue
        if not pipeline.is_short_enough(pictures[0], text.choices[0], pictures[1]):
            continue
        found.before.append(pictures[0])
        found.instructions.append(text.choices[0])
        found.after.append(pictures[1])
    return found


def edited(
    pipeline: TransfusionPipeline, edits: HeldOutEdits, *, batch_size: int, seed: int, **settings: Any
) -> list[Image.Image]:
    """The model's edit of each pair; it depends only on the pair and the seed."""
    seeds = [derived_seed(seed, f"{edits.name} {text}", number) for number, text in enumerate(edits.instructions)]
    # Progress is shown if it takes long.
    with tqdm(total=len(seeds), desc=f"editing {edits.name}", unit="image", delay=2) as bar:

        def of_size(places: list[int], _: Size) -> list[Image.Image]:
            results: list[Image.Image] = []
            for start in range(0, len(places), batch_size):
                part = places[start : start + batch_size]
                results += pipeline.edit(
                    [edits.before[place] for place in part],
                    [edits.instructions[place] for place in part],
                    generator=[torch.Generator().manual_seed(seeds[place]) for place in part],
                    **settings,
                ).images
                bar.update(len(part))
            return results

        return by_size([(image.height, image.width) for image in edits.before], of_size)


def through_codec(pipeline: TransfusionPipeline, images: list[Image.Image], batch_size: int) -> list[Image.Image]:
    """Images encoded and decoded by the codec: the limit for any painting."""

    def of_size(places: list[int], _: Size) -> list[Image.Image]:
        results: list[Image.Image] = []
        for start in range(0, len(places), batch_size):
            part = np.stack([np.asarray(images[place]) for place in places[start : start + batch_size]])
            encoded = pipeline.codec.encode(to_pixels(part).to(pipeline.device))
            results += pipeline.decode_latents(encoded[0] if isinstance(encoded, tuple) else encoded)
        return results

    with torch.no_grad():
        return by_size([(image.height, image.width) for image in images], of_size)


def pixel_distance(first: list[Image.Image], second: list[Image.Image]) -> npt.NDArray[np.float64]:
    """Mean absolute difference of pixels from 0 to 1, of each pair of images."""
    return np.array(
        [
            np.abs(np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)).mean() / 255
            for a, b in zip(first, second, strict=True)
        ]
    )


def feature_distance(network: FeatureNetwork, batch_size: int) -> Distance:
    """1 - cosine of the features of a network, of each pair of images."""

    def distance(first: list[Image.Image], second: list[Image.Image]) -> npt.NDArray[np.float64]:
        sides = [
            image_features(images, network, batch_size=batch_size).astype(np.float64) for images in (first, second)
        ]
        unit = [side / np.linalg.norm(side, axis=1, keepdims=True) for side in sides]
        return 1 - (unit[0] * unit[1]).sum(axis=1)

    return distance


def edit_metrics(name: str, distances: Distances, measure: str, protocol: dict[str, Any]) -> list[Metric]:
    """Numbers of one source and measure, each with an interval over the pairs.

    Args:
        name: Name of the source, or of all together.
        distances: Distances [N] to the target: of `unedited` sources, of `edited` ones, and of the target `through the
            codec`.
        measure: Name of the distance, such as "pixel distance".
        protocol: Conditions of the measurement.
    """
    about = {"pairs": len(distances["edited"]), **protocol}
    metrics = [
        Metric(f"{measure} to the target, {what} ({name})", float(values.mean()), about, mean_interval(values))
        for what, values in distances.items()
    ]
    ratio = float(distances["edited"].sum() / distances["unedited"].sum())
    interval = mean_interval(distances["edited"], weights=distances["unedited"])
    metrics.append(Metric(f"{measure}: edited over unedited ({name})", ratio, about, interval))
    nearer = (distances["edited"] < distances["unedited"]).astype(np.float64)
    metrics.append(
        Metric(
            f"{measure}: share of pairs that are nearer edited ({name})",
            float(nearer.mean()),
            about,
            mean_interval(nearer),
        )
    )
    return metrics


def joined(parts: Sequence[Distances]) -> Distances:
    """The concatenated distances of several sources."""
    return {what: np.concatenate([part[what] for part in parts]) for what in parts[0]}
