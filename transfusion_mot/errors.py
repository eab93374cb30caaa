"""The exception for user mistakes, and how a command ends on it."""

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Something the user gave cannot be used; the message says what was given, what is needed and what to do."""


class NotFiniteError(UserError, FloatingPointError):
    """Training has diverged: a loss or gradient is not finite."""


class UnreadableMedia(UserError):
    """A file has no usable image or audio, and reading it again would not help.

    Attributes:
        what: What the file should contain, for messages.
        file: What messages call the file.
        reason: What is wrong, appended to the file's name.
    """

    what: str
    file: str

    def __init__(self, name: str, reason: str) -> None:
        # An exception is pickled between processes by these arguments.
        super().__init__(name, reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.what} '{self.args[0]}' {self.reason}"


def refuse_surrogates(text: str, what: str, remedy: str) -> None:
    """Refuse a text with lone surrogates. Python makes them from bytes that are not UTF-8, and they cannot be written.

    Raises:
        UserError: The text has some; the message names it by `what` and ends with `remedy`.
    """
    shown = text.encode(errors="backslashreplace").decode()
    if shown != text:
        raise UserError(f"the {what} '{shown}' is not UTF-8 text; {remedy}")


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turn a `UserError` into one line on standard error and exit status 2; our own bugs keep their stack trace.

    An argument of the command that is not UTF-8 is such an error, too, and so is a full disk.
    """
    try:
        for argument in sys.argv[1:]:
            refuse_surrogates(argument, "argument", "write it in UTF-8, or rename the file that it names")
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt as interruption:
        # A command may say what it has kept.
        print(": ".join(["interrupted", *map(str, interruption.args)]), file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        # Libraries in Rust have exceptions of their own, which hold the number in their text.
        number = getattr(error, "errno", None) or (errno.ENOSPC if f"os error {errno.ENOSPC})" in str(error) else None)
        if number not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"error: the disk or your quota is full ({error}); free some space and start again", file=sys.stderr)
        raise SystemExit(2) from None
