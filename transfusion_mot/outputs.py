"""Checks of files and folders that commands write: they can be written, and nothing else is overwritten."""

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from transfusion_mot.errors import UserError
from transfusion_mot.files import RUN_CONFIG, SNAPSHOT_INDEX

# Files of a snapshot, in addition to the folders that its index names.
_FILES_OF_SNAPSHOT = {SNAPSHOT_INDEX, RUN_CONFIG, "pipeline.py", "README.md"}

# How often and after how long to retry while another process writes a short file.
_ATTEMPTS, _SECONDS_BETWEEN = 20, 0.05


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
    """Create the output folder of a command that writes data, or continue with an earlier one of the same settings.

    Args:
        output: The folder.
        marker: JSON file in it that stores the settings of the data.
        settings: Its content.
        what: What the folder holds, for the message; the settings follow.

    Raises:
        UserError: The folder holds other files, or data of other settings.
    """
    refuse_files_of_others(output, marker)
    output.mkdir(parents=True, exist_ok=True)
    before = claim(output / marker, settings)
    if before != settings:
        raise UserError(f"'{output}' holds {what} {before}, but {settings} is requested; give another --output")


def refuse_files_of_others(output: Path, *markers: str) -> None:
    """Refuse an output folder with files that the command did not write.

    Args:
        markers: Files of which the command writes at least one first.

    Raises:
        UserError: The folder holds files, but none of the markers.
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


def check_picture_name(path: str | Path, what: str) -> None:
    """Refuse a file name from which Pillow cannot tell the format to write.

    Args:
        what: The option's name in the message.

    Raises:
        UserError: The name does not end like a picture's.
    """
    # Most commands import this module and write no picture; Pillow would slow down their start.
    from PIL import Image

    if Image.registered_extensions().get(Path(path).suffix.lower()) not in Image.SAVE:
        raise UserError(f"{what} is '{path}'; its name must end like a picture's, such as .png")


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


def refuse_other_content(output: Path, checkpoint: Path) -> None:
    """Refuse an output folder that holds the checkpoint or anything except a snapshot: its content will be deleted.

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
        raise UserError(
            f"the output {output} contains the working directory, and its content would be deleted; give another folder"
        )
    names = {path.name for path in output.iterdir()} if output.is_dir() else set()
    if names and SNAPSHOT_INDEX not in names:
        raise UserError(
            f"the output {output} holds files but no {SNAPSHOT_INDEX}, and they would be deleted; give another folder"
        )
    if others := sorted(names - _FILES_OF_SNAPSHOT - {*(read_claim(output / SNAPSHOT_INDEX) if names else {})}):
        raise UserError(
            f"the output {output} holds {', '.join(others[:3])} beside a snapshot, which would be deleted; give "
            "another folder"
        )
