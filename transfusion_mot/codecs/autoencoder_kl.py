"""The image autoencoder: pixels => normalised latents => pixels.

Latent scale and shift are applied only here: all other code sees latents of about zero mean and unit
variance. `python -m transfusion_mot.autoencoder --config FILE` trains one.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Literal, Self

import torch
from diffusers import AutoencoderKL

from transfusion_mot.codecs.base import fingerprint_of, settings_of
from transfusion_mot.codecs.checkpoint import class_name_of, load_model
from transfusion_mot.errors import UserError


class Autoencoder:
    """A frozen diffusers `AutoencoderKL` with its normalisation inside `encode` and `decode`.

    Latents are normalised with the config's `latents_mean` and `latents_std`, one value a channel, if it has them,
    else with `shift_factor` and `scaling_factor` (Rombach et al. 2022, appendix G; `(raw - shift) * scale`).

    Attributes:
        vae: The wrapped model, in evaluation mode and without gradients.
        latent_channels: Channels C of the latents.
        downsampling: Factor f from latent to image height and width.
    """

    kind: Literal["latents"] = "latents"
    medium: Literal["image"] = "image"

    def __init__(self, vae: AutoencoderKL) -> None:
        self.vae = vae.eval().requires_grad_(False)
        self.latent_channels: int = vae.config.latent_channels
        self.downsampling = 2 ** (len(vae.config.block_out_channels) - 1)
        if vae.config.latents_mean is not None and vae.config.latents_std is not None:
            mean, std = list(vae.config.latents_mean), list(vae.config.latents_std)
        else:
            mean = [vae.config.shift_factor or 0.0] * self.latent_channels
            std = [1.0 / vae.config.scaling_factor] * self.latent_channels
        # On the device from the start: a copy at every call would make the host wait for it. With sequential offload
        # the weights are on `meta`, and their later device is not known yet.
        device = "cpu" if vae.device.type == "meta" else vae.device
        self._mean = torch.tensor(mean, device=device).view(-1, 1, 1)
        self._std = torch.tensor(std, device=device).view(-1, 1, 1)

    @classmethod
    def load(cls, path: str, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Self:
        """Load a folder written by `save_pretrained`, or an autoencoder of that name from the Hugging Face hub.

        Raises:
            UserError: It does not exist, is not an `AutoencoderKL`, or its weights are incomplete.
        """
        if (class_name := class_name_of(path)) != AutoencoderKL.__name__:
            raise UserError(f"codec path '{path}' is of class {class_name}; an AutoencoderKL is needed")
        vae: AutoencoderKL = load_model(AutoencoderKL, path, dtype)
        memory_format = torch.channels_last if torch.device(device).type == "cuda" else torch.contiguous_format
        return cls(vae.to(device=device, memory_format=memory_format))

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.vae.device

    @cached_property
    def fingerprint(self) -> str:
        """Hash of weights and config; the same in every number format that holds the saved weights exactly."""
        return fingerprint_of(self.vae, settings_of(self.vae))

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`pixels` in [-1, 1] `[B, 3, H, W]` => posterior mean and standard deviation of the normalised latents.

        A sample of the posterior is `mean + std * noise`.

        Returns:
            Two float32 tensors `[B, C, H/f, W/f]` on the device of `pixels`.
        """
        posterior = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist
        # With `device_map` the model may be on another GPU; hooks move its input there, but not its output back.
        mean, std = (part.to(pixels.device, torch.float32) for part in (posterior.mean, posterior.std))
        shift, scale = self._normalisation(pixels.device)
        return (mean - shift) / scale, std / scale

    def encode_fast(self, pixels: torch.Tensor, batch_size: int, compiled: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Like `encode`, for many images: `batch_size` at a time, and on CUDA in bfloat16.

        Args:
            compiled: Compile the encoder on its first use (CUDA only); every batch then has the same shape.
        """
        if self.vae.device.type != "cuda":
            parts = [self.encode(batch) for batch in pixels.split(batch_size)]
        else:
            encode = self._compiled_encode if compiled else self.encode
            parts = []
            with torch.autocast("cuda", torch.bfloat16):
                for batch in pixels.split(batch_size):
                    padding = batch_size - len(batch) if compiled else 0
                    padded = torch.cat([batch, batch.new_zeros(padding, *batch.shape[1:])])
                    mean, std = encode(padded)
                    parts.append((mean[: len(batch)], std[: len(batch)]))
        means, stds = zip(*parts, strict=True)
        return torch.cat(means), torch.cat(stds)

    @cached_property
    def _compiled_encode(self) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
        return torch.compile(self.encode, dynamic=False)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Normalised latents `[B, C, h, w]` => `pixels` clamped to [-1, 1], float32 `[B, 3, h*f, w*f]`."""
        shift, scale = self._normalisation(latents.device)
        raw = latents.float() * scale + shift
        return self.vae.decode(raw.to(self.vae.dtype)).sample.to(latents.device, torch.float32).clamp(-1.0, 1.0)

    def _normalisation(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Shift and scale of the raw latents."""
        if self._mean.device != device:
            # Cached: a copy in every call would make the host wait for the device.
            self._mean, self._std = self._mean.to(device), self._std.to(device)
        return self._mean, self._std


def set_normalisation(vae: AutoencoderKL, mean: list[float], std: list[float]) -> None:
    """Write the statistics of the raw latents, one value for each channel, to the config that `save_pretrained` writes.

    The scaling factor becomes 1, so that diffusers' own pipelines, which apply it on top of the statistics, agree with
    `Autoencoder`.
    """
    vae.register_to_config(latents_mean=mean, latents_std=std, scaling_factor=1.0, shift_factor=None)
