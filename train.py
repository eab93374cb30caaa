"""Train a model that writes text and paints images: `accelerate launch train.py --config configs/quickstart.yaml`.

`python train.py --plan --config ...` prints parameters, memory and days instead; `--gpus 8 --gpu A100-80GB --mfu 0.4`.
"""

import logging
import math
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm.auto import tqdm

from transfusion_mot.codecs.autoencoder_kl import Autoencoder
from transfusion_mot.config import DataConfig, ModelConfig, RunConfig, parse_config, save_config, to_dict
from transfusion_mot.data.batch import Batch
from transfusion_mot.data.encoding import check_image_sizes
from transfusion_mot.data.loader import LaneLoader
from transfusion_mot.data.mixture import Source, Sources, open_documents, training_texts, with_latents
from transfusion_mot.data.online import OnlineEncoder
from transfusion_mot.data.packing import Packer
from transfusion_mot.data.sources.base import counted
from transfusion_mot.data.tokenizer import TextTokenizer, load_tokenizer, train_tokenizer
from transfusion_mot.diffusion import Diffusion
from transfusion_mot.errors import UserError, exit_on_user_error
from transfusion_mot.files import check_writable_folder
from transfusion_mot.models.compilation import allow_shapes
from transfusion_mot.models.mot import check_architecture
from transfusion_mot.models.transfusion import TransfusionMoT
from transfusion_mot.pipeline import TransfusionPipeline
from transfusion_mot.sampling.previews import Previews
from transfusion_mot.training.checkpoint import clear_behind, find_state, written_aside
from transfusion_mot.training.ema import EMA
from transfusion_mot.training.float8 import check_float8, convert_to_float8
from transfusion_mot.training.graph import GraphedStep, make_capturable, why_not_recorded
from transfusion_mot.training.guards import Guards
from transfusion_mot.training.log import RunLog
from transfusion_mot.training.metrics import METRICS_FILE, read_metrics
from transfusion_mot.training.model_card import model_card
from transfusion_mot.training.optimizer import make_optimizer, set_lr
from transfusion_mot.training.parallel import end_preparing, make_accelerator, place, wrap
from transfusion_mot.training.plan import plan
from transfusion_mot.training.plot import plot_runs
from transfusion_mot.training.state import (
    StateWriter,
    load_progress,
    load_tensors,
    refuse_other_run,
    refuse_other_tokenizer,
    state_tensors,
)
from transfusion_mot.training.step import StepResult, num_shapes, seed_step, train_step
from transfusion_mot.training.stopping import Stop
from transfusion_mot.training.towers import check_towers, freeze_towers
from transfusion_mot.training.validation import Validation
from transfusion_mot.training.watchdog import Watchdog


def main(arguments: list[str]) -> None:
    if "--plan" in arguments:
        print(plan(arguments))
        return
    started = time.monotonic()
    config = parse_config(RunConfig, arguments, __doc__ or "")
    run = Path(config.output_dir)
    training = config.training
    accelerator = make_accelerator(training, run)
    try:
        run.mkdir(parents=True, exist_ok=True)
        Path(config.data.cache_dir).mkdir(parents=True, exist_ok=True)
        check_writable_folder(run, "output_dir")
    except OSError as error:
        raise UserError(f"cannot make the folder {error.filename}: {error.strerror}; choose another") from None
    check_architecture(config.model)
    check_towers(config)
    allow_shapes(num_shapes(config, accelerator.num_processes))
    plainly = why_not_recorded(accelerator.device.type, accelerator.num_processes)
    records = training.cuda_graph and plainly is None
    if training.cuda_graph and plainly is not None:
        accelerator.print(plainly)
    state_folder = find_state(run, config.resume)

    diffusion = Diffusion.from_config(config.diffusion)

    # What is read: the main process indexes it, the others then find the index; all encode the images together.
    autoencoder = Autoencoder.load(config.autoencoder.path, accelerator.device)
    check_image_sizes(config.data, autoencoder, config.model.patch_size)
    if training.float8:
        check_float8(config, accelerator, autoencoder)
    with accelerator.main_process_first():
        documents = open_documents(config.data, "train")
        held_out_documents = open_documents(config.data, "held_out")
        tokenizer = open_tokenizer(config, run, state_folder, documents, accelerator.is_main_process)
    sources = with_latents(documents, config.data, autoencoder, config.autoencoder, accelerator, all_documents=True)
    held_out = with_latents(held_out_documents, config.data, autoencoder, config.autoencoder, accelerator)
    end_preparing(accelerator)
    encoder = OnlineEncoder(autoencoder, config.autoencoder.batch_size)

    # What a run must find again to go on.
    made_of = {
        "autoencoder": autoencoder.fingerprint,
        "tokenizer": tokenizer.fingerprint,
        "model": settled_model(config.model),
        "diffusion.scheduler": [config.diffusion.scheduler, config.diffusion.scheduler_args],
        "training.num_rows": training.num_rows,
        "training.seed": training.seed,
        "optimizer.name": config.optimizer.name,
        # By what is in them, not where they lie: a run may move to another machine.
        "list of data.sources": sources.contents(),
        "data": settled(config.data),
    }
    first_step, lanes, seen = 0, None, Counter[str]()
    if state_folder is not None:
        saved = load_progress(state_folder)
        readable = Sources(sources.sources, sources.latent_shapes).contents()
        if saved["made_of"].get("list of data.sources") == readable != sources.contents():
            saved["made_of"]["list of data.sources"] = sources.contents()
            accelerator.print(
                "the version that began the run left unreadable images out of the order of documents; now they are "
                "passed over: some documents of this epoch may come twice or not at all"
            )
        refuse_other_run(saved, made_of, state_folder)
        first_step, seen = saved["step"], Counter(saved["seen"])
        if first_step >= training.num_steps:
            accelerator.print(f"{run} has done {first_step} steps; raise training.num_steps to go on with it")
            return
        accelerator.print(f"resuming {run} after step {first_step}")

    # What is trained: weights are drawn, or read, where they will be, each rank its own if they are sharded.
    set_seed(training.seed)
    with torch.device("meta"):
        bare_model = TransfusionMoT.from_config_section(tokenizer.vocab_size, autoencoder.latent_channels, config.model)
    place(bare_model, accelerator, training.seed)
    bare_model.attention = training.attention
    freeze_towers(bare_model, training.frozen_towers)
    if training.float8:
        convert_to_float8(bare_model)
    ema = EMA(bare_model, training.ema_decay)
    optimizer = make_optimizer(bare_model, config.optimizer)
    if records:
        make_capturable(optimizer)
    if state_folder is not None:
        lanes = load_tensors(state_folder, bare_model, ema, optimizer)
    bare_model.checkpoint_activations(training.activation_checkpointing)
    if training.compile and accelerator.device.type == "cuda":
        bare_model.compile_blocks()
    model = wrap(bare_model, accelerator)

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
    if held_out.pools:
        validation = Validation(held_out, tokenizer, config, diffusion, encoder, microbatch_rows)
    pipeline = make_pipeline(bare_model, autoencoder, diffusion, tokenizer, config)
    previews = Previews(pipeline, training.sample_prompts, held_out, run / "samples")
    if accelerator.is_main_process:
        save_config(config, run / "config.yaml")
        clear_behind(run, first_step)
    history = None if state_folder is None else state_folder.parent.parent / METRICS_FILE
    log = RunLog(accelerator, run, config, bare_model, first_step, seen, sources, history)
    text_tower = config.model.towers[config.model.modalities["text"]]
    guards = Guards(
        accelerator,
        model,
        diffusion,
        packer,
        encoder,
        loader.lanes,
        training,
        text_tower.hidden_size,
        is_new=state_folder is None,
    )
    describe(accelerator, bare_model, packer, held_out)

    def plain_step(batch: Batch) -> StepResult:
        return train_step(
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

    take_step = GraphedStep(plain_step) if records else plain_step

    # Where nobody watches, lines are enough: None is no bar unless standard error is a terminal.
    no_bar = None if accelerator.is_main_process else True
    progress = tqdm(total=training.num_steps, initial=first_step, unit="step", disable=no_bar)
    rank, world_size = accelerator.process_index, accelerator.num_processes
    watchdog = Watchdog(run / "heartbeats", rank, world_size, training.watchdog_minutes)
    writer = StateWriter(run, training.keep_last, training.keep_every)
    with watchdog, writer, Stop(started, training.max_minutes) as stop:
        for step, (batch, counts) in enumerate(loader, first_step):
            watchdog.at(step + 1, "training")
            lr = set_lr(optimizer, config.optimizer, step, training.num_steps)
            seed_step(training.seed, step, rank)
            result = take_step(batch)
            ema.update(bare_model, step)

            done = step + 1
            is_last = done == training.num_steps
            stops = stop.agreed() and not is_last
            progress.update()
            log.add(result, batch, counts, loader.seconds_waited)
            guards.add(done, batch, loader.states_before)
            validates = is_due(done, training.validate_every) or is_last
            samples = is_due(done, training.sample_every) or is_last
            saves = is_due(done, training.save_every) or is_last
            if done == 1 or is_due(done, training.log_every) or saves or stops:
                # Before anything is saved, because it stops at what is not finite.
                interval = log.collect()
                line = log.write(interval, lr, guards.check(interval.steps))
                if accelerator.is_main_process:
                    progress.write(line)
            if validates or saves or samples or stops:
                watchdog.at(done, "validation, saving or sampling")
            with log.paused():
                if validates or samples:
                    with ema.in_place_of(bare_model), accelerator.autocast():
                        if validates and validation is not None:
                            line = log.write_validation(done, validation.losses(bare_model, accelerator))
                            if accelerator.is_main_process:
                                progress.write(line)
                        if samples and (accelerator.is_main_process or accelerator.is_fsdp2):
                            previews.make(done, accelerator)
                if saves or stops:
                    writer.begin(done)
                if saves:
                    # The snapshot first: a state whose snapshot is missing would never get one.
                    averaged = averaged_model(bare_model, ema, accelerator.is_main_process)
                    if averaged is not None:
                        with written_aside(run / "snapshots" / f"step-{done:07d}") as folder:
                            snapshot = make_pipeline(averaged, autoencoder, diffusion, tokenizer, config)
                            parameters = sum(parameter.numel() for parameter in averaged.parameters())
                            lines = read_metrics(run / METRICS_FILE)
                            snapshot.model_card = model_card(config, parameters, sources, log.seen, lines, done)
                            snapshot.save_pretrained(folder)
                        plot_runs({run.name: run / METRICS_FILE}, run / "loss.png")
                if saves or stops:
                    all_lanes = accelerator.gather(loader.states.to(accelerator.device)).cpu()
                    tensors = state_tensors(bare_model, ema, optimizer, all_lanes)
                    progress_made = {"step": done, "seen": dict(log.seen), "made_of": made_of}
                    writer.save(done, tensors, progress_made, log.best[1] if log.best is not None else None)
            if stops:
                break
            watchdog.at(done + 1, "waiting for data")
    progress.close()
    accelerator.end_training()
    if stops:
        accelerator.print(f"stopped by {stop.reason} after step {done} and saved; start again to go on")
        return
    accelerator.print(
        f"{sources.report(log.seen)}\n"
        f"snapshot: {run / 'snapshots' / f'step-{training.num_steps:07d}'}\nloss plot: {run / 'loss.png'}"
    )


def make_pipeline(
    model: TransfusionMoT, autoencoder: Autoencoder, diffusion: Diffusion, tokenizer: TextTokenizer, config: RunConfig
) -> TransfusionPipeline:
    """What samples, and what a snapshot is."""
    return TransfusionPipeline(
        transformer=model,
        vae=autoencoder.vae,
        scheduler=diffusion.scheduler,
        tokenizer=tokenizer.hf,
        image_size=config.data.image_size,
        max_prompt_tokens=config.data.max_caption_tokens,
        num_inference_steps=config.diffusion.num_inference_steps,
        guidance_scale=config.diffusion.guidance_scale,
        image_sizes={"trained": [list(size) for size in config.data.image_sizes], "fit": config.data.image_fit},
    )


def averaged_model(model: TransfusionMoT, ema: EMA, is_main_process: bool) -> TransfusionMoT | None:
    """A model of its own with the averaged weights, whole and on the CPU; on the main process alone."""
    weights = ema.gathered(is_main_process)
    if not is_main_process:
        return None
    with torch.device("meta"):
        averaged = TransfusionMoT.from_config(dict(model.config))
    averaged.load_state_dict(weights, assign=True)
    return averaged


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
    if state is not None:
        kept = state.parent.parent / "tokenizer"
        tokenizer = load_tokenizer(str(kept))
        refuse_other_tokenizer(config.tokenizer, tokenizer, state)
        if kept.resolve() == folder.resolve():
            return tokenizer
    elif config.tokenizer.path is not None:
        tokenizer = load_tokenizer(config.tokenizer.path)
    else:
        tokenizer = train_tokenizer(training_texts(documents), config.tokenizer.vocab_size)
    tokenizer.save(folder)
    return tokenizer


def settled(data: DataConfig) -> dict[str, Any]:
    """What of the data section a run keeps to; sources are known by what is in them."""
    free = ("sources", "num_workers", "cache_dir", "latents")
    kept = {key: value for key, value in to_dict(data).items() if key not in free}
    return kept | {"weights of sources": [source.weight for source in data.sources]}


def settled_model(model: ModelConfig) -> dict[str, Any]:
    """What of the model section a run keeps to: all that its weights are made for."""
    kept = to_dict(model)
    for tower in kept["towers"].values():
        del tower["dropout"]
    return kept


def describe(accelerator: Accelerator, model: TransfusionMoT, packer: Packer, held_out: Sources) -> None:
    """Print what is about to be trained on what, and what of it was left out."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    sizes = " or ".join(
        str(math.prod(packer.patch_grid(bucket))) for bucket in range(len(packer.sources.latent_shapes))
    )
    row = f"{packer.config.text_slots} text slots + {packer.config.images_per_row} images of {sizes} patches"
    with accelerator.autocast():
        kernels = {
            model.kernel(accelerator.device, packer.num_slots(bucket))
            for bucket in range(len(packer.sources.latent_shapes))
        }
    num_texts = sum(held_out.pools[pool].length for pool in held_out.text_pools)
    sides = {"image document": held_out.num_image_documents(), "text": num_texts}
    side = counted({kind: count for kind, count in sides.items() if count})
    accelerator.print(
        f"model: {parameters / 1e6:.1f}M parameters in towers {', '.join(model.architecture.towers)}\n"
        f"{packer.sources}\n"
        f"held out: {side or 'nothing, so there is no validation'}\n"
        f"batch: {packer.num_lanes} rows of {row}, on {accelerator.num_processes} x {accelerator.device.type}\n"
        + "\n".join(f"attention: {kernel}, {reason}" for kernel, reason in sorted(kernels))
    )


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    with exit_on_user_error():
        main(sys.argv[1:])
