"""Painted and real images => the metrics of a report."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate import PartialState

from transfusion_mot.evaluation.captions.sentence_similarity import (
    SentenceEncoder,
    load_sentence_encoder,
    packaged_sentence_model,
)
from transfusion_mot.evaluation.clip_score import Clip, PreferenceChoice, load_clip
from transfusion_mot.evaluation.defaults import DEFAULT_CLIP, default_num_workers
from transfusion_mot.evaluation.distances.metrics import set_distance
from transfusion_mot.evaluation.features.load import load_feature_networks
from transfusion_mot.evaluation.features.network import FeatureNetwork
from transfusion_mot.evaluation.features.sets import FeatureArray, FeatureSet, SavedStatistics, feature_set
from transfusion_mot.evaluation.images import ImageSource
from transfusion_mot.evaluation.open_clip import load_hpsv2_file
from transfusion_mot.evaluation.protocol.config import ProtocolConfig
from transfusion_mot.evaluation.report.content import Metric

_NEAREST_ROWS = 1024


@dataclass(frozen=True)
class Networks:
    """Networks that compare and score images.

    Attributes:
        features: For image distances, at least one.
        clips: For CLIP scores.
        preferences: For scores of human preference.
        sentences: For the similarity of captions.
    """

    features: list[FeatureNetwork]
    clips: list[Clip]
    preferences: dict[PreferenceChoice, Clip]
    sentences: SentenceEncoder | None


def load_networks(protocol: ProtocolConfig, device: torch.device) -> Networks:
    """Load the networks of a protocol.

    Raises:
        UserError: Weights are not available; the message names the file and the key that takes its local path.
    """
    features = load_feature_networks(
        protocol.feature_choices,
        device,
        protocol.inception_weights,
        legacy_weights=protocol.legacy_weights,
        other_weights=protocol.other_weights,
        dinov2=protocol.dinov2,
        dinov2_weights=protocol.dinov2_weights,
        clip=protocol.cmmd_clip,
    )
    sentence_model = protocol.sentence_model
    if protocol.captions.kind != "none":
        sentence_model = sentence_model or packaged_sentence_model()
    return Networks(
        features,
        [load_clip(name, device) for name in protocol.clips],
        load_preferences(protocol.pickscore, protocol.hpsv2, protocol.clips, device),
        load_sentence_encoder(sentence_model, str(device)) if sentence_model is not None else None,
    )


def load_preferences(
    pickscore: str | None, hpsv2: str | None, clips: Sequence[str], device: torch.device
) -> dict[PreferenceChoice, Clip]:
    """The given models of human preference.

    Args:
        pickscore: Name or folder of PickScore's model.
        hpsv2: Name or folder of HPSv2's model in the format of transformers, or its published file.
        clips: Models of CLIP scores; the published file of HPSv2 is read with the tokenizer of the first.
        device: Device of the models.

    Raises:
        UserError: As for `load_clip` and `load_hpsv2_file`.
    """
    found: dict[PreferenceChoice, Clip] = {}
    if pickscore is not None:
        found["PickScore"] = load_clip(pickscore, device, "--pickscore")
    if hpsv2 is not None:
        is_file = Path(hpsv2).is_file()
        tokenizer = next(iter(clips), DEFAULT_CLIP)
        found["HPSv2 x100"] = (
            load_hpsv2_file(hpsv2, tokenizer, device) if is_file else load_clip(hpsv2, device, "--hpsv2")
        )
    return found


class Distances:
    """Image distances to real images, whose features are computed once; all processes create and call one.

    Args:
        real: Real images, or statistics of them.
        networks: Networks of the distances.
        protocol: The protocol.
        processes: Processes that share the images.

    Raises:
        UserError: There are too few images, or one cannot be read.
    """

    def __init__(
        self,
        real: Sequence[ImageSource] | SavedStatistics,
        networks: Sequence[FeatureNetwork],
        protocol: ProtocolConfig,
        processes: PartialState,
    ) -> None:
        self.networks, self.protocol, self.processes = networks, protocol, processes
        self.real = [self._set(real, network, "real", protocol.cache_dir) for network in networks]

    def measure(self, images: Sequence[Path], what: str) -> tuple[list[Metric], FeatureSet]:
        """Distances in all networks, returned on the main process, and the features of the first network.

        Raises:
            UserError: There are too few images, or one cannot be read.
        """
        sets = [self._set(images, network, what) for network in self.networks]
        if not self.processes.is_main_process:
            return [], sets[0]
        metrics = [
            metric
            for real, other, network in zip(self.real, sets, self.networks, strict=True)
            for metric in set_distance(real, other, network, self.protocol.image_size)
        ]
        return metrics, sets[0]

    def _set(
        self,
        images: Sequence[ImageSource] | SavedStatistics,
        network: FeatureNetwork,
        what: str,
        cache_dir: str | None = None,
    ) -> FeatureSet:
        return feature_set(
            images,
            network,
            num_workers=default_num_workers(),
            image_size=self.protocol.image_size,
            description=f"{network.name}: {what} images",
            processes=self.processes,
            cache_dir=cache_dir,
        )


def named(metrics: Sequence[Metric], images: str, protocol: dict[str, Any]) -> list[Metric]:
    """The same metrics, with the images in their names and the settings of these images in their protocols."""
    return [
        replace(
            metric,
            name=f"{metric.name} ({images})",
            protocol=metric.protocol | protocol,
        )
        for metric in metrics
    ]


def unit_length(features: FeatureArray) -> FeatureArray:
    """Features `[N, D]` scaled to length one."""
    length = np.linalg.norm(features, axis=1, keepdims=True)
    return (features / np.maximum(length, np.finfo(np.float32).tiny)).astype(np.float32)


def nearest(queries: FeatureArray, among: FeatureArray) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """For each of `queries` `[N, D]` the nearest row of `among` `[M, D]` by cosine => (index `[N]`, 1 - cosine `[N]`).

    Both have rows of length one.
    """
    indices, similarities = [], []
    for start in range(0, len(queries), _NEAREST_ROWS):
        similarity = queries[start : start + _NEAREST_ROWS] @ among.T
        best = similarity.argmax(axis=1)
        indices.append(best)
        similarities.append(similarity[np.arange(len(best)), best])
    return np.concatenate(indices), 1 - np.concatenate(similarities)
