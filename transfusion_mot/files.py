"""Files that commands read line by line, and checks of paths that they write to."""

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from transfusion_mot.errors import UserError

# This file marks the folder of a low-rank adapter, as opposed to a whole snapshot.
ADAPTER_CONFIG = "adapter_config.json"
_INDEX = "model_index.json"
# Of a snapshot, beside the folders that its index names.
_FILES_OF_SNAPSHOT = {_INDEX, "pipeline.py", "README.md", "config.yaml"}

# How often and after how long to retry while another process writes a short file.
_ATTEMPTS, _SECONDS_BETWEEN = 20, 0.05


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


def claim(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Write a new JSON file, or read the existing one => the content of the file.

    If several processes call it at the same time, one of them writes; the content shows which.

    Raises:
        UserError: The file exists and is not a JSON object.
        OSError: The file cannot be written.
    """
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(json.dumps(content, ensure_ascii=False, indent=2) + "\n")
    except FileExistsError:
        pass
    return read_claim(path)


def claim_output(output: Path, marker: str, settings: dict[str, Any], what: str) -> None:
    """Make the folder that a command writes data into, or go on with one that it has written.

    Args:
        output: The folder.
        marker: JSON file in it that says how the data were made.
        settings: What it says.
        what: What the folder holds, for the message; the settings follow.

    Raises:
        UserError: It holds files of others, or data of other settings.
    """
    refuse_files_of_others(output, marker)
    output.mkdir(parents=True, exist_ok=True)
    before = claim(output / marker, settings)
    if before != settings:
        raise UserError(f"'{output}' holds {what} {before}, and {settings} is asked for; give another --output")


def refuse_files_of_others(output: Path, *markers: str) -> None:
    """Refuse a folder that holds files and none of those that the command writes first.

    Raises:
        UserError: It does.
    """
    if output.is_dir() and any(output.iterdir()) and not any((output / marker).exists() for marker in markers):
        raise UserError(
            f"'{output}' holds files but no {markers[0]} of this command, which might overwrite them; give another "
            "--output"
        )


def read_claim(path: Path) -> dict[str, Any]:
    """The content of a file of `claim`.

    Raises:
        UserError: The file is not a JSON object.
    """
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(_SECONDS_BETWEEN)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(content, dict):
            return content
        break
    raise UserError(f"'{path}' is not a file that this command wrote; give another folder, or remove this one")


def flush_to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk and survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_writable_folder(path: str | Path, what: str) -> None:
    """Refuse a folder that cannot be made or written to; the check leaves no files.

    Args:
        path: The folder; it need not exist.
        what: The folder's name in the message.

    Raises:
        UserError: It cannot be written to.
    """
    _check_writable(Path(path), f"{what} '{path}'")


def check_writable_file(path: str | Path, what: str) -> None:
    """Refuse a file that cannot be written; the check leaves no files.

    Raises:
        UserError: It is a folder or protected, or its own folder cannot be made or written to.
    """
    file = Path(path)
    if not file.exists():
        _check_writable(file.parent, f"{what} '{path}'")
    elif file.is_dir() or not os.access(file, os.W_OK):
        raise UserError(
            f"{what} '{path}' is {'a folder' if file.is_dir() else 'protected'}; give the name of a file to write"
        )


def _check_writable(folder: Path, named: str) -> None:
    there = folder.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        # Permission bits are not enough: a file system may be read-only, and root may write anyway.
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise UserError(f"{named} cannot be written: '{there}': {error.strerror}; choose another") from None


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


def refuse_other_content(output: Path, checkpoint: Path) -> None:
    """Refuse an output, whose content will be deleted, that holds the checkpoint or anything but a snapshot.

    Args:
        output: Folder that will be written anew.
        checkpoint: What is read.

    Raises:
        UserError: It holds something else.
    """
    if checkpoint.resolve().is_relative_to(output.resolve()):
        raise UserError(
            f"the output {output} holds the checkpoint, and what is in it would be deleted; give another folder"
        )
    if Path.cwd().is_relative_to(output.resolve()):
        raise UserError(f"the output {output} is, or holds, the folder that you are in, and is made anew; give another")
    names = {path.name for path in output.iterdir()} if output.is_dir() else set()
    if names and _INDEX not in names:
        raise UserError(
            f"the output {output} holds files but no {_INDEX}, and they would be deleted; give another folder"
        )
    if others := sorted(names - _FILES_OF_SNAPSHOT - {*(read_claim(output / _INDEX) if names else {})}):
        raise UserError(
            f"the output {output} holds {', '.join(others[:3])} beside a snapshot, which would be deleted; give "
            "another folder"
        )


def find_snapshot(path: str) -> Path:
    """Run folder or snapshot folder => snapshot folder; for a run the newest one.

    Raises:
        UserError: There is no snapshot.
    """
    folder = Path(path)
    if (folder / "model_index.json").is_file() or (folder / ADAPTER_CONFIG).is_file():
        return folder
    snapshots = step_folders(folder / "snapshots")
    if snapshots:
        return snapshots[-1]
    if not folder.exists():
        raise UserError(f"there is no folder {path}; give a run folder of train.py or one of its snapshots/step-N")
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
