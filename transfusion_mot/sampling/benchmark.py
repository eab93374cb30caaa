"""A benchmark of a model: its pictures and captions, their metrics, scored pictures, nearest training images.

All processes call every method and share the images; the main process receives the numbers.
"""

import contextlib
import functools
import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from accelerate import PartialState
from diffusers import SchedulerMixin

from transfusion_mot.config import DataConfig
from transfusion_mot.errors import UserError
from transfusion_mot.evaluation.captions.metrics import caption_metrics
from transfusion_mot.evaluation.clip_score import caption_clip_scores, clip_scores, preference_score, suffixes
from transfusion_mot.evaluation.defaults import default_num_workers
from transfusion_mot.evaluation.features.sets import FeatureArray, FeatureSet, image_features
from transfusion_mot.evaluation.intervals import mean_interval
from transfusion_mot.evaluation.memorisation import (
    MOST_PAINTED,
    TrainingImages,
    nearest_captions,
    nearest_training_images,
)
from transfusion_mot.evaluation.protocol.assignment import Assignment
from transfusion_mot.evaluation.protocol.config import ProtocolConfig
from transfusion_mot.evaluation.protocol.prompts import (
    Prompt,
    captioned_hash,
    prompts_hash,
    write_dpg_pictures,
    write_geneval_metadata,
)
from transfusion_mot.evaluation.report.content import Metric, Neighbour, Picture, SweepPoint, shown_range
from transfusion_mot.evaluation.scoring import Distances, Networks, named, unit_length
from transfusion_mot.sampling.guidance import Guidance
from transfusion_mot.sampling.painting import OF_CODES, OF_LATENTS, Painter, SamplerSettings
from transfusion_mot.schedulers import make_sampling_scheduler, sampler_name

# In a sweep the first one changes least often, the last one from each setting to the next.
_SWEEP_ORDER = ["scheduler", "num_inference_steps", *OF_CODES, "guidance_interval", "guidance_scale"]
DISTANCE_TO_REFERENCE = "feature distance to its real image"

_logger = logging.getLogger(__name__)


class Benchmark:
    """A model on a protocol.

    Args:
        protocol: The protocol.
        processes: Processes that share the work.
        painter: The model.
        networks: Networks that compare and score images.
        assignment: Prompts and images of the protocol.
        data: Training data of the model, if known.
        output: Folder of the results.
    """

    def __init__(
        self,
        protocol: ProtocolConfig,
        processes: PartialState,
        painter: Painter,
        *,
        networks: Networks,
        assignment: Assignment,
        data: DataConfig | None,
        output: Path,
    ) -> None:
        self.protocol, self.processes, self.painter = protocol, processes, painter
        self.networks, self.assignment, self.output = networks, assignment, output
        self.training: TrainingImages | None = None
        if data is not None and protocol.training_images:
            size = protocol.image_size
            self.training = TrainingImages(data, protocol.training_images, networks.features[0], size, processes)
        self.distances: Distances | None = None
        # Features of the protocol's own images, in the first network.
        self.features: FeatureSet | None = None

    def paint(self, sampling: SamplerSettings) -> list[str]:
        """Write real images, reconstructions, painted images and captions => the captions.

        Raises:
            UserError: The output folder holds results of other settings, or an image cannot be read.
        """
        assignment, output, painter = self.assignment, self.output, self.painter
        if assignment.held_out is not None:
            painter.copy(assignment.held_out.real, output / "real", assignment.held_out.make)
        if self.protocol.reconstructions and assignment.own:
            painter.reconstruct(assignment.own, self.protocol.image_size, output / "reconstructed")
        painter.paint(assignment.prompts, sampling, output / "generated", self.protocol.image_size)
        if assignment.geneval and self.processes.is_main_process:
            write_geneval_metadata(assignment.geneval, output / "generated")
        if self.protocol.prompts.kind == "dpg" and self.processes.is_main_process:
            write_dpg_pictures(assignment.prompts, output / "generated", output / "dpg")
        maximum = self.protocol.captions.max_new_tokens
        return painter.caption(assignment.captioned, maximum, output) if assignment.captioned else []

    def measure(self, sampling: SamplerSettings, captions: Sequence[str]) -> list[Metric]:
        """All metrics of the results of `paint`.

        Args:
            sampling: Settings of painting.
            captions: Captions from `paint`.

        Raises:
            UserError: There are too few images, or one cannot be read.
        """
        if self.assignment.references is not None:
            self.distances = Distances(
                self.assignment.references, self.networks.features, self.protocol, self.processes
            )
        metrics, self.features = self._of_painted(self.assignment.prompts, sampling, self.output / "generated")
        metrics += self._of_real()
        copied = self._copied_captions()
        if captions and self.processes.is_main_process:
            metrics += self._of_captions(captions)
            if copied:
                metrics += named(self._of_captions(copied), "copied from the nearest training image", {})
        return metrics

    def _of_painted(
        self, prompts: Sequence[Prompt], sampling: SamplerSettings, folder: Path
    ) -> tuple[list[Metric], FeatureSet | None]:
        painted = [folder / prompt.file_name for prompt in prompts]
        names = {"num_inference_steps": "steps", "guidance_scale": "guidance", "guidance_interval": "guidance at t"}
        protocol = {
            names.get(name, name): shown_range(value) if name == "guidance_interval" else value
            for name, value in self.painter.told(sampling).items()
        }
        protocol["prompts"] = prompts_hash(prompts)
        metrics: list[Metric] = []
        features = None
        if self.distances is not None:
            metrics, features = self.distances.measure(painted, "painted")
        metrics += self._clip_metrics(painted, prompts) or self._distances_to_own(painted, prompts, features)
        return named(metrics, "generated", protocol), features

    def _of_real(self) -> list[Metric]:
        """Limits for any model: distances of reconstructions, CLIP score of the real images."""
        own, metrics = self.assignment.own, []
        if self.protocol.reconstructions and own and self.distances is not None:
            reconstructed = [self.output / "reconstructed" / prompt.file_name for prompt in own]
            found, _ = self.distances.measure(reconstructed, "reconstructed")
            metrics += named(found, "reconstructed", {"images": prompts_hash(own)})
        if own:
            images = [prompt.image for prompt in own if prompt.image is not None]
            metrics += named(self._clip_metrics(images, own), "real", {"prompts": prompts_hash(own)})
        return metrics

    def _clip_metrics(self, images: Sequence[Path], prompts: Sequence[Prompt]) -> list[Metric]:
        """CLIP scores and preference scores of images for their prompts, as far as the protocol has them."""
        texts, clips = [prompt.text for prompt in prompts], self.networks.clips
        shared: dict[str, Any] = {"num_workers": default_num_workers(), "processes": self.processes}
        metrics = [
            metric
            for clip, suffix in zip(clips, suffixes(clips), strict=True)
            for metric in clip_scores(images, texts, clip, prefix=self.protocol.clip_prefix, suffix=suffix, **shared)
        ]
        return metrics + [
            preference_score(kind, images, texts, clip, **shared) for kind, clip in self.networks.preferences.items()
        ]

    def _distances_to_own(
        self, painted: Sequence[Path], prompts: Sequence[Prompt], features: FeatureSet | None
    ) -> list[Metric]:
        """Distances of painted images to the real images of their prompts, if there are any: 1 - cosine of features."""
        if self._real_features is None:
            return []
        ours = unit_length(self._features(painted, features, "painted"))
        # A sweep paints only the first prompts.
        scores = 1 - np.einsum("nd,nd->n", ours, self._real_features[: len(prompts)]).astype(np.float64)
        protocol = {"features": self.networks.features[0].description}
        interval = mean_interval(scores)
        return [Metric(DISTANCE_TO_REFERENCE, float(scores.mean()), protocol, interval, tuple(scores.tolist()))]

    @functools.cached_property
    def _real_features(self) -> FeatureArray | None:
        """Features of length one [N, D] of the prompts' real images; None if a prompt has none."""
        real = [prompt.image for prompt in self.assignment.prompts if prompt.image is not None]
        if len(real) < len(self.assignment.prompts):
            return None
        of_real = self.distances.real[0] if self.distances is not None else None
        return unit_length(self._features(real, of_real, "real"))

    def _of_captions(self, captions: Sequence[str]) -> list[Metric]:
        captioned = self.assignment.captioned
        most = max(len(item.captions) for item in captioned)
        protocol = {
            "images": len(captioned),
            "references": f"{'up to ' * (most > 1)}{most} an image",
            "decoding": "greedy",
            "captioned images": captioned_hash(captioned),
        }
        references = [item.captions for item in captioned]
        metrics = caption_metrics(captions, references, self.networks.sentences)
        for clip in self.networks.clips[:1]:
            images = [item.image for item in captioned]
            metrics += caption_clip_scores(images, captions, references, clip, num_workers=default_num_workers())
        return [replace(metric, protocol=metric.protocol | protocol) for metric in metrics]

    def _copied_captions(self) -> list[str]:
        """The caption of the training image nearest to each captioned one: a baseline for the model.

        Empty if there are no training images; the report gives the reason.
        """
        captioned = self.assignment.captioned
        if self.training is None or not captioned or self.assignment.held_out is None:
            return []
        known = self.distances.real[0] if self.distances is not None else None
        features = self._features([item.image for item in captioned], known, "captioned")
        try:
            return nearest_captions(features, self.training)
        except UserError as error:
            if self.processes.is_main_process:
                _logger.warning("captions copied from the nearest training images are left out: %s", error)
            return []

    def settings_to_try(self, sampling: SamplerSettings) -> list[SamplerSettings]:
        """All settings of the sweep. Call it before painting, because it checks them.

        Raises:
            UserError: A setting does not fit the model.
        """
        sweep = vars(self.protocol.sweep)
        given = {field.name: sweep[field.name] for field in fields(SamplerSettings) if sweep[field.name]}
        if not given:
            return []
        if refused := [name for name in self.painter.idle if name in given]:
            raise UserError(
                f"configuration: sweep.{refused[0]} is given, but has no effect on this model, which paints "
                f"{'by writing codes' if self.painter.idle == OF_LATENTS else 'by diffusion'}; leave it out"
            )
        # The last name changes fastest.
        names = sorted(given, key=_SWEEP_ORDER.index)
        settings = [
            replace(sampling, **dict(zip(names, values, strict=True)))
            for values in itertools.product(*(given[name] for name in names))
        ]
        for tried in settings:
            with self._scheduler(tried):
                pipeline = self.painter.pipeline
                pipeline.sampling_settings(pipeline.image_modality, tried.num_inference_steps, tried.guidance_scale)
            Guidance(tried.guidance_scale, interval=cast(tuple[float, float], tuple(tried.guidance_interval)))
            tried.decoding()
        return settings

    @contextlib.contextmanager
    def _scheduler(self, settings: SamplerSettings) -> Iterator[None]:
        """The pipeline with the scheduler of some settings."""
        pipeline = self.painter.pipeline
        own: SchedulerMixin = pipeline.scheduler
        if settings.scheduler != sampler_name(own):
            pipeline.scheduler = make_sampling_scheduler(own, settings.scheduler)
        try:
            yield
        finally:
            pipeline.scheduler = own

    def sweep(self, tried: Sequence[SamplerSettings]) -> list[SweepPoint]:
        """Paint and measure with every setting of `settings_to_try`, after `measure`."""
        prompts = self.assignment.prompts[: self.protocol.sweep.num_images]
        points = []
        for settings in tried:
            name = _folder_name(self.painter.told(settings))
            folder = self.output / "sweep" / name
            with self._scheduler(settings):
                self.painter.paint(prompts, settings, folder, self.protocol.image_size)
            metrics, _ = self._of_painted(prompts, settings, folder)
            # A sweep keeps only the metrics, not the score of every image.
            points.append(SweepPoint(self.painter.told(settings), [replace(metric, scores=None) for metric in metrics]))
        return points

    def pictures(self, metrics: Sequence[Metric]) -> tuple[list[Picture], str]:
        """Painted images with their scores, and the name of the score: CLIP cosine, or distance to the real images."""
        prompts = self.assignment.prompts
        paths = self._painted_paths(prompts)
        scores: list[float | None] = [None] * len(prompts)
        name = ""
        scored = {metric.name: metric.scores for metric in metrics}
        for what in ("CLIP cosine", DISTANCE_TO_REFERENCE):
            found = scored.get(f"{what} (generated)")
            if found is not None:
                scores, name = list(found), what
        pictures = [
            Picture(
                str(path.relative_to(self.output)),
                prompt.text,
                score,
                None if prompt.image is None else _below(prompt.image, self.output),
            )
            for path, prompt, score in zip(paths, prompts, scores, strict=True)
        ]
        return pictures, name

    def captioned_pictures(self, captions: Sequence[str]) -> list[Picture]:
        """Captioned images with the model's captions and the references."""
        return [
            Picture(_below(item.image, self.output), caption, None, None, item.captions)
            for item, caption in zip(self.assignment.captioned, captions, strict=True)
        ]

    def neighbours(self) -> tuple[list[Neighbour], list[str]]:
        """The painted images nearest to a training image, or notes on why there are none."""
        if not self.protocol.training_images:
            return [], []
        if self.training is None:
            reason = "the checkpoint is not in a run folder that names its data"
            return [], [f"Nearest training images are not shown: {reason}."]
        prompts = self.assignment.prompts[:MOST_PAINTED]
        features = self._features(self._painted_paths(prompts), self.features, "painted")
        try:
            found = nearest_training_images(prompts, self.output / "generated", features, self.training, self.output)
        except UserError as error:
            return [], [f"Nearest training images are not shown: {error}."]
        return found, []

    def _painted_paths(self, prompts: Sequence[Prompt]) -> list[Path]:
        return [self.output / "generated" / prompt.file_name for prompt in prompts]

    def _features(self, images: Sequence[Path], known: FeatureSet | None, what: str) -> FeatureArray:
        """Features in the first network, from memory or computed."""
        found = known.of(images) if known is not None else None
        if found is not None:
            return found
        network = self.networks.features[0]
        return image_features(
            images,
            network,
            num_workers=default_num_workers(),
            image_size=self.protocol.image_size,
            description=f"{network.name}: {what} images",
            processes=self.processes,
        )


def _folder_name(settings: dict[str, Any]) -> str:
    """The folder of a setting of a sweep."""
    guidance = f"guidance-{settings['guidance_scale']:g}"
    if "code_temperature" in settings:
        temperature, top_p, top_k = (settings[name] for name in OF_CODES)
        return f"temperature-{temperature:g}-top-p-{top_p:g}-top-k-{top_k}-{guidance}"
    interval = settings["guidance_interval"]
    at = "" if interval == [0, 1] else f"-at-{shown_range(interval)}"
    return f"{settings['scheduler']}-{settings['num_inference_steps']}-steps-{guidance}{at}"


def _below(path: Path, folder: Path) -> str:
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path.resolve())
