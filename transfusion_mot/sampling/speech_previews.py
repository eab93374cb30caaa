"""Previews of speech: WAV files of prompts with their spectrograms, and transcripts of held-out recordings."""

import re
from pathlib import Path
from typing import cast

import numpy as np
import torch
from accelerate import Accelerator
from matplotlib.figure import Figure

from transfusion_mot.data.audio import Audio, write_wav
from transfusion_mot.data.mixture import Sources
from transfusion_mot.data.sources.base import AudioSet
from transfusion_mot.errors import UserError
from transfusion_mot.pipeline import TransfusionPipeline
from transfusion_mot.sampling.held_out_items import captions_of, evenly_spaced, printable

_NUM_SPOKEN, _NUM_TRANSCRIBED = 4, 4
# Maximum seconds: a model that has not learnt to stop would fill the maximum length.
_MOST_SECONDS = 10.0
_MAX_NEW_TOKENS = 64
_COLUMNS = 2
# Window of a spectrogram, in seconds.
_WINDOW = 0.025
_SLUG_LENGTH = 48


class SpeechPreviews:
    """Speech in a folder for each step and, if that is the tracker, in TensorBoard; nothing for models without speech.

    Args:
        pipeline: Speaks and transcribes with the current weights of its transformer.
        prompts: Prompts to say; may be empty. None takes captions of held-out audio.
        held_out: Held-out documents; evenly spaced recordings with texts are transcribed.
        folder: Folder of the files.
    """

    def __init__(
        self, pipeline: TransfusionPipeline, prompts: list[str] | None, held_out: Sources, folder: Path
    ) -> None:
        self.pipeline = pipeline
        self.folder = folder
        self.prompts: list[str] = []
        self.recordings: list[Audio] = []
        self.texts: list[str] = []
        if not pipeline.has_audio:
            return
        if prompts is None:
            prompts = captions_of(held_out, pipeline.audio_modality, _NUM_SPOKEN)
        if pipeline.can_speak:
            self.prompts = [prompt for prompt in prompts if pipeline.is_short_enough(prompt)]
        self.recordings, self.texts = recordings_of(held_out, pipeline.audio_modality, _NUM_TRANSCRIBED)

    def make(self, step: int, accelerator: Accelerator) -> list[str]:
        """Speak and transcribe after `step` steps => lines for the log; called by the main process, or by all of a
        sharded model."""
        pipeline = self.pipeline
        if self.prompts:
            spoken = pipeline.speak(
                self.prompts,
                max_seconds=min(_MOST_SECONDS, pipeline.config.max_audio_seconds or _MOST_SECONDS),
                generator=[torch.Generator().manual_seed(place) for place in range(len(self.prompts))],
            )
            if accelerator.is_main_process:
                self._show(spoken, step, accelerator)
        if not self.recordings:
            return []
        heard = pipeline.transcribe(self.recordings, max_new_tokens=_MAX_NEW_TOKENS)
        return [
            f"heard '{printable(transcript)}', said '{text}'"
            for transcript, text in zip(heard, self.texts, strict=True)
        ]

    def _show(self, spoken: list[Audio], step: int, accelerator: Accelerator) -> None:
        folder = self.folder / f"step-{step:07d}-speech"
        folder.mkdir(parents=True, exist_ok=True)
        for place, (prompt, audio) in enumerate(zip(self.prompts, spoken, strict=True)):
            slug = re.sub(r"[\W_]+", "-", prompt.lower()).strip("-")[:_SLUG_LENGTH]
            write_wav(audio, folder / f"{place}-{slug}.wav")
        figure = spectrograms(spoken, self.prompts)
        figure.savefig(f"{folder}.png")
        for tracker in accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.writer.add_figure("speech", figure, step)
                for place, audio in enumerate(spoken):
                    tracker.writer.add_audio(f"speech/{place}", audio.samples[None], step, audio.sample_rate)


def spectrograms(spoken: list[Audio], titles: list[str]) -> Figure:
    """A grid of spectrograms in dB, each under its title: seconds to the right, kHz upwards."""
    rows = -(-len(spoken) // _COLUMNS)
    figure = Figure(figsize=(6 * _COLUMNS, 2.4 * rows), layout="constrained")
    for place, (audio, title) in enumerate(zip(spoken, titles, strict=True)):
        axes = figure.add_subplot(rows, _COLUMNS, place + 1)
        axes.set_title(title if len(title) <= 60 else f"{title[:60]}...", fontsize=9)
        if not len(audio.samples):
            axes.text(0.5, 0.5, "(nothing)", ha="center", va="center", transform=axes.transAxes)
            axes.set_axis_off()
            continue
        window = max(16, round(_WINDOW * audio.sample_rate))
        # Pad to at least two windows; a floor, because silence has no logarithm.
        samples = np.pad(audio.samples, (0, max(0, 2 * window - len(audio.samples)))) + 1e-5
        axes.specgram(
            samples, NFFT=window, noverlap=window // 2, Fs=audio.sample_rate / 1000, cmap="magma", vmin=-120, vmax=-20
        )
        axes.set_xticks(*_seconds(len(samples) / audio.sample_rate))
        axes.set_ylabel("kHz")
    return figure


def _seconds(length: float) -> tuple[list[float], list[str]]:
    """Positions (in milliseconds) and labels of ticks."""
    step = next(step for step in (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, length) if length / step <= 8)
    ticks = np.arange(0, length, step)
    return [1000 * tick for tick in ticks], [f"{tick:g} s" for tick in ticks]


def recordings_of(sources: Sources, modality: str, count: int) -> tuple[list[Audio], list[str]]:
    """Evenly spaced recordings of a modality with their texts; missing files are skipped."""
    recordings, texts = [], []
    for media, index, text in evenly_spaced(sources, modality, count):
        try:
            recordings.append(cast(AudioSet, media).audio(index))
        except UserError:
            continue
        texts.append(text)
    return recordings, texts
