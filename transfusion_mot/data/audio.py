"""Audio files => mono float32 samples in [-1, 1] at any sample rate, and back to files."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
import soundfile
import soxr

from transfusion_mot.errors import UnreadableMedia, UserError

# Inputs of soundfile: a path, a file's content or an open file.
AudioInput = str | Path | bytes | BinaryIO


class UnreadableAudio(UnreadableMedia):
    """The audio of an `UnreadableMedia`."""

    what = "audio clip"
    file = "audio file"


class Audio(NamedTuple):
    """A recording.

    Attributes:
        samples: float32 `[T]`, mono, in [-1, 1].
        sample_rate: Samples a second.
    """

    samples: npt.NDArray[np.float32]
    sample_rate: int

    @property
    def seconds(self) -> float:
        """Duration in seconds."""
        return len(self.samples) / self.sample_rate


def decode_audio(content: AudioInput, where: str | None = None) -> Audio:
    """A file of any format of libsndfile (WAV, FLAC, Ogg, MP3, ...) => its samples, at its own sample rate.

    Several channels are averaged. Values of floating-point files are clipped to [-1, 1].

    Args:
        where: Name in messages; None is the path.

    Raises:
        UnreadableAudio: The file is missing, no audio, damaged, empty, or holds values that are not finite.
        UserError: The system failed to read the file.
    """
    # Averaging +inf and -inf would warn here; such files are refused below.
    with _opened(content, where) as (file, where), np.errstate(invalid="ignore"):
        samples = file.read(dtype="float32", always_2d=True).mean(axis=1)
        if not len(samples):
            raise UnreadableAudio(where, "is empty")
        if not np.isfinite(samples).all():
            raise UnreadableAudio(where, "holds values that are not finite")
        return Audio(samples.clip(-1, 1), file.samplerate)


def audio_seconds(content: AudioInput, where: str | None = None) -> float:
    """Duration of a file in seconds, read only from its header.

    Raises:
        UnreadableAudio, UserError: As `decode_audio`, but only the header is checked.
    """
    with _opened(content, where) as (file, _):
        return file.frames / file.samplerate


@contextmanager
def _opened(content: AudioInput, where: str | None) -> Iterator[tuple[soundfile.SoundFile, str]]:
    """An open file that is not decoded yet, and its name; every error becomes a `UserError` with this name."""
    if not isinstance(content, str | Path | bytes) and not hasattr(content, "read"):
        raise UserError(f"audio is {content!r}; give a path, the content of a file, or an open file")
    where = where or (str(content) if isinstance(content, str | Path) else "the given audio")
    try:
        # libsndfile gives no reason for a path that cannot be opened.
        content = Path(content).read_bytes() if isinstance(content, str | Path) else content
        with soundfile.SoundFile(io.BytesIO(content) if isinstance(content, bytes) else content) as file:
            yield file, where
    except FileNotFoundError:
        raise UnreadableAudio(where, "does not exist") from None
    except OSError as error:
        raise UserError(f"audio clip '{where}' cannot be read: {error.strerror or error}") from None
    except soundfile.LibsndfileError as error:
        raise UnreadableAudio(where, f"cannot be read: {error.error_string}") from None


def resample(audio: Audio, sample_rate: int) -> npt.NDArray[np.float32]:
    """The samples at another rate, `[T * sample_rate / audio.sample_rate]` within one, clipped to [-1, 1].

    Frequencies above half of the lower rate are filtered out.
    """
    if audio.sample_rate == sample_rate:
        return audio.samples
    return soxr.resample(audio.samples, audio.sample_rate, sample_rate).clip(-1, 1)


def write_wav(audio: Audio, file: str | Path | BinaryIO) -> None:
    """Write a WAV file of 16 bits a sample."""
    soundfile.write(
        str(file) if isinstance(file, Path) else file, audio.samples, audio.sample_rate, subtype="PCM_16", format="WAV"
    )
