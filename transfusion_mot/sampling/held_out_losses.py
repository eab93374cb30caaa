"""Losses of a trained model on the held-out documents of its run, as numbers with intervals."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from accelerate import Accelerator, PartialState

from transfusion_mot.config import RunConfig
from transfusion_mot.data.mixture import Sources
from transfusion_mot.data.online import OnlineEncoder
from transfusion_mot.data.sources.base import CaptionedImages, TextDocuments
from transfusion_mot.diffusion import Diffusion
from transfusion_mot.evaluation.intervals import mean_interval
from transfusion_mot.evaluation.report import Metric
from transfusion_mot.models.compilation import allow_shapes
from transfusion_mot.pipeline import TransfusionPipeline
from transfusion_mot.training.text_losses import TextReader, text_losses
from transfusion_mot.training.validation import Validation

TIMESTEP_BINS = 10

_logger = logging.getLogger(__name__)


def text_metrics(
    pipeline: TransfusionPipeline,
    config: RunConfig,
    sources: Sources,
    processes: PartialState | None = None,
    num_texts: int | None = None,
    batch_size: int = 8,
) -> list[Metric]:
    """Text loss, perplexity and bits per byte of each source; called by all processes.

    Args:
        pipeline: The model.
        config: Of its run.
        sources: Held-out documents.
        processes: Which share the texts.
        num_texts: First texts of each source; None is all.
        batch_size: Rows of a forward.

    Returns:
        No numbers where no text is held out.
    """
    patch = config.model.patch_size
    reader = TextReader(
        pipeline.text_tokenizer,
        Diffusion.from_config(config.diffusion),
        config.model.rope,
        config.data.text_slots,
        (pipeline.autoencoder.latent_channels, patch, patch),
        batch_size,
    )
    metrics: list[Metric] = []
    for name, ends_in, texts in _held_out_texts(sources):
        of_source = text_losses(pipeline.transformer, texts[:num_texts], ends_in, reader, processes)
        metrics += [replace(metric, name=f"{metric.name} ({name})") for metric in of_source]
    return metrics


def _held_out_texts(sources: Sources) -> list[tuple[str, Literal["text", "image"], list[str]]]:
    """(name, what follows a text, texts) of each source: texts, and all captions of images."""
    found: list[tuple[str, Literal["text", "image"], list[str]]] = []
    for name, source in zip(sources.names, sources.sources, strict=True):
        documents = source.documents
        if isinstance(documents, TextDocuments):
            found.append((name, "text", [documents.text(index) for index in range(len(documents))]))
        elif isinstance(documents, CaptionedImages):
            captions = [caption for index in range(len(documents)) for caption in documents.captions(index)]
            found.append((f"captions of {name}", "image", captions))
        else:
            _logger.warning("%s is left out: the texts of interleaved documents depend on their images", name)
    return found


def diffusion_metrics(
    pipeline: TransfusionPipeline,
    config: RunConfig,
    sources: Sources,
    accelerator: Accelerator,
    num_images: int | None = None,
    bins: int = TIMESTEP_BINS,
    batch_size: int = 8,
) -> list[Metric]:
    """Diffusion loss with and without captions, at the middles of equal bins of t; called by all processes.

    Args:
        pipeline: The model.
        config: Of its run.
        sources: Held-out documents, with latents.
        accelerator: Its processes share the images.
        num_images: Held-out images; None is all.
        bins: Number of timesteps.
        batch_size: Rows of a forward.

    Returns:
        For `conditional` and `unconditional` the mean over the timesteps, then each. No numbers where no image is held
        out.
    """
    available = sources.num_image_documents()
    if not available:
        return []
    training = replace(config.training, num_validation_documents=num_images or available)
    # An image a row: every one is measured, and with the same noise, whatever its caption takes of a row. There is no
    # image before it, so it needs no clean copy of one, for which the row would have no slot either.
    data = replace(config.data, images_per_row=1, image_context="noised")
    config = replace(config, training=training, data=data)
    # Attention is compiled for the rows of each bucket.
    allow_shapes(len(data.image_sizes))
    diffusion = Diffusion.from_config(config.diffusion)
    encoder = OnlineEncoder(pipeline.autoencoder, config.autoencoder.batch_size)
    tokenizer = pipeline.text_tokenizer
    timesteps = [(index + 0.5) / bins for index in range(bins)]
    metrics: list[Metric] = []
    for name, dropout in (("conditional", 0.0), ("unconditional", 1.0)):
        validation = Validation(sources, tokenizer, config, diffusion, encoder, batch_size, dropout)
        losses = validation.image_losses(pipeline.transformer, accelerator, timesteps).numpy()
        protocol = {
            "images": len(losses),
            "prediction": diffusion.prediction_type,
            "unit": "squared error per element",
            "noise": "fixed",
        }
        means = losses.mean(axis=1)
        over_all = {**protocol, "mean of t": _listed(timesteps)}
        metrics.append(Metric(f"diffusion loss ({name})", float(means.mean()), over_all, mean_interval(means)))
        metrics += [
            Metric(f"diffusion loss ({name}, t = {t:.3g})", float(column.mean()), protocol, mean_interval(column))
            for t, column in zip(timesteps, losses.T, strict=True)
        ]
    return metrics


def _listed(timesteps: Sequence[float]) -> str:
    return ", ".join(f"{t:.3g}" for t in timesteps)
