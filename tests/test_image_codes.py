"""Image tokenizers behind one interface, against their own reconstructions."""

import pytest
import torch
from diffusers import VQModel
from transformers import (
    ChameleonVQVAE,
    ChameleonVQVAEConfig,
    Emu3VQVAE,
    Emu3VQVAEConfig,
    JanusVQVAE,
    JanusVQVAEConfig,
)

from transfusion_mot.codecs.image_codes import ImageCodes
from transfusion_mot.errors import UserError

PIXELS = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def vq_model(**changes):
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    sizes = {"block_out_channels": (8, 8), "latent_channels": 4, "num_vq_embeddings": 24, "norm_num_groups": 4}
    return VQModel(**(blocks | sizes | changes))


def of_transformers(model_class, config_class, **changes):
    sizes = {"embed_dim": 4, "latent_channels": 4, "base_channels": 32, "channel_multiplier": [1, 1]}
    sizes |= {"num_res_blocks": 1, "attn_resolutions": [], "resolution": 16} | changes
    return model_class(config_class(**sizes))


def janus():
    return of_transformers(JanusVQVAE, JanusVQVAEConfig, num_embeddings=24, num_patches=8, image_size=16)


def chameleon():
    return of_transformers(ChameleonVQVAE, ChameleonVQVAEConfig, num_embeddings=24)


def emu3():
    return of_transformers(Emu3VQVAE, Emu3VQVAEConfig, codebook_size=24, temporal_downsample_factor=1, hidden_size=32)


def spread(model):
    """A codebook of places that its own encoder reaches, so that there are many codes in use."""
    model = model.eval()
    reached = []
    hook = model.quantize.register_forward_pre_hook(lambda _, inputs: reached.append(inputs[0]))
    with torch.no_grad():
        if isinstance(model, Emu3VQVAE):
            model.encode(PIXELS, torch.tensor([[16, 16]] * 3))
            places = reached[0].permute(0, 1, 3, 4, 2)
        else:
            latents = model.encode(PIXELS)
            if isinstance(model, VQModel):
                model.quantize(latents.latents)
            places = reached[0].permute(0, 2, 3, 1)
        places = places.flatten(0, -2)
        model.quantize.embedding.weight.copy_(places[:: len(places) // 24][:24])
    hook.remove()
    return model


@pytest.mark.parametrize("build", [vq_model, lambda: vq_model(vq_embed_dim=3, lookup_from_codebook=True)])
@torch.no_grad()
def test_vq_model_equals_its_own_reconstruction(build) -> None:
    model = spread(build())
    codec = ImageCodes(model)
    codes = codec.encode(PIXELS)
    assert codes.shape == (3, 8, 8)
    assert codec.codebook_size == 24
    assert len(codes.unique()) > 3
    expected = model.decode(model.encode(PIXELS).latents).sample.clamp(-1, 1)
    torch.testing.assert_close(codec.decode(codes), expected)


@torch.no_grad()
def test_janus_equals_its_own_reconstruction_and_takes_other_sizes() -> None:
    model = spread(janus())
    codec = ImageCodes(model)
    codes = codec.encode(PIXELS)
    assert codes.shape == (3, 8, 8)
    torch.testing.assert_close(codec.decode(codes), model.decode(codes.flatten(1)).clamp(-1, 1))
    wide = torch.cat([PIXELS, PIXELS], dim=-1)
    assert codec.decode(codec.encode(wide)).shape == wide.shape


@torch.no_grad()
def test_emu3_equals_its_own_reconstruction() -> None:
    model = spread(emu3())
    codec = ImageCodes(model)
    codes = codec.encode(PIXELS)
    own = model.encode(PIXELS, torch.tensor([[16, 16]] * 3)).image_tokens
    assert torch.equal(codes, torch.stack(own))
    torch.testing.assert_close(codec.decode(codes), model.decode(torch.stack(own)).clamp(-1, 1))


@torch.no_grad()
def test_chameleon_reads_images_and_says_that_it_cannot_paint() -> None:
    model = spread(chameleon())
    codec = ImageCodes(model)
    codes = codec.encode(PIXELS)
    assert torch.equal(codes.flatten(), model.encode(PIXELS).image_tokens.flatten())
    with pytest.raises(UserError, match="has no decoder"):
        codec.decode(codes)


@pytest.mark.parametrize("build", [vq_model, janus, chameleon, emu3])
def test_codes_do_not_depend_on_autocast_and_weights_decide_the_fingerprint(build) -> None:
    codec = ImageCodes(spread(build()))
    with torch.autocast("cpu", torch.bfloat16):
        codes = codec.encode(PIXELS)
    assert torch.equal(codes, codec.encode(PIXELS))
    other = ImageCodes(spread(build()))
    assert ImageCodes(codec.model).fingerprint == codec.fingerprint
    with torch.no_grad():
        other.model.quantize.embedding.weight[0] += 1
    assert other.fingerprint != codec.fingerprint
