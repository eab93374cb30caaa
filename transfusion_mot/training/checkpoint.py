"""Folders of a run: training states, from which it resumes, and snapshots, which are diffusers pipelines."""

import errno
import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transfusion_mot.config import RunConfig, parse_config
from transfusion_mot.errors import UserError
from transfusion_mot.files import ADAPTER_CONFIG, RUN_CONFIG, SNAPSHOT_INDEX, flush_to_disk, step_folders, step_number

# The part of a training state that is not tensors.
PROGRESS_FILE = "progress.json"
# Files that mark the folder of a snapshot, an adapter or a codec.
_MODELS = (SNAPSHOT_INDEX, ADAPTER_CONFIG, "config.json")


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that replaces `folder` when the block ends without an error.

    A crash in between leaves the previous folder unchanged. If `folder` is a link, its target is replaced.
    """
    folder = folder.resolve()
    aside = begin_aside(folder)
    yield aside
    put_in_place(folder)


def aside_of(folder: Path) -> Path:
    """The temporary folder in which `folder` is written."""
    return folder.with_name(f".{folder.name}.partial")


def begin_aside(folder: Path) -> Path:
    """The temporary folder, emptied."""
    aside = aside_of(folder)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    return aside


def put_in_place(folder: Path) -> None:
    """Replace `folder` by the temporary folder, once that is on the disk."""
    aside = aside_of(folder)
    for path in [*aside.rglob("*"), aside]:
        flush_to_disk(path)
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
    flush_to_disk(folder.parent)


@contextmanager
def held_alone(run: Path) -> Iterator[None]:
    """Keep other runs out of a run folder until the block or the process ends.

    Two runs in one folder would remove each other's states. A killed launcher may leave processes that train on.

    Raises:
        UserError: Another process trains in the folder.
    """
    with (run / ".lock").open("a") as file:
        try:
            # Forked workers do not inherit this lock; one of `flock` would be held until they end.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # Some file systems have no locks.
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise UserError(
                    f"another process trains in output_dir {run}; wait for its end, end it, or choose another folder"
                ) from None
        yield


def find_state(run: Path, resume: str) -> Path | None:
    """The training state selected by `resume` (`auto`, `never` or a path), or None for a new run.

    Raises:
        UserError: There is none at the path, `never` is given and the folder holds a run, or the folder holds a model
            or another run than the one that is continued.
    """
    states, snapshots = step_folders(run / "state"), step_folders(run / "snapshots")
    if not states and (models := [name for name in _MODELS if (run / name).is_file()]):
        raise UserError(
            f"output_dir {run} holds a model ({models[0]}), whose files a run would overwrite; choose another folder"
        )
    if resume in ("auto", "never") and not states and snapshots and not _was_killed_before_a_state(run, snapshots):
        raise UserError(
            f"output_dir {run} holds {snapshots[-1].name} of a run but no training state to continue; choose another "
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
            f"resume={resume} is not a training state; give a folder state/step-N that holds {PROGRESS_FILE}"
        )
    if (states or snapshots) and folder.resolve().parent.parent != run.resolve():
        raise UserError(
            f"resume={resume} is a state of another run. Output_dir {run} holds a run whose states and snapshots "
            "would be overwritten; choose another output_dir"
        )
    return folder


def _was_killed_before_a_state(run: Path, snapshots: list[Path]) -> bool:
    """Whether the state of every snapshot was begun but not finished, so that there is no state to resume from.

    There can be two snapshots if the first state took longer to write than the steps up to the second save.
    """
    return all(aside_of(run / "state" / snapshot.name).is_dir() for snapshot in snapshots)


def clear_behind(run: Path, step: int) -> list[str]:
    """Remove the states and snapshots after a step: they must not be mistaken for those of the resumed run.

    Folders that were being written when the run was killed are removed, too.

    Returns:
        The names of the complete ones.
    """
    removed = []
    for folder in (run / "state", run / "snapshots"):
        behind = [path for path in step_folders(folder) if step_number(path) > step]
        for left in [*folder.glob(".step-*.partial"), *behind]:
            shutil.rmtree(left)
        removed += [f"{folder.name}/{path.name}" for path in behind]
    return removed


def prune(folder: Path, keep_last: int, keep_every: int, best_step: int | None) -> None:
    """Remove folders step-N in `folder`; the newest, every `keep_every` steps (0: none) and the best step are kept."""
    for old in step_folders(folder)[:-keep_last]:
        step = step_number(old)
        if step != best_step and (not keep_every or step % keep_every):
            shutil.rmtree(old)


def run_config_file(folder: Path) -> Path:
    """Configuration file of the run of a snapshot or state: in its own folder if exported, else in the run folder."""
    own = folder / RUN_CONFIG
    return own if own.is_file() else folder.parent.parent / RUN_CONFIG


def read_run_config(snapshot: Path, given: str | None, option: str) -> RunConfig:
    """The configuration of a snapshot's run, or the given one.

    Args:
        snapshot: A snapshot of the run.
        given: Path of a configuration, or None.
        option: The command-line option of that path, for the message.

    Raises:
        UserError: There is no configuration, or it is not one of train.py.
    """
    file = Path(given) if given is not None else run_config_file(snapshot)
    if not file.is_file():
        missing = f"there is no configuration {file}" if given is not None else f"{snapshot} is not in a run folder"
        raise UserError(f"{missing}; give the configuration of its training by {option}, to find its data")
    return parse_config(RunConfig, ["--config", str(file)], "")
