"""The reconstruction loss of an image codec: L1, and optionally a perceptual distance and a patch discriminator."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from transfusion_mot.config import AutoencoderTrainingConfig
from transfusion_mot.errors import UserError


@dataclass
class Losses:
    """Scalars of a step, on the device."""

    total: torch.Tensor
    l1: torch.Tensor


class Objective:
    """The loss of a codec; owns the additional networks of the loss.

    Args:
        new_discriminator: Makes the patch discriminator; the default is one for pixels.
    """

    def __init__(
        self,
        config: AutoencoderTrainingConfig,
        device: torch.device,
        new_discriminator: Callable[[], nn.Module] | None = None,
    ) -> None:
        self.config = config
        self.perceptual_distance = _load_perceptual_distance(config, device) if config.perceptual_weight else None
        if config.gan_weight:
            self.discriminator = (new_discriminator or discriminator)().to(device)
            # Betas of VQGAN: with more momentum, generator and discriminator oscillate.
            self.discriminator_optimizer = torch.optim.Adam(
                self.discriminator.parameters(), lr=config.lr, betas=(0.5, 0.9)
            )

    def __call__(
        self,
        pixels: torch.Tensor,
        reconstruction: torch.Tensor,
        penalty: torch.Tensor,
        *,
        last_layer: torch.Tensor,
        step: int,
    ) -> Losses:
        """Losses of one batch. `penalty` is the bottleneck's; `last_layer` is the decoder's last weight."""
        l1 = F.l1_loss(reconstruction, pixels)
        visible = l1
        if self.perceptual_distance is not None:
            visible = visible + self.config.perceptual_weight * self.perceptual_distance(reconstruction, pixels)
        total = visible + penalty
        if self.config.gan_weight and step >= self.config.gan_start_step:
            self.train_discriminator(pixels, reconstruction.detach())
            adversarial = -self.discriminator(reconstruction).mean()
            # Esser et al. 2021, equation 7: both terms have gradients of equal norm at the last layer.
            (pull,) = torch.autograd.grad(visible, last_layer, retain_graph=True)
            (adversarial_pull,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
            balance = (pull.norm() / (adversarial_pull.norm() + 1e-4)).clamp(max=1e4)
            total = total + self.config.gan_weight * balance * adversarial
        return Losses(total, l1.detach())

    def train_discriminator(self, pixels: torch.Tensor, reconstruction: torch.Tensor) -> None:
        """One step of the discriminator, which learns to distinguish the two."""
        real, fake = self.discriminator(pixels), self.discriminator(reconstruction)
        hinge = 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())
        self.discriminator_optimizer.zero_grad()
        hinge.backward()
        self.discriminator_optimizer.step()


def discriminator(channels: int = 3) -> nn.Module:
    """A patch discriminator (Isola et al. 2017) for patches of 22 pixels: `[B, channels, H, W]` => scores of
    patches."""
    return nn.Sequential(
        nn.Conv2d(channels, 64, 4, stride=2, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(64, 128, 4, stride=2, padding=1),
        # Not batch normalisation, which mixes the images of a batch.
        nn.GroupNorm(8, 128),
        nn.LeakyReLU(0.2),
        nn.Conv2d(128, 1, 4, padding=1),
    )


def _load_perceptual_distance(
    config: AutoencoderTrainingConfig, device: torch.device
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """LPIPS (Zhang et al. 2018) with VGG16: its heads come with torchmetrics, the backbone from a local file."""
    # Imported here, because few trainings need it.
    from torchmetrics.functional.image.lpips import _LPIPS

    path = config.perceptual_path
    if path is None or not Path(path).is_file():
        raise UserError(
            f"perceptual_weight {config.perceptual_weight} needs perceptual_path, a file with the weights of "
            f"torchvision's VGG16 (https://download.pytorch.org/models/vgg16-397923af.pth); got {path}"
        )
    network = _LPIPS(net="vgg", pnet_rand=True)
    weights = torch.load(path, map_location="cpu", weights_only=True)
    try:
        network.net.load_state_dict(
            {name: weights[f"features.{name.split('.', 1)[1]}"] for name in network.net.state_dict()}
        )
    except KeyError as error:
        raise UserError(f"perceptual_path '{path}' is not a state dict of torchvision's VGG16: no {error}") from None
    network = network.to(device)
    return lambda first, second: network(first, second).mean()
