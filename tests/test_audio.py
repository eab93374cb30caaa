"""Audio files => samples, other sample rates, and WAV files, against the standard library and closed forms."""

import io
import pickle
import struct
import wave
from pathlib import Path

import numpy as np
import pytest
import soundfile

from transfusion_mot.data.audio import Audio, UnreadableAudio, audio_seconds, decode_audio, resample, write_wav
from transfusion_mot.errors import UserError

signal = pytest.importorskip("scipy.signal")

RATE = 16000


def sine(seconds: float, rate: int = RATE, frequency: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * frequency * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def wav_of_stdlib(samples: np.ndarray, rate: int, bits: int) -> bytes:
    """`[T]` or `[T, channels]` in [-1, 1] => a WAV file of integers."""
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1 if samples.ndim == 1 else samples.shape[1])
        out.setsampwidth(bits // 8)
        out.setframerate(rate)
        values = np.round(samples * (2 ** (bits - 1) - 1))
        # WAV stores 8 bits without a sign.
        out.writeframes((values + 128).astype(np.uint8).tobytes() if bits == 8 else values.astype("<i2").tobytes())
    return file.getvalue()


def written(samples: np.ndarray, rate: int, kind: str, subtype: str | None = None) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind, subtype=subtype)
    return file.getvalue()


@pytest.mark.parametrize(("bits", "rate"), [(8, RATE), (16, 8000), (16, 192000)])
def test_wav_files_of_the_standard_library(bits: int, rate: int) -> None:
    audio = decode_audio(wav_of_stdlib(sine(0.2, rate), rate, bits))
    assert audio.sample_rate == rate
    assert audio.samples.dtype == np.float32
    assert audio.seconds == 0.2
    assert np.abs(audio.samples - sine(0.2, rate)).max() < 2 / 2 ** (bits - 1)


def test_channels_are_averaged() -> None:
    channels = np.stack([sine(0.1), np.zeros(1600), sine(0.1)], axis=1)
    assert np.allclose(decode_audio(wav_of_stdlib(channels, RATE, 16)).samples, sine(0.1) * 2 / 3, atol=1e-4)


@pytest.mark.parametrize(("kind", "error"), [("FLAC", 1e-4), ("OGG", 0.05), ("MP3", 0.05)])
def test_compressed_files(kind: str, error: float, tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(written(sine(1), RATE, kind))
    for source in (path, str(path), path.read_bytes(), path.open("rb")):
        samples = decode_audio(source).samples
        assert len(samples) == RATE
        assert np.abs(samples - sine(1)).max() < error


def test_values_beyond_one_are_clipped() -> None:
    samples = decode_audio(written(np.array([0.5, 3.0, -2.0]), RATE, "WAV", "FLOAT")).samples
    assert samples.tolist() == [0.5, 1.0, -1.0]


def test_what_is_no_audio_is_told_in_a_sentence(tmp_path: Path) -> None:
    flac = written(sine(1), RATE, "FLAC")
    infinite = written(np.array([[np.inf, -np.inf]]), RATE, "WAV", "FLOAT")
    for content, reason in [
        (b"", "Format not recognised"),
        (b"hello", "Format not recognised"),
        (flac[: len(flac) // 2], "cannot be read: "),
        (wav_of_stdlib(np.zeros(0), RATE, 16), "is empty"),
        (infinite, "holds values that are not finite"),
        (tmp_path / "none.wav", "does not exist"),
    ]:
        with pytest.raises(UnreadableAudio, match=f"audio clip '.+' .*{reason}"):
            decode_audio(content)
    with pytest.raises(UserError, match=r"cannot be read: Is a directory") as caught:
        decode_audio(tmp_path)
    assert not isinstance(caught.value, UnreadableAudio)
    for read in (decode_audio, audio_seconds):
        with pytest.raises(UserError, match="audio is None; give a path, the content of a file, or an open file"):
            read(None)


def test_the_header_tells_how_long_audio_lasts(tmp_path: Path) -> None:
    content = wav_of_stdlib(sine(1.5), RATE, 16)
    # A header that says there are hours of it: only what there is counts.
    lying = bytearray(content)
    lying[40:44] = struct.pack("<I", 2**31)
    (tmp_path / "a.wav").write_bytes(content)
    for source in (content, bytes(lying), tmp_path / "a.wav", *(written(sine(1.5), RATE, k) for k in ("OGG", "MP3"))):
        assert audio_seconds(source) == decode_audio(source).seconds == 1.5
    with pytest.raises(UnreadableAudio) as caught:
        audio_seconds(b"RIFF", "a.wav")
    assert str(caught.value) == "audio clip 'a.wav' cannot be read: Format not recognised."
    # Workers hand it to the process that counts it.
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize(("rate", "to"), [(192000, 16000), (44100, 24000), (8000, 16000)])
def test_a_resampled_sine_is_the_sine_at_the_other_rate(rate: int, to: int) -> None:
    samples = resample(Audio(sine(1, rate), rate), to)
    assert samples.dtype == np.float32
    assert abs(len(samples) - to) <= 1
    middle = slice(to // 10, -to // 10)
    assert np.abs(samples - sine(1, to)[: len(samples)])[middle].max() < 2e-3
    naive = signal.resample_poly(sine(1, rate), to, rate)[: len(samples)]
    assert np.abs(samples - naive)[middle].max() < 5e-3


def test_what_the_lower_rate_cannot_hold_is_filtered_out() -> None:
    high = Audio(sine(1, 48000, frequency=15000), 48000)
    assert np.abs(resample(high, 16000)[1600:-1600]).max() < 1e-3
    assert resample(high, 48000) is high.samples


def test_wav_files_for_the_standard_library(tmp_path: Path) -> None:
    audio = Audio(np.array([0.0, 0.5, -1.0, 1.5], dtype=np.float32), RATE)
    buffer = io.BytesIO()
    write_wav(audio, tmp_path / "a.wav")
    write_wav(audio, buffer)
    assert (tmp_path / "a.wav").read_bytes() == buffer.getvalue()
    with wave.open(str(tmp_path / "a.wav")) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, RATE)
        values = np.frombuffer(file.readframes(4), dtype="<i2")
    assert np.abs(values / 32768 - [0, 0.5, -1, 1]).max() < 1e-4
