"""Training of a speech codec, a `MelVQModel`: the parts specific to audio.

Shapes: B segments, M mel bands, F frames, T samples.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from tqdm import tqdm

from transfusion_mot.codec_training.bottlenecks import CodeBottleneck, codebook_use
from transfusion_mot.codec_training.losses import Objective, discriminator
from transfusion_mot.codec_training.optimise import Parts, optimise
from transfusion_mot.codec_training.recordings import Recording, read_recordings
from transfusion_mot.codecs.audio_codes import AudioCodes
from transfusion_mot.codecs.base import full_precision
from transfusion_mot.codecs.mel_vq import MelVQModel
from transfusion_mot.config import AutoencoderTrainingConfig, CodecConfig, save_config
from transfusion_mot.data.audio import Audio, write_wav
from transfusion_mot.errors import UserError
from transfusion_mot.outputs import check_writable_folder

# Length of segments of recordings.
_CODES_PER_SEGMENT = 64
_NUM_EVALUATED = 512
_NUM_SHOWN = 4
_DECIBEL_PER_NAT = 8.686


def train_audio_codec(config: AutoencoderTrainingConfig, device: torch.device) -> dict[str, Any]:
    """Train, save and evaluate a `MelVQModel`; the frames of all recordings are on the device.

    Returns:
        Content of `metrics.json`: sizes, times, the log of the losses, and results of the saved model on held-out
        recordings: the mean distance of mel bands in dB, the share of used codes, and their perplexity.

    Raises:
        UserError: The configuration is inconsistent, one side of the held-out split has no recordings, or the loss is
            not finite.
    """
    output_dir = Path(config.output_dir)
    check_writable_folder(output_dir, "output_dir")
    model = build_audio(config).to(device)
    objective = Objective(config, device, mel_discriminator)
    train = read_recordings(config.data, config.audio.sample_rate, "train")
    held_out = read_recordings(config.data, config.audio.sample_rate, "held_out")
    if not held_out:
        raise UserError(
            f"no recording is held out of {len(train)}; raise data.held_out_fraction "
            f"(now {config.data.held_out_fraction}), or change data.split_seed"
        )
    output_dir.mkdir(parents=True, exist_ok=True)
    save_config(config, output_dir / "config.yaml")

    start = time.perf_counter()
    segments = _Segments(model, train, config)
    decoder = model.decoder
    bottleneck = CodeBottleneck(model, config.commitment_weight, is_new=config.init_from is None)
    parts = Parts(model.encoder, bottleneck, _BeforeLast(decoder), decoder.conv_out)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    # Shapes are constant in training; afterwards every recording has its own length.
    with torch.backends.cudnn.flags(enabled=True, benchmark=True):
        log = optimise(model, parts, objective, segments.draw, config)
    seconds = time.perf_counter() - start

    (model.half() if config.save_dtype == "float16" else model).save_pretrained(output_dir)
    codec = AudioCodes.load(CodecConfig(str(output_dir)), device)
    metrics = {
        **_evaluated(codec, held_out[:: -(-len(held_out) // _NUM_EVALUATED)]),
        "codes_per_second": codec.codes_per_second,
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "weight_bytes": (output_dir / "diffusion_pytorch_model.safetensors").stat().st_size,
        "num_train_recordings": len(train),
        "train_hours": round(sum(len(one.samples) for one in train) / config.audio.sample_rate / 3600, 2),
        "num_held_out_recordings": len(held_out),
        "num_steps": config.num_steps,
        "training_seconds": round(seconds, 1),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "log": log,
    }
    _save_examples(codec, held_out[:: -(-len(held_out) // _NUM_SHOWN)], output_dir)
    (output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2))
    return metrics


def build_audio(config: AutoencoderTrainingConfig) -> MelVQModel:
    """The model to train, with its initial weights.

    Raises:
        UserError: Sizes do not match each other or those of `init_from`.
    """
    audio = config.audio
    if not audio.hop_length <= audio.window_length:
        raise UserError(
            f"audio.hop_length {audio.hop_length} is longer than audio.window_length {audio.window_length}, so "
            "audio between frames would be lost; give a shorter hop_length"
        )
    if config.perceptual_weight:
        raise UserError(f"perceptual_weight is {config.perceptual_weight}; it compares pictures: set it to 0 for audio")
    torch.manual_seed(config.seed)
    model = MelVQModel(
        sample_rate=audio.sample_rate,
        hop_length=audio.hop_length,
        window_length=audio.window_length,
        num_mels=audio.num_mels,
        block_out_channels=tuple(config.block_out_channels),
        layers_per_block=config.layers_per_block,
        num_code_layers=audio.num_code_layers,
        latent_channels=config.latent_channels,
        num_vq_embeddings=config.codebook_size,
    )
    if config.init_from is not None:
        begun = AudioCodes.load(CodecConfig(config.init_from), "cpu").model
        if not isinstance(begun, MelVQModel):
            raise UserError(
                f"init_from '{config.init_from}' is of class {type(begun).__name__}; a MelVQModel is needed"
            )
        if _sizes(begun) != _sizes(model):
            raise UserError(
                f"init_from '{config.init_from}' has other sizes than the configuration; see its config.json"
            )
        model.load_state_dict(begun.state_dict())
    return model


def _sizes(model: MelVQModel) -> list[tuple[str, Any]]:
    # Lists are tuples until they are saved.
    sizes = ((key, list(size) if isinstance(size, tuple) else size) for key, size in model.config.items())
    return sorted((key, size) for key, size in sizes if not key.startswith("_"))


def mel_discriminator() -> nn.Module:
    """The patch discriminator of images, for mel frames [B, M, F] as images of one channel."""
    return nn.Sequential(nn.Unflatten(1, (1, -1)), discriminator(1))


class _BeforeLast(nn.Module):
    def __init__(self, decoder: Any) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, latents: Tensor) -> Tensor:
        return self.decoder.before_last(latents)


class _Segments:
    """Concatenated normalised frames of all recordings, and segments of them.

    A segment may cross into the next recording; encoder and decoder have a receptive field of only about half a second.
    """

    def __init__(self, model: MelVQModel, recordings: list[Recording], config: AutoencoderTrainingConfig) -> None:
        device = model.bank.device
        frames, voices = [], []
        with full_precision(device), torch.no_grad():
            for recording in tqdm(recordings, desc="mel frames", unit="recording", mininterval=1.0):
                log_mel = model.log_mel(torch.as_tensor(recording.samples, device=device))
                voices.append(model.voice(log_mel))
                frames.append(log_mel)
            if config.init_from is None:
                model.mel_mean.copy_(torch.cat(voices, dim=1).mean(dim=1))
            self.frames_FM = torch.cat([model.normalise(log_mel).T.half() for log_mel in frames])
        self.num_frames = _CODES_PER_SEGMENT * model.samples_per_code // config.audio.hop_length
        self.batch_size = config.batch_size
        if len(self.frames_FM) < self.num_frames:
            raise UserError("the recordings of data.sources are shorter than one segment of training together")

    def draw(self, generator: torch.Generator) -> Tensor:
        """Segments at random positions, [B, M, F]."""
        device = self.frames_FM.device
        last = len(self.frames_FM) - self.num_frames
        starts = torch.randint(last + 1, (self.batch_size, 1), device=device, generator=generator)
        return self.frames_FM[starts + torch.arange(self.num_frames, device=device)].float().transpose(1, 2)


@dataclass
class _Reconstructed:
    """Normalised mel frames [M, F] of a recording: the original ones and those decoded from its codes."""

    original: Tensor
    decoded: Tensor
    codes: Tensor


@torch.no_grad()
def _reconstruct(codec: AudioCodes, recording: Recording) -> _Reconstructed:
    model: Any = codec.model
    waveform = torch.as_tensor(recording.samples, device=codec.device)
    (codes,) = codec.encode([waveform])
    with full_precision(codec.device):
        original = model.normalise(model.log_mel(waveform))
        return _Reconstructed(original, model.normalise(model.decode_mel(codes)), codes)


def _evaluated(codec: AudioCodes, recordings: list[Recording]) -> dict[str, float]:
    distance, frames = 0.0, 0
    counts = torch.zeros(codec.codebook_size, dtype=torch.long)
    for recording in recordings:
        made = _reconstruct(codec, recording)
        distance += float((made.original - made.decoded).abs().mean(dim=0).sum())
        frames += made.original.shape[1]
        counts += torch.bincount(made.codes.cpu(), minlength=codec.codebook_size)
    use, perplexity = codebook_use(counts)
    return {
        "mel_distance_db": round(distance / frames * MelVQModel.nats * _DECIBEL_PER_NAT, 2),
        "codebook_use": round(use, 4),
        "perplexity": round(perplexity, 1),
    }


def _save_examples(codec: AudioCodes, recordings: list[Recording], folder: Path) -> None:
    """Held-out recordings and their reconstructions: spectrograms one above the other, and WAV files."""
    figure, axes = plt.subplots(2 * len(recordings), 1, figsize=(9, 2.4 * len(recordings)), squeeze=False)
    for index, recording in enumerate(recordings):
        made = _reconstruct(codec, recording)
        for row, (mel, title) in enumerate(
            ((made.original, recording.text), (made.decoded, f"{len(made.codes)} codes"))
        ):
            axis = axes[2 * index + row, 0]
            axis.imshow(mel.cpu().numpy(), origin="lower", aspect="auto", cmap="magma", vmin=-3, vmax=2)
            axis.set_title(title, loc="left", fontsize=8)
            axis.set_axis_off()
        write_wav(Audio(recording.samples, codec.sample_rate), folder / f"original_{index + 1}.wav")
        write_wav(Audio(codec.decode(made.codes).cpu().numpy(), codec.sample_rate), folder / f"decoded_{index + 1}.wav")
    figure.tight_layout()
    figure.savefig(folder / "reconstructions.png", dpi=100)
    plt.close(figure)
