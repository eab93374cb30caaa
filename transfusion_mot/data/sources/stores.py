"""Where the images of a source lie: in files, tar files, parquet files or Arrow tables; read one by one."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from transfusion_mot.data.sources.arrays import StoredArrays, file_stamp
from transfusion_mot.data.sources.base import SkippedItems, fingerprint_of
from transfusion_mot.data.sources.tables import open_parquet
from transfusion_mot.errors import UserError

Items = npt.NDArray[np.int64]

_STATS_AT_ONCE = 256


class ImageStore(Protocol):
    """Encoded images by the number of their item."""

    def present(self, items: Items, skipped: SkippedItems) -> tuple[Items, str]:
        """Those of `items` that are there, the others counted in `skipped`; and a hash of what they are, so that an
        edited image is not taken for the old one.
        """
        ...

    def content(self, item: int) -> bytes | Path | Image.Image:
        """An encoded image or a picture.

        Raises:
            UserError: There is none.
        """
        ...

    def where(self, item: int) -> str:
        """Where an image lies, for messages."""
        ...


class FileStore:
    """Images in files: their paths relative to `folder` are the strings `names` of `arrays`."""

    def __init__(self, folder: Path, arrays: StoredArrays) -> None:
        self.folder = folder
        self.arrays = arrays

    def present(self, items: Items, skipped: SkippedItems) -> tuple[Items, str]:
        names = self.arrays.strings("names")

        def stamps(chunk: Items) -> list[tuple[int, int]]:
            return [_size_and_time(self.folder / names[item]) for item in chunk.tolist()]

        # Threads, because a file system over a network takes its time for each.
        with ThreadPoolExecutor(16) as pool:
            chunks = (items[start : start + _STATS_AT_ONCE] for start in range(0, len(items), _STATS_AT_ONCE))
            found = np.array([stamp for part in pool.map(stamps, chunks) for stamp in part], dtype=np.int64)
        found = found.reshape(-1, 2)
        for position in np.flatnonzero(found[:, 0] <= 0).tolist():
            reason = "empty file" if found[position, 0] == 0 else "missing file"
            skipped.add(reason, names[int(items[position])])
        there = found[:, 0] > 0
        kept = items[there]
        # Reading every byte would take as long as encoding; an edit changes size or time.
        kept_names = "\0".join(names[item] for item in kept.tolist()).encode()
        return kept, fingerprint_of(os.fsencode(self.folder.resolve()), kept_names, found[there])

    def content(self, item: int) -> Path:
        return self.folder / self.arrays.strings("names")[item]

    def where(self, item: int) -> str:
        return str(self.content(item))


def _places(arrays: StoredArrays, items: Items, *names: str) -> list[npt.NDArray[Any]]:
    """Where the images of items lie. Nothing else about them: other captions need no other latents."""
    return [arrays[name][items] for name in names]


def _size_and_time(path: Path) -> tuple[int, int]:
    """Size in bytes and time of change of a file; -1 if there is none."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # ValueError: a name that holds a null
        return -1, -1
    return status.st_size, status.st_mtime_ns


class TarStore:
    """Images in uncompressed tar files, read in place: `arrays` holds `names`, `files`, `offsets` and `sizes`."""

    def __init__(self, files: Sequence[Path], arrays: StoredArrays) -> None:
        self.files = list(files)
        self.arrays = arrays

    def present(self, items: Items, skipped: SkippedItems) -> tuple[Items, str]:
        # The index is of these very files: their stamps are part of its key.
        stamps = repr([file_stamp(file) for file in self.files])
        return items, fingerprint_of(stamps.encode(), *_places(self.arrays, items, "files", "offsets", "sizes"))

    def content(self, item: int) -> bytes:
        path = self.files[int(self.arrays["files"][item])]
        size = int(self.arrays["sizes"][item])
        try:
            # Opened each time: a descriptor kept for each of thousands of tar files would exhaust them.
            with path.open("rb", buffering=0) as file:
                content = os.pread(file.fileno(), size, int(self.arrays["offsets"][item]))
        except OSError as error:
            raise UserError(f"image '{self.where(item)}' cannot be read: {error.strerror}") from None
        if len(content) < size:
            raise UserError(f"image '{self.where(item)}' is cut off: {len(content)} of {size} bytes")
        return content

    def where(self, item: int) -> str:
        return f"{self.files[int(self.arrays['files'][item])]}:{self.arrays.strings('names')[item]}"


class ParquetStore:
    """Images in a column of parquet files, without a copy: a whole row group is read to get at a row of it.

    Reading in order is fast. `arrays` holds `files` and `rows`, the number of an item's row in its file; for columns of
    lists of images, `positions` in them too.
    """

    def __init__(self, files: Sequence[Path], column: str, arrays: StoredArrays) -> None:
        self.files = list(files)
        self.column = column
        self.arrays = arrays

    def present(self, items: Items, skipped: SkippedItems) -> tuple[Items, str]:
        stamps = repr(([file_stamp(file) for file in self.files], self.column))
        return items, fingerprint_of(stamps.encode(), *_places(self.arrays, items, "files", "rows", "positions"))

    def content(self, item: int) -> bytes | Path:
        path = str(self.files[int(self.arrays["files"][item])])
        row = int(self.arrays["rows"][item])
        starts = _row_group_starts(path)
        group = int(np.searchsorted(starts, row, side="right")) - 1
        value = _row_group(path, group, self.column)[row - int(starts[group])]
        if isinstance(value, pa.ListScalar):
            value = value[int(self.arrays["positions"][item])]
        return encoded_image(value.as_py(), self.column, self.where(item), Path(path).parent)

    def where(self, item: int) -> str:
        return f"{self.files[int(self.arrays['files'][item])]}:{int(self.arrays['rows'][item]) + 1}"


@lru_cache(maxsize=4096)
def _row_group_starts(path: str) -> npt.NDArray[np.int64]:
    with open_parquet(Path(path)) as table:
        rows = [table.metadata.row_group(group).num_rows for group in range(table.metadata.num_row_groups)]
    return np.cumsum([0, *rows])[:-1]


# Few: a row group of images may have some hundred megabytes.
@lru_cache(maxsize=2)
def _row_group(path: str, group: int, column: str) -> pa.ChunkedArray:
    try:
        with open_parquet(Path(path)) as table:
            return table.read_row_group(group, columns=[column]).column(column)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"'{path}' cannot be read: {str(error).splitlines()[0]}") from None


class ArrowStore:
    """Images in a column of a data set of the library `datasets`, mapped from disk; `arrays` holds `rows`."""

    def __init__(self, dataset: datasets.Dataset, column: str, name: str, arrays: StoredArrays) -> None:
        self.dataset = dataset.select_columns([column])
        if isinstance(dataset.features[column], datasets.Image):
            # As files: decoding is ours.
            self.dataset = self.dataset.cast_column(column, datasets.Image(decode=False))
        self.column = column
        self.name = name
        self.arrays = arrays

    def present(self, items: Items, skipped: SkippedItems) -> tuple[Items, str]:
        identity = f"{self.dataset._fingerprint} {self.column}"
        return items, fingerprint_of(identity.encode(), *_places(self.arrays, items, "rows"))

    def content(self, item: int) -> bytes | Path:
        value = self.dataset[int(self.arrays["rows"][item])][self.column]
        return encoded_image(value, self.column, self.where(item), Path())

    def where(self, item: int) -> str:
        return f"{self.name}:{int(self.arrays['rows'][item])}"


def encoded_image(value: Any, column: str, where: str, folder: Path) -> bytes | Path:
    """An image as a column of a table holds it: bytes, a path below `folder`, or both as {"bytes": ..., "path": ...}.

    Raises:
        UserError: It is none of them, or null, or there is no such file; names the column and what it holds.
    """
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes) and value:
        return value
    if isinstance(value, str) and value:
        if not (folder / value).is_file():
            raise UserError(f"image '{where}': the column '{column}' holds {value!r:.80}, which is no file")
        return folder / value
    if not value:
        raise UserError(f"image '{where}' is missing: the column '{column}' is empty there")
    raise UserError(f"image '{where}': the column '{column}' holds no image but {value!r:.80}")
