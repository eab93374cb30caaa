"""Mel amplitudes => waveforms: spectrograms, and the Griffin-Lim algorithm for their phases.

Shapes: T samples, F frames, L frequencies, M mel bands.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Iterations of Griffin-Lim and of the amplitudes of mel bands; more make no audible difference.
_ITERATIONS = 32
_FACTORS = 30
# Momentum of the fast algorithm (Perraudin, Balazs and Søndergaard 2013).
_MOMENTUM = 0.99
_TINY = 1e-9


class Spectrogram(nn.Module):
    """Waveform [T] <=> complex frames [L, F] with a Hann window, F = T / hop; both ends are padded with silence.

    Args:
        hop_length: Samples from one frame to the next.
        window_length: Samples of a frame; L = window_length / 2 + 1.
    """

    window: Tensor

    def __init__(self, hop_length: int, window_length: int) -> None:
        super().__init__()
        self.hop_length, self.window_length = hop_length, window_length
        # Each frame is centred on its hop.
        self.margin = (window_length - hop_length) // 2
        self.register_buffer("window", torch.hann_window(window_length), persistent=False)

    def forward(self, waveform: Tensor) -> Tensor:
        """[T], T a multiple of the hop => [L, F]."""
        around = F.pad(waveform, (self.margin, self.window_length - self.hop_length - self.margin))
        frames = around.unfold(0, self.window_length, self.hop_length)
        return torch.fft.rfft(frames * self.window).T

    def inverse(self, spectrum: Tensor) -> Tensor:
        """[L, F] => the waveform [T] with the closest frames (Griffin and Lim 1984, equation 6)."""
        frames = torch.fft.irfft(spectrum.T, n=self.window_length) * self.window
        total = self._overlapped(frames.T)
        weight = self._overlapped(self.window.square()[:, None].expand(-1, spectrum.shape[1]))
        kept = slice(self.margin, self.margin + spectrum.shape[1] * self.hop_length)
        return total[kept] / weight[kept]

    def _overlapped(self, frames: Tensor) -> Tensor:
        length = (frames.shape[1] - 1) * self.hop_length + self.window_length
        shape = {"output_size": (1, length), "kernel_size": (1, self.window_length), "stride": (1, self.hop_length)}
        return F.fold(frames[None].contiguous(), **shape).flatten()


def amplitudes_of_mel(mel: Tensor, bank: Tensor) -> Tensor:
    """Amplitudes of mel bands [M, F] and their filters [L, M] => amplitudes [L, F] >= 0 with nearly these bands.

    Each multiplicative update lowers the squared distance of the bands and keeps the sign (Lee and Seung 2001, theorem
    1).
    """
    amplitudes = torch.linalg.pinv(bank.T) @ mel
    amplitudes = amplitudes.clamp(min=mel.min().item())
    back = bank @ mel
    for _ in range(_FACTORS):
        amplitudes = amplitudes * back / (bank @ (bank.T @ amplitudes) + _TINY)
    return amplitudes


def griffin_lim(amplitudes: Tensor, spectrogram: Spectrogram) -> Tensor:
    """Amplitudes [L, F] => a waveform [T] with about these amplitudes. Phases start from fixed random values."""
    # Drawn on the CPU, so that the result is the same on every device.
    turns = torch.rand(amplitudes.shape, generator=torch.Generator().manual_seed(0)).to(amplitudes.device)
    phases = torch.exp(2j * torch.pi * turns)
    before = torch.zeros_like(phases)
    for _ in range(_ITERATIONS):
        spectrum = spectrogram(spectrogram.inverse(amplitudes * phases))
        phases = spectrum - _MOMENTUM / (1 + _MOMENTUM) * before
        phases = phases / (phases.abs() + _TINY)
        before = spectrum
    return spectrogram.inverse(amplitudes * phases)
