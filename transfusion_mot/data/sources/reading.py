"""Reading of files and parts of files; system failures are retried."""

import errno
import io
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

# Seconds before the second, third and fourth attempt: a network file system recovers after seconds or minutes.
PAUSES = (0.1, 2.0, 20.0)

# Errors that a retry cannot change: a wrong name, or a file that the user may not read.
_SETTLED = (
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.EACCES,
    errno.EPERM,
    errno.EINVAL,
)

_Value = TypeVar("_Value")


def with_retries(read: Callable[[], _Value]) -> _Value:
    """Call `read`, and retry after a pause if the system fails: too many open files, no network, a bad disk.

    Raises:
        OSError: The error of the last attempt, or of the first if a retry cannot help.
    """
    for pause in PAUSES:
        try:
            return read()
        except OSError as error:
            # Libraries raise OSError without an error number for invalid content.
            if error.errno in (None, *_SETTLED):
                raise
        time.sleep(pause)
    return read()


class FilePart(io.RawIOBase):
    """A part of a file, or all of it, as a file object; opened at the first read.

    Args:
        path: The file.
        offset: First byte of the part.
        size: Size of the part in bytes; None means up to the end of the file.
    """

    def __init__(self, path: Path, offset: int = 0, size: int | None = None) -> None:
        super().__init__()
        self.path = path
        self.offset = offset
        self._size = size
        self._position = 0
        self._file: int | None = None

    @property
    def size(self) -> int:
        """Size of the part in bytes."""
        if self._size is None:
            self._size = with_retries(self.path.stat).st_size - self.offset
        return self._size

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to an offset in the part."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        if start + offset < 0:
            raise ValueError(f"place {start + offset} is before the beginning")
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` from the current offset => number of bytes; 0 at the end."""
        view = memoryview(buffer).cast("B")
        view = view[: max(0, self.size - self._position)]
        count = with_retries(lambda: self._read_once(view)) if len(view) else 0
        self._position += count
        return count

    def _read_once(self, view: memoryview) -> int:
        try:
            if self._file is None:
                self._file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            return os.preadv(self._file, [view], self.offset + self._position)
        except OSError:
            # The descriptor of a file that its server has replaced stays stale.
            self._close_file()
            raise

    def readall(self) -> bytes:
        """All bytes from the current offset to the end.

        Raises:
            EOFError: The file is shorter than the part.
        """
        content = bytearray(max(0, self.size - self._position))
        view = memoryview(content)
        while len(view):
            count = self.readinto(view)
            if not count:
                raise EOFError(f"{len(content) - len(view)} of {len(content)} bytes")
            view = view[count:]
        return bytes(content)

    def close(self) -> None:
        """Close the file."""
        self._close_file()
        super().close()

    def _close_file(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None
