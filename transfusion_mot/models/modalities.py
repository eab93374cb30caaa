"""Input layers, output layers and losses of each modality.

Shapes: B rows, T token slots, K media slots, P patches of one, D width, V vocabulary, C latent channels, Y and X latent
height and width.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfusion_mot.config import DiffusionConfig, ModalityConfig
from transfusion_mot.diffusion import Diffusion
from transfusion_mot.losses import diffusion_losses, next_token_loss
from transfusion_mot.models.adapters import LinearAdapter, ReadingAdapter, UNetAdapter
from transfusion_mot.models.inputs import LatentInput, TokenInput

# Of a module: drawn like the matrices of the blocks, or zero; the others as torch and diffusers have it. See
# `TransfusionMoT.initialise`.
InitialValues = Literal["normal", "zero"]


class Terms(NamedTuple):
    """The loss of one modality over some rows, as sums: the caller divides by the count of the whole global batch.

    Attributes:
        loss: [], weighted for training (Min-SNR, z-loss), with gradient.
        losses: Unweighted and without gradient: [B, T] cross-entropies in nats, 0 without a label; or [B, K] squared
            errors summed over the elements of each image, 0 without a loss.
    """

    loss: Tensor
    losses: Tensor


class TiedEmbedding(nn.Embedding):
    """One matrix [V, D] that is embedding and head: token ids => hidden states, hidden states => logits.

    Both uses go through its own forward, so that FSDP and offloading load its weights in both.
    """

    def forward(self, given: Tensor) -> Tensor:
        return F.linear(given, self.weight) if given.is_floating_point() else super().forward(given)


class TokenModality(nn.Module):
    """Discrete tokens with a next-token loss. Its vocabulary is its own: no softmax goes over another modality.

    Args:
        vocab_size: Number of token ids V, including special and spare ones.
        hidden_size: Width D of its tower.
        tied: Embedding and head are one matrix; then there is no `head`.
    """

    def __init__(self, vocab_size: int, hidden_size: int, tied: bool = False) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.embedding = (TiedEmbedding if tied else nn.Embedding)(vocab_size, hidden_size)
        self.head = None if tied else nn.Linear(hidden_size, vocab_size, bias=False)
        self.initial_values: Mapping[str, InitialValues] = dict.fromkeys(
            ["embedding"] if tied else ["embedding", "head"], "normal"
        )

    @property
    def head_weight(self) -> Tensor:
        """The matrix [V, D] of the logits."""
        return self.embedding.weight if self.head is None else self.head.weight

    @property
    def start_id(self) -> int:
        """For codes: the id that starts their span. The two ids after the codebook are `start` and `end`."""
        return self.vocab_size - 2

    @property
    def end_id(self) -> int:
        """For codes: the label of the last one."""
        return self.vocab_size - 1

    def embed(self, given: TokenInput) -> tuple[Tensor, None]:
        """Token ids => (hidden states [B, T, D], nothing)."""
        return self.embedding(given.ids), None

    def loss(self, hidden: Tensor, given: TokenInput, kept: None, z_loss_weight: float) -> Terms:
        """Hidden states [B, T, D] after the last norm => cross-entropies, without keeping all logits in memory."""
        assert given.labels is not None
        return Terms(*next_token_loss(hidden, self.head_weight, given.labels, z_loss_weight))

    def predict(self, hidden: Tensor, given: TokenInput, kept: None) -> Tensor:
        """Hidden states [B, T, D] => logits [B, T, V] of the next token."""
        return self.embedding(hidden) if self.head is None else self.head(hidden)


class DiffusionModality(nn.Module):
    """Continuous latents, cut into patches, with a diffusion loss.

    Args:
        latent_channels: Channels C of the codec's latents.
        hidden_size: Width D of its tower.
        config: Its patches and adapter.
        diffusion: The objective.
    """

    def __init__(
        self, latent_channels: int, hidden_size: int, config: ModalityConfig, diffusion: DiffusionConfig
    ) -> None:
        super().__init__()
        self.latent_channels = latent_channels
        self.patch_size = config.patch_size
        self.adapter: LinearAdapter | UNetAdapter = (
            LinearAdapter(latent_channels, hidden_size, config.patch_size)
            if config.adapter == "linear"
            else UNetAdapter(
                latent_channels, hidden_size, config.patch_size, config.unet_channels, config.unet_num_layers
            )
        )
        # Training starts from the mean prediction.
        self.initial_values: Mapping[str, InitialValues] = {f"adapter.{self.adapter.last_layer}": "zero"}
        # The model may be built on `meta`, but the noise schedule needs real numbers.
        with torch.device("cpu"):
            self.diffusion = Diffusion.from_config(diffusion)

    def embed(self, given: LatentInput) -> tuple[Tensor, Any]:
        """Latents => (hidden states [B, K * P, D], context for `predict`); clean latents are noised first."""
        latents = given.latents
        if given.noise is not None:
            latents = self.diffusion.add_noise(latents, given.noise, given.timesteps)
        tokens, kept = self.adapter.embed(latents.flatten(0, 1), given.timesteps.flatten())
        return tokens.unflatten(0, latents.shape[:2]).flatten(1, 2), kept

    def loss(self, hidden: Tensor, given: LatentInput, kept: Any, z_loss_weight: float) -> Terms:
        """Hidden states [B, K * P, D] after the last norm => squared errors of the prediction."""
        assert given.noise is not None
        assert given.mask is not None
        prediction = self.predict(hidden, given, kept)
        target = self.diffusion.target(given.latents, given.noise, given.timesteps)
        losses = diffusion_losses(prediction, target, given.mask)
        weight = self.diffusion.loss_weight(given.timesteps)
        weighted = losses if weight is None else weight * losses
        return Terms(weighted.sum(), losses.detach())

    def predict(self, hidden: Tensor, given: LatentInput, kept: Any) -> Tensor:
        """Hidden states [B, K * P, D] => the network's prediction [B, K, C, Y, X]."""
        images = hidden.unflatten(1, (given.latents.shape[1], -1)).flatten(0, 1)
        return self.adapter.predict(images, kept, *given.latents.shape[-2:]).view(given.latents.shape)


class ReadModality(nn.Module):
    """Clean latents of another modality, cut into patches, which are only read and have no prediction.

    Args:
        latent_channels: Channels C of the codec's latents.
        hidden_size: Width D of its tower.
        config: Its patches.
    """

    # As torch draws them.
    initial_values: Mapping[str, InitialValues] = MappingProxyType({})

    def __init__(self, latent_channels: int, hidden_size: int, config: ModalityConfig) -> None:
        super().__init__()
        self.adapter = ReadingAdapter(latent_channels, hidden_size, config.patch_size)

    def embed(self, given: LatentInput) -> tuple[Tensor, None]:
        """Clean latents => (hidden states [B, K * P, D], nothing)."""
        tokens = self.adapter.embed(given.latents.flatten(0, 1))
        return tokens.unflatten(0, given.latents.shape[:2]).flatten(1, 2), None


# Modalities that the model generates.
Modality = TokenModality | DiffusionModality
