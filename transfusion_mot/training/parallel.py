"""accelerate set-up for one device, DDP or FSDP2, and placement of the model."""

import os
import warnings
from datetime import timedelta
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    fsdp2_prepare_model,
    parse_flag_from_env,
)
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from transfusion_mot.config import TrainingConfig
from transfusion_mot.errors import UserError
from transfusion_mot.models.transfusion import TransfusionMoT
from transfusion_mot.training.launcher import check_launcher, uses_fsdp

# Timeouts. Before training, ranks wait while the first one reads the sources and others encode more images than they.
# In training they wait for the first one's snapshots and samples at most; a rank that is later hangs.
_PREPARING = timedelta(hours=12)
_TRAINING = timedelta(minutes=30)

# Size of DDP's gradient buckets: 25 MB, its default, or for large models a share. With 5.8 GB, 200 MB at a time made a
# step on two H200 0.9 and 2.1 % shorter than 25 (docs/scaling.md).
_BUCKET_MEGABYTES, _BUCKETS = 25, 30

# The prediction is a view, and nothing modifies it in place.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
# accelerate builds its mesh in this way.
warnings.filterwarnings("ignore", message="Slicing a flattened dim from root mesh")


def make_accelerator(training: TrainingConfig, run: Path) -> Accelerator:
    """An accelerator with the launcher's configuration.

    Raises:
        UserError: The launcher is configured for something unsupported.
    """
    check_launcher(training)
    try:
        plugin = _fsdp_plugin(training) if uses_fsdp() else None
        if plugin is not None and parse_flag_from_env("ACCELERATE_USE_CPU"):
            state = PartialState(cpu=True, timeout=_PREPARING)
            if state.distributed_type == DistributedType.MULTI_CPU:
                # accelerate shards only on GPUs, although the same code works on CPUs.
                state.distributed_type = DistributedType.MULTI_GPU
        accelerator = Accelerator(
            mixed_precision=training.mixed_precision,
            log_with=training.tracker,
            project_config=ProjectConfiguration(str(run), logging_dir=str(run / "tracker")),
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=_PREPARING),
                # Otherwise every gradient is stored twice.
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            ],
            fsdp_plugin=plugin,
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"accelerate refuses its launcher's settings or training.tracker: {' '.join(str(error).split())}"
        ) from None
    if training.tracker is not None and not accelerator.log_with:
        raise UserError(
            f"training.tracker is {training.tracker}, which is not installed; install it, or give another one or null"
        )
    kind, mesh = accelerator.distributed_type, accelerator.parallelism_config
    known = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU, DistributedType.FSDP)
    if kind not in known:
        raise UserError(f"accelerate is configured for {kind.value}; train.py runs on one device, DDP or FSDP2")
    if mesh is not None and mesh.non_data_parallel_size > 1:
        raise UserError(
            f"accelerate's parallelism_config has the dimensions {', '.join(mesh.non_dp_dim_names)}; train.py knows "
            "dp_replicate and dp_shard"
        )
    world_size = os.environ.get("WORLD_SIZE", "1") if "LOCAL_RANK" in os.environ else "1"
    if world_size != "1" and accelerator.num_processes == 1:
        raise UserError(
            f"WORLD_SIZE is {world_size}, but accelerate finds no GPUs, so each process would train alone; launch one "
            "process, or set ACCELERATE_USE_CPU=true for several on CPUs"
        )
    if training.num_rows % accelerator.num_processes:
        raise UserError(
            f"training.num_rows is {training.num_rows} and cannot be split evenly over {accelerator.num_processes} "
            "processes; give a multiple of the number of processes"
        )
    return accelerator


def _fsdp_plugin(training: TrainingConfig) -> FullyShardedDataParallelPlugin:
    """FSDP2, sharded block by block; the launcher decides whether weights are freed after a forward."""
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if training.mixed_precision == "bf16" else None,
        reduce_dtype=torch.float32,
        # Inputs are not cast: autocast decides what is computed in bfloat16; timesteps and rotary angles stay in
        # float32.
        cast_forward_inputs=False,
    )
    return FullyShardedDataParallelPlugin(
        mixed_precision_policy=policy,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=TransfusionMoT._no_split_modules,
        # Weights are drawn on their final device.
        cpu_ram_efficient_loading=False,
    )


def place(model: TransfusionMoT, accelerator: Accelerator, seed: int) -> None:
    """Shard a model that is on `meta` (FSDP2), give it memory on this rank's device and draw its weights.

    accelerate would shard the optimizer at the same time and match its parameters by their addresses, which are equal
    for all parameters on `meta` and for all empty shards. Here the optimizer is made afterwards.
    """
    if accelerator.is_fsdp2:
        fsdp2_prepare_model(accelerator, model)
    model.to_empty(device=accelerator.device)
    model.initialise(seed)


def wrap(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """The module that a training step calls: the model, or its DDP wrapper."""
    if accelerator.is_fsdp2:
        return model
    if accelerator.ddp_handler is not None:
        size = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad) / 2**20
        accelerator.ddp_handler.bucket_cap_mb = max(_BUCKET_MEGABYTES, round(size / _BUCKETS))
    return accelerator.prepare_model(model)


def end_preparing(accelerator: Accelerator) -> None:
    """Set the timeout of collectives to that of training; called by all ranks."""
    if not dist.is_initialized():
        return
    # All ranks have finished preparing before the timeout changes.
    accelerator.wait_for_everyone()
    mesh = accelerator.torch_device_mesh
    # PyTorch 2.11 has only this private name.
    set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
    for group in (None, *(mesh.get_all_groups() if mesh is not None else ())):
        set_timeout(_TRAINING, group)


def host_group() -> dist.ProcessGroup | None:
    """A new process group of all hosts, independent of the devices; None for a single process."""
    if not dist.is_initialized():
        return None
    return cast(dist.ProcessGroup, dist.new_group(timeout=_TRAINING, backend="gloo"))
