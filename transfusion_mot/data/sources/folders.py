"""A folder of images or audio: with metadata, the ImageFolder and AudioFolder conventions of the library `datasets`, or
without."""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from transfusion_mot.config import DataConfig, SourceConfig
from transfusion_mot.data.sources.arrays import ArrayWriter, StoredArrays, file_stamp, stored_arrays
from transfusion_mot.data.sources.base import Medium, Split
from transfusion_mot.data.sources.columns import MediaColumns
from transfusion_mot.data.sources.stored_media import CaptionWriter
from transfusion_mot.data.sources.tables import Row, pick_column, pick_text_column, rows_of, split_field, texts_in
from transfusion_mot.errors import UserError

_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
# Suffixes of media in folders without metadata.
_SUFFIXES: dict[Medium, tuple[str, ...]] = {
    "image": (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"),
    "audio": (".wav", ".flac", ".ogg", ".opus", ".mp3"),
}
_EXAMPLE: dict[Medium, str] = {
    "image": '{"file_name": "apple.png", "text": "a red apple"}',
    "audio": '{"file_name": "apple.wav", "transcription": "a red apple"}',
}


@dataclass
class _Listed:
    name: str
    where: str
    side: Split | None
    second: str
    captions: list[str] = field(default_factory=list)


def index_folder(source: SourceConfig, data: DataConfig, folder: Path, columns: MediaColumns) -> StoredArrays:
    """Names (paths below the folder) and texts of the images or audio clips that the metadata lists; names of both, if
    there is a second column of media, as in editing pairs.

    A field may hold a list of captions. An image, audio clip or pair may be listed several times, with any spelling of
    its path: each line adds captions.

    Without metadata, the text of an item is in a text file of the same name (`apple.txt` of `apple.png`). For images
    without one it is the name of the subfolder; audio need not have texts.

    Raises:
        UserError: A line of the metadata cannot be used, or puts an item on another side of the split than an earlier
            line; gives the line. Or there is no metadata, and an image has no caption.
    """
    metadata = next((folder / name for name in _METADATA if (folder / name).is_file()), None)
    if metadata is None:
        return _index_bare_folder(source, data, folder, columns)

    def build(writer: ArrayWriter) -> None:
        listed: dict[tuple[str, ...], _Listed] = {}
        has_text = False
        for where, row in rows_of(metadata):
            name_column = pick_column(columns.first, ("file_name",), list(row), where)
            text_column = pick_text_column(source.text_column, columns, list(row), where)
            name, second = _path_in(row, name_column, columns.noun, where), ""
            if columns.second is not None:
                pick_column(columns.second, (), list(row), where)
                # An image may have no audio.
                if columns.is_edit or row[columns.second]:
                    second = _path_in(row, columns.second, columns.second_noun, where)
            side = split_field(row, where)
            key = tuple(os.path.normpath(folder / part) for part in (name, second) if part)
            entry = listed.setdefault(key, _Listed(name, where, side, second))
            if side is not None and entry.side not in (None, side):
                raise UserError(
                    f"{where}: has another 'split' for '{name}' than {entry.where}; give all lines of an "
                    f"{columns.noun} the same 'split'"
                )
            entry.side = entry.side or side
            if text_column is not None:
                has_text = True
                entry.captions += texts_in(row[text_column], text_column, where)
        items = CaptionWriter(writer, data.split_seed, columns, has_text=has_text)
        for entry in listed.values():
            items.add(entry.name, entry.captions, entry.where, entry.side, second=entry.second)

    key = [file_stamp(metadata), *columns.key, source.text_column, data.split_seed]
    return stored_arrays(data.cache_dir, source.kind, key, build)


def _index_bare_folder(source: SourceConfig, data: DataConfig, folder: Path, columns: MediaColumns) -> StoredArrays:
    """Images or audio of a folder without metadata and of its subfolders, without hidden files."""
    given = ("text_column", "image_column", "audio_column", "source_image_column")
    example = f"one line for each {columns.noun}, such as {_EXAMPLE[columns.medium]}"
    if wrong := next((name for name in given if getattr(source, name) is not None), None):
        raise UserError(
            f"{columns.medium} folder '{folder}' has no {', '.join(_METADATA[:-1])} or {_METADATA[-1]}, where {wrong} "
            f"would be; write it, with {example}, or remove the key"
        )
    files = sorted(path for path in folder.rglob("*") if not any(p[0] == "." for p in path.relative_to(folder).parts))
    suffixes = _SUFFIXES[columns.medium]
    media = [path for path in files if path.suffix.lower() in suffixes]
    if not media:
        raise UserError(f"{columns.medium} folder '{folder}' has no {columns.noun}s; known: {', '.join(suffixes)}")
    texts = {path.with_suffix(""): path for path in files if path.suffix.lower() == ".txt"}

    def build(writer: ArrayWriter) -> None:
        has_text = columns.medium != "audio" or any(path.with_suffix("") in texts for path in media)
        items = CaptionWriter(writer, data.split_seed, columns, has_text=has_text)
        for path in media:
            text, name = texts.get(path.with_suffix("")), str(path.relative_to(folder))
            if text is not None:
                try:
                    caption = " ".join(text.read_text(encoding="utf-8-sig").split())
                except UnicodeDecodeError as error:
                    raise UserError(f"'{text}' is not UTF-8 text ({error}); save it as UTF-8") from None
            elif columns.medium == "audio":
                caption = ""
            elif path.parent != folder:
                caption = " ".join(re.split(r"[\s_-]+", path.parent.name)).strip()
            else:
                raise UserError(
                    f"'{path}' has no caption: there is no {_METADATA[0]}, no '{path.stem}.txt' beside it, and no "
                    f"subfolder named by its caption; write {_METADATA[0]}, with {example}"
                )
            items.add(name, [caption] if caption else [], str(text or path))

    # Names of media without their times: media are identified by content.
    key = [str(folder.resolve()), [str(path) for path in media], [file_stamp(text) for text in texts.values()]]
    return stored_arrays(data.cache_dir, source.kind, [*key, data.split_seed], build)


def _path_in(row: Row, column: str, noun: str, where: str) -> str:
    """The path in a field.

    Raises:
        UserError: The field holds something else.
    """
    if not isinstance(row[column], str):
        raise UserError(f"{where}: needs a field '{column}' with the path of an {noun}, got {row[column]!r}")
    return row[column]
