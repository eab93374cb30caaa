"""Tables with columns of images, audio and texts: parquet and Arrow files, data sets of the library `datasets`."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import datasets
import pyarrow as pa
from tqdm import tqdm

from transfusion_mot.config import DataConfig, SourceConfig
from transfusion_mot.data.sources.arrays import ArrayWriter, StoredArrays, file_stamp, stored_arrays
from transfusion_mot.data.sources.base import NOUNS, Medium
from transfusion_mot.data.sources.columns import MediaColumns
from transfusion_mot.data.sources.stored_media import CaptionWriter
from transfusion_mot.data.sources.tables import (
    ROWS_AT_ONCE,
    Row,
    open_parquet,
    pick_column,
    pick_text_column,
    rows_of,
    split_field,
    texts_in,
)
from transfusion_mot.errors import UserError
from transfusion_mot.hub_names import ask_hub


def index_parquet(
    source: SourceConfig, data: DataConfig, files: Sequence[Path], columns: MediaColumns
) -> tuple[str, StoredArrays]:
    """The column of the first media, and places and texts of the rows of parquet files.

    Raises:
        UserError: A file is damaged or lacks the columns; lists the existing ones.
    """
    schemas = []
    for file in files:
        with open_parquet(file) as table:
            schemas.append(table.schema_arrow)
    first_column = pick_column(columns.first, (columns.medium,), schemas[0].names, str(files[0]))
    text_columns = []
    for file, schema in zip(files, schemas, strict=True):
        _check_holds_media(schema, first_column, columns, str(file))
        text_columns.append(pick_text_column(source.text_column, columns, schema.names, str(file)))

    def build(writer: ArrayWriter) -> None:
        has_text = any(column is not None for column in text_columns)
        items = CaptionWriter(writer, data.split_seed, columns, has_text=has_text)
        numbers, rows, positions = (writer.integers(name) for name in ("files", "rows", "positions"))
        tables = zip(files, schemas, text_columns, strict=True)
        for number, (file, schema, text_column) in enumerate(tqdm(tables, desc="reading captions")):
            wanted = [*([] if text_column is None else [text_column]), *(["split"] if "split" in schema.names else [])]
            for index, (where, row) in enumerate(_rows(file, wanted)):
                captions = [] if text_column is None else texts_in(row[text_column], text_column, where)
                name = f"{file.name}:{index}"
                if items.add(name, captions, where, split_field(row, where), second=name):
                    numbers.append(number)
                    rows.append(index)
                    positions.append(0)

    key = [[file_stamp(file) for file in files], source.text_column, *columns.key, data.split_seed]
    return first_column, stored_arrays(data.cache_dir, "parquet", key, build)


def _rows(file: Path, wanted: list[str]) -> Iterator[tuple[str, Row]]:
    """`rows_of` a parquet file; also works if no column is wanted."""
    if wanted:
        yield from rows_of(file, wanted)
        return
    with open_parquet(file) as table:
        for number in range(table.metadata.num_rows):
            yield f"{file}:{number + 1}", {}


def _check_holds_media(schema: pa.Schema, first: str, columns: MediaColumns, where: str) -> None:
    """Refuse missing columns and columns whose type cannot hold media; texts are checked for paths when they are read.

    Raises:
        UserError: It gives the column and its type.
    """
    named: list[tuple[str, str, Medium]] = [(f"{columns.medium}_column", first, columns.medium)]
    if columns.second is not None:
        key = "source_image_column" if columns.is_edit else "audio_column"
        named.append((key, columns.second, columns.second_medium))
    for key, column, medium in named:
        pick_column(column, (), schema.names, where)
        _check_type(schema, column, where, key=key, noun=NOUNS[medium])


def _check_type(schema: pa.Schema, column: str, where: str, *, key: str, noun: str) -> None:
    kind = schema.field(column).type
    content = kind.value_type if hasattr(kind, "value_type") else kind
    if not pa.types.is_struct(content) and not any(
        is_such(content)
        for is_such in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_string, pa.types.is_large_string)
    ):
        raise UserError(
            f"{where}: the column '{column}' is of type {kind}; {noun}s are bytes, paths or {{bytes, path}}: set "
            f"{key} to one of {[name for name in schema.names if name != column]}"
        )


def open_dataset(source: SourceConfig) -> datasets.Dataset:
    """A folder of `save_to_disk`, or a data set by its name.

    Raises:
        UserError: It does not exist, or has no such split.
    """
    if source.path is None:
        raise UserError("a source of kind 'datasets' needs 'path', a name or a folder of save_to_disk")
    try:
        if Path(source.path, "state.json").is_file() or Path(source.path, "dataset_dict.json").is_file():
            dataset = datasets.load_from_disk(source.path)
            if isinstance(dataset, datasets.DatasetDict):
                if source.split not in dataset:
                    raise UserError(f"'{source.path}' has no split '{source.split}'; it has {sorted(dataset)}")
                dataset = dataset[source.split]
        else:
            dataset = _load_by_name(source.path, source)
    except UserError:
        raise
    # The library raises many kinds of errors: of files, the network, names, splits and Arrow.
    except (OSError, ValueError, RuntimeError, pa.ArrowException, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"`datasets` cannot load '{source.path}' (name {source.name}, split {source.split}): "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from None
    return dataset


def _load_by_name(path: str, source: SourceConfig) -> datasets.Dataset:
    """`datasets.load_dataset`. If the hub does not answer, it reads only its cache, and fails at once."""
    load = partial(datasets.load_dataset, path, source.name, split=source.split)
    try:
        ask_hub(path, "dataset")
    except OSError as error:
        was_offline = datasets.config.HF_HUB_OFFLINE
        datasets.config.HF_HUB_OFFLINE = True
        try:
            return load()
        except ConnectionError:
            raise error from None
        finally:
            datasets.config.HF_HUB_OFFLINE = was_offline
    return load()


def open_arrow_files(files: Sequence[Path]) -> datasets.Dataset:
    """Memory-mapped and concatenated Arrow files of the library `datasets`.

    Raises:
        UserError: A file is damaged, or their columns differ.
    """
    parts = []
    for file in files:
        try:
            parts.append(datasets.Dataset.from_file(str(file)))
        except (pa.ArrowException, OSError, ValueError) as error:
            raise UserError(f"'{file}' is not a whole Arrow file ({str(error).splitlines()[0]})") from None
    try:
        return datasets.concatenate_datasets(parts)
    except ValueError as error:
        raise UserError(f"the Arrow files differ in their columns: {str(error).splitlines()[0]}") from None


def index_dataset(
    source: SourceConfig, data: DataConfig, dataset: datasets.Dataset, name: str, columns: MediaColumns
) -> tuple[str, StoredArrays]:
    """The column of the first media, and rows and texts of a data set.

    Raises:
        UserError: It lacks the columns; lists the existing ones.
    """
    names = dataset.column_names
    first_column = pick_column(columns.first, (columns.medium,), names, name)
    _check_holds_media(dataset.features.arrow_schema, first_column, columns, name)
    text_column = pick_text_column(source.text_column, columns, names, name)
    wanted = [*([] if text_column is None else [text_column]), *(["split"] if "split" in names else [])]
    texts = dataset.select_columns(wanted)

    def build(writer: ArrayWriter) -> None:
        items = CaptionWriter(writer, data.split_seed, columns, has_text=text_column is not None)
        rows = writer.integers("rows")
        index = 0
        with tqdm(total=len(dataset), desc=f"reading captions of {name}", unit="row") as progress:
            # A table without columns has no rows.
            batches = texts.iter(ROWS_AT_ONCE) if wanted else [{"": [None] * len(dataset)}]
            for batch in batches:
                for values in zip(*batch.values(), strict=True):
                    row = dict(zip(batch, values, strict=True))
                    where = f"{name}:{index}"
                    captions = [] if text_column is None else texts_in(row[text_column], text_column, where)
                    if items.add(where, captions, where, split_field(row, where), second=where):
                        rows.append(index)
                    index += 1
                    progress.update()

    key = [dataset._fingerprint, text_column, *columns.key, data.split_seed]
    return first_column, stored_arrays(data.cache_dir, "datasets", key, build)
