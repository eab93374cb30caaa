"""Interface of codecs: raw media => latents or codes, and back.

A codec of the kind `latents` gives the mean and standard deviation of normalised latents, for the objective
`diffusion`; one of the kind `codes` gives integers, for `next_token`. Its medium is `image` or `audio`.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from transfusion_mot.errors import UserError


@runtime_checkable
class LatentCodec(Protocol):
    """Pixels <=> continuous latents.

    Attributes:
        kind: `latents`.
        medium: `image`.
        latent_channels: Channels C of the latents.
        downsampling: Factor f from latent to image height and width.
        device: Where it computes.
        fingerprint: Hash of weights and configuration.
    """

    kind: Literal["latents"]
    medium: Literal["image"]
    latent_channels: int
    downsampling: int

    @property
    def device(self) -> torch.device: ...

    @property
    def fingerprint(self) -> str: ...

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels [B, 3, H, W] in [-1, 1] => mean and standard deviation [B, C, H/f, W/f] of the normalised latents."""
        ...

    def encode_fast(self, pixels: Tensor, batch_size: int, compiled: bool) -> tuple[Tensor, Tensor]:
        """Like `encode`, for many images: `batch_size` at a time, in lower precision than float32 if that is faster.

        Args:
            compiled: Compile the encoder on its first use (CUDA only); every batch then has the same shape.
        """
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents [B, C, h, w] => pixels [B, 3, h*f, w*f] in [-1, 1]."""
        ...


@runtime_checkable
class CodeCodec(Protocol):
    """Pixels <=> integer codes.

    Attributes:
        kind: `codes`.
        medium: `image`.
        codebook_size: Number of codes.
        downsampling: Factor f from codes to image height and width.
        device: Where it computes.
        has_decoder: Whether codes can be decoded to pictures.
        fingerprint: Hash of weights and configuration.
    """

    kind: Literal["codes"]
    medium: Literal["image"]
    codebook_size: int
    downsampling: int

    @property
    def device(self) -> torch.device: ...

    @property
    def has_decoder(self) -> bool: ...

    @property
    def fingerprint(self) -> str: ...

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in [-1, 1] => codes [B, H/f, W/f] in [0, codebook_size)."""
        ...

    def decode(self, codes: Tensor) -> Tensor:
        """Codes [B, h, w] => pixels [B, 3, h*f, w*f] in [-1, 1].

        Raises:
            UserError: The codec has no decoder.
        """
        ...


@runtime_checkable
class AudioCodec(Protocol):
    """Audio <=> integer codes.

    Attributes:
        kind: `codes`.
        medium: `audio`.
        codebook_size: Number of codes.
        sample_rate: Samples a second of the waveforms.
        codes_per_second: Average number of codes for a second of audio.
        device: Device of the model.
        has_decoder: Whether codes can be decoded to audio.
        fingerprint: Hash of weights and configuration.
    """

    kind: Literal["codes"]
    medium: Literal["audio"]
    codebook_size: int
    sample_rate: int
    codes_per_second: float

    @property
    def device(self) -> torch.device: ...

    @property
    def has_decoder(self) -> bool: ...

    @property
    def fingerprint(self) -> str: ...

    def encode(self, waveforms: Sequence[Tensor]) -> list[Tensor]:
        """Mono waveforms, float32 [T] in [-1, 1] at `sample_rate` => codes [N] of each, in [0, codebook_size).

        The codes of a waveform do not depend on the others.
        """
        ...

    def decode(self, codes: Tensor) -> Tensor:
        """Codes [N] => a waveform [T] in [-1, 1] at `sample_rate`.

        Raises:
            UserError: The codec has no decoder.
        """
        ...


ImageCodec = LatentCodec | CodeCodec
Codec = ImageCodec | AudioCodec


def reconstruct(codec: ImageCodec, pixels: Tensor) -> Tensor:
    """Pixels [B, 3, H, W] in [-1, 1] => their reconstruction by the codec, without the noise of latents."""
    return codec.decode(codec.encode(pixels)[0] if codec.kind == "latents" else codec.encode(pixels))


# Keys that transformers adds to a configuration when it is saved.
_OF_THE_FILES = {"architectures", "dtype", "transformers_version"}


def settings_of(model: nn.Module) -> dict[str, Any]:
    """Configuration of a model of diffusers or transformers, the same before and after it is saved."""
    config: Any = model.config
    settings = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    return {key: value for key, value in settings.items() if key not in _OF_THE_FILES}


def fingerprint_of(model: nn.Module, config: dict[str, Any]) -> str:
    """Hash of weights and configuration; the same in every number format that holds the saved weights exactly."""
    kept = {key: value for key, value in config.items() if not key.startswith("_")}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode())
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.float().contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Compute in full float32: no autocast, and no TF32, which has as few mantissa bits as half precision."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        # TF32 is the default of convolutions on CUDA.
        with torch.autocast(device.type, enabled=False), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def check_image_size(side: int, multiple: int, name: str = "image_size", part: str = "a patch") -> None:
    """Refuse a height or width of images that does not divide into patches or codes.

    Args:
        side: Height or width in pixels.
        multiple: Required divisor: the codec's downsampling, times the patch size of a modality of latents.
        name: Name of the side in the message.
        part: Name of the patches or codes in the message.

    Raises:
        UserError: It is not a multiple.
    """
    if not isinstance(side, int) or side < 1 or side % multiple:
        raise UserError(f"{name} is {side}; it must be a multiple of {multiple} pixels, {part}'s side")
