"""Small audio files, and what codes a naive tokenizer makes of them; clip number i is silence of the level i / 100."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import soundfile
import torch
from torch import Tensor

RATE = 8000


def clip(number: int, seconds: float = 0.5, rate: int = RATE, kind: str = "WAV", **options: Any) -> bytes:
    """A file's content."""
    file = io.BytesIO()
    channels = options.pop("channels", 1)
    samples = np.full((round(seconds * rate), channels), number / 100)
    soundfile.write(file, samples, rate, format=kind, **options)
    return file.getvalue()


class LevelCodec:
    """Ten codes a second: the level of each tenth, in hundredths.

    Attributes:
        lengths: Of the waveforms of every call.
    """

    kind, medium, codebook_size, sample_rate, codes_per_second = "codes", "audio", 101, RATE, 10.0
    device, has_decoder, fingerprint = torch.device("cpu"), False, "levels"

    def __init__(self) -> None:
        self.lengths: list[list[int]] = []

    def encode(self, waveforms: Sequence[Tensor]) -> list[Tensor]:
        self.lengths.append([len(waveform) for waveform in waveforms])
        frames = [waveform[: len(waveform) // 800 * 800].view(-1, 800) for waveform in waveforms]
        return [(frame.mean(1) * 100).round().long() for frame in frames]


def numbers_heard(clips: Any) -> list[int]:
    """Which clips there are, read from their samples."""
    return [round(float(np.median(clips.audio(index).samples)) * 100) for index in range(len(clips))]
