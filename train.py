"""Train a model that writes text and paints images: `accelerate launch train.py --config configs/quickstart.yaml`.

`python train.py --plan --config ...` prints parameters, memory and days instead; `--gpus 8 --gpu A100-80GB --mfu 0.4`.
"""

import logging
import math
import sys
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    set_seed,
)
from tqdm.auto import tqdm

from transfusion_mot.autoencoder import Autoencoder
from transfusion_mot.config import DataConfig, RunConfig, parse_config, save_config, to_dict
from transfusion_mot.data.encoding import check_image_sizes
from transfusion_mot.data.images import grid
from transfusion_mot.data.loader import LaneLoader
from transfusion_mot.data.mixture import Source, open_documents, training_texts, with_latents
from transfusion_mot.data.online import OnlineEncoder
from transfusion_mot.data.packing import Packer
from transfusion_mot.data.tokenizer import TextTokenizer, load_tokenizer, train_tokenizer
from transfusion_mot.diffusion import Diffusion, make_scheduler
from transfusion_mot.errors import UserError, exit_on_user_error
from transfusion_mot.models.attention import attention_kernel
from transfusion_mot.models.mot import check_architecture
from transfusion_mot.models.transfusion import TransfusionMoT
from transfusion_mot.pipeline import TransfusionPipeline
from transfusion_mot.training.checkpoint import drop_later, find_state, load_state, save_state, written_aside
from transfusion_mot.training.metrics import RunLog
from transfusion_mot.training.optimizer import EMA, load_moments, make_optimizer, set_lr
from transfusion_mot.training.plan import plan
from transfusion_mot.training.plot import plot_losses
from transfusion_mot.training.step import train_step
from transfusion_mot.training.towers import check_towers, freeze_towers
from transfusion_mot.training.validation import Validation


def main(arguments: list[str]) -> None:
    if "--plan" in arguments:
        print(plan(arguments))
        return
    config = parse_config(RunConfig, arguments, __doc__ or "")
    run = Path(config.output_dir)
    training = config.training
    try:
        accelerator = Accelerator(
            mixed_precision=training.mixed_precision,
            log_with=training.tracker,
            project_config=ProjectConfiguration(config.output_dir, logging_dir=str(run / "tracker")),
            # The other ranks wait while the first one encodes the images.
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=timedelta(hours=12)),
                # Else every gradient exists twice.
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            ],
        )
    except ValueError as error:
        raise UserError(f"accelerate refuses the settings, training.tracker perhaps: {error}") from None
    if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        raise UserError(
            f"accelerate is configured for {accelerator.distributed_type.value}; train.py runs on one device or DDP"
        )
    if training.num_rows % accelerator.num_processes:
        raise UserError(
            f"training.num_rows is {training.num_rows}, which the {accelerator.num_processes} processes cannot share "
            "evenly; give a multiple of their number"
        )
    try:
        run.mkdir(parents=True, exist_ok=True)
        Path(config.data.cache_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {error.filename}: {error.strerror}; choose another") from None
    check_architecture(config.model)
    check_towers(config)
    state_folder = find_state(run, config.resume)

    diffusion = Diffusion(
        make_scheduler(config.diffusion.scheduler, config.diffusion.scheduler_args),
        config.diffusion.timestep_distribution,
    )

    # What is read: the main process indexes it, the others then find the index; all encode the images together.
    autoencoder = Autoencoder.load(config.autoencoder.path, accelerator.device)
    check_image_sizes(config.data, autoencoder, config.model.patch_size)
    with accelerator.main_process_first():
        documents = open_documents(config.data, "train")
        held_out_documents = open_documents(config.data, "held_out")
        tokenizer = open_tokenizer(config, run, state_folder, documents, accelerator.is_main_process)
    sources = with_latents(documents, config.data, autoencoder, config.autoencoder, accelerator)
    held_out = with_latents(held_out_documents, config.data, autoencoder, config.autoencoder, accelerator)
    encoder = OnlineEncoder(autoencoder, config.autoencoder.batch_size)

    # What is trained. The seed comes after the data: encoding, which a cache may spare, draws numbers.
    set_seed(training.seed)
    bare_model = TransfusionMoT.from_config_section(tokenizer.vocab_size, autoencoder.latent_channels, config.model)
    bare_model.to(accelerator.device)
    bare_model.attention = training.attention
    freeze_towers(bare_model, training.frozen_towers)
    ema = EMA(bare_model, training.ema_decay)
    optimizer = make_optimizer(bare_model, config.optimizer)

    # What a run must find again to go on.
    stateful = {"model": bare_model, "ema": ema.model, "optimizer": optimizer}
    made_of = {
        "autoencoder": autoencoder.fingerprint,
        "tokenizer": tokenizer.fingerprint,
        "model": to_dict(config.model),
        "diffusion.scheduler": [config.diffusion.scheduler, config.diffusion.scheduler_args],
        "training.seed": training.seed,
        # By what is in them, not where they lie: a run may move to another machine.
        "list of data.sources": sources.contents(),
        "data": settled(config.data),
    }
    first_step, lanes, seen = 0, None, Counter[str]()
    if state_folder is not None:
        state = load_state(state_folder)
        refuse_other_run(state, made_of, config, state_folder)
        bare_model.load_state_dict(state["model"])
        ema.model.load_state_dict(state["ema"])
        load_moments(optimizer, state["optimizer"])
        first_step, lanes, seen = state["step"], state["lanes"], Counter(state["seen"])
        del state  # Else its copy of everything stays in memory for the whole run.
        if first_step >= training.num_steps:
            accelerator.print(f"{run} has done {first_step} steps; raise training.num_steps to go on with it")
            return
        accelerator.print(f"resuming {run} after step {first_step}")

    bare_model.checkpoint_activations(training.activation_checkpointing)
    if training.compile and accelerator.device.type == "cuda":
        bare_model.compile_blocks()
    model = accelerator.prepare_model(bare_model)
    packer = Packer(
        sources,
        tokenizer,
        config.data,
        config.model.rope,
        config.model.patch_size,
        training.num_rows,
        training.seed,
        diffusion.timesteps_from_uniform,
    )
    loader = LaneLoader(
        packer,
        accelerator.process_index,
        accelerator.num_processes,
        config.data.num_workers,
        lanes,
        first_step,
        training.num_steps,
        accelerator.device,
        encoder,
    )
    microbatch_rows = training.microbatch_rows or training.num_rows // accelerator.num_processes
    validation = None
    if held_out.num_image_documents():
        validation = Validation(held_out, tokenizer, config, diffusion, encoder, microbatch_rows)
    pipeline = TransfusionPipeline(
        transformer=ema.model,
        vae=autoencoder.vae,
        scheduler=diffusion.scheduler,
        tokenizer=tokenizer.hf,
        image_size=config.data.image_size,
        max_prompt_tokens=config.data.max_caption_tokens,
        num_inference_steps=config.diffusion.num_inference_steps,
        guidance_scale=config.diffusion.guidance_scale,
    )
    # What sampling would refuse is refused before training, not after it.
    pipeline.sampling_settings(None, None)
    if training.sample_prompts:
        pipeline.check_prompts(training.sample_prompts)
    if accelerator.is_main_process:
        save_config(config, run / "config.yaml")
        if first_step:
            drop_later(run, first_step)
    log = RunLog(accelerator, run, config, bare_model, first_step, seen, sources)
    describe(accelerator, bare_model, packer, held_out.num_image_documents())

    progress = tqdm(total=training.num_steps, initial=first_step, unit="step", disable=not accelerator.is_main_process)
    for step, (batch, counts) in enumerate(loader, first_step):
        lr = set_lr(optimizer, config.optimizer, step, training.num_steps)
        result = train_step(
            model,
            batch,
            diffusion,
            optimizer,
            accelerator,
            microbatch_rows,
            training.diffusion_loss_weight,
            config.optimizer.max_grad_norm,
            training.z_loss_weight,
        )
        ema.update(bare_model, step)

        done = step + 1
        is_last = done == training.num_steps
        progress.update()
        log.add(result, batch, counts)
        validates = is_due(done, training.validate_every) or is_last
        samples = is_due(done, training.sample_every) or is_last
        saves = is_due(done, training.save_every) or is_last
        if done == 1 or is_due(done, training.log_every) or saves:
            # Before anything is saved, because it stops at what is not finite.
            progress.set_postfix(log.write(done, lr))
        with log.paused():
            if validates and validation is not None:
                log.write_validation(done, validation.losses(ema.model, accelerator))
            if saves:
                all_lanes = accelerator.gather(loader.states.to(accelerator.device)).cpu()
            if saves and accelerator.is_main_process:
                # The snapshot first: a state whose snapshot is missing would never get one.
                with written_aside(run / "snapshots" / f"step-{done:07d}") as folder:
                    pipeline.save_pretrained(folder)
                parts = {name: part.state_dict() for name, part in stateful.items()}
                rest = {"step": done, "lanes": all_lanes, "seen": dict(log.seen), "made_of": made_of}
                save_state(run, done, parts | rest)
                plot_losses(run / "metrics.jsonl", run / "loss.png")
            if samples and training.sample_prompts and accelerator.is_main_process:
                save_samples(pipeline, run / "samples" / f"step-{done:07d}.png", training.sample_prompts)
            if saves or samples:
                accelerator.wait_for_everyone()
    progress.close()
    accelerator.end_training()
    accelerator.print(
        f"{sources.report(log.seen)}\n"
        f"snapshot: {run / 'snapshots' / f'step-{training.num_steps:07d}'}\nloss plot: {run / 'loss.png'}"
    )


def is_due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps (0: never) happens after this one."""
    return every > 0 and step % every == 0


def open_tokenizer(
    config: RunConfig, run: Path, state: Path | None, documents: list[Source], is_main_process: bool
) -> TextTokenizer:
    """The tokenizer of the run that is gone on with, else the configured one, else a newly trained one.

    The main process saves it into the run folder; the others, which come later, find it there.
    """
    folder = run / "tokenizer"
    if not is_main_process:
        return load_tokenizer(str(folder))
    kept = state.parent.parent / "tokenizer" if state is not None else None
    if kept is not None:
        tokenizer = load_tokenizer(str(kept))
    elif config.tokenizer.path is not None:
        tokenizer = load_tokenizer(config.tokenizer.path)
    else:
        tokenizer = train_tokenizer(training_texts(documents), config.tokenizer.vocab_size)
    if kept is None or kept.resolve() != folder.resolve():
        tokenizer.save(folder)
    return tokenizer


def settled(data: DataConfig) -> dict[str, Any]:
    """What of the data section a run keeps to; sources are known by what is in them."""
    free = ("sources", "num_workers", "cache_dir", "latents")
    kept = {key: value for key, value in to_dict(data).items() if key not in free}
    return kept | {"weights of sources": [source.weight for source in data.sources]}


def refuse_other_run(state: dict[str, Any], made_of: dict[str, Any], config: RunConfig, folder: Path) -> None:
    """Refuse to resume with another autoencoder, tokenizer, model or number of rows.

    Raises:
        UserError: Names what differs.
    """
    if "made_of" not in state:
        raise UserError(f"{folder} holds no training state of train.py; remove it, or give another output_dir")
    for part, now in made_of.items():
        before = state["made_of"].get(part)
        if before != now:
            if isinstance(now, dict):
                before, now = (
                    {key: side.get(key) for key in now if before.get(key) != now[key]} for side in (before, now)
                )
            raise UserError(
                f"{folder} was trained with another {part}: {before}, and now it is {now}; "
                "use the one it was trained with, or another output_dir"
            )
    if len(state["lanes"]) != config.training.num_rows:
        raise UserError(
            f"{folder} was trained with training.num_rows={len(state['lanes'])}, not {config.training.num_rows}; "
            "keep it (microbatch_rows and the number of processes may change)"
        )


def describe(accelerator: Accelerator, model: TransfusionMoT, packer: Packer, num_held_out: int) -> None:
    """Print what is about to be trained on what, and what of it was left out."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    sizes = " or ".join(
        str(math.prod(packer.patch_grid(bucket))) for bucket in range(len(packer.sources.latent_shapes))
    )
    row = f"{packer.config.text_slots} text slots + {packer.config.images_per_row} images of {sizes} patches"
    kernels = {
        attention_kernel(model.attention, accelerator.device.type, packer.num_slots(bucket))
        for bucket in range(len(packer.sources.latent_shapes))
    }
    side = f"{num_held_out} documents with images" if num_held_out else "nothing with images, so there is no validation"
    accelerator.print(
        f"model: {parameters / 1e6:.1f}M parameters in towers {', '.join(model.architecture.towers)}\n"
        f"{packer.sources}\n"
        f"held out: {side}\n"
        f"batch: {packer.num_lanes} rows of {row}, on {accelerator.num_processes} x {accelerator.device.type}\n"
        + "\n".join(f"attention: {kernel}, {reason}" for kernel, reason in sorted(kernels))
    )


def save_samples(pipeline: TransfusionPipeline, path: Path, prompts: list[str]) -> None:
    """Write a labelled grid of one image per prompt, from the averaged weights."""
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    images = pipeline(prompts, generator=generators).images
    path.parent.mkdir(exist_ok=True)
    grid(images, prompts, columns=4).save(path)


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    with exit_on_user_error():
        main(sys.argv[1:])
