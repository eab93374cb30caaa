"""Options for input paths: a missing path is refused in one sentence, before PyTorch loads."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transfusion_mot.errors import UserError


class PathOption(argparse.Action):
    """Stores a path, or a list of paths, after `check` has accepted them.

    With `type=check` argparse would print the usage and the option's name before the sentence.

    Args:
        check: Receives one path; raises a `UserError` if it cannot be used.
    """

    def __init__(self, *args: Any, check: Callable[[str], object], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.check = check

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[str] | None,
        option_string: str | None = None,
    ) -> None:
        for path in [values] if isinstance(values, str) else values or []:
            # For `Path`, an empty text is the working directory; here it is mostly a variable that is not set.
            if not path:
                raise UserError(f"{option_string or self.metavar} is empty; give a path, as --help says")
            self.check(path)
        setattr(namespace, self.dest, values)


def existing(needed: str) -> Callable[[str], None]:
    """A check that a file or folder exists.

    Args:
        needed: What the option takes, for the message: "a folder of images".
    """

    def check(path: str) -> None:
        if not path or not Path(path).exists():
            raise UserError(f"there is no '{path}'; give {needed}")

    return check


def existing_or_on_hub(what: str) -> Callable[[str], None]:
    """A check of a path or a name on the Hugging Face hub; the hub is not asked.

    Args:
        what: The option's name, for the message: "--clip".
    """

    def check(name: str) -> None:
        # The import loads the client of the hub, so --help must not reach it.
        from transfusion_mot.hub_names import refuse_missing_path

        refuse_missing_path(name, what, "; give a folder, or a name on the Hugging Face hub")

    return check
