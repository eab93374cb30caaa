"""Names that stand for a local path, or else for something on the Hugging Face hub."""

from pathlib import Path

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
