"""Images as integer codes: VQ tokenizers of diffusers and transformers behind one interface."""

from collections.abc import Callable
from functools import cached_property
from typing import Any, Literal

import torch
from diffusers import VQModel
from torch import Tensor, nn
from transformers import ChameleonVQVAE, Emu3VQVAE, JanusVQVAE

from transfusion_mot.codecs.base import fingerprint_of
from transfusion_mot.errors import UserError


class ImageCodes:
    """A frozen VQ tokenizer of images.

    Args:
        model: One of `CLASSES`.
    """

    kind: Literal["codes"] = "codes"

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.codebook_size, self.downsampling, self._encode, self._decode = CLASSES[type(model).__name__](model)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of weights and configuration."""
        config: Any = self.model.config
        return fingerprint_of(self.model, config.to_dict() if hasattr(config, "to_dict") else dict(config))

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in [-1, 1] => codes [B, H/f, W/f], in float32 whatever autocast says."""
        rows, columns = pixels.shape[-2] // self.downsampling, pixels.shape[-1] // self.downsampling
        with torch.autocast(pixels.device.type, enabled=False):
            return self._encode(pixels.float()).view(len(pixels), rows, columns)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes [B, h, w] => pixels [B, 3, h*f, w*f] clamped to [-1, 1].

        Raises:
            UserError: The tokenizer has no decoder.
        """
        if self._decode is None:
            raise UserError(
                f"{type(self.model).__name__} has no decoder, so its codes cannot become pictures; use it to read "
                "images, or another tokenizer to paint them"
            )
        with torch.autocast(codes.device.type, enabled=False):
            return self._decode(codes).float().clamp(-1.0, 1.0)


# Codes of the codebook, downsampling, pixels => codes in any shape, codes [B, h, w] => pixels.
_Parts = tuple[int, int, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor] | None]


def _vq_model(model: Any) -> _Parts:
    config = model.config
    width = config.vq_embed_dim or config.latent_channels

    def encode(pixels: Tensor) -> Tensor:
        return model.quantize(model.encode(pixels).latents)[2][2]

    def decode(codes: Tensor) -> Tensor:
        entries = model.quantize.get_codebook_entry(codes.flatten(), (*codes.shape, width))
        # Entries are given, so nothing is quantised again (and `lookup_from_codebook` would look them up a second time).
        hidden = model.post_quant_conv(entries)
        return model.decoder(hidden, entries if config.norm_type == "spatial" else None)

    return config.num_vq_embeddings, 2 ** (len(config.block_out_channels) - 1), encode, decode


def _chameleon(model: Any) -> _Parts:
    downsampling = 2 ** (len(model.config.channel_multiplier) - 1)
    return model.config.num_embeddings, downsampling, lambda pixels: model.encode(pixels).image_tokens, None


def _janus(model: Any) -> _Parts:
    codebook_size, downsampling, encode, _ = _chameleon(model)

    def decode(codes: Tensor) -> Tensor:
        # Its own `decode` takes images of the one size in its configuration.
        entries = model.quantize.embedding(codes)
        # As `get_codebook_entry` has it: the codebook is on the unit sphere.
        entries = nn.functional.normalize(entries, p=2, dim=-1).permute(0, 3, 1, 2).contiguous()
        return model.decoder(model.post_quant_conv(entries))

    return codebook_size, downsampling, encode, decode


def _emu3(model: Any) -> _Parts:
    def encode(pixels: Tensor) -> Tensor:
        sizes = torch.tensor([pixels.shape[-2:]] * len(pixels))
        return torch.stack(model.encode(pixels, sizes).image_tokens)

    return model.config.codebook_size, model.spatial_scale_factor, encode, model.decode


CLASSES: dict[str, Callable[[Any], _Parts]] = {
    VQModel.__name__: _vq_model,
    ChameleonVQVAE.__name__: _chameleon,
    JanusVQVAE.__name__: _janus,
    Emu3VQVAE.__name__: _emu3,
}
