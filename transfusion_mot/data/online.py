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
    """Completes rows whose images are still pixels; the batch is what it would be with a cache of latents.

    Args:
        codecs: Of each modality with latents; compiled on CUDA.
        batch_sizes: Likewise; images encoded at a time.
    """

    def __init__(self, codecs: Mapping[str, LatentCodec], batch_sizes: Mapping[str, int]) -> None:
        self.codecs = codecs
        self.batch_sizes = batch_sizes

    @classmethod
    def of_model(cls, model: ModelConfig, codecs: Mapping[str, Codec], configs: Mapping[str, CodecConfig]) -> Self:
        """For all latents of a model, also those that are only read.

        Args:
            model: Its modalities.
            codecs: Of each modality that the model makes, but text.
            configs: Of each modality of latents; how many images they encode at a time.
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
            # Empty slots too: how many there are is known to the host only if it waits.
            pixels = to_pixels(images_uint8.flatten(0, 1))
            encoded = self.codecs[name].encode_fast(pixels, self.batch_sizes[name], compiled=pixels.is_cuda)
            # In half precision, as a cache would have kept them.
            mean, std = (part.half().float().view_as(given.latents) for part in encoded)
            # What is still the noise of the posterior.
            latents = mean + std * given.latents
            inputs[name] = given._replace(latents=latents * given.is_filled[:, :, None, None, None])
        return dataclasses.replace(rows.batch, inputs=inputs)
