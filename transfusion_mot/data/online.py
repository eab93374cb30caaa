"""Encode the media of rows on the device, for training directly from pixels."""

import dataclasses
from collections.abc import Mapping
from typing import Self

import torch

from transfusion_mot.codecs.base import Codec, LatentCodec
from transfusion_mot.config import TEXT, CodecConfig, ModelConfig
from transfusion_mot.data.batch import Batch, Rows
from transfusion_mot.data.images import to_pixels


class OnlineEncoder:
    """Encodes the images of rows; the batch equals the one with a cache of latents.

    Args:
        codecs: Codec of each modality with latents; compiled on CUDA.
        batch_sizes: Number of images that each codec encodes at a time.
    """

    def __init__(self, codecs: Mapping[str, LatentCodec], batch_sizes: Mapping[str, int]) -> None:
        self.codecs = codecs
        self.batch_sizes = batch_sizes

    @classmethod
    def of_model(cls, model: ModelConfig, codecs: Mapping[str, Codec], configs: Mapping[str, CodecConfig]) -> Self:
        """Encoder of all latents of a model, also those that are only read.

        Args:
            model: The modalities.
            codecs: Codec of each modality that the model makes, except text.
            configs: Configuration of the codec of each modality of latents; it sets the batch size of encoding.
        """
        content = {name: model.content_of(name) for name in model.stream_order if name != TEXT}
        latents = {name: codec for name, codec in codecs.items() if codec.kind == "latents"}
        return cls(
            {name: latents[media] for name, media in content.items() if media in latents},
            {name: configs[media].batch_size for name, media in content.items() if media in latents},
        )

    @torch.no_grad()
    def __call__(self, rows: Rows) -> Batch:
        """Rows on the codecs' device => the batch, without waiting for the device."""
        if not rows.media:
            return rows.batch
        inputs = dict(rows.batch.inputs)
        for name, images_uint8 in rows.media.items():
            given = rows.batch.latents(name)
            # Empty slots are encoded, too: to know their number the host would have to wait for the device.
            pixels = to_pixels(images_uint8.flatten(0, 1))
            encoded = self.codecs[name].encode_fast(pixels, self.batch_sizes[name], compiled=pixels.is_cuda)
            # In half precision, like in a cache.
            mean, std = (part.half().float().view_as(given.latents) for part in encoded)
            # The latents are still the noise of the posterior here.
            latents = mean + std * given.latents
            inputs[name] = given._replace(latents=latents * given.is_filled[:, :, None, None, None])
        return dataclasses.replace(rows.batch, inputs=inputs)
