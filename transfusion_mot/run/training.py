"""Model, optimizer, data loader and log of a run, built once before the first step."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.optim import Optimizer

from transfusion_mot.config import RunConfig, save_config
from transfusion_mot.data.batch import Batch
from transfusion_mot.data.loader import LaneLoader
from transfusion_mot.data.mixture import Sources
from transfusion_mot.data.packing import Packer
from transfusion_mot.data.sources.base import counted
from transfusion_mot.files import RUN_CONFIG
from transfusion_mot.models.transfusion import TransfusionMoT
from transfusion_mot.run.begin import fill_initial_weights
from transfusion_mot.run.data import RunData
from transfusion_mot.run.length import described_length
from transfusion_mot.run.snapshots import make_pipeline
from transfusion_mot.run.start import Start
from transfusion_mot.sampling.previews import Previews
from transfusion_mot.training.checkpoint import clear_behind
from transfusion_mot.training.ema import EMA
from transfusion_mot.training.float8 import convert_to_float8
from transfusion_mot.training.graph import GraphedStep, make_capturable, why_not_recorded
from transfusion_mot.training.guards import Guards
from transfusion_mot.training.log import RunLog
from transfusion_mot.training.lora import choose_trained
from transfusion_mot.training.optimizer import make_optimizer
from transfusion_mot.training.parallel import place, wrap
from transfusion_mot.training.state import load_tensors
from transfusion_mot.training.step import StepResult, train_step
from transfusion_mot.training.validation import Validation


@dataclass(frozen=True)
class Training:
    """Model, optimizer, data loader and log of a run.

    Attributes:
        model: The model without the wrapper of DDP.
        ema: Its averaged weights.
        optimizer: Optimizer of its weights.
        loader: Rows of this process, step after step.
        take_step: Forward, backward and update on a batch.
        log: Losses, speed and counters.
        guards: Checks of the steps.
        validation: Held-out losses; None if nothing is held out.
        previews: Samples during training.
        is_random: Whether the weights were drawn at random, not loaded from a start or a training state.
    """

    model: TransfusionMoT
    ema: EMA
    optimizer: Optimizer
    loader: LaneLoader
    take_step: Callable[[Batch], StepResult]
    log: RunLog
    guards: Guards
    validation: Validation | None
    previews: Previews
    is_random: bool

    @classmethod
    def build(cls, config: RunConfig, accelerator: Accelerator, data: RunData, start: Start) -> Self:
        """Draw the weights, or load them from a start or a training state, and build the rest; called by all processes.

        Raises:
            UserError: A setting does not fit the model, or a file of the state is damaged.
        """
        training, run = config.training, Path(config.output_dir)
        rank, world_size = accelerator.process_index, accelerator.num_processes
        # Weights are drawn or loaded on their final device; if they are sharded, each process does so for its own
        # shard.
        set_seed(training.seed)
        with torch.device("meta"):
            model = TransfusionMoT.from_sections(data.sizes, config.model, config.diffusion)
            choose_trained(model, config)
        place(model, accelerator, training.seed)
        # The averages are made afterwards, because they start with the same weights.
        is_random = start.state is None and not fill_initial_weights(model, config, accelerator)
        model.attention = training.attention
        if training.float8:
            convert_to_float8(model)
        ema = EMA(model, training.ema_decay, on_cpu=training.ema_on_cpu)
        optimizer = make_optimizer(model, config.optimizer)
        records = training.cuda_graph and why_not_recorded(accelerator.device.type, world_size) is None
        if records:
            make_capturable(optimizer)
        lanes = None if start.state is None else load_tensors(start.state, model, ema, optimizer)
        model.checkpoint_activations(training.activation_checkpointing)
        model.insulate(training.insulated_towers)
        if training.compile and accelerator.device.type == "cuda":
            model.compile_blocks()
        # A step calls the wrapper; the bare model is averaged, saved and sampled.
        wrapped = wrap(model, accelerator)

        packer = data.packer(config)
        loader = LaneLoader(
            packer,
            rank=rank,
            world_size=world_size,
            num_workers=config.data.num_workers,
            states=lanes,
            first_step=start.step,
            num_steps=training.num_steps,
            device=accelerator.device,
            encoder=data.encoder,
        )
        microbatch_rows = training.microbatch_rows or training.num_rows // world_size
        loss_weights = {name: config.model.modalities[name].loss_weight for name in config.model.made}

        def plain_step(batch: Batch) -> StepResult:
            return train_step(
                wrapped,
                batch,
                optimizer,
                accelerator,
                loss_weights=loss_weights,
                microbatch_rows=microbatch_rows,
                max_grad_norm=config.optimizer.max_grad_norm,
                z_loss_weight=training.z_loss_weight,
            )

        validation = None
        if data.held_out.pools:
            validation = Validation(
                data.held_out, data.tokenizer, config, encoder=data.encoder, rows_at_once=microbatch_rows
            )
        pipeline = make_pipeline(model, config, data)
        previews = Previews(pipeline, training.sample_prompts, data.held_out, run / "samples")
        # From here on the run folder changes: all refusals come before.
        if accelerator.is_main_process:
            save_config(config, run / RUN_CONFIG)
            if removed := clear_behind(run, start.step):
                accelerator.print(f"removed what was made after step {start.step}: {', '.join(removed)}")
        log = RunLog(
            accelerator,
            run,
            config,
            model=model,
            sources=data.sources,
            first_step=start.step,
            seen=start.seen,
            history=start.history,
        )
        guards = Guards(
            accelerator,
            wrapped,
            {name: model.modality(name) for name in config.model.made},
            packer=packer,
            encoder=data.encoder,
            lanes=loader.lanes,
            config=config,
            is_new=is_random,
        )
        accelerator.print(_described(accelerator, model, packer, data.held_out, training.num_steps))
        return cls(
            model,
            ema,
            optimizer,
            loader,
            take_step=GraphedStep(plain_step) if records else plain_step,
            log=log,
            guards=guards,
            validation=validation,
            previews=previews,
            is_random=is_random,
        )


def _described(
    accelerator: Accelerator, model: TransfusionMoT, packer: Packer, held_out: Sources, num_steps: int
) -> str:
    """Summary of the model, the data, the held-out part and the batch, printed before training."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    buckets = range(len(packer.sources.media_pools))
    rows = " or ".join(dict.fromkeys(str(packer.row_shape(bucket)) for bucket in buckets))
    with accelerator.autocast():
        kernels = {model.kernel(accelerator.device, packer.num_slots(bucket)) for bucket in buckets}
    kinds = {"document of media": held_out.num_media_documents()}
    for name, pools in held_out.stream_pools.items():
        kinds[f"document of {name}"] = sum(held_out.pools[pool].length for pool in pools)
    side = counted({kind: count for kind, count in kinds.items() if count})
    return (
        f"model: {parameters / 1e6:.1f}M parameters in towers {', '.join(model.architecture.towers)}\n"
        f"{packer.sources}\n"
        f"held out: {side or 'nothing, so there is no validation, and only training.sample_prompts are painted'}\n"
        f"batch: {packer.num_lanes} rows of {rows}, on {accelerator.num_processes} x {accelerator.device.type}\n"
        f"{described_length(num_steps, packer)}\n"
        + "\n".join(f"attention: {kernel}, {reason}" for kernel, reason in sorted(kernels))
    )
