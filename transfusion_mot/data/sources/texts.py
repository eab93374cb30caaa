"""Texts without images, from .txt, .jsonl and .parquet files or the library `datasets`."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import datasets
from tqdm import tqdm

from transfusion_mot.config import TEXT, DataConfig, SourceConfig
from transfusion_mot.data.sources.arrays import ArrayWriter, StoredArrays, file_stamp, stored_arrays
from transfusion_mot.data.sources.base import MediaItem, MediaSet, Split, Text, fingerprint_of
from transfusion_mot.data.sources.stored_media import SplitWriter, items_of, skipped_on_opening
from transfusion_mot.data.sources.tables import (
    ROWS_AT_ONCE,
    Unusable,
    find_files,
    lines_of,
    open_parquet,
    pick_column,
    rows_of,
    split_field,
    suffix_of,
    texts_in,
)
from transfusion_mot.errors import UserError

_SUFFIXES = (".txt", ".jsonl", ".parquet")
# (place, texts, split) of a row or paragraph.
_Read = tuple[str, list[str], Split | None]


class StoredTexts:
    """Texts of one side of a source: strings `texts`."""

    is_paired = False

    def __init__(self, name: str, arrays: StoredArrays, source: SourceConfig, data: DataConfig, split: Split) -> None:
        self.items = items_of(arrays, source, data, split)
        skipped = skipped_on_opening(arrays, source, split)
        skipped.warn(name, len(self.items), "text")
        self.name = name
        self.arrays = arrays
        self.skipped = skipped.counts
        self.documents_fingerprint = fingerprint_of(arrays.fingerprint.encode(), self.items)
        self.media: dict[str, MediaSet] = {}
        self.modalities = (TEXT,)

    def __len__(self) -> int:
        return len(self.items)

    def document(self, index: int) -> list[Text | MediaItem]:
        """One text."""
        return [Text([self.arrays.strings("texts")[int(self.items[index])]])]


def open_texts(source: SourceConfig, data: DataConfig, split: Split, path: str) -> StoredTexts:
    """A `.txt` file (documents are paragraphs, separated by blank lines), a `.jsonl` or `.parquet` file (documents are
    the field `text` of lines or rows), or a folder with such files in it or its subfolders.

    Lines and rows that cannot be used are counted.

    Raises:
        UserError: A file is missing or damaged, a `.txt` is not UTF-8, or no line or row can be used.
    """
    files = find_files(path, _SUFFIXES, "text")
    key = [[file_stamp(file) for file in files], source.text_column, data.split_seed]

    def build(writer: ArrayWriter) -> None:
        unusable = Unusable(writer.skipped)
        _write(writer, data, read(unusable))
        unusable.refuse_if_all()

    def read(unusable: Unusable) -> Iterator[_Read]:
        for file in tqdm(files, desc=f"reading {path}", unit="file"):
            is_text = suffix_of(file) == ".txt"
            yield from _paragraphs(file) if is_text else _rows(file, source.text_column, unusable)

    arrays = stored_arrays(data.cache_dir, "text", key, build)
    return StoredTexts(path, arrays, source, data, split)


def open_dataset_texts(
    source: SourceConfig, data: DataConfig, split: Split, dataset: datasets.Dataset, name: str
) -> StoredTexts:
    """A column of texts of a data set of the library `datasets`.

    Raises:
        UserError: The column does not exist; lists the existing ones.
    """
    columns = dataset.column_names
    column = pick_column(source.text_column, ("text",), columns, name)
    texts = dataset.select_columns([column, *(["split"] if "split" in columns else [])])

    def read() -> Iterator[_Read]:
        with tqdm(total=len(texts), desc=f"reading {name}", unit="row") as progress:
            for batch in texts.iter(ROWS_AT_ONCE):
                for values in zip(*batch.values(), strict=True):
                    where = f"{name}:{progress.n}"
                    row = dict(zip(batch, values, strict=True))
                    yield where, texts_in(row[column], column, where), split_field(row, where)
                    progress.update()

    key = [dataset._fingerprint, column, data.split_seed]
    arrays = stored_arrays(data.cache_dir, "text", key, lambda writer: _write(writer, data, read()))
    return StoredTexts(name, arrays, source, data, split)


def _write(writer: ArrayWriter, data: DataConfig, rows: Iterator[_Read]) -> None:
    texts, sides = writer.strings("texts"), SplitWriter(writer, data.split_seed)
    for where, found, side in rows:
        if not found:
            writer.skipped.add("empty text", where)
        for text in found:
            texts.add(text)
            sides.add(text, side)


def _rows(file: Path, text_column: str | None, unusable: Unusable) -> Iterator[_Read]:
    usual: Sequence[str] = ("text",)
    columns = None
    if suffix_of(file) == ".parquet":
        with open_parquet(file) as table:
            names = table.schema_arrow.names
        columns = [pick_column(text_column, usual, names, str(file)), *(["split"] if "split" in names else [])]
    for where, row in rows_of(file, columns, unusable):
        side = split_field(row, where)
        try:
            column = pick_column(text_column, usual, list(row), where)
            texts = texts_in(row[column], column, where)
        except UserError as error:
            unusable.add(error)
            continue
        unusable.num_used += 1
        yield where, texts, side


def _paragraphs(file: Path) -> Iterator[_Read]:
    paragraph: list[str] = []
    start = 1
    for number, line in lines_of(file):
        if line:
            if not paragraph:
                start = number
            paragraph.append(line)
        elif paragraph:
            yield f"{file}:{start}", ["\n".join(paragraph).strip()], None
            paragraph = []
    if paragraph:
        yield f"{file}:{start}", ["\n".join(paragraph).strip()], None
