"""Defaults of evaluations. The options of commands use them, so nothing here loads PyTorch."""

import os
from typing import Literal

from transfusion_mot.cores import usable_cores

FeatureChoice = Literal["auto", "inception", "legacy", "legacy_tensorflow", "dinov2", "clip", "efficientnet"]

DEFAULT_DINOV2 = "vit_large_patch14_dinov2.lvd142m"
# The CLIP model of the CMMD paper.
DEFAULT_CMMD_CLIP = "openai/clip-vit-large-patch14-336"
DEFAULT_CLIP = "openai/clip-vit-large-patch14"
# GenEval's detector, in transformers.
DEFAULT_DETECTOR = "facebook/mask2former-swin-small-coco-instance"
# Prefix that some published code puts before every prompt of a CLIP score.
CLIP_PREFIX = "A photo depicts "
# Timesteps at which diffusion losses are measured.
TIMESTEP_BINS = 10


def default_num_workers() -> int:
    """Images decoded at a time: this process's share of the host's cores, at most 16."""
    # Environment variable of torchrun and `accelerate launch` with the number of processes on this host.
    shared_by = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(16, usable_cores() // shared_by))
