"""Configuration of a source => its documents."""

import logging
from pathlib import Path

from transfusion_mot.config import DataConfig, SourceConfig
from transfusion_mot.data.sources.arrays import StoredArrays
from transfusion_mot.data.sources.base import NOUNS, Documents, Medium, Split, counted, own_media
from transfusion_mot.data.sources.coco import index_coco
from transfusion_mot.data.sources.columns import UNREADABLE, MediaColumns, media_columns
from transfusion_mot.data.sources.edit_pairs import EditPairs, PairStore
from transfusion_mot.data.sources.folders import index_folder
from transfusion_mot.data.sources.interleaved import open_interleaved
from transfusion_mot.data.sources.media_tables import index_dataset, index_parquet, open_arrow_files, open_dataset
from transfusion_mot.data.sources.openmoji import EmojiStore, index_openmoji
from transfusion_mot.data.sources.paths import refuse_missing_source
from transfusion_mot.data.sources.scenes import Scenes
from transfusion_mot.data.sources.stored_audio import StoredSpeech
from transfusion_mot.data.sources.stored_images import StoredCaptionedImages
from transfusion_mot.data.sources.stores import ArrowStore, FileStore, MediaStore, ParquetStore, TarStore
from transfusion_mot.data.sources.tables import find_files, suffix_of
from transfusion_mot.data.sources.tars import index_webdataset
from transfusion_mot.data.sources.texts import open_dataset_texts, open_texts
from transfusion_mot.errors import UserError

_logger = logging.getLogger(__name__)

# Keys that only some kinds have.
_KEYS = {
    "text_column": ("imagefolder", "audiofolder", "webdataset", "parquet", "datasets", "text", "interleaved"),
    "image_column": ("imagefolder", "webdataset", "parquet", "datasets", "interleaved"),
    "audio_column": ("imagefolder", "audiofolder", "webdataset", "parquet", "datasets"),
    "source_image_column": ("imagefolder", "webdataset", "parquet", "datasets"),
    "annotations": ("coco",),
    "images": ("interleaved",),
    "name": ("datasets",),
    "num_items": ("scenes",),
}


def media_of(source: SourceConfig) -> dict[str, Medium]:
    """Modality => medium of the media of a source; empty if its documents are only texts."""
    if source.kind == "text" or (source.kind == "datasets" and source.image_column is source.audio_column is None):
        return {}
    columns = media_columns(source)
    media: dict[str, Medium] = {}
    if columns.medium != "audio":
        media[source.modality] = "image"
    if columns.has_audio:
        media[source.audio_modality] = "audio"
    return media


def open_source(source: SourceConfig, data: DataConfig, split: Split) -> Documents:
    """Open one side of a source. Its index is cached in `data.cache_dir`.

    A source without documents on that side gives an object of length 0. The training side must not be empty unless the
    whole source is held out. A warning is logged if nothing is held out although something should be.

    Raises:
        UserError: The source is missing, has a wrong format, or has nothing to train on.
    """
    for key, kinds in _KEYS.items():
        if getattr(source, key) is not None and source.kind not in kinds:
            raise UserError(f"a source of kind '{source.kind}' has no key '{key}'; {' and '.join(kinds)} have")
    try:
        Path(data.cache_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make the folder data.cache_dir, '{data.cache_dir}': {error.strerror}; choose another"
        ) from None
    refuse_missing_source(source)
    opened = _open(source, data, split)
    if split == "train" and source.use != "held_out" and len(opened) == 0:
        what = "pair" if isinstance(opened, EditPairs) else "document"
        if (own := own_media(opened)) is not None:
            what = NOUNS[opened.media[own].medium]
        reasons = [counted(opened.skipped)] if opened.skipped else []
        if source.use == "split":
            reasons.append(f"held_out_fraction is {data.held_out_fraction}")
        raise UserError(
            f"{source.kind} source '{opened.name}' has no {what} to train on ({'; '.join(reasons) or 'it is empty'})"
        )
    if split == "held_out" and source.use == "split" and data.held_out_fraction > 0 and len(opened) == 0:
        _logger.warning(
            "%s: nothing is held out, so all items are for training: there are too few for data.held_out_fraction %g, "
            "or their field 'split' says so",
            opened.name,
            data.held_out_fraction,
        )
    return opened


def _open(source: SourceConfig, data: DataConfig, split: Split) -> Documents:
    if source.kind == "openmoji":
        return StoredCaptionedImages("openmoji", EmojiStore(data), index_openmoji(data), source, data, split)
    assert source.path is not None
    if source.kind == "scenes":
        return Scenes(source.path, source, data, split)
    if source.kind == "text":
        return open_texts(source, data, split, source.path)
    if source.kind == "interleaved":
        return open_interleaved(source, data, split, source.path)
    if not media_of(source):
        if source.source_image_column is not None:
            raise UserError(
                f"source '{source.path}' has source_image_column '{source.source_image_column}' but no image_column; "
                "give image_column, the column of the edited images"
            )
        return open_dataset_texts(source, data, split, open_dataset(source), source.path)
    columns = media_columns(source)
    stores, arrays = _open_media(source, data, source.path, columns)
    if columns.is_edit:
        return EditPairs(source.path, PairStore(*stores), arrays, source, data, split)
    if columns.medium == "audio":
        return StoredSpeech(source.path, stores[0], arrays, source, data, split)
    return StoredCaptionedImages(source.path, stores[0], arrays, source, data, split, *stores[1:])


def _open_media(
    source: SourceConfig, data: DataConfig, path: str, columns: MediaColumns
) -> tuple[list[MediaStore], StoredArrays]:
    """Stores of the first and any second media (for editing pairs the source image first), and the arrays."""
    # Prefix of the arrays, column (empty for a usual name), and the error class.
    parts = [("", columns.first or "", UNREADABLE[columns.medium])]
    if columns.second is not None:
        second = (columns.prefix, columns.second, UNREADABLE[columns.second_medium])
        parts = [second, *parts] if columns.is_edit else [*parts, second]
    if source.kind in ("imagefolder", "audiofolder", "coco"):
        folder = Path(path)
        arrays = index_coco(source, data) if source.kind == "coco" else index_folder(source, data, folder, columns)
        return [FileStore(folder, arrays, prefix, unreadable) for prefix, _, unreadable in parts], arrays
    if source.kind == "webdataset":
        files = find_files(path, (".tar",), "webdataset")
        arrays = index_webdataset(source, data, files, columns)
        return [TarStore(files, arrays, prefix, unreadable) for prefix, _, unreadable in parts], arrays
    if source.kind == "parquet":
        files = find_files(path, (".parquet", ".arrow"), "parquet")
        if all(suffix_of(file) == ".parquet" for file in files):
            first, arrays = index_parquet(source, data, files, columns)
            return [ParquetStore(files, column or first, arrays, unreadable) for _, column, unreadable in parts], arrays
        if any(suffix_of(file) == ".parquet" for file in files):
            raise UserError(f"parquet source '{path}' has both .parquet and .arrow files; make two sources of them")
        dataset = open_arrow_files(files)
    else:
        dataset = open_dataset(source)
    first, arrays = index_dataset(source, data, dataset, path, columns)
    return [ArrowStore(dataset, column or first, path, arrays, unreadable) for _, column, unreadable in parts], arrays
