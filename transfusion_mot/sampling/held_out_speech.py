"""Word and character error rates of a model's transcripts and speech for held-out recordings."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from transfusion_mot.config import RunConfig
from transfusion_mot.data.audio import Audio
from transfusion_mot.data.mixture import Sources
from transfusion_mot.data.online import OnlineEncoder
from transfusion_mot.evaluation.protocol.prompts import derived_seed
from transfusion_mot.evaluation.recognisers import Recogniser
from transfusion_mot.evaluation.report.content import Metric
from transfusion_mot.evaluation.speech import RecordingSet, error_rates, normalise
from transfusion_mot.pipeline import TransfusionPipeline
from transfusion_mot.sampling.held_out_losses import codecs_of, of_checkpoint
from transfusion_mot.training.validation import Validation


def transcription_metrics(
    pipeline: TransfusionPipeline, recordings: RecordingSet, *, batch_size: int
) -> tuple[list[Metric], list[tuple[str, str]]]:
    """Error rates of the model's transcripts, and pairs of a text and its transcript.

    Args:
        pipeline: The model.
        recordings: Held-out recordings, transcribed greedily.
        batch_size: Recordings at a time.
    """
    said = [one for one in recordings.held_out if normalise(one.text)]
    texts = [one.text for one in said]
    # The longest text and its end must fit; the first number is the default of `transcribe`.
    most = max([64, *(1 + len(pipeline.text_tokenizer.encode(text)) for text in texts)])
    transcripts: list[str] = []
    for start in tqdm(range(0, len(said), batch_size), desc=f"transcribing {recordings.name}", unit="batch"):
        batch = [one.audio() for one in said[start : start + batch_size]]
        transcripts += pipeline.transcribe(batch, max_new_tokens=most)
    metrics = error_rates(texts, transcripts, {"transcripts": "of the model, temperature 0"})
    return _named(metrics, f"{recordings.name}, transcribed by the model"), list(zip(texts, transcripts, strict=True))


def intelligibility_metrics(
    pipeline: TransfusionPipeline,
    recordings: RecordingSet,
    recogniser: Recogniser,
    *,
    speaking: dict[str, Any],
    seed: int,
    batch_size: int,
) -> tuple[list[Metric], list[tuple[str, Audio]]]:
    """Error rates of a recogniser on recordings, on their reconstructions, and on the model's speech of the same texts.

    Args:
        pipeline: The model.
        recordings: Held-out recordings. Texts are left out if the recogniser does not know their words, or if they are
            longer than any prompt of training.
        recogniser: A recogniser that is independent of the model.
        speaking: Keyword arguments of `TransfusionPipeline.speak`.
        seed: The audio of a text depends only on the seed and the text.
        batch_size: Texts at a time.

    Returns:
        The error rates, and pairs of a text and the model's speech.
    """
    known = [one for one in recordings.held_out if normalise(one.text) and recogniser.knows(one.text)]
    said = [one for one in known if pipeline.is_short_enough(one.text)]
    if not said:
        return [], []
    texts, real = [one.text for one in said], [one.audio() for one in said]
    about = {
        "recogniser": recogniser.name,
        "left out for unknown words": len(recordings.held_out) - len(known),
        "left out for length": len(known) - len(said),
    }
    metrics = _named(error_rates(texts, recogniser.transcribe(real), about), f"{recordings.name}, real audio")
    if not pipeline.can_speak:
        return metrics, []
    rebuilt, spoken = [], []
    for start in tqdm(range(0, len(said), batch_size), desc=f"speaking {recordings.name}", unit="batch"):
        rebuilt += [through_codec(pipeline, audio) for audio in real[start : start + batch_size]]
        batch = texts[start : start + batch_size]
        generators = [torch.Generator().manual_seed(derived_seed(seed, text, 0)) for text in batch]
        spoken += pipeline.speak(batch, generator=generators, **speaking)
    rates = error_rates(texts, recogniser.transcribe(rebuilt), about)
    metrics += _named(rates, f"{recordings.name}, through the codec")
    rates = error_rates(texts, recogniser.transcribe(spoken), about | speaking | {"seed": seed})
    metrics += _named(rates, f"{recordings.name}, spoken by the model")
    return metrics, list(zip(texts, spoken, strict=True))


def through_codec(pipeline: TransfusionPipeline, audio: Audio) -> Audio:
    """Audio encoded and decoded by the codec: the limit for the model's speech."""
    (media,) = pipeline.encode_audio([audio])
    return pipeline.decode_audio(media.content[1:-1])


def loss_metrics(
    pipeline: TransfusionPipeline, config: RunConfig, sources: Sources, accelerator: Accelerator, *, batch_size: int
) -> list[Metric]:
    """Held-out loss of each modality and direction, as training's validation measures it.

    Args:
        pipeline: The model.
        config: Configuration with its data.
        sources: Held-out documents.
        accelerator: An accelerator in float32.
        batch_size: Rows of a forward.
    """
    config = of_checkpoint(config, pipeline)
    encoder = OnlineEncoder.of_model(config.model, codecs_of(pipeline, config, accelerator.device), config.codecs)
    validation = Validation(sources, pipeline.text_tokenizer, config, encoder=encoder, rows_at_once=batch_size)
    losses = validation.losses(pipeline.transformer, accelerator)
    about = {"documents": config.training.num_validation_documents, "unit": "nats per token, of latents squared error"}
    return [Metric(f"held-out {name}", loss, about) for name, loss in losses.items()]


def _named(metrics: Sequence[Metric], what: str) -> list[Metric]:
    return [replace(metric, name=f"{metric.name} ({what})") for metric in metrics]
