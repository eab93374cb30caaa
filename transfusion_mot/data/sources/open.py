"""From the configuration of a source to its documents."""

import logging
from pathlib import Path

from transfusion_mot.config import DataConfig, SourceConfig
from transfusion_mot.data.sources.arrays import StoredArrays
from transfusion_mot.data.sources.base import Documents, Split, counted
from transfusion_mot.data.sources.coco import index_coco
from transfusion_mot.data.sources.edit_pairs import EditPairs, PairStore
from transfusion_mot.data.sources.image_tables import index_dataset, index_parquet, open_arrow_files, open_dataset
from transfusion_mot.data.sources.imagefolder import index_imagefolder
from transfusion_mot.data.sources.interleaved import open_interleaved
from transfusion_mot.data.sources.openmoji import EmojiStore, index_openmoji
from transfusion_mot.data.sources.scenes import Scenes
from transfusion_mot.data.sources.stored_images import StoredCaptionedImages
from transfusion_mot.data.sources.stores import ArrowStore, FileStore, ImageStore, ParquetStore, TarStore
from transfusion_mot.data.sources.tables import find_files, source_columns, suffix_of
from transfusion_mot.data.sources.tars import index_webdataset
from transfusion_mot.data.sources.texts import open_dataset_texts, open_texts
from transfusion_mot.errors import UserError

_logger = logging.getLogger(__name__)

# Keys that some kinds alone have.
_KEYS = {
    "text_column": ("imagefolder", "webdataset", "parquet", "datasets", "text", "interleaved"),
    "image_column": ("imagefolder", "webdataset", "parquet", "datasets", "interleaved"),
    "source_image_column": ("imagefolder", "webdataset", "parquet", "datasets"),
    "annotations": ("coco",),
    "images": ("interleaved",),
    "name": ("datasets",),
    "num_items": ("scenes",),
}


def has_media(source: SourceConfig) -> bool:
    """Whether its documents are not texts alone."""
    return source.kind != "text" and not (source.kind == "datasets" and source.image_column is None)


def open_source(source: SourceConfig, data: DataConfig, split: Split) -> Documents:
    """Open one side of a source. What had to be read for it is kept in `data.cache_dir` for the next time.

    A source of which nothing is on that side gives an object of length 0; only the training side of a source that is
    not set aside as a whole must not be empty. That nothing is held out where something should be is logged.

    Raises:
        UserError: The source is missing, cannot be understood, or has nothing to train on.
    """
    for key, kinds in _KEYS.items():
        if getattr(source, key) is not None and source.kind not in kinds:
            raise UserError(f"a source of kind '{source.kind}' has no key '{key}'; {' and '.join(kinds)} have")
    try:
        Path(data.cache_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"data.cache_dir, '{data.cache_dir}', cannot be made a folder: {error.strerror}; choose another"
        ) from None
    opened = _open(source, data, split)
    if split == "train" and source.use != "held_out" and len(opened) == 0:
        what = "image" if opened.is_paired else "pair" if isinstance(opened, EditPairs) else "document"
        reasons = [counted(opened.skipped)] if opened.skipped else []
        if source.use == "split":
            reasons.append(f"held_out_fraction is {data.held_out_fraction}")
        raise UserError(
            f"{source.kind} source '{opened.name}' has no {what} to train on ({'; '.join(reasons) or 'it is empty'})"
        )
    if split == "held_out" and source.use == "split" and data.held_out_fraction > 0 and len(opened) == 0:
        _logger.warning(
            "%s: nothing is held out, and all of it is trained on: it has too few items for data.held_out_fraction %g, "
            "or its field 'split' says so",
            opened.name,
            data.held_out_fraction,
        )
    return opened


def _open(source: SourceConfig, data: DataConfig, split: Split) -> Documents:
    if source.kind == "openmoji":
        return StoredCaptionedImages("openmoji", EmojiStore(data), index_openmoji(data), source, data, split)
    if source.path is None:
        raise UserError(f"a source of kind '{source.kind}' needs 'path'")
    if source.kind == "scenes":
        return Scenes(source.path, source, data, split)
    if source.kind == "text":
        return open_texts(source, data, split, source.path)
    if source.kind == "interleaved":
        return open_interleaved(source, data, split, source.path)
    if source.kind == "datasets" and source.image_column is None:
        if source.source_image_column is not None:
            raise UserError(
                f"source '{source.path}' has source_image_column '{source.source_image_column}' and no image_column; "
                "give image_column, the column of the results of the edits"
            )
        return open_dataset_texts(source, data, split, open_dataset(source), source.path)
    stores, arrays = _open_images(source, data, source.path)
    if len(stores) > 1:
        return EditPairs(source.path, PairStore(*stores), arrays, source, data, split)
    return StoredCaptionedImages(source.path, stores[0], arrays, source, data, split)


def _open_images(source: SourceConfig, data: DataConfig, path: str) -> tuple[list[ImageStore], StoredArrays]:
    """The store of the images, or those of the source and target images of editing pairs, and what is known of them."""
    before = source_columns(source)
    prefixes = ("source_", "") if before else ("",)
    if source.kind in ("imagefolder", "coco"):
        folder = Path(path)
        if not folder.is_dir():
            raise UserError(f"{source.kind} source '{path}' is not a folder")
        arrays = index_imagefolder(source, data, folder) if source.kind == "imagefolder" else index_coco(source, data)
        return [FileStore(folder, arrays, prefix) for prefix in prefixes], arrays
    if source.kind == "webdataset":
        files = find_files(path, (".tar",), "webdataset")
        arrays = index_webdataset(source, data, files)
        return [TarStore(files, arrays, prefix) for prefix in prefixes], arrays
    if source.kind == "parquet":
        files = find_files(path, (".parquet", ".arrow"), "parquet")
        if all(suffix_of(file) == ".parquet" for file in files):
            column, arrays = index_parquet(source, data, files)
            return [ParquetStore(files, name, arrays) for name in (*before, column)], arrays
        if any(suffix_of(file) == ".parquet" for file in files):
            raise UserError(f"parquet source '{path}' holds .parquet and .arrow files; make two sources of them")
        dataset = open_arrow_files(files)
    else:
        dataset = open_dataset(source)
    column, arrays = index_dataset(source, data, dataset, path)
    return [ArrowStore(dataset, name, path, arrays) for name in (*before, column)], arrays
