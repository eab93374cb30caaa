"""The two things a run leaves: training states, from which it resumes, and snapshots, which are diffusers pipelines."""

import os
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from transfusion_mot.errors import UserError

STATE_FILE = "state.pt"
KEPT_STATES = 2


@contextmanager
def written_aside(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `folder` once the block ends without an error.

    A crash in the middle leaves what was there before.
    """
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    yield aside
    for path in aside.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


def save_state(run: Path, step: int, state: dict[str, Any]) -> None:
    """Write the training state after `step` steps and remove all but the newest ones."""
    with written_aside(run / "state" / f"step-{step:07d}") as folder:
        torch.save(state, folder / STATE_FILE)
    for old in _steps(run / "state")[:-KEPT_STATES]:
        shutil.rmtree(old)


def find_state(run: Path, resume: str) -> Path | None:
    """The training state that `resume` (`auto`, `never` or a path) asks for, or None to begin.

    Raises:
        UserError: There is none at the path, or `never` was asked for in a folder that holds a run.
    """
    states = _steps(run / "state")
    if resume in ("auto", "never") and not states and (snapshots := _steps(run / "snapshots")):
        raise UserError(
            f"output_dir {run} holds {snapshots[-1].name} of a run but no training state to go on from; choose another "
            "folder, or remove snapshots/ to start over"
        )
    if resume == "auto":
        return states[-1] if states else None
    if resume == "never":
        if states:
            raise UserError(
                f"output_dir {run} holds a run with training state {states[-1].name}; choose another folder, "
                "or resume=auto to continue it"
            )
        return None
    folder = Path(resume)
    if not (folder / STATE_FILE).is_file():
        raise UserError(f"resume={resume} is no training state; it needs a folder state/step-N that holds {STATE_FILE}")
    return folder


def drop_later(run: Path, step: int) -> None:
    """Remove the states and snapshots behind a step: a run that goes on from there would be mistaken for them."""
    for later in [*_steps(run / "state"), *_steps(run / "snapshots")]:
        if _step_number(later) > step:
            shutil.rmtree(later)


def load_state(folder: Path) -> dict[str, Any]:
    """Read a training state onto the CPU.

    Raises:
        UserError: The file is damaged.
    """
    try:
        return torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(f"training state {folder} cannot be read ({error}); remove it to use the one before") from None


def find_snapshot(path: str) -> Path:
    """Run folder or snapshot folder => snapshot folder; of a run, the newest one.

    Raises:
        UserError: There is no snapshot.
    """
    folder = Path(path)
    if (folder / "model_index.json").is_file():
        return folder
    snapshots = _steps(folder / "snapshots")
    if snapshots:
        return snapshots[-1]
    if not folder.exists():
        raise UserError(f"there is no folder {path}; give a run folder of train.py or one of its snapshots/step-N")
    raise UserError(
        f"{path} holds no snapshot (neither model_index.json nor snapshots/step-N); give a run folder of train.py "
        "that has saved one, or a snapshot"
    )


def _steps(folder: Path) -> list[Path]:
    """The folders step-N in `folder`, by N."""
    return sorted((path for path in folder.glob("step-*") if path.name[5:].isdigit()), key=_step_number)


def _step_number(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))
