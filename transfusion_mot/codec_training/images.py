"""Training images of a codec, their augmentation, and reconstructions of held-out images."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from transfusion_mot.codecs.base import ImageCodec, reconstruct
from transfusion_mot.config import DataConfig
from transfusion_mot.cores import usable_cores
from transfusion_mot.data.images import ImageArray, grid, to_pil, to_pixels
from transfusion_mot.data.sources.base import CaptionedImages, SkippedItems, Split, read_images
from transfusion_mot.data.sources.open import open_source
from transfusion_mot.errors import UserError

_READ_AT_ONCE = 256
_NUM_GRID_PAIRS = 16


def read_split(data: DataConfig, split: Split) -> tuple[ImageArray, list[str]]:
    """All readable images of all sources of captioned images, `uint8 [N, H, W, 3]`, and the first caption of each."""
    data = dataclasses.replace(data, buckets=[])
    images_uint8: list[ImageArray] = []
    captions: list[str] = []
    for source in data.sources:
        if source.kind == "text":
            continue
        images = open_source(source, data, split)
        if not isinstance(images, CaptionedImages):
            continue
        skipped = SkippedItems()
        with ThreadPoolExecutor(usable_cores()) as pool:
            starts = range(0, len(images), _READ_AT_ONCE)
            for start in tqdm(starts, desc=f"reading {images.name} ({split})", unit="batch"):
                batch = range(start, min(start + _READ_AT_ONCE, len(images)))
                readable = read_images(images, batch, skipped, pool)
                images_uint8 += readable.values()
                captions += [images.captions(index)[0] for index in readable]
        skipped.warn(images.name, len(images) - sum(skipped.counts.values()), "image")
    if split == "train" and not images_uint8:
        raise UserError("data.sources holds no readable image to train on")
    shape = (0, data.image_size, data.image_size, 3)
    return (np.stack(images_uint8) if images_uint8 else np.empty(shape, np.uint8)), captions


def augment(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Vary drawings on white, `pixels` in [-1, 1] `[B, 3, H, W]`, H = W, without blurring them.

    - One of the eight symmetries of the square: strokes run in all directions in other drawings.
    - A shift of at most 1/16 of the size, filled with white: a detail gets every phase of the downsampling grid.
    - Other colours for half of the images: channels are permuted, and each is moved closer to white by its own factor.
      A set of drawings has a palette, and the autoencoder must learn other colours, too. White stays white.
    """
    batch, _, size, _ = pixels.shape
    device = pixels.device

    def chance() -> torch.Tensor:
        return torch.rand(batch, 1, 1, 1, device=device, generator=generator) < 0.5

    pixels = torch.where(chance(), pixels.flip(-1), pixels)
    pixels = torch.where(chance(), pixels.flip(-2), pixels)
    pixels = torch.where(chance(), pixels.transpose(-1, -2), pixels)

    order = torch.rand(batch, 3, device=device, generator=generator).argsort(dim=1)
    strength = 0.5 + 0.5 * torch.rand(batch, 3, 1, 1, device=device, generator=generator)
    permuted = pixels.gather(1, order[:, :, None, None].expand_as(pixels))
    pixels = torch.where(chance(), 1.0 - strength * (1.0 - permuted), pixels)

    margin = max(1, size // 16)
    padded = F.pad(pixels, (margin,) * 4, value=1.0)
    offsets = torch.randint(2 * margin + 1, (2, batch, 1), device=device, generator=generator)
    rows, columns = offsets + torch.arange(size, device=device)
    image = torch.arange(batch, device=device)[:, None, None]
    # Indexing around a slice puts the channels last in memory, the layout for convolutions.
    return padded[image, :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


def measured(codec: ImageCodec, images_uint8: ImageArray, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Reconstruct images => PSNR in dB of every image [N], the reconstructions as `pixels` [N, 3, H, W]."""
    values, reconstructions = [], []
    for start in range(0, len(images_uint8), batch_size):
        pixels = to_pixels(images_uint8[start : start + batch_size]).to(codec.device)
        reconstruction = reconstruct(codec, pixels)
        # Divided by 2, because pixels have a range of 2 and PSNR is defined for 1; a perfect image counts as 100 dB.
        error = ((pixels - reconstruction) / 2).square().mean(dim=(1, 2, 3)).clamp(min=1e-10)
        values.append(-10 * error.log10())
        reconstructions.append(reconstruction)
    return torch.cat(values).cpu(), torch.cat(reconstructions).cpu()


def every_nth(images_uint8: ImageArray, at_most: int) -> ImageArray:
    """At most this number of images, evenly spaced."""
    return images_uint8[:: -(-len(images_uint8) // at_most)]


def save_grid(codec: ImageCodec, images_uint8: ImageArray, captions: list[str], path: Path) -> None:
    """Held-out originals, each with its reconstruction to the right."""
    chosen = list(range(0, len(images_uint8), -(-len(images_uint8) // _NUM_GRID_PAIRS)))
    values, reconstructions = measured(codec, images_uint8[chosen], len(chosen))
    originals = to_pil(to_pixels(images_uint8[chosen]))
    pairs = zip(originals, to_pil(reconstructions), strict=True)
    labels = zip((captions[index] for index in chosen), (f"{value:.1f} dB" for value in values.tolist()), strict=True)
    grid([image for pair in pairs for image in pair], [label for pair in labels for label in pair], 8).save(path)
