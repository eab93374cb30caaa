"""Pictures to begin with: variations of an image, and painting in a part of it, without training for either."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from transfusion_mot.autoencoder import Autoencoder
from transfusion_mot.data.images import load_image, to_pixels
from transfusion_mot.diffusion import Edit
from transfusion_mot.errors import UserError
from transfusion_mot.sampling.sizes import ImageSizes, Size

Pictures = Image.Image | Sequence[Image.Image]


class Original(NamedTuple):
    """What an edit leaves as it is.

    Attributes:
        pixels: [B, 3, H, W] in [-1, 1].
        repaint: Bool [B, 1, H, W], where the painting shows; None is everywhere.
    """

    pixels: Tensor
    repaint: Tensor | None

    @property
    def size(self) -> Size:
        """(height, width) in pixels."""
        return self.pixels.shape[2], self.pixels.shape[3]

    def put_back(self, painted: Tensor) -> Tensor:
        """Pixels of the painting [B, 3, H, W], with those of the picture where it was not to be repainted."""
        return painted if self.repaint is None else torch.where(self.repaint, painted, self.pixels)


def load_original(
    image: Pictures,
    mask_image: Pictures | None,
    sizes: ImageSizes,
    height: int | None,
    width: int | None,
    repeats: Sequence[int],
    device: torch.device,
) -> Original:
    """Pictures and masks of any size, brought to that of the painting as in training.

    Args:
        image: One picture for all results, or one for each prompt.
        mask_image: As `image`, of the same sizes; what is white is repainted.
        sizes: Of the model's images.
        height: Of the painting, in pixels; None is that at which training would read the pictures.
        width: As `height`.
        repeats: The number of the prompt of each result.
        device: Where the result goes.

    Raises:
        UserError: They are not as many as the prompts, of different sizes, or nothing is white; and as of
            `ImageSizes.painted`.
    """
    num_prompts = repeats[-1] + 1
    pictures = _one_a_prompt(image, "image", num_prompts)
    size = sizes.painted(height, width, pictures)
    pixels = to_pixels(np.stack([sizes.read(picture, size) for picture in pictures]))[list(repeats)].to(device)
    if mask_image is None:
        return Original(pixels, None)
    masks = _one_a_prompt(mask_image, "mask_image", num_prompts)
    for picture, mask in zip(pictures, masks, strict=True):
        if picture.size != mask.size:
            raise UserError(
                f"mask_image has {mask.width} x {mask.height} pixels and image {picture.width} x {picture.height}; "
                "give a mask of the image's size"
            )
    # Inverted, because what is added at the sides is white, and stays as it is.
    black = [ImageOps.invert(Image.fromarray(load_image(mask, (mask.height, mask.width)))) for mask in masks]
    white = np.stack([sizes.read(mask, size).mean(axis=-1) < 127.5 for mask in black])
    if not white.any(axis=(1, 2)).all():
        raise UserError("mask_image has no white pixel; white is what is repainted")
    return Original(pixels, torch.from_numpy(white)[list(repeats), None].to(device))


def make_edit(original: Original, strength: float, autoencoder: Autoencoder, dtype: torch.dtype) -> Edit:
    """The same in latents [B, C, Y, X]; a latent is repainted if any of its pixels is."""
    clean = autoencoder.encode(original.pixels)[0].to(dtype)
    if original.repaint is None:
        return Edit(clean, strength)
    return Edit(clean, strength, F.max_pool2d(original.repaint.float(), autoencoder.downsampling) > 0)


def _one_a_prompt(pictures: Pictures, name: str, num_prompts: int) -> list[Image.Image]:
    given = [pictures] if isinstance(pictures, Image.Image) else list(pictures)
    for picture in given:
        if not isinstance(picture, Image.Image):
            raise UserError(f"{name} must be a PIL image, got {type(picture).__name__}")
    if len(given) not in (1, num_prompts):
        raise UserError(f"there are {len(given)} pictures in {name} for {num_prompts} prompts; give one, or one each")
    return given * (num_prompts // len(given))
