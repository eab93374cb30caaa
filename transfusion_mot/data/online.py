"""Images of rows encoded on the device, for training straight from pixels."""

import dataclasses

import torch

from transfusion_mot.codecs.autoencoder_kl import Autoencoder
from transfusion_mot.data.batch import Batch, Rows
from transfusion_mot.data.images import to_pixels


class OnlineEncoder:
    """Completes rows whose images are still pixels; the batch is what it would be with a latent cache.

    Args:
        autoencoder: Of the run; compiled on CUDA.
        batch_size: Images encoded at a time.
    """

    def __init__(self, autoencoder: Autoencoder, batch_size: int) -> None:
        self.autoencoder = autoencoder
        self.batch_size = batch_size

    @torch.no_grad()
    def __call__(self, rows: Rows) -> Batch:
        """Rows on the autoencoder's device => the batch, without waiting for the device."""
        batch = rows.batch
        if rows.images_uint8 is None:
            return batch
        # Empty slots too: how many there are is known to the host only if it waits.
        pixels = to_pixels(rows.images_uint8.flatten(0, 1))
        encoded = self.autoencoder.encode_fast(pixels, self.batch_size, compiled=pixels.is_cuda)
        # In half precision, as a cache would have kept them.
        mean, std = (part.half().float().view_as(batch.latents) for part in encoded)
        latents = mean + std * batch.latents
        return dataclasses.replace(batch, latents=latents * batch.filled_images[:, :, None, None, None])
