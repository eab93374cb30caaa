"""Training of the image autoencoder: L1, KL and, if asked for, LPIPS and a patch discriminator.

After Esser et al. 2021 (VQGAN) and Rombach et al. 2022, as used in Transfusion (Zhou et al. 2024), appendix A.
"""

import dataclasses
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from torch import nn
from tqdm import tqdm

from transfusion_mot.codecs.autoencoder_kl import Autoencoder, set_normalisation
from transfusion_mot.config import AutoencoderTrainingConfig, DataConfig, parse_config, save_config
from transfusion_mot.data.images import ImageArray, grid, to_pil, to_pixels
from transfusion_mot.data.sources.base import CaptionedImages, SkippedItems, Split, read_images
from transfusion_mot.data.sources.open import open_source
from transfusion_mot.errors import UserError
from transfusion_mot.files import check_writable_folder

_LOG_EVERY = 100
_READ_AT_ONCE = 256
# Enough images for a mean PSNR with a standard error of about 0.1 dB.
_NUM_EVALUATED = 1024
_NUM_GRID_PAIRS = 16
_MAX_GRAD_NORM = 1.0


def main() -> None:
    """Train an autoencoder and write it, its metrics and a grid of reconstructions into `output_dir`."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    config = parse_config(AutoencoderTrainingConfig, sys.argv[1:], "Train an image autoencoder (AutoencoderKL).")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    metrics = train_autoencoder(config, device)
    print(json.dumps({key: value for key, value in metrics.items() if key != "log"}, indent=2))


def train_autoencoder(config: AutoencoderTrainingConfig, device: torch.device) -> dict[str, Any]:
    """Train, save and evaluate an autoencoder; all images are kept on the device.

    Returns:
        What is written as `metrics.json`: sizes, times, the log of the losses, and of what `Autoencoder.load` makes of
        the saved files: PSNR in dB, the mean over images in [0, 1], and `latent_noise`, the mean posterior standard
        deviation of normalised latents.

    Raises:
        UserError: The configuration does not fit together, there are no images on one side of the held-out split, or
            the loss stops being finite.
    """
    output_dir = Path(config.output_dir)
    check_writable_folder(output_dir, "output_dir")
    vae = _build(config).to(device)
    objective = _Objective(config, device)
    train_images, _ = _read_split(config.data, "train")
    held_out_images, held_out_captions = _read_split(config.data, "held_out")
    if len(held_out_images) == 0:
        raise UserError(
            f"no image is held out of {len(train_images)}; raise data.held_out_fraction "
            f"(now {config.data.held_out_fraction}), or change data.split_seed"
        )
    output_dir.mkdir(parents=True, exist_ok=True)
    save_config(config, output_dir / "config.yaml")

    start = time.perf_counter()
    log = _optimise(vae, objective, torch.as_tensor(train_images).to(device), config)
    seconds = time.perf_counter() - start

    if config.save_dtype == "float16":
        # Rounded first: the statistics are those of the weights as they will be read back.
        vae.half().float()
    set_normalisation(vae, *_latent_statistics(Autoencoder(vae), train_images, config.batch_size))
    (vae.half() if config.save_dtype == "float16" else vae).save_pretrained(output_dir)

    autoencoder = Autoencoder.load(str(output_dir), device)
    psnr_train, _, _ = _reconstruct(autoencoder, _every_nth(train_images, _NUM_EVALUATED), config.batch_size)
    psnr, _, latent_noise = _reconstruct(autoencoder, _every_nth(held_out_images, _NUM_EVALUATED), config.batch_size)
    _save_grid(autoencoder, held_out_images, held_out_captions, output_dir / "reconstructions.png")
    metrics = {
        "psnr_held_out": round(float(psnr.mean()), 2),
        "psnr_train": round(float(psnr_train.mean()), 2),
        "latent_noise": round(latent_noise, 5),
        "num_parameters": sum(parameter.numel() for parameter in autoencoder.vae.parameters()),
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


def _build(config: AutoencoderTrainingConfig) -> AutoencoderKL:
    widths = config.block_out_channels
    factor = 2 ** (len(widths) - 1)
    if config.data.image_size % factor:
        raise UserError(
            f"data.image_size {config.data.image_size} must be a multiple of {factor}, the downsampling factor of "
            f"{len(widths)} block_out_channels"
        )
    if any(width % config.norm_num_groups for width in widths):
        raise UserError(f"norm_num_groups {config.norm_num_groups} must divide all of block_out_channels {widths}")
    torch.manual_seed(config.seed)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=tuple(widths),
        layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels,
        norm_num_groups=config.norm_num_groups,
        mid_block_add_attention=config.mid_block_attention,
        sample_size=config.data.image_size,
        # 1x1 convolutions next to other convolutions add nothing; without them encoder and decoder are the whole model.
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    if config.init_from is not None:
        begun = Autoencoder.load(config.init_from, "cpu").vae
        try:
            vae.load_state_dict(begun.state_dict())
        except RuntimeError as error:
            raise UserError(
                f"init_from '{config.init_from}' has other sizes than the configuration "
                f"({' '.join(str(error).split())[:300]}); give latent_channels, block_out_channels, layers_per_block "
                "and mid_block_attention as in its config.json"
            ) from None
    # Raw latents, until their statistics are known.
    set_normalisation(vae, [0.0] * config.latent_channels, [1.0] * config.latent_channels)
    return vae


def _read_split(data: DataConfig, split: Split) -> tuple[ImageArray, list[str]]:
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
        with ThreadPoolExecutor(os.cpu_count()) as pool:
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


@dataclass
class _Losses:
    """Scalars of a step, on the device."""

    total: torch.Tensor
    l1: torch.Tensor
    kl: torch.Tensor


class _Objective:
    """The loss of the autoencoder; owns the networks that it needs besides it."""

    def __init__(self, config: AutoencoderTrainingConfig, device: torch.device) -> None:
        self.config = config
        self.perceptual_distance = _load_perceptual_distance(config, device) if config.perceptual_weight else None
        if config.gan_weight:
            self.discriminator = _discriminator().to(device)
            # Betas of VQGAN: momentum makes the two players circle each other.
            self.discriminator_optimizer = torch.optim.Adam(
                self.discriminator.parameters(), lr=config.lr, betas=(0.5, 0.9)
            )

    def __call__(
        self, pixels: torch.Tensor, reconstruction: torch.Tensor, kl: torch.Tensor, last_layer: nn.Parameter, step: int
    ) -> _Losses:
        """Losses of one batch. `kl` `[B]` is summed over an image; `last_layer` is the decoder's last weight."""
        l1 = F.l1_loss(reconstruction, pixels)
        # Divided by the size of an image: the total is L1 + kl_weight * KL, both summed, at the scale of a mean.
        kl = kl.mean() / pixels[0].numel()
        visible = l1
        if self.perceptual_distance is not None:
            visible = visible + self.config.perceptual_weight * self.perceptual_distance(reconstruction, pixels)
        total = visible + self.config.kl_weight * kl
        if self.config.gan_weight and step >= self.config.gan_start_step:
            self._train_discriminator(pixels, reconstruction.detach())
            adversarial = -self.discriminator(reconstruction).mean()
            # Esser et al. 2021, equation 7: both terms pull equally hard at the last layer.
            (pull,) = torch.autograd.grad(visible, last_layer, retain_graph=True)
            (adversarial_pull,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
            balance = (pull.norm() / (adversarial_pull.norm() + 1e-4)).clamp(max=1e4)
            total = total + self.config.gan_weight * balance * adversarial
        return _Losses(total, l1.detach(), kl.detach())

    def _train_discriminator(self, pixels: torch.Tensor, reconstruction: torch.Tensor) -> None:
        real, fake = self.discriminator(pixels), self.discriminator(reconstruction)
        hinge = 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())
        self.discriminator_optimizer.zero_grad()
        hinge.backward()
        self.discriminator_optimizer.step()


def _discriminator() -> nn.Module:
    """A patch discriminator (Isola et al. 2017) of 22 pixels' view: `pixels [B, 3, H, W]` => scores, one a patch."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 4, stride=2, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(64, 128, 4, stride=2, padding=1),
        # Not batch normalisation, which lets images of a batch see each other.
        nn.GroupNorm(8, 128),
        nn.LeakyReLU(0.2),
        nn.Conv2d(128, 1, 4, padding=1),
    )


def _load_perceptual_distance(
    config: AutoencoderTrainingConfig, device: torch.device
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """LPIPS (Zhang et al. 2018) with VGG16: its heads come with torchmetrics, the backbone from a local file."""
    # Imported here: few trainings need it.
    from torchmetrics.functional.image.lpips import _LPIPS

    path = config.perceptual_path
    if path is None or not Path(path).is_file():
        raise UserError(
            f"perceptual_weight {config.perceptual_weight} needs perceptual_path, a file with the weights of "
            f"torchvision's VGG16 (https://download.pytorch.org/models/vgg16-397923af.pth); got {path}"
        )
    network = _LPIPS(net="vgg", pnet_rand=True)
    weights = torch.load(path, map_location="cpu", weights_only=True)
    try:
        network.net.load_state_dict(
            {name: weights[f"features.{name.split('.', 1)[1]}"] for name in network.net.state_dict()}
        )
    except KeyError as error:
        raise UserError(f"perceptual_path '{path}' is not a state dict of torchvision's VGG16: no {error}") from None
    network = network.to(device)
    return lambda first, second: network(first, second).mean()


def _optimise(
    vae: AutoencoderKL, objective: _Objective, images_uint8: torch.Tensor, config: AutoencoderTrainingConfig
) -> list[dict[str, float]]:
    """Train `vae` in place; it ends with the averaged weights. Returns one entry every `_LOG_EVERY` steps."""
    device = images_uint8.device
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
        vae.to(memory_format=torch.channels_last)
    # The adaptive weight of the discriminator walks the graph twice, which compiled graphs refuse.
    compiled = config.compile and device.type == "cuda" and not config.gan_weight
    encoder: Callable[[torch.Tensor], torch.Tensor] = torch.compile(vae.encoder) if compiled else vae.encoder
    decoder: Callable[[torch.Tensor], torch.Tensor] = torch.compile(vae.decoder) if compiled else vae.decoder
    optimizer = torch.optim.AdamW(vae.parameters(), lr=config.lr, betas=(0.9, 0.99), fused=device.type == "cuda")
    schedule = get_cosine_schedule_with_warmup(optimizer, config.warmup_steps, config.num_steps)
    ema = EMAModel(vae.parameters(), decay=config.ema_decay, foreach=True)
    generator = torch.Generator(device).manual_seed(config.seed)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.mixed_precision == "bf16")

    log = []
    vae.train()
    progress = tqdm(range(config.num_steps), desc="training the autoencoder", unit="step", mininterval=1.0)
    for step in progress:
        chosen = torch.randint(len(images_uint8), (config.batch_size,), device=device, generator=generator)
        pixels = augment(to_pixels(images_uint8[chosen]), generator)
        with autocast:
            posterior = DiagonalGaussianDistribution(encoder(pixels).float())
            noise = torch.randn(posterior.mean.shape, device=device, generator=generator)
            reconstruction = decoder(posterior.mean + posterior.std * noise)
        losses = objective(pixels, reconstruction.float(), posterior.kl(), vae.decoder.conv_out.weight, step)
        optimizer.zero_grad()
        losses.total.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), _MAX_GRAD_NORM)
        optimizer.step()
        schedule.step()
        ema.step(vae.parameters())

        if (step + 1) % _LOG_EVERY == 0 or step + 1 == config.num_steps:
            entry = {"loss": losses.total.item(), "l1": losses.l1.item(), "kl": losses.kl.item()}
            if not np.isfinite(entry["loss"]):
                raise UserError(f"the loss is not finite at step {step + 1}; lower lr (now {config.lr})")
            log.append({"step": step + 1, **entry})
            progress.set_postfix(entry)
    ema.copy_to(vae.parameters())
    return log


def augment(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Vary drawings on white, `pixels` in [-1, 1] `[B, 3, H, W]`, H = W, without blurring them.

    - One of the eight symmetries of the square: strokes run in all directions in other drawings.
    - A shift of at most 1/16 of the size, white moving in: a detail meets every phase of the downsampling grid.
    - For half of the images other colours - channels exchanged, each brought closer to white by its own factor: a set
      of drawings has a palette, and the autoencoder must not learn that there are no others. White stays white.
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
    # Indexing around a slice puts the channels last in memory, as convolutions want them.
    return padded[image, :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


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


def _reconstruct(
    autoencoder: Autoencoder, images_uint8: ImageArray, batch_size: int
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Reconstruct images from the posterior mean.

    Returns:
        PSNR in dB of every image `[N]`, the reconstructions as `pixels` `[N, 3, H, W]`, and the mean posterior standard
        deviation.
    """
    values, reconstructions, noise = [], [], []
    for start in range(0, len(images_uint8), batch_size):
        pixels = to_pixels(images_uint8[start : start + batch_size]).to(autoencoder.vae.device)
        mean, std = autoencoder.encode(pixels)
        reconstruction = autoencoder.decode(mean)
        # Half, because the range of pixels is 2 and that of PSNR is 1; a perfect image counts as 100 dB.
        error = ((pixels - reconstruction) / 2).square().mean(dim=(1, 2, 3)).clamp(min=1e-10)
        values.append(-10 * error.log10())
        reconstructions.append(reconstruction)
        noise.append(std.mean(dim=(1, 2, 3)))
    return torch.cat(values).cpu(), torch.cat(reconstructions).cpu(), float(torch.cat(noise).mean())


def _every_nth(images_uint8: ImageArray, at_most: int) -> ImageArray:
    """At most that many images, spread evenly over the set."""
    return images_uint8[:: -(-len(images_uint8) // at_most)]


def _save_grid(autoencoder: Autoencoder, images_uint8: ImageArray, captions: list[str], path: Path) -> None:
    """Held-out originals, each with its reconstruction to the right."""
    chosen = list(range(0, len(images_uint8), -(-len(images_uint8) // _NUM_GRID_PAIRS)))
    values, reconstructions, _ = _reconstruct(autoencoder, images_uint8[chosen], len(chosen))
    originals = to_pil(to_pixels(images_uint8[chosen]))
    pairs = zip(originals, to_pil(reconstructions), strict=True)
    labels = zip((captions[index] for index in chosen), (f"{value:.1f} dB" for value in values.tolist()), strict=True)
    grid([image for pair in pairs for image in pair], [label for pair in labels for label in pair], 8).save(path)
