"""Interface of feature networks, and resizing of images to their input size.

Images are resized on the network's device, because resizing on CPU cores takes longer than decoding.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from transfusion_mot.evaluation.distances.mmd import KernelDistance, kernel_distance


@dataclass(frozen=True)
class FeatureNetwork:
    """A network that turns images into feature vectors, with everything that its metrics depend on.

    Attributes:
        name: Last part of the names of metrics.
        frechet_name: Name of the Frechet distance in its features.
        kernel_name: Name of the kernel distance in its features.
        description: The network and its layer.
        weights: Hash of its weights.
        resize: Method of resizing images to its input size.
        prepare: Images `uint8 [B, H, W, 3]` => network inputs `float32 [B, 3, S, S]`, 0 to 255, on the same device.
        module: Network inputs `[B, 3, S, S]` => features `[B, D]`.
        num_features: D.
        device: Device of the network.
        kernel: Kernel distance between two sets of its features.
    """

    name: str
    frechet_name: str
    kernel_name: str
    description: str
    weights: str
    resize: str
    prepare: Callable[[Tensor], Tensor]
    module: nn.Module
    num_features: int
    device: torch.device
    kernel: Callable[[Tensor, Tensor], KernelDistance] = kernel_distance

    def features(self, images: Sequence[Tensor]) -> Tensor:
        """Images `uint8 [B, H, W, 3]`, one tensor for each size => features `[sum of B, D]`."""
        return self.module(torch.cat([self.prepare(of_size) for of_size in images]))


class Normalised(nn.Module):
    """A network with its own normalisation of images from 0 to 255 in front."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: Callable[[Tensor], Tensor], mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1) * 255)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1) * 255)

    def forward(self, images: Tensor) -> Tensor:
        return self.network((images - self.mean) / self.std)


def clean_resize(images: Tensor, size: int) -> Tensor:
    """Resize like clean-fid (arXiv 2104.11222): antialiased bicubic in float, without rounding to 8 bits.

    Args:
        images: `uint8 [B, H, W, 3]`.
        size: S.

    Returns:
        `float32 [B, 3, S, S]`, 0 to 255.
    """
    pixels = images.permute(0, 3, 1, 2).float()
    # With antialiasing torch's bicubic kernel is that of Pillow, which clean-fid resizes with.
    resized = interpolate(pixels, size=(size, size), mode="bicubic", align_corners=False, antialias=True)
    return resized.clamp(0, 255)


def legacy_resize(images: Tensor) -> Tensor:
    """Resize like clean-fid's `legacy_pytorch` and pytorch-fid: from neighbouring pixels only, to 299 pixels."""
    pixels = images.permute(0, 3, 1, 2).float()
    return interpolate(pixels, size=(299, 299), mode="bilinear", align_corners=False).clamp(0, 255)


def tensorflow_resize(images: Tensor) -> Tensor:
    """Resize like TensorFlow 1 (`resize_bilinear`, corners not aligned), torch-fidelity and torchmetrics.

    Pixel i of S is read at i * size / S of the image, not at its middle, so the picture moves up and to the left.
    """
    pixels = images.permute(0, 3, 1, 2).float()
    for dim in (2, 3):
        size = pixels.shape[dim]
        places = torch.arange(299, device=pixels.device, dtype=torch.float32) * (size / 299)
        low = places.long()
        share = (places - low).view((-1, 1) if dim == 2 else (-1,))
        first, second = (pixels.index_select(dim, place.clamp(max=size - 1)) for place in (low, low + 1))
        pixels = first + (second - first) * share
    return pixels
