"""Image tokenizers with one interface, against the tokenizers' own reconstructions."""

import json

import pytest
import torch
from diffusers import AutoencoderKL, VQModel
from safetensors.torch import load_file, save_file
from transformers import (
    ChameleonVQVAE,
    ChameleonVQVAEConfig,
    Emu3VQVAE,
    Emu3VQVAEConfig,
    JanusVQVAE,
    JanusVQVAEConfig,
)

from transfusion_mot.codecs.autoencoder_kl import Autoencoder
from transfusion_mot.codecs.base import CodeCodec, LatentCodec
from transfusion_mot.codecs.image_codes import CLASSES, ImageCodes
from transfusion_mot.codecs.load import load_codec
from transfusion_mot.config import CodecConfig, DataConfig, ModelConfig
from transfusion_mot.data.encoding import check_media_sizes
from transfusion_mot.errors import UserError

PIXELS = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}


def vq_model(**changes):
    sizes = {"block_out_channels": (8, 8), "latent_channels": 4, "num_vq_embeddings": 24, "norm_num_groups": 4}
    return VQModel(**(BLOCKS | sizes | changes))


def of_transformers(model_class, config_class, **changes):
    sizes = {"embed_dim": 4, "latent_channels": 4, "base_channels": 32, "channel_multiplier": [1, 1]}
    sizes |= {"num_res_blocks": 1, "attn_resolutions": [], "resolution": 16} | changes
    return model_class(config_class(**sizes))


def janus():
    return of_transformers(JanusVQVAE, JanusVQVAEConfig, num_embeddings=24, num_patches=8, image_size=16)


def chameleon():
    return of_transformers(ChameleonVQVAE, ChameleonVQVAEConfig, num_embeddings=24)


def emu3(temporal=1):
    changes = {"codebook_size": 24, "temporal_downsample_factor": temporal, "hidden_size": 32}
    return of_transformers(Emu3VQVAE, Emu3VQVAEConfig, **changes)


def spread(model):
    """A codebook of outputs of its own encoder, so that many codes are used."""
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


@pytest.mark.parametrize("temporal", [1, 4])
@torch.no_grad()
def test_emu3_equals_its_own_reconstruction(temporal) -> None:
    """Its own default, 4, repeats an image as frames of a video."""
    model = spread(emu3(temporal))
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
@pytest.mark.parametrize(("height", "width"), [(16, 32), (32, 16)])
@torch.no_grad()
def test_every_code_is_the_entry_next_to_the_latent_at_its_place(build, height, width) -> None:
    codec = ImageCodes(spread(build()))
    given = []
    hook = codec.model.quantize.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    codes = codec.encode(PIXELS.repeat(1, 1, height // 16, width // 16))
    hook.remove()
    latents = given[0].flatten(0, 1) if given[0].ndim == 5 else given[0]
    assert codes.shape == (3, height // 2, width // 2)
    for image, y, x in ((0, 0, 0), (1, 2, 3), (2, 5, 7), (0, height // 2 - 1, 1), (1, 0, width // 2 - 1)):
        distances = (codec.model.quantize.embedding.weight - latents[image, :, y, x]).square().sum(dim=1)
        assert codes[image, y, x] == distances.argmin()


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


# --- loading -------------------------------------------------------------------------------------------------------


def kl():
    sizes = {"block_out_channels": (8, 8), "latent_channels": 4, "norm_num_groups": 4}
    return AutoencoderKL(**BLOCKS, **sizes)


@pytest.mark.parametrize("build", [vq_model, janus, chameleon, emu3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_codec_is_loaded_by_its_class_in_float32(tmp_path, build, dtype) -> None:
    original = spread(build()).to(dtype)
    original.save_pretrained(tmp_path)
    codec = load_codec(CodecConfig(str(tmp_path)), "next_token", "cpu")
    assert isinstance(codec, CodeCodec)
    assert type(codec.model).__name__ in CLASSES
    assert type(codec.model) is type(original)
    assert {parameter.dtype for parameter in codec.model.parameters()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in codec.model.parameters())
    expected = ImageCodes(original)
    assert codec.fingerprint == expected.fingerprint, "of another number format, too"
    assert torch.equal(codec.encode(PIXELS), expected.encode(PIXELS))


def test_the_objective_decides_what_a_codec_must_be(tmp_path) -> None:
    kl().save_pretrained(tmp_path / "kl")
    vq_model().save_pretrained(tmp_path / "vq")
    latents, codes = (CodecConfig(str(tmp_path / name)) for name in ("kl", "vq"))
    assert isinstance(load_codec(latents, "diffusion", "cpu"), LatentCodec)
    assert isinstance(load_codec(latents, "diffusion", "cpu"), Autoencoder)
    with pytest.raises(
        UserError, match=r"is of class AutoencoderKL, .*next_token needs VQModel, .*objective to diffusion"
    ):
        load_codec(latents, "next_token", "cpu")
    with pytest.raises(
        UserError, match=r"is of class VQModel, .*diffusion needs AutoencoderKL; .*objective to next_token"
    ):
        load_codec(codes, "diffusion", "cpu")
    with pytest.raises(UserError, match=r"is of class AutoencoderKL; one of VQModel, .* is needed"):
        ImageCodes.load(latents.path, "cpu")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"architectures": ["ChameleonForConditionalGeneration"]}, "save its image tokenizer, `vqmodel`"),
        ({"_class_name": "UNet2DModel"}, "is of class UNet2DModel, but the objective next_token needs VQModel,"),
        ({"model_type": "bert"}, "no codec at"),
        ({"architectures": []}, "no codec at"),
        ([], "no codec at"),
    ],
)
def test_folders_of_something_else_are_refused(tmp_path, config, words) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=words):
        load_codec(CodecConfig(str(tmp_path)), "next_token", "cpu")


@pytest.mark.parametrize("build", [vq_model, emu3])
def test_missing_weights_are_not_left_at_random(tmp_path, build) -> None:
    build().save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    weights = load_file(file)
    del weights["quantize.embedding.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"has no weights for quantize\.embedding\.weight"):
        load_codec(CodecConfig(str(tmp_path)), "next_token", "cpu")


def test_images_must_divide_into_patches_and_codes() -> None:
    codecs = {"image": Autoencoder(kl()), "sketch": ImageCodes(vq_model())}
    modalities = ModelConfig().modalities
    model = ModelConfig(modalities=modalities | {"sketch": type(modalities["text"])("text")})
    slots = {"text": 64, "image": 4, "sketch": 82}
    check_media_sizes(DataConfig(image_size=16, slots=slots), codecs, model)
    with pytest.raises(
        UserError, match=r"data\.slots\.sketch is 64, but an image of 16 x 16 pixels takes 65 slots as codes"
    ):
        check_media_sizes(DataConfig(image_size=16, slots=slots | {"sketch": 64}), codecs, model)
    # Patches of two by two latent pixels, each of two by two pixels.
    with pytest.raises(UserError, match=r"data\.image_size is 18; it must be a multiple of 4 pixels, a patch's side"):
        check_media_sizes(DataConfig(image_size=18), codecs, model)
    check_media_sizes(DataConfig(image_size=18, slots=slots), {"sketch": codecs["sketch"]}, model)
    with pytest.raises(UserError, match=r"data\.buckets is 15; it must be a multiple of 2 pixels, a code's side"):
        check_media_sizes(DataConfig(buckets=[[16, 15]]), {"sketch": codecs["sketch"]}, model)
