"""Whole runs of train.py in several processes, sharded or not; runs that are stopped or killed."""

import itertools
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from process_group import FSDP2, clean_process, run_processes
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from training_runs import Arguments, assert_same, final_state

import train
from transfusion_mot.data.packing import Packer
from transfusion_mot.files import find_snapshot
from transfusion_mot.models.transfusion import TransfusionMoT
from transfusion_mot.pipeline import TransfusionPipeline
from transfusion_mot.run import snapshots
from transfusion_mot.training import checkpoint, state
from transfusion_mot.training.checkpoint import find_state
from transfusion_mot.training.ema import EMA
from transfusion_mot.training.metrics import read_metrics
from transfusion_mot.training.state import StateWriter, load_progress

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def test_sharded_run_equals_one_process_and_each_goes_on_with_the_other(arguments: Arguments, tmp_path: Path) -> None:
    constant = {"optimizer": {"lr_schedule": "constant", "warmup_steps": 2, "lr": 0.01}}
    # Three rows of held-out images on two ranks: they must forward equally often.
    often = {"validate_every": 2, "sample_every": 3, "num_validation_documents": 6, "microbatch_rows": 1}
    train.main(arguments("one", training=often, **constant))
    run_processes(train.main, 2, FSDP2, tmp_path / "fsdp", arguments("sharded", training=often, **constant))
    one, sharded = final_state(tmp_path / "one"), final_state(tmp_path / "sharded")
    assert_same(one, sharded, tolerance=2e-5)
    runs = [read_metrics(tmp_path / run / "metrics.jsonl") for run in ("one", "sharded")]
    for name in ("text_loss", "image_loss", "grad_norm", "validation/text_loss", "validation/image_loss"):
        first, second = ([line[name] for line in lines if name in line] for lines in runs)
        assert len(first) >= 3
        assert second == pytest.approx(first, rel=1e-3), name
    pipeline = TransfusionPipeline.from_pretrained(find_snapshot(str(tmp_path / "sharded")))
    assert type(pipeline.transformer) is TransfusionMoT
    for name, parameter in pipeline.transformer.named_parameters():
        assert torch.equal(parameter, sharded[f"ema/{name}"]), name
    assert (tmp_path / "sharded" / "samples" / "step-0000003.png").exists()

    # From DDP to shards, and from them to one process.
    run_processes(train.main, 2, {}, tmp_path / "ddp", arguments("mixed", **constant, training={"num_steps": 2}))
    run_processes(train.main, 2, FSDP2, tmp_path / "again", arguments("mixed", **constant, training={"num_steps": 4}))
    train.main(arguments("mixed", **constant))
    assert_same(one, final_state(tmp_path / "mixed"), tolerance=2e-5)


# --- Asked to stop. ---


def ask_to_stop(arguments: list[str], number: int, rank: int) -> None:
    """Train, and send this rank a signal after three steps."""
    original, done = EMA.update, itertools.count(1)

    def update(*args: Any) -> None:
        original(*args)
        if next(done) == 3 and int(os.environ.get("RANK", "0")) == rank:
            os.kill(os.getpid(), number)

    EMA.update = update
    train.main(arguments)


@pytest.mark.parametrize(
    ("world_size", "environment", "number"),
    [(1, {}, signal.SIGTERM), (1, {}, signal.SIGINT), (2, FSDP2, signal.SIGTERM)],
)
def test_signal_ends_the_run_after_a_step_and_it_goes_on_exactly(
    arguments: Arguments, tmp_path: Path, world_size: int, environment, number: int
) -> None:
    changes = {"training": {"num_steps": 60, "sample_prompts": [], "validate_every": 0, "log_every": 20}}
    changes |= {"optimizer": {"lr_schedule": "constant"}, "data": {"num_workers": 1}}
    run_processes(ask_to_stop, world_size, environment, tmp_path / "a", arguments(**changes), number, world_size - 1)
    run = tmp_path / "run"
    step = load_progress(find_state(run, "auto"))["step"]
    assert step == (3 if world_size == 1 else 4), "with others, it takes a step until all know"
    assert not (run / "snapshots").exists()
    changes["training"] |= {"num_steps": 6}
    train.main(arguments(**changes))
    train.main(arguments("whole", **changes))
    assert_same(final_state(tmp_path / "whole"), final_state(run), tolerance=None if world_size == 1 else 2e-5)


def ask_in_the_first_step(arguments: list[str]) -> None:
    """Train, and be asked to stop where the first step begins."""
    original, done = TransfusionMoT.forward, itertools.count(1)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if next(done) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    TransfusionMoT.forward = forward
    train.main(arguments)


def test_signal_in_the_first_step_ends_the_run_at_once(arguments: Arguments, tmp_path: Path) -> None:
    process = clean_process(ask_in_the_first_step, arguments())
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGTERM
    assert not (tmp_path / "run" / "state").exists()


def test_run_ends_when_its_time_is_over(arguments: Arguments, tmp_path: Path, capsys) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    train.main(arguments(training={"max_minutes": 1e-9}))
    assert "stopped by training.max_minutes after step 1" in capsys.readouterr().out
    assert load_progress(find_state(tmp_path / "run", "auto"))["step"] == 1
    assert handlers == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]


# --- Killed. ---

# Where a process kills itself, as the kernel would: when it calls this for the n-th time.
PHASES: dict[str, tuple[Any, str]] = {
    "data": (Packer, "rows"),
    "forward": (TransfusionMoT, "forward"),
    "optimizer": (torch.optim.AdamW, "step"),
    "averages": (EMA, "update"),
    "snapshot": (TransfusionPipeline, "save_pretrained"),
    "state begun": (StateWriter, "save"),
    "state written": (FileSystemWriter, "finish"),
    "before the renaming": (state, "put_in_place"),
    "while syncing": (checkpoint, "flush_to_disk"),
    "while removing": (checkpoint.shutil, "rmtree"),
}


def train_without_figure(arguments: list[str]) -> None:
    """The figure takes most of the time, and nothing depends on it."""
    snapshots.plot_runs = lambda *_: None
    train.main(arguments)


def killed_at(arguments: list[str], phase: str, number: int) -> None:
    """Train until what a phase calls is called for the n-th time."""
    target, name = PHASES[phase]
    original: Callable[..., Any] = getattr(target, name)
    calls = itertools.count(1)

    def dies(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(target, name, dies)
    train_without_figure(arguments)


def test_twenty_kills_in_every_phase_change_nothing(arguments: Arguments, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(snapshots, "plot_runs", lambda *_: None)
    training = {"num_steps": 120, "save_every": 2, "log_every": 10, "sample_prompts": [], "num_validation_documents": 2}
    train.main(arguments("whole", training=training | {"save_every": 0}))
    command = arguments("killed", training=training)
    draw = random.Random(0)
    steps = []
    for phase in ("snapshot", "state begun", "state written", "before the renaming"):
        process = clean_process(killed_at, command, phase, 1)
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        assert find_state(tmp_path / "killed", "auto") is None, f"{phase}: nothing was saved yet"
    for kill in range(20):
        phase = list(PHASES)[kill] if kill < len(PHASES) else None
        if phase is not None:
            process = clean_process(killed_at, command, phase, draw.randint(2, 5))
            process.start()
            process.join(60)
        else:
            process = clean_process(train_without_figure, command)
            process.start()
            process.join(draw.uniform(0.2, 0.8))
            process.kill()
            process.join()
        assert process.exitcode == -signal.SIGKILL, f"{phase}: it ended before it could be killed"
        folder = find_state(tmp_path / "killed", "auto")
        steps.append(load_progress(folder)["step"] if folder is not None else 0)
    assert steps == sorted(steps), "what is saved is never lost"
    assert 0 < steps[-1] < 120, steps
    train.main(command)
    assert_same(final_state(tmp_path / "whole"), final_state(tmp_path / "killed"))
    assert find_snapshot(str(tmp_path / "killed")).name == "step-0000120"
    logged = [line["step"] for line in read_metrics(tmp_path / "killed" / "metrics.jsonl") if "loss" in line]
    assert logged == sorted(set(logged)), "no step twice"
    assert set(logged) >= set(range(10, 121, 10))
    state = tmp_path / "killed" / "state"
    assert sorted(path.name for path in state.iterdir()) == ["step-0000118", "step-0000120"]
