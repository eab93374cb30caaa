"""Makers of the audio and transcripts of sample.py."""

import argparse
from pathlib import Path
from typing import Any

from transfusion_mot.cli.items import Item, Maker
from transfusion_mot.cli.makers import open_picture, snapshot_settings, writing_settings
from transfusion_mot.cli.outputs import ResultFolder
from transfusion_mot.data.audio import decode_audio, write_wav
from transfusion_mot.pipeline import TransfusionPipeline


def speaker(pipeline: TransfusionPipeline, arguments: argparse.Namespace) -> tuple[Maker, dict[str, Any]]:
    """A maker that speaks prompts or describes a picture aloud, and its settings."""
    pipeline.check_can_speak()
    pipeline.most_codes(arguments.max_seconds)
    _, scale = pipeline.sampling_settings(pipeline.audio_modality, None, arguments.guidance_scale)
    how = {
        "guidance_scale": scale,
        "temperature": arguments.code_temperature,
        "top_p": arguments.code_top_p,
        "top_k": arguments.code_top_k,
        "max_seconds": arguments.max_seconds,
    }
    settings = {"seed": arguments.seed, **how, **snapshot_settings(pipeline)}
    # The name of the spoken text in Hugging Face's audiofolder; for a picture that text is unknown.
    key = "image" if arguments.image else "transcription"

    def speak(items: list[Item], folder: ResultFolder | None) -> list[dict[str, Any]]:
        given = [open_picture(item.prompt) if arguments.image else item.prompt for item in items]
        spoken = pipeline.speak(given, generator=[item.generator() for item in items], **how)
        if folder is not None:
            folder.make()
        lines = []
        for item, audio in zip(items, spoken, strict=True):
            path = Path(arguments.output_file) if folder is None else folder.path / f"{item.name}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_wav(audio, path)
            details = {"seconds": round(audio.seconds, 2), "audio_seed": item.seed}
            name = str(path) if folder is None else path.name
            lines.append({"file_name": name, key: item.prompt, **details, **settings})
        return lines

    return speak, settings


def transcriber(pipeline: TransfusionPipeline, arguments: argparse.Namespace) -> tuple[Maker, dict[str, Any]]:
    """A maker that transcribes audio files, and its settings."""
    settings = writing_settings(arguments)

    def transcribe(items: list[Item], folder: ResultFolder | None) -> list[dict[str, Any]]:
        texts = pipeline.transcribe(
            [decode_audio(item.prompt) for item in items], generator=[item.generator() for item in items], **settings
        )
        return [{"file_name": item.prompt, "text": text} for item, text in zip(items, texts, strict=True)]

    return transcribe, settings
