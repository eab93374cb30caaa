"""Images as integer codes: one interface for VQ tokenizers of diffusers and transformers.

All of them were trained on pixels in [-1, 1]. They compute in full float32, because lower precision changes codes.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any, Literal, Self

import torch
from diffusers import VQModel
from torch import Tensor, nn
from transformers import ChameleonVQVAE, Emu3VQVAE, JanusVQVAE

from transfusion_mot.codecs.base import fingerprint_of, full_precision, settings_of
from transfusion_mot.codecs.checkpoint import class_name_of, load_model
from transfusion_mot.errors import UserError


class ImageCodes:
    """A frozen VQ tokenizer of images.

    Args:
        model: One of `CLASSES`.

    Attributes:
        model: The same, in float32, in evaluation mode and without gradients.
        codebook_size: Number of codes.
        downsampling: Factor f from codes to image height and width.
    """

    kind: Literal["codes"] = "codes"
    medium: Literal["image"] = "image"

    def __init__(self, model: nn.Module) -> None:
        self.model = model.float().eval().requires_grad_(False)
        self.codebook_size, self.downsampling, self._encode, self._decode = _ADAPTERS[type(model)](model)

    @classmethod
    def load(cls, path: str, device: torch.device | str) -> Self:
        """Load a folder written by `save_pretrained`, or a tokenizer of that name from the Hugging Face hub.

        Raises:
            UserError: It does not exist, is not in `CLASSES`, or its weights are incomplete.
        """
        class_name = class_name_of(path)
        if class_name not in CLASSES:
            raise UserError(f"codec path '{path}' is of class {class_name}; one of {', '.join(CLASSES)} is needed")
        return cls(load_model(CLASSES[class_name], path).to(device))

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return next(self.model.parameters()).device

    @property
    def has_decoder(self) -> bool:
        """Whether codes can be decoded to pictures."""
        return self._decode is not None

    @cached_property
    def fingerprint(self) -> str:
        """Hash of weights and configuration; the same in every number format that holds the saved weights exactly."""
        return fingerprint_of(self.model, settings_of(self.model))

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in [-1, 1] => codes [B, H/f, W/f]."""
        rows, columns = pixels.shape[-2] // self.downsampling, pixels.shape[-1] // self.downsampling
        with full_precision(pixels.device):
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
        with full_precision(codes.device):
            return self._decode(codes).float().clamp(-1.0, 1.0)


# Number of codes, downsampling, pixels => codes in any shape, codes [B, h, w] => pixels.
_Parts = tuple[int, int, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor] | None]


def _vq_model(model: Any) -> _Parts:
    config = model.config
    width = config.vq_embed_dim or config.latent_channels

    def encode(pixels: Tensor) -> Tensor:
        return model.quantize(model.encode(pixels).latents)[2][2]

    def decode(codes: Tensor) -> Tensor:
        entries = model.quantize.get_codebook_entry(codes.flatten(), (*codes.shape, width))
        # Not `model.decode`, which would look up the entries a second time with `lookup_from_codebook`.
        hidden = model.post_quant_conv(entries)
        return model.decoder(hidden, entries if config.norm_type == "spatial" else None)

    return config.num_vq_embeddings, 2 ** (len(config.block_out_channels) - 1), encode, decode


def _chameleon(model: Any) -> _Parts:
    downsampling = 2 ** (len(model.config.channel_multiplier) - 1)
    return model.config.num_embeddings, downsampling, lambda pixels: model.encode(pixels).image_tokens, None


def _janus(model: Any) -> _Parts:
    codebook_size, downsampling, encode, _ = _chameleon(model)

    def decode(codes: Tensor) -> Tensor:
        # The model's `decode` only takes images of the size in its configuration.
        entries = model.quantize.embedding(codes)
        # As in `get_codebook_entry`: the codebook is normalised to the unit sphere.
        entries = nn.functional.normalize(entries, p=2, dim=-1).permute(0, 3, 1, 2).contiguous()
        return model.decoder(model.post_quant_conv(entries))

    return codebook_size, downsampling, encode, decode


def _emu3(model: Any) -> _Parts:
    def encode(pixels: Tensor) -> Tensor:
        sizes = torch.tensor([pixels.shape[-2:]] * len(pixels))
        return torch.stack(model.encode(pixels, sizes).image_tokens)

    return model.config.codebook_size, model.spatial_scale_factor, encode, model.decode


_ADAPTERS: dict[type[nn.Module], Callable[[Any], _Parts]] = {
    VQModel: _vq_model,
    ChameleonVQVAE: _chameleon,
    JanusVQVAE: _janus,
    Emu3VQVAE: _emu3,
}
CLASSES = {model_class.__name__: model_class for model_class in _ADAPTERS}
