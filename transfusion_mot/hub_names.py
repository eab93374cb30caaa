"""Names that stand for a local path, or else for something on the Hugging Face hub."""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

from transfusion_mot.errors import UserError


def refuse_missing_path(name: str, what: str, hint: str = "") -> None:
    """Refuse what reads like a local path and is none, instead of asking the hub for it.

    Args:
        what: What is named, for the message: "autoencoder path".
        hint: What else to do, behind a semicolon.

    Raises:
        UserError: It begins like a path, has more parts than a name on the hub, or its folder is there, and it is not.
    """
    path = Path(name)
    is_path = name.startswith(("/", "./", "../", "~")) or len(path.parts) > 2
    # A name on the hub may have an owner, which is no folder here.
    is_path = is_path or (len(path.parts) == 2 and path.parent.is_dir())
    if is_path and not path.exists():
        there = path.parent
        while not there.exists():
            there = there.parent
        raise UserError(
            f"{what} '{name}' does not exist; there is '{there}', but no '{path.relative_to(there)}' in it{hint}"
        )


def download(name: str, patterns: Sequence[str], what: str) -> Path:
    """A folder with the files of a repository on the hub that match one of the patterns.

    Args:
        name: On the hub.
        patterns: Of paths in the repository, such as `*.json`.
        what: The key that names it, for the message.

    Raises:
        UserError: It cannot be had.
    """
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except (OSError, ValueError, HFValidationError) as error:
        raise UserError(
            f"{what}={name} is neither a folder nor can it be had from the Hugging Face hub "
            f"({' '.join(str(error).split())[:200]})"
        ) from None
