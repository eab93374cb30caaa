"""Losses of a trained model on the held-out documents of its run, as numbers with intervals."""

import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from accelerate import Accelerator, PartialState

from transfusion_mot.codecs.base import Codec
from transfusion_mot.codecs.load import load_codec
from transfusion_mot.config import TEXT, DiffusionConfig, RunConfig
from transfusion_mot.data.mixture import Source, Sources
from transfusion_mot.data.online import OnlineEncoder
from transfusion_mot.data.sources.base import Documents, Text
from transfusion_mot.data.sources.edit_pairs import EditPairs
from transfusion_mot.diffusion import Diffusion
from transfusion_mot.evaluation.defaults import TIMESTEP_BINS
from transfusion_mot.evaluation.intervals import mean_interval
from transfusion_mot.evaluation.protocol.prompts import list_hash
from transfusion_mot.evaluation.report.content import Metric
from transfusion_mot.models.compilation import allow_shapes
from transfusion_mot.pipeline import TransfusionPipeline
from transfusion_mot.training.text_losses import TextReader, text_losses
from transfusion_mot.training.validation import Validation

# Name of a loss, and the share of media whose caption is dropped.
_WITH_AND_WITHOUT_CAPTIONS = (("conditional", 0.0), ("unconditional", 1.0))

_logger = logging.getLogger(__name__)


def of_checkpoint(config: RunConfig, pipeline: TransfusionPipeline) -> RunConfig:
    """A run's configuration with the model and the diffusion settings of the checkpoint."""
    transformer = pipeline.transformer
    return replace(config, model=transformer.architecture, diffusion=DiffusionConfig(**transformer.config.diffusion))


def codecs_of(pipeline: TransfusionPipeline, config: RunConfig, device: torch.device) -> dict[str, Codec]:
    """The codec of each modality but text: from the pipeline, or else from its run."""
    own, config = pipeline.codecs, of_checkpoint(config, pipeline)
    return {
        name: own[name] if name in own else load_codec(config.codecs[name], modality.objective, device)
        for name, modality in config.model.modalities.items()
        if name in config.model.made and name != TEXT
    }


def text_metrics(
    pipeline: TransfusionPipeline,
    config: RunConfig,
    sources: Sources,
    *,
    processes: PartialState | None = None,
    num_texts: int | None = None,
    batch_size: int = 8,
) -> list[Metric]:
    """Text loss, perplexity and bits per byte of each source; called by all processes.

    Args:
        pipeline: The model.
        config: Configuration of its run, with the model and diffusion settings of the checkpoint.
        sources: Held-out documents.
        processes: Processes that share the texts.
        num_texts: Number of first texts of each source; None is all.
        batch_size: Rows of a forward.

    Returns:
        The metrics; empty if no text is held out.
    """
    config = of_checkpoint(config, pipeline)
    reader = TextReader(pipeline.text_tokenizer, config.model.rope, config.data.slots[TEXT], batch_size)
    metrics: list[Metric] = []
    for name, ends_in, texts in _held_out_texts(sources):
        of_source = text_losses(pipeline.transformer, texts[:num_texts], ends_in, reader, processes)
        metrics += [replace(metric, name=f"{metric.name} ({name})") for metric in of_source]
    return metrics


def _held_out_texts(sources: Sources) -> list[tuple[str, str, list[str]]]:
    """(name, modality after a text, texts) of each source: texts, and all captions of media."""
    found: list[tuple[str, str, list[str]]] = []
    for name, source in zip(sources.names, sources.sources, strict=True):
        documents = source.documents
        if TEXT not in documents.modalities:
            continue
        media = list(documents.media)
        if not media:
            found.append((name, TEXT, _texts(documents)))
        elif documents.is_paired and len(media) == 1:
            found.append((f"captions of {name}", media[0], _texts(documents)))
        else:
            _logger.warning("%s is left out: its texts depend on the media between them", name)
    return found


def _texts(documents: Documents) -> list[str]:
    items = (item for index in range(len(documents)) for item in documents.document(index))
    return [text for item in items if isinstance(item, Text) for text in item.choices]


def diffusion_metrics(
    pipeline: TransfusionPipeline,
    config: RunConfig,
    sources: Sources,
    *,
    codecs: dict[str, Codec],
    accelerator: Accelerator,
    num_images: int | None = None,
    bins: int = TIMESTEP_BINS,
    batch_size: int = 8,
) -> list[Metric]:
    """Diffusion loss with and without captions, at the middles of equal bins of t; called by all processes.

    Args:
        pipeline: The model.
        config: Configuration of its run, with the model and diffusion settings of the checkpoint.
        sources: Held-out documents.
        codecs: Result of `codecs_of`.
        accelerator: Its processes share the images.
        num_images: Held-out images of each modality of latents; None is all.
        bins: Number of timesteps.
        batch_size: Rows of a forward.

    Returns:
        For each modality of latents, and for `conditional` and `unconditional`: the mean over the timesteps, then each
        timestep. Empty if no image is held out.
    """
    config = of_checkpoint(config, pipeline)
    latents = config.model.of_objective("diffusion")
    # Attention is compiled for the row shape of each bucket.
    allow_shapes(len(config.data.image_sizes))
    encoder = OnlineEncoder.of_model(config.model, codecs, config.codecs)
    prediction = Diffusion.from_config(config.diffusion).prediction_type
    timesteps = [(index + 0.5) / bins for index in range(bins)]
    metrics: list[Metric] = []
    for modality in latents:
        with_it = [source for source in sources.sources if modality in source.documents.modalities]
        edits = [source for source in with_it if isinstance(source.documents, EditPairs)]
        others = [source for source in with_it if not isinstance(source.documents, EditPairs)]
        parts = [(Sources(part, sources.latent_shapes), slots) for part, slots in ((others, 1), (edits, 2)) if part]
        parts = [(held_out, slots) for held_out, slots in parts if held_out.num_media_documents()]
        available = sum(held_out.num_media_documents() for held_out, _ in parts)
        if not parts:
            continue
        kind = "diffusion loss" if len(latents) == 1 else f"diffusion loss of {modality}"
        for name, dropout in _WITH_AND_WITHOUT_CAPTIONS:
            found = []
            for held_out, media_slots in parts:
                own = held_out.num_media_documents()
                readers = config.model.readers
                # One image a row, so that every image is measured with the same noise for any length of its caption.
                # Only before the result of an edit there is its source.
                each = {name: 1 if dropout or name in readers else media_slots for name in latents}
                validation = _validation(
                    pipeline,
                    config,
                    held_out,
                    encoder,
                    modality=modality,
                    slots=each | dict.fromkeys(readers.values(), 1),
                    count=own if num_images is None else max(1, num_images * own // available),
                    batch_size=batch_size,
                    prompt_dropout_prob=dropout,
                )
                found.append(validation.item_losses(pipeline.transformer, accelerator, modality, timesteps).numpy())
            losses = np.concatenate(found)
            protocol = {
                "images": len(losses),
                "prediction": prediction,
                "unit": "squared error per element",
                "noise": "fixed",
                **_measured_on([held_out for held_out, _ in parts], codecs[modality]),
            }
            means = losses.mean(axis=1)
            over_all = {**protocol, "mean of t": _listed(timesteps)}
            metrics.append(Metric(f"{kind} ({name})", float(means.mean()), over_all, mean_interval(means)))
            metrics += [
                Metric(f"{kind} ({name}, t = {t:.3g})", float(column.mean()), protocol, mean_interval(column))
                for t, column in zip(timesteps, losses.T, strict=True)
            ]
    return metrics


def code_metrics(
    pipeline: TransfusionPipeline,
    config: RunConfig,
    sources: Sources,
    *,
    codecs: dict[str, Codec],
    accelerator: Accelerator,
    num_media: int | None = None,
    batch_size: int = 8,
) -> list[Metric]:
    """Next-token loss of the codes of captioned media, with and without captions; called by all processes.

    Arguments as in `diffusion_metrics`. A loss includes the end of a span, as in training. Empty if no media of codes
    with captions are held out.
    """
    config = of_checkpoint(config, pipeline)
    encoder = OnlineEncoder.of_model(config.model, codecs, config.codecs)
    metrics: list[Metric] = []
    for modality in config.model.of_objective("next_token"):
        having = [s for s in sources.sources if s.documents.is_paired and modality in s.documents.media]
        held_out = Sources(having, sources.latent_shapes)
        lengths = [length for source in having for length in _span_lengths(source, modality)]
        if not lengths:
            continue
        # Attention is compiled for these rows.
        allow_shapes(len(held_out.media_pools))
        own = held_out.num_media_documents()
        for name, dropout in _WITH_AND_WITHOUT_CAPTIONS:
            validation = _validation(
                pipeline,
                config,
                held_out,
                encoder,
                modality=modality,
                # One span a row, so that every one is measured for any length of its caption and of others.
                slots={modality: max(lengths)},
                one_a_row=True,
                count=own if num_media is None else min(num_media, own),
                batch_size=batch_size,
                prompt_dropout_prob=dropout,
            )
            nats, codes = validation.row_losses(pipeline.transformer, accelerator, modality).numpy().T
            protocol = {
                "codes": int(codes.sum()),
                "unit": "nats per code",
                **_measured_on([held_out], codecs[modality]),
            }
            loss = float(nats.sum() / codes.sum())
            metrics.append(Metric(f"loss of {modality} codes ({name})", loss, protocol, mean_interval(nats, codes)))
    return metrics


def _span_lengths(source: Source, modality: str) -> list[int]:
    """Slots of each readable span of codes of a source."""
    encoded = source.encoded[modality]
    assert encoded.kind == "codes"
    # Without the end of a span, which is only a label.
    return [len(encoded.span(int(index))) - 1 for index in np.flatnonzero(encoded.readable)]


def _validation(
    pipeline: TransfusionPipeline,
    config: RunConfig,
    held_out: Sources,
    encoder: OnlineEncoder,
    *,
    modality: str,
    slots: dict[str, int],
    count: int,
    batch_size: int,
    prompt_dropout_prob: float,
    one_a_row: bool = False,
) -> Validation:
    """Held-out rows of one modality, with only captions before its media; `slots` replace those of the run."""
    # Of a modality that the pictures' data do not have, such as speech, a slot that stays empty.
    empty = dict.fromkeys(config.model.made, 1)
    data = replace(
        config.data,
        slots=empty | config.data.slots | slots,
        orders=config.data.orders and {f"{TEXT} {modality}": 1.0},
        # No media follow, so none need a clean copy, for which the row has no slot.
        image_context="noised",
    )
    return Validation(
        held_out,
        pipeline.text_tokenizer,
        replace(config, training=replace(config.training, num_validation_documents=count), data=data),
        encoder=encoder,
        rows_at_once=batch_size,
        prompt_dropout_prob=prompt_dropout_prob,
        one_a_row=one_a_row,
    )


def _measured_on(parts: Sequence[Sources], codec: Codec) -> dict[str, str]:
    """Protocol of a loss of media: hashes of the held-out documents and of the codec."""
    documents = [source.documents.documents_fingerprint for held_out in parts for source in held_out.sources]
    return {"held-out documents": list_hash([documents]), "codec": f"sha256 {codec.fingerprint[:12]}"}


def _listed(timesteps: Sequence[float]) -> str:
    return ", ".join(f"{t:.3g}" for t in timesteps)
