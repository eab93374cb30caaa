"""The Inception-v3 of FID, in the two files of weights that others publish."""

import urllib.request
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from transfusion_mot.errors import UserError
from transfusion_mot.evaluation.feature_network import FeatureNetwork, clean_resize, legacy_resize
from transfusion_mot.evaluation.weights import file_sha256

INCEPTION_FILE = "inception-2015-12-05.pt"
INCEPTION_URL = f"https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/{INCEPTION_FILE}"
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
LEGACY_FILE = "pt_inception-2015-12-05-6726825d.pth"
LEGACY_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{LEGACY_FILE}"
# Its publishers give the first digits, in the file's name.
LEGACY_SHA256 = "6726825d"


class CannotFetch(UserError):
    """A file that others publish is not here and cannot be downloaded."""


def inception_file(given: str | Path | None) -> Path:
    """The weights of clean-fid's mode `clean`: a local file, or one that is cached or downloaded.

    Raises:
        UserError: The file is another one; CannotFetch if there is none.
    """
    return _published_file(given, INCEPTION_URL, INCEPTION_SHA256, "--inception-weights")


def legacy_file(given: str | Path | None) -> Path:
    """The same of clean-fid's mode `legacy_pytorch`."""
    return _published_file(given, LEGACY_URL, LEGACY_SHA256, "--legacy-weights")


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
            raise CannotFetch(
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


def load_inception(path: Path, device: torch.device) -> FeatureNetwork:
    """Features of clean-fid's mode `clean`."""
    return FeatureNetwork(
        name="Inception",
        frechet_name="FID (clean-fid)",
        kernel_name="KID (clean-fid)",
        description="Inception-v3, 2048 pooled",
        weights=f"sha256 {file_sha256(path)[:12]}",
        resize="299 px, bicubic antialiased, float (clean-fid)",
        prepare=partial(clean_resize, size=299),
        module=_Inception(path).to(device).eval().requires_grad_(False),
        num_features=2048,
        device=device,
    )


def legacy_architecture() -> nn.Module:
    """pytorch-fid's Inception-v3, from clean-fid's blocks, without trained weights."""
    from cleanfid import inception_pytorch as blocks
    from torchvision.models import inception_v3

    network: nn.Module = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
    network.Mixed_5b = blocks.FIDInceptionA(192, pool_features=32)
    network.Mixed_5c = blocks.FIDInceptionA(256, pool_features=64)
    network.Mixed_5d = blocks.FIDInceptionA(288, pool_features=64)
    network.Mixed_6b = blocks.FIDInceptionC(768, channels_7x7=128)
    network.Mixed_6c = blocks.FIDInceptionC(768, channels_7x7=160)
    network.Mixed_6d = blocks.FIDInceptionC(768, channels_7x7=160)
    network.Mixed_6e = blocks.FIDInceptionC(768, channels_7x7=192)
    network.Mixed_7b = blocks.FIDInceptionE_1(1280)
    network.Mixed_7c = blocks.FIDInceptionE_2(2048)
    return network


class _LegacyInception(nn.Module):
    """Its pooled features; inputs are brought to [-1, 1]."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        network = legacy_architecture()
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        network.dropout = network.fc = nn.Identity()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(2 * (images / 255) - 1)


def load_legacy(path: Path, device: torch.device) -> FeatureNetwork:
    """Features of clean-fid's mode `legacy_pytorch`, and so of pytorch-fid."""
    return FeatureNetwork(
        name="Inception, legacy",
        frechet_name="FID (legacy_pytorch)",
        kernel_name="KID (legacy_pytorch)",
        description="Inception-v3 of pytorch-fid, 2048 pooled",
        weights=f"sha256 {file_sha256(path)[:12]}",
        resize="299 px, bilinear without antialiasing (clean-fid legacy_pytorch, pytorch-fid)",
        prepare=legacy_resize,
        module=_LegacyInception(path).to(device).eval().requires_grad_(False),
        num_features=2048,
        device=device,
    )
