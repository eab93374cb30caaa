"""A small speech tokenizer: log-mel frames <=> codes, one for every few frames.

Shapes: B waveforms, T samples, F frames, M mel bands, N codes, C channels of a layer, D channels of a code.
"""

import itertools
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.audio_utils import mel_filter_bank

from transfusion_mot.codecs.griffin_lim import Spectrogram, amplitudes_of_mel, griffin_lim

# Smallest amplitude of a band, so that its logarithm is finite.
_SMALLEST = 1e-7
# Below this number of nats (8.7 dB each) under a voice's mean, a band is clamped, so that codes ignore faint noise.
_SILENT = 4.5
# Lower limit of another voice, in nats below the mean voice.
_QUIETEST = 3.0
# A frame is speech if it is at most this number of nats below the loudest frame.
_SPEECH = 4.0
# Batches are padded to the longest waveform.
_ENCODED_AT_ONCE = 32


class MelVQModel(ModelMixin, ConfigMixin):
    """Waveforms => log-mel frames => codes => log-mel frames => waveforms.

    The mean of each band over the speech of a waveform is subtracted first. So codes describe words more than the
    speaker, the microphone and the loudness. The decoder uses the mean voice of the training data. Encoder and decoder
    are ConvNeXt blocks (arXiv 2201.03545) along time. A vector is replaced by the code with the highest cosine
    similarity (ViT-VQGAN, arXiv 2110.04627). The phases of decoded frames come from the Griffin-Lim algorithm.

    Args:
        sample_rate: Samples a second of the waveforms.
        hop_length: Samples from one frame to the next.
        window_length: Samples of a frame.
        num_mels: Mel bands, from 0 to half the sample rate.
        block_out_channels: Width at each frame rate; the rate halves at each step, down to that of codes.
        layers_per_block: Blocks at each rate except the last, in the encoder and in the decoder.
        num_code_layers: Blocks at the rate of codes, in the encoder and in the decoder.
        latent_channels: Channels of a code.
        num_vq_embeddings: Number of codes.
    """

    # Normalised bands have about unit variance.
    nats = 1.5
    mel_mean: Tensor

    @register_to_config
    def __init__(
        self,
        sample_rate: int = 16000,
        hop_length: int = 160,
        window_length: int = 400,
        num_mels: int = 64,
        block_out_channels: Sequence[int] = (128, 192, 256),
        layers_per_block: int = 1,
        num_code_layers: int = 6,
        latent_channels: int = 16,
        num_vq_embeddings: int = 512,
    ) -> None:
        super().__init__()
        layers = [layers_per_block] * (len(block_out_channels) - 1) + [num_code_layers]
        self.encoder = Encoder(num_mels, block_out_channels, layers)
        # Named as in diffusers' `VQModel`. Centred, so that vectors have all directions from the first step.
        self.quant_conv = nn.Sequential(
            nn.Conv1d(block_out_channels[-1], latent_channels, 1), nn.BatchNorm1d(latent_channels, affine=False)
        )
        self.quantize = _Codebook(num_vq_embeddings, latent_channels)
        self.post_quant_conv = nn.Conv1d(latent_channels, block_out_channels[-1], 1)
        self.decoder = Decoder(num_mels, block_out_channels, layers)
        self.register_buffer("mel_mean", torch.zeros(num_mels))
        self.spectrogram = Spectrogram(hop_length, window_length)
        bank = mel_filter_bank(
            window_length // 2 + 1, num_mels, 0.0, sample_rate / 2, sample_rate, norm="slaney", mel_scale="slaney"
        )
        self.register_buffer("bank", torch.tensor(bank, dtype=torch.float32), persistent=False)

    @property
    def samples_per_code(self) -> int:
        """Samples from one code to the next."""
        return self.config.hop_length * 2 ** (len(self.config.block_out_channels) - 1)

    def log_mel(self, waveform: Tensor) -> Tensor:
        """[T] => logarithms of the amplitudes of bands [M, F], padded with silence to whole codes."""
        whole = F.pad(waveform, (0, -len(waveform) % self.samples_per_code))
        return (self.spectrogram(whole).abs().T @ self.bank).T.clamp(min=_SMALLEST).log()

    @staticmethod
    def voice(log_mel: Tensor) -> Tensor:
        """[M, F] => the mean of each band over frames with speech [M, 1]."""
        loudness = log_mel.mean(dim=0)
        return log_mel[:, loudness > loudness.max() - _SPEECH].mean(dim=1, keepdim=True)

    def normalise(self, log_mel: Tensor) -> Tensor:
        """[M, F] => the input of the encoder, of the same shape."""
        # Audio that is much quieter than the training voices is silence, not a voice.
        voice = torch.maximum(self.voice(log_mel), self.mel_mean[:, None] - _QUIETEST)
        return (log_mel - voice).clamp(min=-_SILENT) / self.nats

    def encode(self, waveforms: Sequence[Tensor]) -> list[Tensor]:
        """[T] each => codes [N] of each, independent of the other waveforms."""
        codes: list[Tensor] = []
        for start in range(0, len(waveforms), _ENCODED_AT_ONCE):
            frames = [self.normalise(self.log_mel(one)) for one in waveforms[start : start + _ENCODED_AT_ONCE]]
            mel_BMF = pad_sequence([one.T for one in frames], batch_first=True).transpose(1, 2)
            lengths = torch.tensor([one.shape[1] for one in frames], device=mel_BMF.device)
            mask_B1F = (torch.arange(mel_BMF.shape[2], device=mel_BMF.device) < lengths[:, None])[:, None]
            vectors_BND = self.quant_conv(self.encoder(mel_BMF, mask_B1F)).transpose(1, 2)
            # Codes have length one, so the length of a vector does not matter.
            codes_BN = (vectors_BND @ F.normalize(self.quantize.embedding.weight, dim=1).T).argmax(dim=2)
            per_code = mel_BMF.shape[2] // codes_BN.shape[1]
            codes += [row[: one.shape[1] // per_code] for row, one in zip(codes_BN, frames, strict=True)]
        return codes

    def decode_mel(self, codes: Tensor) -> Tensor:
        """Codes [N] => log-mel frames [M, F], in the mean voice."""
        vectors_DN = F.normalize(self.quantize.embedding.weight, dim=1)[codes].T
        normalised = self.decoder(self.post_quant_conv(vectors_DN[None]))[0]
        return normalised * self.nats + self.mel_mean[:, None]

    def decode(self, codes: Tensor) -> Tensor:
        """Codes [N] => a waveform [T]."""
        return self.waveform_of(self.decode_mel(codes))

    def waveform_of(self, log_mel: Tensor) -> Tensor:
        """Log-mel frames [M, F] => a waveform [T] with about these frames."""
        return griffin_lim(amplitudes_of_mel(log_mel.exp(), self.bank), self.spectrogram)


class _Codebook(nn.Module):
    """Codes; they are normalised to length one when they are used."""

    def __init__(self, num_codes: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_codes, width)


class _Block(nn.Module):
    """A ConvNeXt block: a depthwise convolution along time, then a feed-forward on each frame."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.along_time = nn.Conv1d(width, width, 7, padding=3 * dilation, dilation=dilation, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, hidden_BCF: Tensor, mask_B1F: Tensor | None) -> Tensor:
        added_BFC = self.down(F.gelu(self.up(self.norm(self.along_time(hidden_BCF).transpose(1, 2)))))
        return _masked(hidden_BCF + added_BFC.transpose(1, 2), mask_B1F)


def _blocks(width: int, count: int) -> nn.ModuleList:
    # Dilations give a few blocks the receptive field of a syllable.
    return nn.ModuleList(_Block(width, dilation=2 ** (index % 3)) for index in range(count))


def _masked(hidden_BCF: Tensor, mask_B1F: Tensor | None) -> Tensor:
    """Zeros after the end of each waveform, like the padding of a convolution."""
    return hidden_BCF if mask_B1F is None else hidden_BCF * mask_B1F


class Encoder(nn.Module):
    """Normalised mel frames [B, M, F] => hidden [B, C, N].

    Args:
        num_mels: M.
        widths: Channels at each rate of frames, the rate of codes last.
        layers: Number of blocks at each rate.
    """

    def __init__(self, num_mels: int, widths: Sequence[int], layers: Sequence[int]) -> None:
        super().__init__()
        self.conv_in = nn.Conv1d(num_mels, widths[0], 3, padding=1)
        self.stages = nn.ModuleList(_blocks(width, count) for width, count in zip(widths, layers, strict=True))
        pairs = itertools.pairwise(widths)
        self.downs = nn.ModuleList(nn.Conv1d(width, next_width, 2, stride=2) for width, next_width in pairs)
        self.norm_out = nn.LayerNorm(widths[-1])

    def forward(self, mel_BMF: Tensor, mask_B1F: Tensor | None = None) -> Tensor:
        """`mask_B1F` is true up to the end of each waveform, a whole number of codes; None: all end with the batch."""
        hidden = _masked(self.conv_in(mel_BMF), mask_B1F)
        for index, blocks in enumerate(self.stages):
            if index:
                hidden = self.downs[index - 1](hidden)
                mask_B1F = None if mask_B1F is None else mask_B1F[..., ::2]
                hidden = _masked(hidden, mask_B1F)
            for block in cast(nn.ModuleList, blocks):
                hidden = block(hidden, mask_B1F)
        return self.norm_out(hidden.transpose(1, 2)).transpose(1, 2)


class Decoder(nn.Module):
    """Hidden [B, C, N] => normalised mel frames [B, M, F]: the mirror image of `Encoder`."""

    def __init__(self, num_mels: int, widths: Sequence[int], layers: Sequence[int]) -> None:
        super().__init__()
        widths, layers = list(reversed(widths)), list(reversed(layers))
        self.stages = nn.ModuleList(_blocks(width, count) for width, count in zip(widths, layers, strict=True))
        pairs = itertools.pairwise(widths)
        self.ups = nn.ModuleList(nn.ConvTranspose1d(width, next_width, 2, stride=2) for width, next_width in pairs)
        self.norm_out = nn.LayerNorm(widths[-1])
        self.conv_out = nn.Conv1d(widths[-1], num_mels, 3, padding=1)

    def before_last(self, hidden: Tensor) -> Tensor:
        """All layers except `conv_out`."""
        for index, blocks in enumerate(self.stages):
            if index:
                hidden = self.ups[index - 1](hidden)
            for block in cast(nn.ModuleList, blocks):
                hidden = block(hidden, None)
        return self.norm_out(hidden.transpose(1, 2)).transpose(1, 2)

    def forward(self, hidden: Tensor) -> Tensor:
        """See the class."""
        return self.conv_out(self.before_last(hidden))
