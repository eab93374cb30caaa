"""The speech tokenizer of this project: its frames, codes, decoding, and training."""

import json

import numpy as np
import pytest
import torch

from transfusion_mot.codec_training.audio import build_audio
from transfusion_mot.codec_training.train import train_codec
from transfusion_mot.codecs.audio_codes import AudioCodes
from transfusion_mot.codecs.griffin_lim import Spectrogram, amplitudes_of_mel, griffin_lim
from transfusion_mot.codecs.load import load_codec
from transfusion_mot.codecs.mel_vq import MelVQModel
from transfusion_mot.config import AudioFramesConfig, AutoencoderTrainingConfig, CodecConfig, DataConfig, SourceConfig
from transfusion_mot.data.audio import Audio, decode_audio, write_wav
from transfusion_mot.errors import UserError

SIZES = {"block_out_channels": (8, 12, 16), "num_code_layers": 2, "num_mels": 20, "num_vq_embeddings": 24}


def model(**changes):
    torch.manual_seed(0)
    return MelVQModel(**(SIZES | changes)).eval().requires_grad_(False)


def noise(length, seed=0):
    return 0.3 * torch.randn(length, generator=torch.Generator().manual_seed(seed))


def syllables(seed, seconds=1.5):
    """Tones of changing pitch and loudness in a little noise, [T] at 16 kHz."""
    rng = np.random.default_rng(seed)
    time = np.arange(int(seconds * 16000)) / 16000
    pitch = np.interp(time, np.linspace(0, seconds, 8), rng.uniform(200, 3000, 8))
    loudness = np.interp(time, np.linspace(0, seconds, 12), rng.uniform(0, 0.5, 12))
    tones = loudness * np.sin(2 * np.pi * np.cumsum(pitch) / 16000)
    return torch.tensor(tones + rng.normal(0, 0.02, len(tones)), dtype=torch.float32)


@pytest.mark.parametrize("window", [400, 640])
def test_frames_are_those_of_torch_and_have_an_inverse(window) -> None:
    spectrogram = Spectrogram(160, window)
    waveform = noise(1600)
    margin = (window - 160) // 2
    around = torch.nn.functional.pad(waveform, (margin, margin))
    expected = torch.stft(around, window, 160, window=torch.hann_window(window), center=False, return_complex=True)
    torch.testing.assert_close(spectrogram(waveform), expected)
    torch.testing.assert_close(spectrogram.inverse(expected), waveform, atol=1e-5, rtol=0)


def test_sound_of_mel_frames_has_these_frames() -> None:
    codec = model(num_mels=40)
    waveform = syllables(0)
    mel = codec.log_mel(waveform).exp()
    amplitudes = amplitudes_of_mel(mel, codec.bank)
    assert amplitudes.min() >= 0
    bands = codec.bank.T @ amplitudes
    assert (bands - mel).norm() < 0.05 * mel.norm()
    again = codec.waveform_of(mel.log())
    assert (codec.log_mel(again).exp() - mel).norm() < 0.2 * mel.norm()
    # Where phases are drawn once and kept, frames contradict each other.
    turns = torch.rand(amplitudes.shape, generator=torch.Generator().manual_seed(0))
    once = codec.spectrogram.inverse(amplitudes * torch.exp(2j * torch.pi * turns))
    assert (codec.log_mel(once).exp() - mel).norm() > 0.4 * mel.norm()
    assert torch.equal(codec.waveform_of(mel.log()), again)


def test_a_tone_keeps_its_pitch() -> None:
    spectrogram = Spectrogram(160, 400)
    tone = 0.5 * torch.sin(2 * torch.pi * 1000 * torch.arange(16000) / 16000)
    made = griffin_lim(spectrogram(tone).abs(), spectrogram)
    assert abs(torch.fft.rfft(made).abs().argmax() - 1000) < 5
    assert made.std() == pytest.approx(tone.std().item(), rel=0.05)


def test_codes_of_a_waveform_do_not_depend_on_the_others() -> None:
    codec = AudioCodes(model())
    waveforms = [syllables(1), noise(640), noise(641), noise(1), syllables(2, 0.7), torch.zeros(5000)]
    together = codec.encode(waveforms)
    # 40 ms a code.
    assert [len(codes) for codes in together] == [38, 1, 2, 1, 18, 8]
    assert (codec.codes_per_second, codec.codebook_size, codec.sample_rate) == (25.0, 24, 16000)
    assert len(torch.cat(together).unique()) > 3
    for waveform, codes in zip(waveforms, together, strict=True):
        assert codec.encode([waveform])[0].tolist() == codes.tolist()
        assert codec.decode(codes).shape == (640 * len(codes),)
        assert codec.decode(codes).abs().max() <= 1


def test_loudness_and_colour_make_no_other_codes() -> None:
    codec = model()
    codec.mel_mean.fill_(-5.0)
    waveform = noise(16000)
    (codes,) = codec.encode([waveform])
    (quiet,) = codec.encode([0.2 * waveform])
    assert (codes == quiet).float().mean() > 0.95
    # Digital silence is no voice: all of it is far below one.
    silence = codec.normalise(codec.log_mel(torch.zeros(16000)))
    assert silence.max() == silence.min() == pytest.approx(-4.5 / 1.5)


def test_a_code_is_the_one_nearest_in_direction() -> None:
    codec = model()
    mel = codec.normalise(codec.log_mel(syllables(3)))
    vectors = codec.quant_conv(codec.encoder(mel[None]))[0].T
    cosines = torch.cosine_similarity(vectors[:, None], codec.quantize.embedding.weight, dim=2)
    assert codec.encode([syllables(3)])[0].tolist() == cosines.argmax(1).tolist()


def recordings(folder):
    lines = []
    for index in range(12):
        write_wav(Audio(syllables(index % 4).numpy(), 16000), folder / f"{index}.wav")
        split = "held_out" if index >= 10 else "train"
        lines.append(json.dumps({"file_name": f"{index}.wav", "text": f"tones {index}", "split": split}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return DataConfig(sources=[SourceConfig(kind="audiofolder", path=str(folder))])


def config(folder, data, **changes):
    settings = {"num_steps": 80, "batch_size": 4, "warmup_steps": 10, "lr": 1e-2, "mixed_precision": "no"}
    settings |= {"block_out_channels": [16, 24, 32], "codebook_size": 32, "latent_channels": 8, "ema_decay": 0.9}
    audio = AudioFramesConfig(num_mels=20, num_code_layers=2)
    return AutoencoderTrainingConfig(str(folder), "audio_codes", data=data, audio=audio, **(settings | changes))


@pytest.mark.slow
def test_training_writes_a_codec_that_knows_its_recordings(tmp_path) -> None:
    (tmp_path / "data").mkdir()
    data = recordings(tmp_path / "data")
    metrics = train_codec(config(tmp_path / "codec", data, gan_weight=0.1, gan_start_step=70), torch.device("cpu"))
    written = json.loads((tmp_path / "codec" / "metrics.json").read_text())
    assert written == metrics
    assert {path.name for path in (tmp_path / "codec").iterdir()} >= {
        *("config.json", "config.yaml", "diffusion_pytorch_model.safetensors", "metrics.json", "reconstructions.png"),
        *("original_1.wav", "decoded_1.wav", "original_2.wav", "decoded_2.wav"),
    }
    assert (metrics["num_train_recordings"], metrics["num_held_out_recordings"]) == (10, 2)
    assert metrics["log"][-1]["codebook_use"] > 0.5
    assert metrics["perplexity"] > 2
    codec = load_codec(CodecConfig(str(tmp_path / "codec")), "next_token", "cpu")
    assert isinstance(codec, AudioCodes)
    assert next(codec.model.parameters()).dtype == torch.float32

    # The saved files are as far from the recordings as the metrics say, and nearer than each band's mean.
    distances, spread = [], []
    for index in (10, 11):
        waveform = torch.from_numpy(decode_audio(tmp_path / f"data/{index}.wav").samples)
        mel = codec.model.normalise(codec.model.log_mel(waveform))
        made = codec.model.normalise(codec.model.decode_mel(codec.encode([waveform])[0]))
        distances.append((made - mel).abs().mean() * 1.5 * 8.686)
        spread.append((mel - mel.mean(1, keepdim=True)).abs().mean() * 1.5 * 8.686)
    assert metrics["mel_distance_db"] == pytest.approx(np.mean(distances), abs=0.01)
    assert metrics["mel_distance_db"] < 0.95 * np.mean(spread)
    decoded = decode_audio(tmp_path / "codec/decoded_2.wav").samples
    assert decoded.tolist() == pytest.approx(codec.decode(codec.encode([waveform])[0]).tolist(), abs=1e-3)

    begun = build_audio(config(tmp_path / "more", data, init_from=str(tmp_path / "codec")))
    assert torch.equal(begun.mel_mean, codec.model.mel_mean)
    with pytest.raises(UserError, match="has other sizes than the configuration"):
        build_audio(config(tmp_path / "more", data, init_from=str(tmp_path / "codec"), codebook_size=16))


def test_what_cannot_be_trained_is_refused(tmp_path) -> None:
    (tmp_path / "data").mkdir()
    data = recordings(tmp_path / "data")
    audio = AudioFramesConfig(hop_length=320, window_length=300)
    with pytest.raises(UserError, match=r"hop_length 320 is longer than audio\.window_length 300"):
        build_audio(AutoencoderTrainingConfig(kind="audio_codes", audio=audio))
    with pytest.raises(UserError, match=r"perceptual_weight is 1\.0; it compares pictures"):
        build_audio(config(tmp_path / "codec", data, perceptual_weight=1.0))
    lines = (tmp_path / "data/metadata.jsonl").read_text().replace("held_out", "train")
    (tmp_path / "data/metadata.jsonl").write_text(lines)
    with pytest.raises(UserError, match="no recording is held out of 12"):
        train_codec(config(tmp_path / "codec", data), torch.device("cpu"))
