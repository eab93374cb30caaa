"""Documents of texts and images in reading order, in the form of OBELICS or of MMC4."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from transfusion_mot.config import TEXT, DataConfig, SourceConfig
from transfusion_mot.data.sources.arrays import ArrayWriter, StoredArrays, file_stamp, stored_arrays
from transfusion_mot.data.sources.base import MediaItem, MediaSet, Split, Text, counted, fingerprint_of
from transfusion_mot.data.sources.stored_images import StoredImages
from transfusion_mot.data.sources.stored_media import SplitWriter, items_of, skipped_on_opening
from transfusion_mot.data.sources.stores import FileStore, MediaStore, ParquetStore, TarStore
from transfusion_mot.data.sources.tables import (
    Row,
    Unusable,
    find_files,
    open_parquet,
    pick_column,
    rows_of,
    split_field,
    suffix_of,
    texts_in,
)
from transfusion_mot.data.sources.tars import SAME_NAME, Member, scan_tars
from transfusion_mot.errors import UserError

_SUFFIXES = (".jsonl", ".parquet")
_TEXTS, _IMAGES = "texts", "images"
_MMC4_TEXTS, _MMC4_IMAGES = "text_list", "image_info"
_MISSING = "missing file"


class StoredDocuments:
    """Documents of texts and images in reading order, of one side of a source.

    `arrays` holds the strings `texts`; `segments`, where n >= 0 is image n of the source and -1 - n is text n; and the
    ends of the segments and of the images of each document.
    """

    is_paired = False

    def __init__(
        self,
        name: str,
        store: MediaStore,
        arrays: StoredArrays,
        source: SourceConfig,
        data: DataConfig,
        split: Split,
    ) -> None:
        self.name = name
        self.arrays = arrays
        self.items = items_of(arrays, source, data, split)
        skipped = skipped_on_opening(arrays, source, split)
        self.skipped = skipped.counts
        ends = arrays["image_ends"]
        starts = np.concatenate([[0], ends])[self.items]
        counts = ends[self.items] - starts
        documents = np.repeat(np.arange(len(self.items)), counts)
        numbers = np.arange(len(documents)) - np.repeat(np.cumsum(counts) - counts, counts) + np.repeat(starts, counts)
        images = StoredImages(name, store, numbers, skipped, source, data, split)
        # Number of an image in the source => its index in `images`; -1 if it is missing.
        self._image_indices = np.full(int(ends[-1]) if len(ends) else 0, -1, dtype=np.int64)
        self._image_indices[images.items] = np.arange(len(images))
        images.share_buckets(documents[np.isin(numbers, images.items, assume_unique=True)])
        self.modality = source.modality
        self.modalities = (TEXT, source.modality)
        self.media: dict[str, MediaSet] = {source.modality: images}
        self.documents_fingerprint = fingerprint_of(arrays.fingerprint.encode(), self.items, images.items)

    def __len__(self) -> int:
        return len(self.items)

    def document(self, index: int) -> list[Text | MediaItem]:
        """One document without missing images."""
        item = int(self.items[index])
        ends = self.arrays["segment_ends"]
        start = int(ends[item - 1]) if item > 0 else 0
        texts = self.arrays.strings("texts")
        document: list[Text | MediaItem] = []
        for code in self.arrays["segments"][start : int(ends[item])].tolist():
            if code < 0:
                document.append(Text([texts[-1 - code]]))
            elif self._image_indices[code] >= 0:
                document.append(MediaItem(self.modality, int(self._image_indices[code])))
        return document


# A text, or an image by its name in the documents.
_Segment = tuple[bool, Any]


class _Writer:
    """Writes documents; `add_image` writes the places of their images and returns whether an image exists.

    Rows that cannot be used are counted, unless there are no others.
    """

    def __init__(self, writer: ArrayWriter, split_seed: int, add_image: Callable[[Any, str], bool]) -> None:
        self.skipped = writer.skipped
        self.unusable = Unusable(writer.skipped)
        self.texts = writer.strings("texts")
        self.segments = writer.integers("segments")
        self.segment_ends = writer.integers("segment_ends")
        self.image_ends = writer.integers("image_ends")
        self.sides = SplitWriter(writer, split_seed)
        self.add_image = add_image
        self.num_images = 0

    def add(self, row: Row, where: str, read: Callable[[], Iterator[_Segment]]) -> None:
        """Add one document, from its row and a function that splits it into segments."""
        side = split_field(row, where)
        try:
            segments = list(read())
        except UserError as error:
            self.unusable.add(error)
            return
        self.unusable.num_used += 1
        texts = [value for is_text, value in segments if is_text]
        if not texts:
            self.skipped.add("document without text", where)
            return
        for is_text, value in segments:
            if is_text:
                self.texts.add(value)
                self.segments.append(-len(self.texts.ends))
            elif self.add_image(value, where):
                self.segments.append(self.num_images)
                self.num_images += 1
        self.segment_ends.append(len(self.segments))
        self.image_ends.append(self.num_images)
        # Some texts, such as the instruction of an edit, occur in many documents.
        name = Path(where).name if len(texts) < len(segments) else None
        self.sides.add("\n".join(texts), side, name)


def open_interleaved(source: SourceConfig, data: DataConfig, split: Split, path: str) -> StoredDocuments:
    """Documents in .jsonl or .parquet files, or a folder of them.

    The form of OBELICS has lists `texts` and `images` of equal length, one of them null at each position. The form of
    MMC4 has a list `text_list`, and a list `image_info` of `image_name` and `matched_text_index`; an image comes before
    its text.

    Images are in a folder or in tar files (`images`), next to the documents, or bytes in a parquet file.

    Rows that cannot be used are counted.

    Raises:
        UserError: A file is missing or damaged, or no row can be used; gives the place.
    """
    files = find_files(path, _SUFFIXES, "interleaved")
    in_table = source.images is None and _hold_bytes(source, files)
    tars: list[Path] = []
    if source.images is not None and not _is_folder_of_images(Path(source.images)):
        tars = find_files(source.images, (".tar",), "interleaved")

    def build(writer: ArrayWriter) -> None:
        if in_table:
            _write_with_bytes(writer, source, data, files)
        elif tars:
            _write_with_tars(writer, source, data, files, tars)
        else:
            names = writer.strings("names")

            def add_image(name: str, where: str) -> bool:
                names.add(name)
                return True

            _write(_Writer(writer, data.split_seed, add_image), source, files)

    stamps = [file_stamp(file) for file in (*files, *tars)]
    key = [stamps, source.text_column, source.image_column, data.split_seed]
    arrays = stored_arrays(data.cache_dir, "interleaved", key, build)
    store: MediaStore
    if in_table:
        store = ParquetStore(files, source.image_column or _IMAGES, arrays)
    elif tars:
        store = TarStore(tars, arrays)
    else:
        store = FileStore(Path(source.images) if source.images is not None else files[0].parent, arrays)
    return StoredDocuments(path, store, arrays, source, data, split)


def _is_folder_of_images(path: Path) -> bool:
    return path.is_dir() and not any(suffix_of(file) == ".tar" for file in path.iterdir())


def _hold_bytes(source: SourceConfig, files: Sequence[Path]) -> bool:
    """Whether the files are tables with the images themselves instead of their names."""
    if any(suffix_of(file) != ".parquet" for file in files):
        return False
    with open_parquet(files[0]) as table:
        schema = table.schema_arrow
    column = source.image_column or _IMAGES
    if column not in schema.names or not hasattr(schema.field(column).type, "value_type"):
        return False
    kind = schema.field(column).type.value_type
    return pa.types.is_struct(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _write_with_bytes(writer: ArrayWriter, source: SourceConfig, data: DataConfig, files: Sequence[Path]) -> None:
    """Write documents whose images are bytes: images are the gaps between texts, and their bytes are not read."""
    numbers, rows, positions = (writer.integers(name) for name in ("files", "rows", "positions"))

    def add_image(place: tuple[int, int, int], where: str) -> bool:
        for values, value in zip((numbers, rows, positions), place, strict=True):
            values.append(value)
        return True

    documents = _Writer(writer, data.split_seed, add_image)
    for number, file in enumerate(tqdm(files, desc=f"reading {source.path}", unit="file")):
        with open_parquet(file) as table:
            names = table.schema_arrow.names
        column = pick_column(source.text_column, (_TEXTS,), names, str(file))
        wanted = [column, *(["split"] if "split" in names else [])]
        for index, (where, row) in enumerate(rows_of(file, wanted)):
            documents.add(row, where, partial(_segments_around_bytes, row, column, (number, index), where))
    documents.unusable.refuse_if_all()


def _segments_around_bytes(row: Row, column: str, place: tuple[int, int], where: str) -> Iterator[_Segment]:
    """Texts and places of images of a document whose images are bytes in its row, in reading order."""
    for position, value in enumerate(_list_in(row, column, where)):
        if value is None:
            yield False, (*place, position)
        else:
            yield from ((True, text) for text in texts_in(value, column, where))


def _write_with_tars(
    writer: ArrayWriter, source: SourceConfig, data: DataConfig, files: Sequence[Path], tars: Sequence[Path]
) -> None:
    names = writer.strings("names")
    numbers, offsets, sizes = (writer.integers(name) for name in ("files", "offsets", "sizes"))
    members: dict[str, tuple[int, Member]] = {}
    for number, found in enumerate(scan_tars(tars, writer.skipped)):
        for member in found:
            name = member.name.removeprefix("./")
            if name in members:
                writer.skipped.add(SAME_NAME, f"{tars[number]}:{member.name}")
            members[name] = number, member

    def add_image(name: str, where: str) -> bool:
        name = name.removeprefix("./")
        if name not in members:
            writer.skipped.add(_MISSING, name)
            return False
        number, member = members[name]
        names.add(name)
        for values, part in zip((numbers, offsets, sizes), (number, member.offset, member.size), strict=True):
            values.append(part)
        return True

    documents = _Writer(writer, data.split_seed, add_image)
    _write(documents, source, files)
    missing = writer.skipped.counts.get(_MISSING, 0)
    if missing and not documents.num_images:
        raise UserError(
            f"interleaved source '{source.path}': it lists {counted({'image': missing})}, but none is in the tar files "
            f"of '{source.images}', for example '{writer.skipped.examples[_MISSING][0]}'; "
            + (f"their members are named like '{next(iter(members))}'" if members else "they are empty")
        )


def _write(documents: _Writer, source: SourceConfig, files: Sequence[Path]) -> None:
    for file in tqdm(files, desc=f"reading {source.path}", unit="file"):
        for where, row in rows_of(file, unusable=documents.unusable):
            documents.add(row, where, partial(_segments, row, source, where))
    documents.unusable.refuse_if_all()


def _segments(row: Row, source: SourceConfig, where: str) -> Iterator[_Segment]:
    """Texts and names of images of a document, in reading order."""
    if _MMC4_TEXTS in row and source.text_column is None:
        texts = _list_in(row, _MMC4_TEXTS, where)
        before: dict[int, list[str]] = {}
        for image in _list_in(row, _MMC4_IMAGES, where):
            try:
                place, name = image["matched_text_index"], image["image_name"]
            except (KeyError, TypeError):
                raise UserError(
                    f"{where}: each entry of '{_MMC4_IMAGES}' needs 'image_name' and 'matched_text_index', got "
                    f"{image!r:.100}"
                ) from None
            if place not in range(len(texts)):
                raise UserError(f"{where}: a matched_text_index is {place!r:.100}, not one of the {len(texts)} texts")
            before.setdefault(place, []).append(_image_name(name, where))
        for place, text in enumerate(texts):
            yield from ((False, name) for name in before.get(place, []))
            yield from ((True, part) for part in texts_in(text, _MMC4_TEXTS, where))
        return
    text_column = pick_column(source.text_column, (_TEXTS,), list(row), where)
    image_column = pick_column(source.image_column, (_IMAGES,), list(row), where)
    texts, images = _list_in(row, text_column, where), _list_in(row, image_column, where)
    if len(texts) != len(images):
        raise UserError(
            f"{where}: '{text_column}' has {len(texts)} entries and '{image_column}' {len(images)}; give "
            "them equal lengths, with null in one where the other has an entry"
        )
    for text, image in zip(texts, images, strict=True):
        if image is not None:
            yield False, _image_name(image, where)
        yield from ((True, part) for part in texts_in(text, text_column, where))


def _list_in(row: Row, column: str, where: str) -> list[Any]:
    pick_column(column, (), list(row), where)
    if not isinstance(row[column], list):
        raise UserError(f"{where}: the field '{column}' must be a list, got {row[column]!r:.100}")
    return row[column]


def _image_name(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise UserError(f"{where}: an image must be named by its path, got {value!r:.100}")
    return value
