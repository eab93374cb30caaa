"""The one exception for what a user can put right, and how a command ends on it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Something the user gave cannot be used; the message says what was given, what is needed and what to do."""


class NotFiniteError(UserError, FloatingPointError):
    """Training has diverged: a loss or gradient is not finite."""


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turn a `UserError` into one line on standard error and exit status 2; a defect of ours keeps its stack trace."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
