"""The folders a run leaves: training states, from which it resumes, and snapshots, which are diffusers pipelines."""

import errno
import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transfusion_mot.config import RunConfig, parse_config
from transfusion_mot.errors import UserError
from transfusion_mot.files import ADAPTER_CONFIG, flush_to_disk, step_folders, step_number

# What of a training state is no tensor.
PROGRESS_FILE = "progress.json"
_CONFIG = "config.yaml"
# Files that tell the folder of a snapshot, an adapter, or a codec.
_MODELS = ("model_index.json", ADAPTER_CONFIG, "config.json")


@contextmanager
def written_aside(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `folder` once the block ends without an error.

    A crash in the middle leaves what was there before. Of a link, the folder that it points to is replaced.
    """
    folder = folder.resolve()
    aside = begin_aside(folder)
    yield aside
    put_in_place(folder)


def aside_of(folder: Path) -> Path:
    """Where `folder` is written."""
    return folder.with_name(f".{folder.name}.partial")


def begin_aside(folder: Path) -> Path:
    """The same, empty."""
    aside = aside_of(folder)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    return aside


def put_in_place(folder: Path) -> None:
    """Let what was written aside take the place of `folder`, once it is on the disk."""
    aside = aside_of(folder)
    for path in [*aside.rglob("*"), aside]:
        flush_to_disk(path)
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
    flush_to_disk(folder.parent)


@contextmanager
def held_alone(run: Path) -> Iterator[None]:
    """Keep other runs out of a run folder until the block or the process ends.

    Two runs in one folder would remove each other's states. One can outlive its launcher, whose end does not end all
    processes.

    Raises:
        UserError: Another process trains in the folder.
    """
    with (run / ".lock").open("a") as file:
        try:
            # Of this process alone: one that `flock` takes would outlive it in forked workers.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # Some file systems have no locks.
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise UserError(
                    f"another process trains in output_dir {run}; wait for its end, end it, or choose another folder"
                ) from None
        yield


def find_state(run: Path, resume: str) -> Path | None:
    """The training state that `resume` (`auto`, `never` or a path) asks for, or None to begin.

    Raises:
        UserError: There is none at the path, `never` was asked for in a folder that holds a run, or the folder holds
            another run than the one that is continued, or a model.
    """
    states, snapshots = step_folders(run / "state"), step_folders(run / "snapshots")
    if not states and (models := [name for name in _MODELS if (run / name).is_file()]):
        raise UserError(
            f"output_dir {run} holds a model ({models[0]}), whose files a run would overwrite; choose another folder"
        )
    if resume in ("auto", "never") and not states and snapshots and not _was_killed_before_a_state(run, snapshots):
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
    if not (folder / PROGRESS_FILE).is_file():
        raise UserError(
            f"resume={resume} is no training state; it needs a folder state/step-N that holds {PROGRESS_FILE}"
        )
    if (states or snapshots) and folder.resolve().parent.parent != run.resolve():
        raise UserError(
            f"resume={resume} is a state of another run than the one that output_dir {run} holds, whose states and "
            "snapshots would be overwritten; choose another output_dir"
        )
    return folder


def _was_killed_before_a_state(run: Path, snapshots: list[Path]) -> bool:
    """Whether the state of each snapshot was begun and never ended: then there is nothing to go on from.

    There are two where the first state took longer to write than the steps up to the second save.
    """
    return all(aside_of(run / "state" / snapshot.name).is_dir() for snapshot in snapshots)


def clear_behind(run: Path, step: int) -> list[str]:
    """Remove the states and snapshots behind a step: a run that goes on from there would be mistaken for them.

    What was being written when the run was killed goes, too.

    Returns:
        The names of what was whole.
    """
    removed = []
    for folder in (run / "state", run / "snapshots"):
        behind = [path for path in step_folders(folder) if step_number(path) > step]
        for left in [*folder.glob(".step-*.partial"), *behind]:
            shutil.rmtree(left)
        removed += [f"{folder.name}/{path.name}" for path in behind]
    return removed


def prune(folder: Path, keep_last: int, keep_every: int, best_step: int | None) -> None:
    """Remove all of the folders step-N in `folder` but the newest, those of every `keep_every` steps (0: none), and
    that of the best step."""
    for old in step_folders(folder)[:-keep_last]:
        step = step_number(old)
        if step != best_step and (not keep_every or step % keep_every):
            shutil.rmtree(old)


def run_config_file(folder: Path) -> Path:
    """Where the configuration of the run of a snapshot or state lies: in its folder if exported, else in the run's."""
    own = folder / _CONFIG
    return own if own.is_file() else folder.parent.parent / _CONFIG


def read_run_config(snapshot: Path, given: str | None, option: str) -> RunConfig:
    """The configuration of the run that a snapshot is of, or the one that is given instead.

    Args:
        snapshot: Of the run.
        given: Path of a configuration, or None.
        option: What gives it on the command line; for the message.

    Raises:
        UserError: There is none, or it is no configuration of train.py.
    """
    file = Path(given) if given is not None else run_config_file(snapshot)
    if not file.is_file():
        missing = f"there is no configuration {file}" if given is not None else f"{snapshot} lies in no run folder"
        raise UserError(f"{missing}; give the configuration that it was trained with, to find its data, by {option}")
    return parse_config(RunConfig, ["--config", str(file)], "")
