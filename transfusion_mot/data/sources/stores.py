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
from transfusion_mot.data.sources.reading import FilePart, tried_again
from transfusion_mot.errors import UnreadableMedia, UserError

Items = npt.NDArray[np.int64]

_STATS_AT_ONCE = 256
# More media than one row of a table can hold.
_MOST_POSITIONS = 2**24


class MediaStore(Protocol):
    """Encoded images or audio clips by the number of their item.

    Attributes:
        unreadable: What is raised where there is none: it says what they are.
    """

    unreadable: type[UnreadableMedia]

    def present(self, items: Items, skipped: SkippedItems) -> tuple[Items, Keys]:
        """Those of `items` that are there, the others counted in `skipped`; and the stamp of each: media with the
        same stamp have not been edited since.
        """
        ...

    def open(self, item: int) -> BinaryIO | Image.Image:
        """An encoded image or audio clip, of which only what is asked for is read, or a picture.

        Raises:
            UnreadableMedia: There is none.
            OSError: The system fails to read it.
        """
        ...

    def where(self, item: int) -> str:
        """Where one lies, for messages."""
        ...


def content_of(store: MediaStore, item: int) -> bytes | Image.Image:
    """An encoded image or audio clip as a whole, or a picture.

    Raises:
        UnreadableMedia: There is none.
        FileNotFoundError: Its file was there when the source was opened.
        UserError: The system fails to read it, again and again.
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

        # Threads, because a file system over a network takes its time for each.
        with ThreadPoolExecutor(16) as pool:
            chunks = (items[start : start + _STATS_AT_ONCE] for start in range(0, len(items), _STATS_AT_ONCE))
            looked = list(pool.map(look, chunks))
        sizes = np.array([size for part, _ in looked for size in part], dtype=np.int64)
        for position in np.flatnonzero(sizes <= 0).tolist():
            reason = "empty" if sizes[position] == 0 else "missing"
            skipped.add(f"{reason} {self.unreadable.file}", names[int(items[position])])
        there = sizes > 0
        # Reading every byte would take as long as encoding; an edit changes size or time.
        stamps = keys_from(b"".join(hashes for _, hashes in looked))
        return items[there], stamps[there]

    def open(self, item: int) -> BinaryIO:
        return _opened(self.folder / self.arrays.strings(self._names)[item])

    def where(self, item: int) -> str:
        return str(self.folder / self.arrays.strings(self._names)[item])


def _opened(path: Path, offset: int = 0, size: int | None = None) -> BinaryIO:
    # A few kilobytes at a time for those who want to know the head only; whoever wants all gets it at once.
    return cast(BinaryIO, io.BufferedReader(FilePart(path, offset, size), buffer_size=4096))


def _stamp_of(*parts: object) -> bytes:
    return key_of(repr(parts).encode("utf-8", errors="surrogateescape"))


def stamps_of(files: Sequence[object], numbers: npt.NDArray[Any], places: npt.NDArray[Any]) -> Keys:
    """[N, 2] from what tells files apart, the number of each item's file, and its place there."""
    halves = keys_from(b"".join(map(_stamp_of, files)))[:, 0]
    return np.stack([halves[numbers], places.astype(np.uint64)], axis=1)


def _size_and_time(path: Path, what: str) -> tuple[int, int]:
    """Size in bytes and time of change of a file, which is called `what` in messages; -1 if there is none.

    Raises:
        UserError: The system does not say.
    """
    try:
        status = tried_again(path.stat)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a name that holds a null
        return -1, -1
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            return -1, -1
        raise UserError(f"{what} '{path}' cannot be read: {error.strerror}") from None
    return (status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else (-1, -1)


class TarStore:
    """Media in uncompressed tar files, read in place: `arrays` holds `names`, `files`, `offsets` and `sizes`.

    The names of all arrays but `files` begin with `prefix`.
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
        # The index is of these very files: their stamps are part of its key.
        stamps = [file_stamp(file) for file in self.files]
        return items, stamps_of(stamps, self.arrays["files"][items], self.arrays[self._offsets][items])

    def open(self, item: int) -> BinaryIO:
        path = self.files[int(self.arrays["files"][item])]
        # Opened each time: a descriptor kept for each of thousands of tar files would exhaust them.
        return _opened(path, int(self.arrays[self._offsets][item]), int(self.arrays[self._sizes][item]))

    def where(self, item: int) -> str:
        return f"{self.files[int(self.arrays['files'][item])]}:{self.arrays.strings(self._names)[item]}"


class ParquetStore:
    """Media in a column of parquet files, without a copy: a whole row group is read to get at a row of it.

    Reading in order is fast. `arrays` holds `files` and `rows`, the number of an item's row in its file; for columns of
    lists of media, `positions` in them too.
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
        # Also tells what has been read of a file from what lies there since it was written anew.
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
            starts = tried_again(partial(_row_group_starts, stamp))
            group = int(np.searchsorted(starts, row, side="right")) - 1
            value = tried_again(partial(_row_group, stamp, group, self.column))[row - int(starts[group])]
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


# Few: a row group of images may have some hundred megabytes.
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
                # As files: decoding is ours.
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
        UnreadableMedia: It is none of them, or null, or there is no such file; names the column and what it holds.
    """
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes) and value:
        return io.BytesIO(value)
    if isinstance(value, str) and value and tried_again((folder / value).is_file):
        return _opened(folder / value)
    if not value:
        reason = f"is missing: the column '{store.column}' is empty there"
    else:
        what = "file" if isinstance(value, str) else store.unreadable.what
        reason = f"cannot be read: the column '{store.column}' holds {value!r:.80}, which is not a valid {what}"
    raise store.unreadable(store.where(item), reason)
