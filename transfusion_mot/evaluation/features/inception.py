"""The Inception-v3 of FID: two published files of weights, each usable with all three ways to resize."""

import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from transfusion_mot.errors import UserError
from transfusion_mot.evaluation.features.network import FeatureNetwork, clean_resize, legacy_resize, tensorflow_resize
from transfusion_mot.evaluation.weights import file_sha256

InceptionChoice = Literal["inception", "legacy", "legacy_tensorflow"]


@dataclass(frozen=True)
class PublishedFile:
    """A published file of weights.

    Attributes:
        url: Its address.
        sha256: Its hash, or the first digits if no more are published.
        option: Command-line option that takes its local path.
    """

    url: str
    sha256: str
    option: str

    @property
    def name(self) -> str:
        """The file's name."""
        return self.url.rsplit("/", 1)[1]

    @property
    def cached(self) -> Path:
        """Its path in the cache of torch.hub."""
        return Path(torch.hub.get_dir()) / "checkpoints" / self.name


# From StyleGAN2-ADA, used by clean-fid, as TorchScript.
TORCHSCRIPT = PublishedFile(
    "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt",
    "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
    "--inception-weights",
)
# From pytorch-fid, used by torch-fidelity and torchmetrics under another name, as a state dict.
STATE_DICT = PublishedFile(
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
    "6726825d",
    "--legacy-weights",
)


@dataclass(frozen=True)
class _Mode:
    """A way to resize, by its name in clean-fid.

    Attributes:
        names: Name of the network, and the text in brackets after FID and KID.
        resize: Description.
        prepare: Images `uint8 [B, H, W, 3]` => `float32 [B, 3, 299, 299]`, 0 to 255.
        scale: 0 to 255 => input of the network.
        own: The file that its publishers use.
    """

    names: tuple[str, str]
    resize: str
    prepare: Callable[[Tensor], Tensor]
    scale: Callable[[Tensor], Tensor]
    own: PublishedFile


def _tensorflow_scale(images: Tensor) -> Tensor:
    return (images - 128) / 128


def _pytorch_scale(images: Tensor) -> Tensor:
    return 2 * (images / 255) - 1


_MODES: dict[InceptionChoice, _Mode] = {
    "inception": _Mode(
        ("Inception", "clean-fid"),
        "299 px, bicubic antialiased, float (clean-fid)",
        partial(clean_resize, size=299),
        _tensorflow_scale,
        TORCHSCRIPT,
    ),
    "legacy": _Mode(
        ("Inception, legacy", "legacy_pytorch"),
        "299 px, bilinear without antialiasing (clean-fid legacy_pytorch, pytorch-fid)",
        legacy_resize,
        _pytorch_scale,
        STATE_DICT,
    ),
    "legacy_tensorflow": _Mode(
        ("Inception, legacy_tensorflow", "legacy_tensorflow"),
        "299 px, bilinear of TensorFlow 1 without antialiasing (clean-fid legacy_tensorflow, torch-fidelity)",
        tensorflow_resize,
        _tensorflow_scale,
        STATE_DICT,
    ),
}


class CannotFetch(UserError):
    """A published file is not cached and cannot be downloaded."""


def find_inception(
    choice: InceptionChoice, inception_weights: str | Path | None, legacy_weights: str | Path | None
) -> Path:
    """The weights of a mode: its own file or the other one, given, cached by torch.hub, or downloaded into its cache.

    Raises:
        CannotFetch: There is none.
    """
    given = {TORCHSCRIPT: inception_weights, STATE_DICT: legacy_weights}
    own = _MODES[choice].own
    ordered = sorted(given, key=lambda file: file != own)
    for file in ordered:
        if (path := given[file]) is not None:
            return Path(path)
    for file in ordered:
        if file.cached.exists():
            return file.cached
    try:
        # Without a network the download itself would wait for minutes.
        urllib.request.urlopen(own.url, timeout=10).close()
        own.cached.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(own.url, str(own.cached), hash_prefix=own.sha256)
    except (OSError, RuntimeError) as error:
        raise CannotFetch(
            f"{own.name} is not cached and cannot be downloaded from {own.url} ({error}); download it elsewhere and "
            f"give its path with {own.option}"
        ) from None
    return own.cached


def load_inception(
    choice: InceptionChoice, path: Path, device: torch.device, *, other_weights: bool = False
) -> FeatureNetwork:
    """FID's network with the resize of a mode.

    Args:
        choice: The mode: `inception` is clean-fid's `clean`, `legacy` its `legacy_pytorch`.
        path: Either published file, or with `other_weights` another file of the same layout.
        device: Device of the network.
        other_weights: Whether `path` may be another file; its metrics are not called FID.

    Raises:
        UserError: The file is not published, or cannot be read.
    """
    digest = file_sha256(path)
    is_published = any(digest.startswith(file.sha256) for file in (TORCHSCRIPT, STATE_DICT))
    if not is_published and not other_weights:
        raise UserError(
            f"'{path}' is not the Inception of FID: its SHA-256 is {digest[:12]}..., and those of the published files "
            f"begin with {TORCHSCRIPT.sha256[:12]} ({TORCHSCRIPT.name}) and {STATE_DICT.sha256} ({STATE_DICT.name}); "
            "give one of them, or allow other weights with --other-weights, whose numbers are not called FID"
        )
    mode = _MODES[choice]
    is_torchscript = _is_torchscript(path)
    try:
        network = torch.jit.load(path, map_location="cpu").layers if is_torchscript else _load_state_dict(path)
    # Parsers of damaged files raise any error.
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"'{path}' does not hold an Inception of FID's layout: {reason}") from None
    kinds = ("FID", "KID") if is_published else ("FD-Inception of other weights", "KD-Inception of other weights")
    return FeatureNetwork(
        name=mode.names[0] if is_published else f"{mode.names[0]}, other weights",
        frechet_name=f"{kinds[0]} ({mode.names[1]})",
        kernel_name=f"{kinds[1]} ({mode.names[1]})",
        description=f"Inception-v3{'' if is_torchscript else ' of pytorch-fid'}, 2048 pooled",
        weights=f"sha256 {digest[:12]}",
        resize=mode.resize,
        prepare=mode.prepare,
        module=_Inception(network, mode.scale).to(device).eval().requires_grad_(False),
        num_features=2048,
        device=device,
    )


class _Inception(nn.Module):
    """Pooled features of images with values from 0 to 255."""

    def __init__(self, network: nn.Module, scale: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.network, self.scale = network, scale

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.network(self.scale(images)).flatten(1)
        return features


def _is_torchscript(path: Path) -> bool:
    """Whether the file is an archive with code, which a state dict is not."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


def _load_state_dict(path: Path) -> nn.Module:
    network = legacy_architecture()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    network.dropout = network.fc = nn.Identity()
    return network


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
