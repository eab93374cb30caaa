"""Names that are a local path or a repository on the Hugging Face hub."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from transfusion_mot.errors import UserError

# What to do, by the setting that names what is not there.
_HINTS = {
    "init_from": "; give a snapshot, or a run folder that has saved one",
    "pretrained": "; give the folder of a language model, or its name on the hub",
    "tokenizer path": "; null trains one on the run's own texts",
    "codec path": "; `python -m transfusion_mot.autoencoder` trains one",
}


def refuse_missing_path(name: str | os.PathLike[str], what: str, hint: str = "") -> None:
    """Refuse a missing local path instead of asking the hub for it.

    Args:
        name: A path, or a name on the hub.
        what: What is named, for the message: "codec path".
        hint: What to do, after a semicolon; for the settings of a run it is known.

    Raises:
        UserError: It is empty or no path; or it does not exist, and it begins like a path, has more parts than a name
            on the hub, or lies in an existing folder.
    """
    if not name or not isinstance(name, str | os.PathLike):
        given = "empty" if name == "" else repr(name)
        raise UserError(f"{what} is {given}{hint or '; give a folder or a name on the Hugging Face hub'}")
    path, name = Path(name), str(name)
    is_path = name.startswith(("/", "./", "../", "~")) or len(path.parts) > 2
    # The owner in a hub name is not a local folder.
    is_path = is_path or (len(path.parts) == 2 and path.parent.is_dir())
    if is_path and not path.exists():
        there = path.parent
        while not there.exists():
            there = there.parent
        raise UserError(
            f"{what} '{name}' does not exist; there is '{there}', but no '{path.relative_to(there)}' in it"
            f"{hint or _HINTS.get(what, '')}"
        )


def ask_hub(name: str, kind: Literal["model", "dataset"] = "model") -> None:
    """Ask the hub once for a repository, before a library asks for each of its files.

    Without a network the libraries retry every file, for half a minute.

    Args:
        name: On the hub; of a local path nothing is asked.
        kind: What the repository holds.

    Raises:
        OSError, ValueError: The repository does not exist, or it is not in the cache and the hub cannot be reached.
    """
    if not Path(name).exists():
        _fetched(name, [{"model": "config.json", "dataset": "README.md"}[kind]], kind)


def download(name: str, patterns: Sequence[str], what: str) -> Path:
    """A folder with the files of a repository on the hub that match one of the patterns.

    Args:
        name: On the hub.
        patterns: Of paths in the repository, such as `*.json`.
        what: The key that names it, for the message.

    Raises:
        UserError: It cannot be downloaded.
    """
    try:
        return _fetched(name, patterns)
    except (OSError, ValueError, HFValidationError) as error:
        raise UserError(
            f"{what}={name} is not a folder and cannot be downloaded from the Hugging Face hub "
            f"({' '.join(str(error).split())[:200]})"
        ) from None


def _fetched(name: str, patterns: Sequence[str], kind: str = "model") -> Path:
    """`snapshot_download`, with a short message if there is no network."""
    try:
        return Path(snapshot_download(name, repo_type=kind, allow_patterns=list(patterns)))
    except LocalEntryNotFoundError:
        raise OSError("it is not in the cache, and the hub cannot be reached, or HF_HUB_OFFLINE is set") from None
