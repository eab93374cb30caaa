"""Tables with a column of images, or two, and one of captions: parquet and Arrow files, data sets of `datasets`."""

from collections.abc import Sequence
from pathlib import Path

import datasets
import pyarrow as pa
from tqdm import tqdm

from transfusion_mot.config import DataConfig, SourceConfig
from transfusion_mot.data.sources.arrays import ArrayWriter, StoredArrays, file_stamp, stored_arrays
from transfusion_mot.data.sources.stored_images import CaptionWriter
from transfusion_mot.data.sources.tables import (
    open_parquet,
    pick_column,
    rows_of,
    source_columns,
    split_field,
    texts_in,
)
from transfusion_mot.errors import UserError
from transfusion_mot.hub_names import refuse_missing_path

_ROWS_AT_ONCE = 1024
TEXT_COLUMNS = ("text", "caption")


def index_parquet(source: SourceConfig, data: DataConfig, files: Sequence[Path]) -> tuple[str, StoredArrays]:
    """The column of images, and places and captions of the rows of parquet files.

    Raises:
        UserError: A file is damaged, or has no such columns; names those that it has.
    """
    schemas = []
    for file in files:
        with open_parquet(file) as table:
            schemas.append(table.schema_arrow)
    image_column = pick_column(source.image_column, ("image",), schemas[0].names, str(files[0]))
    for file, schema in zip(files, schemas, strict=True):
        pick_column(image_column, (), schema.names, str(file))
        _check_holds_images(schema, image_column, str(file))
        for column in source_columns(source):
            pick_column(column, (), schema.names, str(file))
            _check_holds_images(schema, column, str(file), "source_image_column")

    def build(writer: ArrayWriter) -> None:
        items = CaptionWriter(writer, data.split_seed, is_pairs=source.source_image_column is not None)
        numbers, rows, positions = (writer.integers(name) for name in ("files", "rows", "positions"))
        for number, (file, schema) in enumerate(tqdm(zip(files, schemas, strict=True), desc="reading captions")):
            text_column = pick_column(source.text_column, TEXT_COLUMNS, schema.names, str(file))
            wanted = [text_column, *(["split"] if "split" in schema.names else [])]
            for index, (where, row) in enumerate(rows_of(file, wanted)):
                captions = texts_in(row[text_column], text_column, where)
                name = f"{file.name}:{index}"
                if items.add(name, captions, where, split_field(row, where), source_name=name):
                    numbers.append(number)
                    rows.append(index)
                    positions.append(0)

    key = [[file_stamp(file) for file in files], source.text_column, *source_columns(source), data.split_seed]
    return image_column, stored_arrays(data.cache_dir, "parquet", key, build)


def _check_holds_images(schema: pa.Schema, column: str, where: str, key: str = "image_column") -> None:
    """Refuse a column that can hold no images by its type; whether texts are paths of images is seen when one is read.

    Raises:
        UserError: Names the column and its type.
    """
    kind = schema.field(column).type
    content = kind.value_type if hasattr(kind, "value_type") else kind
    if not pa.types.is_struct(content) and not any(
        is_such(content)
        for is_such in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_string, pa.types.is_large_string)
    ):
        raise UserError(
            f"{where}: the column '{column}' is of type {kind}; images are bytes, paths or {{bytes, path}}: set "
            f"{key} to one of {[name for name in schema.names if name != column]}"
        )


def open_dataset(source: SourceConfig) -> datasets.Dataset:
    """A folder of `save_to_disk`, or a data set by its name.

    Raises:
        UserError: There is none, or it has no such split.
    """
    if source.path is None:
        raise UserError("a source of kind 'datasets' needs 'path', a name or a folder of save_to_disk")
    refuse_missing_path(source.path, "datasets source")
    try:
        if Path(source.path, "state.json").is_file() or Path(source.path, "dataset_dict.json").is_file():
            dataset = datasets.load_from_disk(source.path)
            if isinstance(dataset, datasets.DatasetDict):
                if source.split not in dataset:
                    raise UserError(f"'{source.path}' has no split '{source.split}'; it has {sorted(dataset)}")
                dataset = dataset[source.split]
        else:
            dataset = datasets.load_dataset(source.path, source.name, split=source.split)
    except UserError:
        raise
    # The library raises what it finds fit: of files, of the network, of names and splits, of Arrow.
    except (OSError, ValueError, RuntimeError, pa.ArrowException, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"`datasets` cannot load '{source.path}' (name {source.name}, split {source.split}): "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from None
    return dataset


def open_arrow_files(files: Sequence[Path]) -> datasets.Dataset:
    """Arrow files as the library `datasets` writes them, mapped, one after the other.

    Raises:
        UserError: A file is damaged, or they differ in their columns.
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
    source: SourceConfig, data: DataConfig, dataset: datasets.Dataset, name: str
) -> tuple[str, StoredArrays]:
    """The column of images, and rows and captions of a data set.

    Raises:
        UserError: It has no such columns; names those that it has.
    """
    columns = dataset.column_names
    image_column = pick_column(source.image_column, ("image",), columns, name)
    _check_holds_images(dataset.features.arrow_schema, image_column, name)
    for column in source_columns(source):
        pick_column(column, (), columns, name)
        _check_holds_images(dataset.features.arrow_schema, column, name, "source_image_column")
    text_column = pick_column(source.text_column, TEXT_COLUMNS, columns, name)
    texts = dataset.select_columns([text_column, *(["split"] if "split" in columns else [])])

    def build(writer: ArrayWriter) -> None:
        items = CaptionWriter(writer, data.split_seed, is_pairs=source.source_image_column is not None)
        rows = writer.integers("rows")
        index = 0
        with tqdm(total=len(texts), desc=f"reading captions of {name}", unit="row") as progress:
            for batch in texts.iter(_ROWS_AT_ONCE):
                for values in zip(*batch.values(), strict=True):
                    row = dict(zip(batch, values, strict=True))
                    where = f"{name}:{index}"
                    captions = texts_in(row[text_column], text_column, where)
                    if items.add(where, captions, where, split_field(row, where), source_name=where):
                        rows.append(index)
                    index += 1
                progress.update(len(batch[text_column]))

    key = [dataset._fingerprint, text_column, *source_columns(source), data.split_seed]
    return image_column, stored_arrays(data.cache_dir, "datasets", key, build)
