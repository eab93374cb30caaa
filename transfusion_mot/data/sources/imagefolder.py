"""A folder of images: with metadata, the ImageFolder convention of the library `datasets`, or without."""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from transfusion_mot.config import DataConfig, SourceConfig
from transfusion_mot.data.sources.arrays import ArrayWriter, StoredArrays, file_stamp, stored_arrays
from transfusion_mot.data.sources.base import Split
from transfusion_mot.data.sources.stored_images import CaptionWriter
from transfusion_mot.data.sources.tables import Row, pick_column, rows_of, source_columns, split_field, texts_in
from transfusion_mot.errors import UserError

_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
# Of images that are found where there is no metadata.
_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")


@dataclass
class _Listed:
    name: str
    where: str
    side: Split | None
    source_name: str | None
    captions: list[str] = field(default_factory=list)


def index_imagefolder(source: SourceConfig, data: DataConfig, folder: Path) -> StoredArrays:
    """Names (paths below the folder) and captions of the images that the metadata lists; or of editing pairs, names of
    both images and the instructions.

    A field may hold a list of captions, and an image or pair may be listed several times, in any spelling of its path:
    each line adds to its captions.

    Without metadata, the caption of an image is in the text file beside it (`apple.txt` of `apple.png`), or else the
    name of its subfolder.

    Raises:
        UserError: A line of the metadata cannot be used, or puts an image on another side of the split than a line
            before it; names the line. Or there is no metadata, and an image has no caption.
    """
    metadata = next((folder / name for name in _METADATA if (folder / name).is_file()), None)
    if metadata is None:
        return _index_bare_folder(source, data, folder)

    def build(writer: ArrayWriter) -> None:
        listed: dict[tuple[str, ...], _Listed] = {}
        for where, row in rows_of(metadata):
            name_column = pick_column(source.image_column, ("file_name",), list(row), where)
            text_column = pick_column(source.text_column, ("text", "caption"), list(row), where)
            name, source_name = _path_in(row, name_column, where), None
            if source.source_image_column is not None:
                source_column = pick_column(source.source_image_column, (), list(row), where)
                source_name = _path_in(row, source_column, where)
            side = split_field(row, where)
            key = tuple(os.path.normpath(folder / part) for part in (name, source_name) if part is not None)
            entry = listed.setdefault(key, _Listed(name, where, side, source_name))
            if side is not None and entry.side not in (None, side):
                raise UserError(
                    f"{where}: puts '{name}' on another side of the split than {entry.where}; give all lines of an "
                    "image the same 'split'"
                )
            entry.side = entry.side or side
            entry.captions += texts_in(row[text_column], text_column, where)
        items = CaptionWriter(writer, data.split_seed, is_pairs=source.source_image_column is not None)
        for entry in listed.values():
            items.add(entry.name, entry.captions, entry.where, entry.side, source_name=entry.source_name)

    columns = [source.image_column, source.text_column, *source_columns(source)]
    key = [file_stamp(metadata), *columns, data.split_seed]
    return stored_arrays(data.cache_dir, "imagefolder", key, build)


def _index_bare_folder(source: SourceConfig, data: DataConfig, folder: Path) -> StoredArrays:
    """Images of a folder without metadata, in subfolders too, hidden ones left out."""
    columns = {name: getattr(source, name) for name in ("text_column", "image_column", "source_image_column")}
    example = 'one line for each image, such as {"file_name": "apple.png", "text": "a red apple"}'
    if given := [key for key, value in columns.items() if value is not None]:
        raise UserError(
            f"image folder '{folder}' has no {', '.join(_METADATA[:-1])} or {_METADATA[-1]}, where {given[0]} would "
            f"be; write it, with {example}, or remove the key"
        )
    files = sorted(path for path in folder.rglob("*") if not any(p[0] == "." for p in path.relative_to(folder).parts))
    images = [path for path in files if path.suffix.lower() in _IMAGES]
    if not images:
        raise UserError(f"image folder '{folder}' has no images; known are {', '.join(_IMAGES)}")
    texts = {path.with_suffix(""): path for path in files if path.suffix.lower() == ".txt"}

    def build(writer: ArrayWriter) -> None:
        items = CaptionWriter(writer, data.split_seed)
        for image in images:
            text, name = texts.get(image.with_suffix("")), str(image.relative_to(folder))
            if text is not None:
                try:
                    caption = " ".join(text.read_text(encoding="utf-8-sig").split())
                except UnicodeDecodeError as error:
                    raise UserError(f"'{text}' is no UTF-8 text ({error}); save it as UTF-8") from None
            elif image.parent != folder:
                caption = " ".join(re.split(r"[\s_-]+", image.parent.name)).strip()
            else:
                raise UserError(
                    f"'{image}' has no caption: there is no {_METADATA[0]}, no '{image.stem}.txt' beside it, and it is "
                    f"in no subfolder whose name says what it shows; write {_METADATA[0]}, with {example}"
                )
            items.add(name, [caption] if caption else [], str(text or image))

    # Names of images and not their times: what is in them is found by content.
    key = [str(folder.resolve()), [str(image) for image in images], [file_stamp(text) for text in texts.values()]]
    return stored_arrays(data.cache_dir, "imagefolder", [*key, data.split_seed], build)


def _path_in(row: Row, column: str, where: str) -> str:
    """The path in a field.

    Raises:
        UserError: The field holds something else.
    """
    if not isinstance(row[column], str):
        raise UserError(f"{where}: needs a field '{column}' with the path of an image, got {row[column]!r}")
    return row[column]
