"""Environment variables of accelerate that could contradict a run's configuration.

accelerate's launcher sets them from its options and its configuration file; a shell may also set some.
`make_accelerator` passes some of them on. The others must have one of the harmless values listed here; other values are
refused.
"""

import os
from typing import NamedTuple

from transfusion_mot.config import TrainingConfig
from transfusion_mot.errors import UserError
from transfusion_mot.models.transfusion import TransfusionMoT


class _Setting(NamedTuple):
    """A variable, its harmless values (in lower case), what to do about other values, and its default."""

    variable: str
    harmless: tuple[str, ...]
    instead: str
    default: str = ""


# accelerate's spellings of "no"; an empty value means unset.
_OFF = ("0", "n", "no", "f", "false", "off")
_SHARD = "launch with configs/accelerate/fsdp2.yaml to shard a model"
_CHECKPOINTING = "use training.activation_checkpointing instead"
_SETTINGS = (
    _Setting("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", ("1",), "training.microbatch_rows accumulates instead"),
    _Setting("ACCELERATE_DYNAMO_BACKEND", _OFF, "training.compile compiles instead"),
    _Setting("ACCELERATE_FP8_BACKEND", _OFF, "use training.float8 instead"),
    _Setting("ACCELERATE_USE_DEEPSPEED", _OFF, _SHARD),
    _Setting("ACCELERATE_USE_MEGATRON_LM", _OFF, _SHARD),
    _Setting("ACCELERATE_TORCH_DEVICE", ("cpu",), "choose GPUs with CUDA_VISIBLE_DEVICES"),
    _Setting("ACCELERATE_USE_SAGEMAKER", _OFF, "launch on the machines themselves"),
)
_WITHOUT_FSDP = (_Setting("PARALLELISM_CONFIG_DP_SHARD_SIZE", ("1",), _SHARD),)
_WITH_FSDP = (
    _Setting("FSDP_VERSION", ("2",), "train.py needs fsdp_version 2", "1"),
    _Setting("FSDP_OFFLOAD_PARAMS", _OFF, "train.py keeps weights on the device"),
    _Setting("FSDP_ACTIVATION_CHECKPOINTING", _OFF, _CHECKPOINTING),
    _Setting("FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD", _OFF, _CHECKPOINTING),
    _Setting("FSDP_AUTO_WRAP_POLICY", ("transformer_based_wrap",), "train.py shards block by block"),
    _Setting(
        "FSDP_TRANSFORMER_CLS_TO_WRAP",
        tuple(name.lower() for name in TransfusionMoT._no_split_modules),
        "train.py shards block by block",
    ),
    _Setting("FSDP_IGNORED_MODULES", (), "train.py shards all weights"),
    # FSDP version 2 has another name for it.
    _Setting("FSDP_SHARDING_STRATEGY", ("full_shard", "1"), "use fsdp_reshard_after_forward instead"),
    _Setting("FSDP_FORWARD_PREFETCH", _OFF, "FSDP2 fetches ahead by itself"),
)


def uses_fsdp() -> bool:
    """Whether the launcher asks for sharded parameters."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() not in ("", *_OFF)


def check_launcher(training: TrainingConfig) -> None:
    """Refuse variables that would override the configuration or be ignored.

    Raises:
        UserError: Names the variable, its value and what to use instead.
    """
    precision = _Setting(
        "ACCELERATE_MIXED_PRECISION",
        # The launcher always sets its default.
        ("no", training.mixed_precision),
        f"training.mixed_precision is {training.mixed_precision}: give both the same value",
    )
    for setting in (precision, *_SETTINGS, *(_WITH_FSDP if uses_fsdp() else _WITHOUT_FSDP)):
        given = os.environ.get(setting.variable) or setting.default
        if given and given.lower() not in setting.harmless:
            raise UserError(
                f"{setting.variable} is {given} (set by accelerate's launcher, its configuration file or the shell): "
                f"{setting.instead}"
            )
