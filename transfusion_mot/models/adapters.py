"""Input and output layers of images: latents => patch tokens, and hidden states => prediction.

Shapes: I images, C latent channels, Y and X latent height and width, p patch size, P patches, D width.
"""

import torch.nn.functional as F
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.unets.unet_2d_blocks import DownBlock2D, UpBlock2D
from torch import Tensor, nn

from transfusion_mot.models.architecture import UNET_GROUPS

TIMESTEP_FREQUENCIES = 256


def patchify(latents: Tensor, patch_size: int) -> Tensor:
    """Latents [I, C, Y, X] => patches [I, P, p*p*C], left to right, top to bottom."""
    images, channels, height, width = latents.shape
    p = patch_size
    grid = latents.view(images, channels, height // p, p, width // p, p)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(images, (height // p) * (width // p), p * p * channels)


def unpatchify(patches: Tensor, patch_size: int, height: int, width: int) -> Tensor:
    """Patches [I, P, p*p*C] => latents [I, C, Y, X]."""
    p = patch_size
    grid = patches.view(patches.shape[0], height // p, width // p, p, p, -1)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(patches.shape[0], -1, height, width)


class TimestepEmbedder(nn.Module):
    """Timesteps [I] in [0, 1] => [I, size]: sinusoids of 1000 t (Ho et al., arXiv 2006.11239) and a two-layer MLP."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.sinusoids = Timesteps(TIMESTEP_FREQUENCIES, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.mlp = TimestepEmbedding(TIMESTEP_FREQUENCIES, size)

    def forward(self, timesteps: Tensor) -> Tensor:
        return self.mlp(self.sinusoids(1000 * timesteps).to(self.mlp.linear_1.weight.dtype))


class LinearAdapter(nn.Module):
    """A linear layer in, a linear layer out; the timestep's embedding is added to every token."""

    last_layer = "output"

    def __init__(self, latent_channels: int, hidden_size: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        patch_elements = patch_size**2 * latent_channels
        self.timestep = TimestepEmbedder(hidden_size)
        self.input = nn.Linear(patch_elements, hidden_size)
        self.output = nn.Linear(hidden_size, patch_elements)

    def embed(self, noisy_latents: Tensor, timesteps: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Noisy latents [I, C, Y, X], timesteps [I] => (tokens [I, P, D], context for `predict`)."""
        tokens = self.input(patchify(noisy_latents, self.patch_size))
        return tokens + self.timestep(timesteps)[:, None], ()

    def predict(self, hidden: Tensor, kept: tuple[Tensor, ...], height: int, width: int) -> Tensor:
        """Hidden states [I, P, D], context from `embed` => prediction [I, C, Y, X]."""
        return unpatchify(self.output(hidden), self.patch_size, height, width)


class ReadingAdapter(nn.Module):
    """A linear input layer for clean latents that are only read, without timesteps and without an output layer."""

    def __init__(self, latent_channels: int, hidden_size: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.input = nn.Linear(patch_size**2 * latent_channels, hidden_size)

    def embed(self, latents: Tensor) -> Tensor:
        """Clean latents [I, C, Y, X] => tokens [I, P, D]."""
        return self.input(patchify(latents, self.patch_size))


class UNetAdapter(nn.Module):
    """U-Net blocks down before the transformer and up after it, with a long skip from each to its mirror (Transfusion,
    section 3; LMFusion, arXiv 2412.15188, equations 6 and 14). The blocks are those of diffusers, with plain group
    norms; the timestep enters their residual layers.

    Args:
        channels: Width of each block. The first log2(patch_size) blocks halve the resolution; at least one more
            does not.
        num_layers: Residual layers of a block.
    """

    last_layer = "conv_out"

    def __init__(
        self, latent_channels: int, hidden_size: int, patch_size: int, channels: list[int], num_layers: int
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.num_layers = num_layers
        inputs = [channels[0], *channels[:-1]]
        halves = [2 ** (block + 1) <= patch_size for block in range(len(channels))]
        temb = 4 * channels[0]
        self.timestep = TimestepEmbedder(temb)
        self.conv_in = nn.Conv2d(latent_channels, channels[0], 3, padding=1)
        self.down = nn.ModuleList(
            DownBlock2D(width_in, width, temb, num_layers=num_layers, add_downsample=halve)
            for width_in, width, halve in zip(inputs, channels, halves, strict=True)
        )
        self.input = nn.Linear(channels[-1], hidden_size)
        self.output = nn.Linear(hidden_size, channels[-1])
        self.up = nn.ModuleList(
            UpBlock2D(
                in_channels=inputs[block],
                prev_output_channel=channels[min(block + 1, len(channels) - 1)],
                out_channels=channels[block],
                temb_channels=temb,
                num_layers=num_layers + 1,
                add_upsample=block > 0 and halves[block - 1],
            )
            for block in reversed(range(len(channels)))
        )
        self.norm_out = nn.GroupNorm(UNET_GROUPS, channels[0])
        self.conv_out = nn.Conv2d(channels[0], latent_channels, 3, padding=1)

    def embed(self, noisy_latents: Tensor, timesteps: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """As `LinearAdapter.embed`."""
        temb = self.timestep(timesteps)
        hidden = self.conv_in(noisy_latents)
        kept = [temb]
        for block in self.down:
            block_input = hidden
            hidden, outputs = block(hidden, temb)
            kept += [block_input, *outputs[: self.num_layers]]
        return self.input(hidden.flatten(2).transpose(1, 2)), tuple(kept)

    def predict(self, hidden: Tensor, kept: tuple[Tensor, ...], height: int, width: int) -> Tensor:
        """As `LinearAdapter.predict`."""
        temb, *skips = kept
        grid = self.output(hidden).transpose(1, 2).unflatten(2, (height // self.patch_size, width // self.patch_size))
        for block in self.up:
            grid = block(grid, tuple(skips[-self.num_layers - 1 :]), temb)
            del skips[-self.num_layers - 1 :]
        return self.conv_out(F.silu(self.norm_out(grid)))
