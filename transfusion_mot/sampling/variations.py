"""Variations of an image, and repainting of a part of it; neither needs training."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from transfusion_mot.codecs.base import LatentCodec
from transfusion_mot.data.images import load_image, to_pixels
from transfusion_mot.diffusion import Variation
from transfusion_mot.errors import UserError
from transfusion_mot.sampling.sizes import ImageSizes, Size

Picture = Image.Image | NDArray[Any] | Tensor
Pictures = Picture | Sequence[Picture]


class Original(NamedTuple):
    """The picture to vary.

    Attributes:
        pixels: [B, 3, H, W] in [-1, 1].
        repaint: Bool [B, 1, H, W], True where it is repainted; None is everywhere.
    """

    pixels: Tensor
    repaint: Tensor | None

    @property
    def size(self) -> Size:
        """(height, width) in pixels."""
        return self.pixels.shape[2], self.pixels.shape[3]

    def put_back(self, painted: Tensor) -> Tensor:
        """Pixels of the painting [B, 3, H, W], with those of the picture outside of the mask."""
        return painted if self.repaint is None else torch.where(self.repaint, painted, self.pixels)


def load_original(
    image: Pictures,
    mask_image: Pictures | None,
    *,
    sizes: ImageSizes,
    height: int | None,
    width: int | None,
    repeats: Sequence[int],
    device: torch.device,
) -> Original:
    """Pictures and masks of any size, resized to the painting's size as in training.

    Args:
        image: One picture for all results, or one for each prompt.
        mask_image: As `image`, of the same sizes; white is repainted.
        sizes: Sizes of the model's images.
        height: Height of the painting in pixels; None is that at which training would read the pictures.
        width: As `height`.
        repeats: Index of the prompt of each result.
        device: Device of the result.

    Raises:
        UserError: The numbers of pictures and prompts differ, sizes differ, or nothing is white; also as
            `ImageSizes.painted`.
    """
    num_prompts = repeats[-1] + 1
    pictures = one_a_prompt(image, "image", num_prompts)
    size = sizes.painted(height, width, pictures)
    pixels = to_pixels(np.stack([sizes.read(picture, size) for picture in pictures]))[list(repeats)].to(device)
    if mask_image is None:
        return Original(pixels, None)
    masks = one_a_prompt(mask_image, "mask_image", num_prompts)
    for picture, mask in zip(pictures, masks, strict=True):
        if picture.size != mask.size:
            raise UserError(
                f"mask_image has {mask.width} x {mask.height} pixels, but image {picture.width} x {picture.height}; "
                "give a mask of the image's size"
            )
    # Inverted, because padding is white and must not be repainted.
    black = [ImageOps.invert(Image.fromarray(load_image(mask, (mask.height, mask.width)))) for mask in masks]
    white = np.stack([sizes.read(mask, size).mean(axis=-1) < 127.5 for mask in black])
    if not white.any(axis=(1, 2)).all():
        raise UserError("mask_image has no white pixel; make the part to repaint white")
    return Original(pixels, torch.from_numpy(white)[list(repeats), None].to(device))


def make_variation(original: Original, strength: float, codec: LatentCodec, dtype: torch.dtype) -> Variation:
    """`Original` in latents [B, C, Y, X]; a latent is repainted if any of its pixels is."""
    clean = codec.encode(original.pixels)[0].to(dtype)
    if original.repaint is None:
        return Variation(clean, strength)
    return Variation(clean, strength, F.max_pool2d(original.repaint.float(), codec.downsampling) > 0)


def one_a_prompt(pictures: Pictures, name: str, num_prompts: int) -> list[Image.Image]:
    """A picture for each prompt: the given ones, or a single one for all.

    Raises:
        UserError: Their number is neither 1 nor that of the prompts.
    """
    given = as_pictures(pictures, name)
    if len(given) not in (1, num_prompts):
        raise UserError(f"there are {len(given)} pictures in {name} for {num_prompts} prompts; give one, or one each")
    return given * (num_prompts // len(given))


def as_pictures(given: Pictures, what: str) -> list[Image.Image]:
    """Convert all image types of diffusers to PIL images; values become 8 bits.

    Args:
        given: PIL images; arrays [H, W], [H, W, C] or [B, H, W, C]; tensors [H, W], [C, H, W] or [B, C, H, W]; of 1 or
            3 channels, in [0, 1] or, if their type is `uint8`, from 0 to 255; one, or a sequence of them.
        what: Their name in messages.

    Raises:
        UserError: The type, the shape or a value is invalid.
    """
    if isinstance(given, Image.Image):
        return [given]
    if isinstance(given, Tensor | np.ndarray):
        return _pictures_of(given, what)
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise UserError(f"{what} must be PIL images, arrays or tensors, got {type(given).__name__}")
    return [picture for part in given for picture in as_pictures(part, what)]


def _pictures_of(given: Tensor | NDArray[Any], what: str) -> list[Image.Image]:
    values = given
    if isinstance(values, Tensor):
        values = (values if values.dtype == torch.uint8 else values.float()).detach().cpu().numpy()
        values = np.moveaxis(values, -3, -1) if values.ndim > 2 else values
    values = values[..., None] if values.ndim == 2 else values
    if values.ndim not in (3, 4) or values.shape[-1] not in (1, 3) or 0 in values.shape[-3:]:
        order = "[C, H, W] or [B, C, H, W]" if isinstance(given, Tensor) else "[H, W, C] or [B, H, W, C]"
        raise UserError(
            f"{what} has the shape {list(given.shape)}; it must be {order}, with 1 or 3 channels C and some pixels"
        )
    if values.dtype != np.uint8:
        # This form also refuses NaN.
        if not ((values >= 0) & (values <= 1)).all():
            raise UserError(f"{what} has values outside of 0 to 1; scale them, or give uint8 values from 0 to 255")
        values = (values.astype(np.float64) * 255).round().astype(np.uint8)
    images = np.broadcast_to(values, (*values.shape[:-1], 3)).reshape(-1, *values.shape[-3:-1], 3)
    return [Image.fromarray(image) for image in images]
