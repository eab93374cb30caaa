"""Stores of a source's media: files, tar files, parquet files or Arrow tables, read one item at a time."""

import errno
import io
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from transfusion_mot.data.images import UnreadableImage
from transfusion_mot.data.sources.arrays import StoredArrays, file_stamp
from transfusion_mot.data.sources.base import SkippedItems
from transfusion_mot.data.sources.keys import Keys, key_of, keys_from
from transfusion_mot.data.sources.reading import FilePart, with_retries
from transfusion_mot.errors import UnreadableMedia, UserError

Items = npt.NDArray[np.int64]

_STATS_AT_ONCE = 256
# Larger than the number of media in one row of a table.
_MOST_POSITIONS = 2**24


class MediaStore(Protocol):
    """Encoded images or audio clips by the number of their item.

    Attributes:
        unreadable: Error class for a missing item; it gives the name of the media.
    """

    unreadable: type[UnreadableMedia]

    def present(self, items: Items, skipped: SkippedItems) -> tuple[Items, Keys]:
        """The existing `items` and their stamps, which change with the media; others are counted in `skipped`."""
        ...

    def open(self, item: int) -> BinaryIO | Image.Image:
        """An encoded image or audio clip as a file object, which reads only requested bytes, or a picture.

        Raises:
            UnreadableMedia: It does not exist.
            OSError: The system failed to read it.
        """
        ...

    def where(self, item: int) -> str:
        """Place of an item, for messages."""
        ...


def content_of(store: MediaStore, item: int) -> bytes | Image.Image:
    """All bytes of an encoded image or audio clip, or a picture.

    Raises:
        UnreadableMedia: It does not exist.
        FileNotFoundError: Its file was removed after the source was opened.
        UserError: The system failed to read it in all attempts.
    """
    try:
        source = store.open(item)
        if isinstance(source, Image.Image):
            return source
        with source:
            return source.read()
    except FileNotFoundError:
        raise
    except EOFError as error:
        raise UserError(
            f"{store.unreadable.what} '{store.where(item)}' is cut off: {error}; its file has changed since it was "
            "indexed: start again"
        ) from None
    except OSError as error:
        raise UserError(
            f"{store.unreadable.what} '{store.where(item)}' cannot be read: {error.strerror or error}"
        ) from None


class FileStore:
    """Media in files: their paths relative to `folder` are the strings `names` of `arrays`.

    The names of arrays begin with `prefix`.
    """

    def __init__(
        self,
        folder: Path,
        arrays: StoredArrays,
        prefix: str = "",
        unreadable: type[UnreadableMedia] = UnreadableImage,
    ) -> None:
        self.unreadable = unreadable
        self.folder = folder
        self.arrays = arrays
        self._names = f"{prefix}names"

    def present(self, items: Items, skipped: SkippedItems) -> tuple[Items, Keys]:
        names = self.arrays.strings(self._names)
        folder = self.folder.resolve()

        def look(chunk: Items) -> tuple[list[int], bytes]:
            sizes, hashes = [], []
            for path in (folder / names[item] for item in chunk.tolist()):
                size, time = _size_and_time(path, self.unreadable.what)
                sizes.append(size)
                hashes.append(_stamp_of(str(path), size, time))
            return sizes, b"".join(hashes)

        # Threads, because a network file system is slow for each file.
        with ThreadPoolExecutor(16) as pool:
            chunks = (items[start : start + _STATS_AT_ONCE] for start in range(0, len(items), _STATS_AT_ONCE))
            looked = list(pool.map(look, chunks))
        sizes = np.array([size for part, _ in looked for size in part], dtype=np.int64)
        for position in np.flatnonzero(sizes <= 0).tolist():
            reason = "empty" if sizes[position] == 0 else "missing"
            skipped.add(f"{reason} {self.unreadable.file}", names[int(items[position])])
        there = sizes > 0
        # Reading all bytes would take as long as encoding; an edit changes the size or the time.
        stamps = keys_from(b"".join(hashes for _, hashes in looked))
        return items[there], stamps[there]

    def open(self, item: int) -> BinaryIO:
        return _opened(self.folder / self.arrays.strings(self._names)[item])

    def where(self, item: int) -> str:
        return str(self.folder / self.arrays.strings(self._names)[item])


def _opened(path: Path, offset: int = 0, size: int | None = None) -> BinaryIO:
    # A small buffer, because some callers read only the header; `readall` reads everything at once.
    return cast(BinaryIO, io.BufferedReader(FilePart(path, offset, size), buffer_size=4096))


def _stamp_of(*parts: object) -> bytes:
    return key_of(repr(parts).encode("utf-8", errors="surrogateescape"))


def stamps_of(files: Sequence[object], numbers: npt.NDArray[Any], places: npt.NDArray[Any]) -> Keys:
    """[N, 2] stamps from keys of files, the number of each item's file, and its place in the file."""
    halves = keys_from(b"".join(map(_stamp_of, files)))[:, 0]
    return np.stack([halves[numbers], places.astype(np.uint64)], axis=1)


def _size_and_time(path: Path, what: str) -> tuple[int, int]:
    """Size in bytes and modification time of a file, which is called `what` in messages; -1 if it does not exist.

    Raises:
        UserError: The system failed to read them.
    """
    try:
        status = with_retries(path.stat)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a name with a null character
        return -1, -1
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            return -1, -1
        raise UserError(f"{what} '{path}' cannot be read: {error.strerror}") from None
    return (status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else (-1, -1)


class TarStore:
    """Media in uncompressed tar files, read in place: `arrays` holds `names`, `files`, `offsets` and `sizes`.

    The names of all arrays except `files` begin with `prefix`.
    """

    def __init__(
        self,
        files: Sequence[Path],
        arrays: StoredArrays,
        prefix: str = "",
        unreadable: type[UnreadableMedia] = UnreadableImage,
    ) -> None:
        self.unreadable = unreadable
        self.files = list(files)
        self.arrays = arrays
        self._names, self._offsets, self._sizes = (f"{prefix}{name}" for name in ("names", "offsets", "sizes"))

    def present(self, items: Items, skipped: SkippedItems) -> tuple[Items, Keys]:
        # The index is valid for exactly these files: their stamps are part of its key.
        stamps = [file_stamp(file) for file in self.files]
        return items, stamps_of(stamps, self.arrays["files"][items], self.arrays[self._offsets][items])

    def open(self, item: int) -> BinaryIO:
        path = self.files[int(self.arrays["files"][item])]
        # Opened each time: a descriptor kept for each of thousands of tar files would exhaust them.
        return _opened(path, int(self.arrays[self._offsets][item]), int(self.arrays[self._sizes][item]))

    def where(self, item: int) -> str:
        return f"{self.files[int(self.arrays['files'][item])]}:{self.arrays.strings(self._names)[item]}"


class ParquetStore:
    """Media in a column of parquet files, without a copy: to read one row, its whole row group is read.

    Reading in order is fast. `arrays` holds `files` and `rows`, the number of an item's row in its file; for columns of
    lists of media also `positions` in the lists.
    """

    def __init__(
        self,
        files: Sequence[Path],
        column: str,
        arrays: StoredArrays,
        unreadable: type[UnreadableMedia] = UnreadableImage,
    ) -> None:
        self.unreadable = unreadable
        self.files = list(files)
        self.column = column
        self.arrays = arrays
        # Also distinguishes cached content of a file from its content after it was rewritten.
        self._stamps = [tuple(file_stamp(file)) for file in files]

    def present(self, items: Items, skipped: SkippedItems) -> tuple[Items, Keys]:
        stamps = [(stamp, self.column) for stamp in self._stamps]
        numbers, rows, positions = (self.arrays[name][items] for name in ("files", "rows", "positions"))
        return items, stamps_of(stamps, numbers, rows * _MOST_POSITIONS + positions)

    def open(self, item: int) -> BinaryIO:
        number = int(self.arrays["files"][item])
        row = int(self.arrays["rows"][item])
        stamp = self._stamps[number]
        try:
            starts = with_retries(partial(_row_group_starts, stamp))
            group = int(np.searchsorted(starts, row, side="right")) - 1
            value = with_retries(partial(_row_group, stamp, group, self.column))[row - int(starts[group])]
        except (pa.ArrowInvalid, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise self.unreadable(self.where(item), f"cannot be read: {str(error).splitlines()[0]}") from None
        if isinstance(value, pa.ListScalar):
            value = value[int(self.arrays["positions"][item])]
        return _opened_value(self, value.as_py(), self.files[number].parent, item)

    def where(self, item: int) -> str:
        return f"{self.files[int(self.arrays['files'][item])]}:{int(self.arrays['rows'][item]) + 1}"


@lru_cache(maxsize=4096)
def _row_group_starts(stamp: tuple[Any, ...]) -> npt.NDArray[np.int64]:
    with pq.ParquetFile(stamp[0], memory_map=True) as table:
        rows = [table.metadata.row_group(group).num_rows for group in range(table.metadata.num_row_groups)]
    return np.cumsum([0, *rows])[:-1]


# A small number, because a row group of images may have hundreds of megabytes.
@lru_cache(maxsize=2)
def _row_group(stamp: tuple[Any, ...], group: int, column: str) -> pa.ChunkedArray:
    with pq.ParquetFile(stamp[0], memory_map=True) as table:
        return table.read_row_group(group, columns=[column]).column(column)


class ArrowStore:
    """Media in a column of a data set of the library `datasets`, mapped from disk; `arrays` holds `rows`."""

    def __init__(
        self,
        dataset: datasets.Dataset,
        column: str,
        name: str,
        arrays: StoredArrays,
        unreadable: type[UnreadableMedia] = UnreadableImage,
    ) -> None:
        self.unreadable = unreadable
        self.dataset = dataset.select_columns([column])
        for kind in (datasets.Image, datasets.Audio):
            if isinstance(dataset.features[column], kind):
                # As undecoded files, because this project decodes them.
                self.dataset = self.dataset.cast_column(column, kind(decode=False))
        self.column = column
        self.name = name
        self.arrays = arrays

    def present(self, items: Items, skipped: SkippedItems) -> tuple[Items, Keys]:
        rows = self.arrays["rows"][items]
        return items, stamps_of([(self.dataset._fingerprint, self.column)], np.zeros_like(rows), rows)

    def open(self, item: int) -> BinaryIO:
        value = self.dataset[int(self.arrays["rows"][item])][self.column]
        return _opened_value(self, value, Path(), item)

    def where(self, item: int) -> str:
        return f"{self.name}:{int(self.arrays['rows'][item])}"


def _opened_value(store: ParquetStore | ArrowStore, value: Any, folder: Path, item: int) -> BinaryIO:
    """Open a value of a table column: bytes, a path below `folder`, or both as {"bytes": ..., "path": ...}.

    Raises:
        UnreadableMedia: It is null, has another type, or its file does not exist; gives the column and its value.
    """
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes) and value:
        return io.BytesIO(value)
    if isinstance(value, str) and value and with_retries((folder / value).is_file):
        return _opened(folder / value)
    if not value:
        reason = f"is missing: the column '{store.column}' is empty there"
    else:
        what = "file" if isinstance(value, str) else store.unreadable.what
        reason = f"cannot be read: the column '{store.column}' holds {value!r:.80}, which is not a valid {what}"
    raise store.unreadable(store.where(item), reason)
