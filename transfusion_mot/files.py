"""Files that commands read line by line or write as a whole, and folders of snapshots and states."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transfusion_mot.errors import UserError

# This file marks the folder of a low-rank adapter, as opposed to a whole snapshot.
ADAPTER_CONFIG = "adapter_config.json"
# The index of a snapshot, as of every pipeline of diffusers.
SNAPSHOT_INDEX = "model_index.json"
# The whole configuration of a run, in its folder and in exported snapshots.
RUN_CONFIG = "config.yaml"


def lines_of(text: str) -> list[str]:
    """The lines of a text, split at LF or CRLF.

    `str.splitlines` also splits at characters that prompts and JSON strings may contain: form feeds, vertical tabs,
    U+0085, U+2028 and others.
    """
    return text.replace("\r\n", "\n").removesuffix("\n").split("\n") if text else []


def read_lines(path: str | Path, what: str) -> list[str]:
    """The lines of a text file; "-" is standard input.

    Args:
        what: What the file is, for the message.

    Raises:
        UserError: The file does not exist or is not UTF-8.
    """
    try:
        content = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        return lines_of(content.decode("utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{what} '{path}' cannot be read as UTF-8 text: {error}") from None


@contextmanager
def written_whole(path: Path, *, is_shared: bool = False) -> Iterator[Path]:
    """A temporary file that replaces `path` when the block ends without an error.

    So nobody reads a part of a file: neither another process, nor the next run after a kill, which overwrites the
    temporary file.

    Args:
        is_shared: Whether other processes may write the file at the same time. Each then has its own temporary file,
            which a killed one leaves behind.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial" if is_shared else f".{path.name}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def flush_to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk and survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def refuse_dangling_links(folder: Path) -> None:
    """Refuse a model folder that was copied without the files that its links point to.

    Raises:
        UserError: A link in it is dangling.
    """
    for path in sorted(folder.rglob("*")) if folder.is_dir() else []:
        if path.is_symlink() and not path.exists():
            raise UserError(
                f"'{path}' is a link to '{path.readlink()}', which does not exist; copy the folder again and follow "
                "its links: cp -rL"
            )


def find_snapshot(path: str) -> Path:
    """Run folder or snapshot folder => snapshot folder; for a run the newest one.

    Raises:
        UserError: There is no snapshot.
    """
    folder = Path(path)
    if (folder / SNAPSHOT_INDEX).is_file() or (folder / ADAPTER_CONFIG).is_file():
        return folder
    snapshots = step_folders(folder / "snapshots")
    if snapshots:
        return snapshots[-1]
    if not folder.exists():
        raise UserError(f"there is no folder '{path}'; give a run folder of train.py or one of its snapshots/step-N")
    raise UserError(
        f"{path} holds no snapshot (neither model_index.json nor snapshots/step-N); give a run folder of train.py "
        "that has saved one, or a snapshot"
    )


def step_folders(folder: Path) -> list[Path]:
    """The folders step-N in `folder`, by N."""
    return sorted((path for path in folder.glob("step-*") if path.name[5:].isdigit()), key=step_number)


def step_number(folder: Path) -> int:
    """N of a folder step-N."""
    return int(folder.name.removeprefix("step-"))
