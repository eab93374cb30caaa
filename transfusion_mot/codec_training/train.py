"""Training of an image codec: an `AutoencoderKL`, which gives latents, or a `VQModel`, which gives codes.

Both have the same encoder, decoder and losses, after Esser et al. 2021 (VQGAN) and Rombach et al. 2022, as in
Transfusion (Zhou et al. 2024), appendix A; they differ in the bottleneck.
"""

import json
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, VQModel
from torch import Tensor, nn
from tqdm import tqdm

from transfusion_mot.codec_training.audio import train_audio_codec
from transfusion_mot.codec_training.bottlenecks import Bottleneck, CodeBottleneck, GaussianBottleneck, codebook_use
from transfusion_mot.codec_training.images import augment, every_nth, measured, read_split, save_grid
from transfusion_mot.codec_training.losses import Objective
from transfusion_mot.codec_training.optimise import Parts, optimise
from transfusion_mot.codecs.autoencoder_kl import Autoencoder, set_normalisation
from transfusion_mot.codecs.base import ImageCodec
from transfusion_mot.codecs.image_codes import ImageCodes
from transfusion_mot.config import AutoencoderTrainingConfig, save_config
from transfusion_mot.data.images import ImageArray, to_pixels
from transfusion_mot.errors import UserError
from transfusion_mot.outputs import check_writable_folder

# Enough images for a mean PSNR with a standard error of about 0.1 dB.
_NUM_EVALUATED = 1024
# Length of the vectors for which a saved `VQModel` looks up codes. In half precision the length of a code is wrong by
# up to 0.05 %, which must not outweigh its direction.
_VECTOR_LENGTH = 8.0


def train_codec(config: AutoencoderTrainingConfig, device: torch.device) -> dict[str, Any]:
    """Train, save and evaluate a codec; all images are on the device.

    Returns:
        Content of `metrics.json`: sizes, times, the log of the losses, and results of the saved model on images: PSNR
        in dB, the mean over images in [0, 1]; for latents `latent_noise`, the mean posterior standard deviation of
        normalised latents; for codes `codebook_use`, the share of codes that the images use, and `perplexity`.

    Raises:
        UserError: The configuration is inconsistent, one side of the held-out split has no images, or the loss is not
            finite.
    """
    if config.kind == "audio_codes":
        return train_audio_codec(config, device)
    output_dir = Path(config.output_dir)
    check_writable_folder(output_dir, "output_dir")
    model = build(config).to(device)
    objective = Objective(config, device)
    train_images, _ = read_split(config.data, "train")
    held_out_images, held_out_captions = read_split(config.data, "held_out")
    if len(held_out_images) == 0:
        raise UserError(
            f"no image is held out of {len(train_images)}; raise data.held_out_fraction "
            f"(now {config.data.held_out_fraction}), or change data.split_seed"
        )
    output_dir.mkdir(parents=True, exist_ok=True)
    save_config(config, output_dir / "config.yaml")

    start = time.perf_counter()
    log = _optimise(model, objective, torch.as_tensor(train_images).to(device), config)
    seconds = time.perf_counter() - start

    if isinstance(model, VQModel):
        _set_vector_length(model, train_images, config.batch_size)
    if config.save_dtype == "float16":
        # Rounded first, so that the statistics are those of the saved weights.
        model.half().float()
    if isinstance(model, AutoencoderKL):
        set_normalisation(model, *_latent_statistics(Autoencoder(model), train_images, config.batch_size))
    (model.half() if config.save_dtype == "float16" else model).save_pretrained(output_dir)

    codec = _load(config, str(output_dir), device)
    evaluated = every_nth(held_out_images, _NUM_EVALUATED)
    psnr_train, _ = measured(codec, every_nth(train_images, _NUM_EVALUATED), config.batch_size)
    psnr, _ = measured(codec, evaluated, config.batch_size)
    save_grid(codec, held_out_images, held_out_captions, output_dir / "reconstructions.png")
    metrics = {
        "psnr_held_out": round(float(psnr.mean()), 2),
        "psnr_train": round(float(psnr_train.mean()), 2),
        **_of_the_bottleneck(codec, evaluated, config.batch_size),
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "weight_bytes": (output_dir / "diffusion_pytorch_model.safetensors").stat().st_size,
        "num_train_images": len(train_images),
        "num_held_out_images": len(held_out_images),
        "num_steps": config.num_steps,
        "training_seconds": round(seconds, 1),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "log": log,
    }
    (output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2))
    return metrics


def build(config: AutoencoderTrainingConfig) -> AutoencoderKL | VQModel:
    """The model to train, with its initial weights.

    Raises:
        UserError: Sizes do not match each other or those of `init_from`.
    """
    widths = config.block_out_channels
    factor = 2 ** (len(widths) - 1)
    if config.data.image_size % factor:
        raise UserError(
            f"data.image_size {config.data.image_size} must be a multiple of {factor}, the downsampling factor of "
            f"{len(widths)} block_out_channels"
        )
    if any(width % config.norm_num_groups for width in widths):
        raise UserError(f"norm_num_groups {config.norm_num_groups} must divide all of block_out_channels {widths}")
    sizes: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
        "block_out_channels": tuple(widths),
        "layers_per_block": config.layers_per_block,
        "latent_channels": config.latent_channels,
        "norm_num_groups": config.norm_num_groups,
        "mid_block_add_attention": config.mid_block_attention,
        "sample_size": config.data.image_size,
    }
    torch.manual_seed(config.seed)
    model: AutoencoderKL | VQModel
    if config.kind == "codes":
        model = VQModel(num_vq_embeddings=config.codebook_size, **sizes)
        # All directions are equally likely.
        nn.init.normal_(model.quantize.embedding.weight)
    else:
        # 1x1 convolutions next to other convolutions add nothing; without them encoder and decoder are the whole model.
        model = AutoencoderKL(use_quant_conv=False, use_post_quant_conv=False, **sizes)
    if config.init_from is not None:
        begun = _model_of(_load(config, config.init_from, torch.device("cpu")))
        try:
            model.load_state_dict(begun.state_dict())
        except RuntimeError as error:
            raise UserError(
                f"init_from '{config.init_from}' has other sizes than the configuration "
                f"({' '.join(str(error).split())[:300]}); give latent_channels, block_out_channels, layers_per_block "
                "and mid_block_attention as in its config.json, and codebook_size as num_vq_embeddings there"
            ) from None
    if isinstance(model, AutoencoderKL):
        # Raw latents until their statistics are known.
        set_normalisation(model, [0.0] * config.latent_channels, [1.0] * config.latent_channels)
    return model


def _load(config: AutoencoderTrainingConfig, path: str, device: torch.device) -> Autoencoder | ImageCodes:
    codec = ImageCodes.load(path, device) if config.kind == "codes" else Autoencoder.load(path, device)
    if isinstance(codec, ImageCodes) and not isinstance(codec.model, VQModel):
        raise UserError(f"init_from '{path}' is of class {type(codec.model).__name__}; a VQModel is needed")
    return codec


def _model_of(codec: Autoencoder | ImageCodes) -> nn.Module:
    return codec.vae if isinstance(codec, Autoencoder) else codec.model


def _bottleneck(model: AutoencoderKL | VQModel, config: AutoencoderTrainingConfig) -> Bottleneck:
    if isinstance(model, VQModel):
        return CodeBottleneck(model, config.commitment_weight, is_new=config.init_from is None)
    return GaussianBottleneck(model, 3 * config.data.image_size**2, config.kl_weight)


def _optimise(
    model: AutoencoderKL | VQModel, objective: Objective, images_uint8: Tensor, config: AutoencoderTrainingConfig
) -> list[dict[str, float]]:
    device = images_uint8.device
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
        model.to(memory_format=torch.channels_last)

    def draw(generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(images_uint8), (config.batch_size,), device=device, generator=generator)
        return augment(to_pixels(images_uint8[chosen]), generator)

    decoder = model.decoder
    parts = Parts(model.encoder, _bottleneck(model, config), _DecoderWithoutLast(decoder), decoder.conv_out)
    return optimise(model, parts, objective, draw, config)


class _DecoderWithoutLast(nn.Module):
    """A decoder of diffusers without its last layer."""

    def __init__(self, decoder: Any) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, latents: Tensor) -> Tensor:
        """Latents [B, C, Y, X] => hidden [B, width, H, W], the input of `conv_out`."""
        hidden = self.decoder.mid_block(self.decoder.conv_in(latents))
        for block in self.decoder.up_blocks:
            hidden = block(hidden)
        return self.decoder.conv_act(self.decoder.conv_norm_out(hidden))


def _latent_statistics(
    autoencoder: Autoencoder, images_uint8: ImageArray, batch_size: int
) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel of sampled latents (the posterior's variance counts)."""
    count = 0
    first = second = torch.zeros(autoencoder.latent_channels, dtype=torch.float64)
    for start in tqdm(range(0, len(images_uint8), batch_size), desc="measuring the latents", unit="batch"):
        pixels = to_pixels(images_uint8[start : start + batch_size]).to(autoencoder.vae.device)
        mean, std = (part.double().cpu() for part in autoencoder.encode(pixels))
        count += mean[:, 0].numel()
        first = first + mean.sum(dim=(0, 2, 3))
        second = second + (mean**2 + std**2).sum(dim=(0, 2, 3))
    mean = first / count
    return mean.tolist(), (second / count - mean**2).sqrt().tolist()


@torch.no_grad()
def _set_vector_length(model: VQModel, images_uint8: ImageArray, batch_size: int) -> None:
    """Scale the vectors before the look-up to a mean length of `_VECTOR_LENGTH`; the nearest code stays the same."""
    pixels = to_pixels(every_nth(images_uint8, batch_size)).to(model.device)
    scale = _VECTOR_LENGTH / model.encode(pixels).latents.norm(dim=1).mean()
    for parameter in model.quant_conv.parameters():
        parameter.mul_(scale)


def _of_the_bottleneck(codec: ImageCodec, images_uint8: ImageArray, batch_size: int) -> dict[str, float]:
    """Statistics of the bottleneck on images: the noise of latents or the use of codes."""
    batches = [to_pixels(images_uint8[start : start + batch_size]) for start in range(0, len(images_uint8), batch_size)]
    if codec.kind == "latents":
        deviations = [codec.encode(pixels.to(codec.device))[1].mean(dim=(1, 2, 3)) for pixels in batches]
        return {"latent_noise": round(float(torch.cat(deviations).mean()), 5)}
    codes = torch.cat([codec.encode(pixels.to(codec.device)).flatten() for pixels in batches])
    use, perplexity = codebook_use(torch.bincount(codes, minlength=codec.codebook_size))
    return {"codebook_use": round(use, 4), "perplexity": round(perplexity, 1)}
