"""A training run, from its configuration to its last snapshot."""

import io
import time
from contextlib import nullcontext, redirect_stdout
from pathlib import Path

from accelerate import Accelerator
from tqdm.auto import tqdm

from transfusion_mot.config import RunConfig
from transfusion_mot.reporting.plan import plan
from transfusion_mot.run.begin import settled_config
from transfusion_mot.run.data import RunData, load_codecs
from transfusion_mot.run.from_snapshot import keep_codecs
from transfusion_mot.run.length import with_num_steps
from transfusion_mot.run.saving import RunSaver
from transfusion_mot.run.start import Start, check_run
from transfusion_mot.run.training import Training
from transfusion_mot.training.checkpoint import held_alone
from transfusion_mot.training.optimizer import set_lr
from transfusion_mot.training.parallel import end_preparing, make_accelerator
from transfusion_mot.training.step import seed_step
from transfusion_mot.training.stopping import Stop
from transfusion_mot.training.watchdog import Watchdog


def run(arguments: list[str], *, quiet: bool = False) -> None:
    """Run train.py with these arguments.

    Args:
        arguments: The command line.
        quiet: Print only lines of losses, warnings and errors.

    Raises:
        UserError: A user mistake, described in one sentence.
    """
    if "--plan" in arguments:
        print(plan(arguments, settled_config))
        return
    started = time.monotonic()
    config = settled_config(arguments)
    folder = Path(config.output_dir)
    accelerator = make_accelerator(config.training, folder)
    check_run(config, accelerator)
    with held_alone(folder) if accelerator.is_main_process else nullcontext():
        _train(config, accelerator, started=started, quiet=quiet)


def _train(config: RunConfig, accelerator: Accelerator, *, started: float, quiet: bool) -> None:
    """Train as far as the configuration says.

    Args:
        config: Of the run.
        accelerator: Of the run.
        started: When the command began, on the clock of `time.monotonic`.
        quiet: Print lines of losses, warnings and errors alone.
    """
    folder = Path(config.output_dir)
    start = Start.find(config)
    if start.state is None:
        config = keep_codecs(config, accelerator)
    codecs = load_codecs(config, accelerator.device)
    start.check_settings(config, codecs)
    data = RunData.open(config, accelerator, codecs, start.state)
    end_preparing(accelerator)
    start.check_data(data)
    config = with_num_steps(config, data.packer(config))
    num_steps = config.training.num_steps
    if start.step >= num_steps:
        accelerator.print(f"{folder} has already done {start.step} steps; raise training.num_steps to continue it")
        return
    if start.state is not None and not quiet:
        accelerator.print(f"resuming {folder} after step {start.step}")
    # Building prints to standard output; warnings go to standard error.
    with redirect_stdout(io.StringIO()) if quiet else nullcontext():
        training = Training.build(config, accelerator, data, start)
    saver = RunSaver(accelerator, config, data, training)
    stopped_by = take_steps(training, saver, config, accelerator, first_step=start.step, started=started, quiet=quiet)
    accelerator.end_training()
    if quiet:
        return
    if stopped_by is not None:
        accelerator.print(f"stopped by {stopped_by} and saved; start again to continue")
        return
    accelerator.print(
        f"{data.sources.report(training.log.seen)}\n"
        f"snapshot: {folder / 'snapshots' / f'step-{num_steps:07d}'}\nloss plot: {folder / 'loss.png'}"
    )


def take_steps(
    training: Training,
    saver: RunSaver,
    config: RunConfig,
    accelerator: Accelerator,
    *,
    first_step: int,
    started: float,
    quiet: bool,
) -> str | None:
    """Take all steps from `first_step` on => a sentence about what stopped the run early and when, or None."""
    model, ema, log, settings = training.model, training.ema, training.log, config.training
    rank, world_size = accelerator.process_index, accelerator.num_processes
    # None shows the bar only if standard error is a terminal.
    no_bar = None if accelerator.is_main_process and not quiet else True
    progress = tqdm(total=settings.num_steps, initial=first_step, unit="step", disable=no_bar)

    def tell(line: str) -> None:
        if accelerator.is_main_process:
            progress.write(line)

    def look(step: int, *, validates: bool, samples: bool) -> None:
        with ema.in_place_of(model), accelerator.autocast():
            if validates and training.validation is not None:
                tell(log.write_validation(step, training.validation.losses(model, accelerator)))
            if samples and (accelerator.is_main_process or accelerator.is_fsdp2):
                for line in training.previews.make(step, accelerator):
                    tell(line)

    heartbeats = Path(config.output_dir) / "heartbeats"
    watchdog = Watchdog(heartbeats, rank=rank, world_size=world_size, minutes=settings.watchdog_minutes)
    with watchdog, saver, Stop(started, settings.max_minutes) as stop:
        if first_step == 0 and not training.is_random:
            watchdog.at(0, "validation and sampling of what it begins with")
            with log.paused():
                look(0, validates=True, samples=True)
        for step, (batch, counts) in enumerate(training.loader, first_step):
            watchdog.at(step + 1, "training")
            lr = set_lr(training.optimizer, config.optimizer, step, settings.num_steps)
            seed_step(settings.seed, step, rank)
            result = training.take_step(batch)
            ema.update(model, step)

            done = step + 1
            is_last = done == settings.num_steps
            stops = stop.agreed() and not is_last
            progress.update()
            log.add(result, batch, counts, training.loader.seconds_waited)
            training.guards.add(done, batch, training.loader.states_before)
            validates = is_due(done, settings.validate_every) or is_last
            samples = is_due(done, settings.sample_every) or is_last
            saves = is_due(done, settings.save_every) or is_last
            if done == 1 or is_due(done, settings.log_every) or saves or stops:
                # The check comes before saving, because it stops at losses that are not finite.
                interval = log.collect()
                tell(log.write(interval, lr, training.guards.check(interval.steps)))
            if validates or saves or samples or stops:
                watchdog.at(done, "validation, saving or sampling")
            with log.paused():
                if validates or samples:
                    look(done, validates=validates, samples=samples)
                if saves or stops:
                    saver.save(done, with_snapshot=saves)
            if stops:
                break
            watchdog.at(done + 1, "waiting for data")
    progress.close()
    return f"{stop.reason} after step {done}" if stops else None


def is_due(step: int, every: int) -> bool:
    """Whether an action that is due every `every` steps (0: never) is due after this one."""
    return every > 0 and step % every == 0
