"""Index arrays of a source on disk: built once, then memory-mapped by every process without copies."""

import hashlib
import json
import os
import shutil
import uuid
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast, overload

import numpy as np
import numpy.typing as npt

from transfusion_mot.data.sources.base import SkippedItems

# Part of every key: increase it when the format or the content of the files changes.
_FORMAT = 3


class Strings(Sequence[str]):
    """Strings as one array of UTF-8 bytes, and the end of each string.

    Worker processes share it. A list would gradually be copied into each of them by reference counting.
    """

    def __init__(self, content: npt.NDArray[np.uint8], ends: npt.NDArray[np.int64]) -> None:
        self._content = content
        self._ends = ends

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        start = int(self._ends[index - 1]) if index > 0 else 0
        return bytes(self._content[start : int(self._ends[index])]).decode("utf-8")


class StringsWriter:
    """Writes strings one after the other; a lone surrogate, which UTF-8 cannot encode, becomes "?"."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self.ends = array("q")

    def add(self, text: str) -> None:
        self._file.write(text.encode("utf-8", errors="replace"))
        self.ends.append(self._file.tell())

    def close(self) -> None:
        self._file.close()


class ArrayWriter:
    """Collects the arrays of a folder; strings go to disk at once, numbers (8 bytes each) when it is closed.

    Attributes:
        folder: The folder to write.
        skipped: Skipped items.
        before_close: Called when everything has been added.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.skipped = SkippedItems()
        self.before_close: list[Callable[[], None]] = []
        self._strings: dict[str, StringsWriter] = {}
        self._numbers: dict[str, array[Any]] = {}

    def strings(self, name: str) -> StringsWriter:
        """A new array of strings."""
        self._strings[name] = StringsWriter(self.folder / f"{name}.bytes")
        return self._strings[name]

    def integers(self, name: str) -> "array[int]":
        """A new array of integers."""
        self._numbers[name] = array("q")
        return self._numbers[name]

    def floats(self, name: str) -> "array[float]":
        """A new array of floating-point numbers."""
        self._numbers[name] = array("d")
        return self._numbers[name]

    def close(self) -> None:
        """Write the remaining arrays, and a hash of all arrays."""
        for finish in self.before_close:
            finish()
        for name, strings in self._strings.items():
            strings.close()
            self._numbers[f"{name}_ends"] = strings.ends
        for name, values in self._numbers.items():
            np.save(self.folder / f"{name}.npy", np.asarray(values))
        digest = hashlib.sha256()
        for path in sorted(self.folder.iterdir()):
            with path.open("rb") as file:
                # Flushed to disk before the rename, so that a machine failure leaves no partial file.
                os.fsync(file.fileno())
                digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()} ".encode())
        about = {
            "fingerprint": digest.hexdigest()[:16],
            "counts": self.skipped.counts,
            "examples": self.skipped.examples,
        }
        with (self.folder / "about.json").open("w") as text:
            text.write(json.dumps(about))
            text.flush()
            os.fsync(text.fileno())

    def abandon(self) -> None:
        """Close the files of an interrupted writer."""
        for strings in self._strings.values():
            strings.close()


class StoredArrays:
    """The memory-mapped arrays of a folder. A worker process maps them again; pickle sends only the path.

    Attributes:
        fingerprint: Hash of their content.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        about = json.loads((folder / "about.json").read_text())
        self.fingerprint: str = about["fingerprint"]
        self._skipped: dict[str, Any] = {name: about[name] for name in ("counts", "examples")}
        self._mapped: dict[str, npt.NDArray[Any]] = {}

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        if name not in self._mapped:
            self._mapped[name] = np.load(self.folder / f"{name}.npy", mmap_mode="r")
        return self._mapped[name]

    def strings(self, name: str) -> Strings:
        """The strings written under that name."""
        ends = self[f"{name}_ends"]
        if name not in self._mapped:
            path = self.folder / f"{name}.bytes"
            # An empty file cannot be mapped.
            empty = path.stat().st_size == 0
            self._mapped[name] = np.zeros(0, np.uint8) if empty else np.memmap(path, np.uint8, mode="r")
        return Strings(self._mapped[name], ends)

    def list_at(self, name: str, ends: str, index: int) -> list[str]:
        """The strings of one item; the array `ends` has the end of each item's strings."""
        start = int(self[ends][index - 1]) if index > 0 else 0
        return self.strings(name)[start : int(self[ends][index])]

    def skipped(self) -> SkippedItems:
        """Items skipped while the arrays were built; a copy that can be changed."""
        return SkippedItems(**cast(dict[str, Any], json.loads(json.dumps(self._skipped))))

    def __reduce__(self) -> tuple[type["StoredArrays"], tuple[Path]]:
        return StoredArrays, (self.folder,)


def stored_arrays(cache_dir: str, name: str, key: object, build: Callable[[ArrayWriter], None]) -> StoredArrays:
    """The arrays that `build` writes, read from `cache_dir` if they are there under `key` (any JSON value).

    They are written to a temporary folder and renamed at the end. So partial files of an interrupted run are never
    read, and two processes that build at the same time get the same files.
    """
    folder = arrays_folder(cache_dir, name, key)
    if not folder.exists():
        partial = folder.with_name(f"{folder.name}.partial-{uuid.uuid4().hex[:8]}")
        partial.mkdir(parents=True)
        writer = ArrayWriter(partial)
        try:
            build(writer)
            writer.close()
            os.replace(partial, folder)
        except OSError:
            # A folder that is not empty is not replaced: another process has finished first.
            if not folder.exists():
                raise
        finally:
            writer.abandon()
            shutil.rmtree(partial, ignore_errors=True)
    return StoredArrays(folder)


def arrays_folder(cache_dir: str, name: str, key: object) -> Path:
    """Folder of the arrays of `stored_arrays`."""
    digest = hashlib.sha256(json.dumps([_FORMAT, key]).encode()).hexdigest()[:16]
    return Path(cache_dir) / f"{name}-{digest}"


def file_stamp(path: Path) -> list[Any]:
    """Stamp that identifies an unchanged file without reading it: path, size and modification time.

    Raises:
        OSError: The file does not exist.
    """
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]
