"""Tar files, indexed once and read in place: WebDataset shards, and images of interleaved documents."""

import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tqdm import tqdm

from transfusion_mot.config import DataConfig, SourceConfig
from transfusion_mot.data.sources.arrays import ArrayWriter, StoredArrays, file_stamp, stored_arrays
from transfusion_mot.data.sources.base import SkippedItems
from transfusion_mot.data.sources.columns import UNREADABLE, MediaColumns
from transfusion_mot.data.sources.parallel import map_in_processes
from transfusion_mot.data.sources.stored_media import CaptionWriter
from transfusion_mot.data.sources.tables import Unusable, json_object, pick_column, texts_in
from transfusion_mot.errors import UserError

_IMAGES = ("jpg", "jpeg", "png", "webp")
_CAPTIONS = ("txt", "json")
# Reason for skipping all but the last member with one name.
SAME_NAME = "member of the same name"
_NO_TAR = "unreadable tar file"


@dataclass
class Member:
    """A file in a tar file: its name, and the place of its content."""

    name: str
    offset: int
    size: int


@dataclass
class _Sample:
    name: str
    captions: list[str]
    first: Member
    second: Member | None


@dataclass
class _Shard:
    """Contents of a tar file: samples; skipped members by reason; (reason, problem) of invalid members."""

    samples: list[_Sample] = field(default_factory=list)
    skipped: SkippedItems = field(default_factory=SkippedItems)
    unusable: list[tuple[str, str]] = field(default_factory=list)


def scan_tar(path: Path, skipped: SkippedItems) -> list[Member]:
    """The regular files of a tar file, in order, read only from its headers.

    Files before a damaged place are used; the damage is counted in `skipped`, and so are empty files.

    Raises:
        UserError: It is not an uncompressed tar file.
    """
    if path.stat().st_size == 0:
        skipped.add("empty shard", str(path))
        return []
    members = []
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            while (info := tar.next()) is not None:
                # The library keeps every header it has read.
                tar.members = []  # type: ignore[attr-defined]
                if info.isreg() and not info.issparse():
                    members.append(Member(info.name, info.offset_data, info.size))
            # The library treats a truncated or damaged header as the end of the file, which is a block of zeros.
            file.seek(tar.offset)
            whole = file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
    except tarfile.TarError as error:
        if not members:
            raise UserError(
                f"'{path}' is not an uncompressed tar file ({error}); unpack it if it is compressed"
            ) from None
        whole = False
    if not whole:
        skipped.add("truncated tar file", str(path))
        size = path.stat().st_size
        members = [member for member in members if member.offset + member.size <= size]
    if not members:
        skipped.add("empty shard", str(path))
    return members


def scan_tars(files: Sequence[Path], skipped: SkippedItems) -> list[list[Member]]:
    """`scan_tar` of each, on all cores; files that are not tar files are counted in `skipped`, too.

    Raises:
        UserError: None is an uncompressed tar file.
    """
    unusable = Unusable(skipped)
    found = []
    for members, own, problem in tqdm(
        map_in_processes(_scan_one, files), total=len(files), desc="indexing tar files", unit="file"
    ):
        skipped.update(own)
        found.append(members)
        if problem is None:
            unusable.num_used += 1
        else:
            unusable.add(UserError(problem), _NO_TAR)
    unusable.refuse_if_all()
    return found


def _scan_one(path: Path) -> tuple[list[Member], SkippedItems, str | None]:
    skipped = SkippedItems()
    try:
        return scan_tar(path, skipped), skipped, None
    except UserError as error:
        return [], skipped, str(error)


def index_webdataset(
    source: SourceConfig, data: DataConfig, files: Sequence[Path], columns: MediaColumns
) -> StoredArrays:
    """Names, places and texts of the images or audio clips of WebDataset shards.

    Members with the same name up to the first dot are a sample: an image or audio clip and its text. The text is in a
    `.txt`, or else in the field `text` or `caption` of a `.json` (for audio `transcription` or `text`); with
    `text_column`, in that field. If no sample has an image or audio clip, names are compared up to the extension, as
    in "cat 2.0.jpg" and "cat 2.0.txt". If no sample of audio has a text, items have no texts.

    `columns` gives the ends of member names.

    Shards and samples that cannot be used are counted.

    Raises:
        UserError: No file is a tar file, or the field is in no `.json`.
    """

    def build(writer: ArrayWriter) -> None:
        has_text = _any_has_text(files, columns)
        items = CaptionWriter(writer, data.split_seed, columns, has_text=has_text)
        unusable = Unusable(writer.skipped)
        numbers, offsets, sizes = (writer.integers(name) for name in ("files", "offsets", "sizes"))
        if columns.second is not None:
            seconds = [writer.integers(f"{columns.prefix}{name}") for name in ("offsets", "sizes")]
        read = partial(_read_shard, columns=columns, text_column=source.text_column, has_text=has_text)
        shards = tqdm(map_in_processes(read, files), total=len(files), desc=f"indexing {source.path}", unit="file")
        for number, shard in enumerate(shards):
            writer.skipped.update(shard.skipped)
            for sample in shard.samples:
                where = f"{files[number]}:{sample.name}"
                second = Member("", 0, 0) if sample.second is None else sample.second
                if items.add(sample.name, sample.captions, where, second=second.name):
                    numbers.append(number)
                    offsets.append(sample.first.offset)
                    sizes.append(sample.first.size)
                    if columns.second is not None:
                        for values, value in zip(seconds, (second.offset, second.size), strict=True):
                            values.append(value)
            unusable.num_used = len(numbers)
            for reason, problem in shard.unusable:
                unusable.add(UserError(problem), reason)
        unusable.refuse_if_all()

    key = [[file_stamp(file) for file in files], source.text_column, *columns.key, data.split_seed]
    return stored_arrays(data.cache_dir, "webdataset", key, build)


def _any_has_text(files: Sequence[Path], columns: MediaColumns) -> bool:
    """Whether samples may have texts: audio need not have any, and the first shard decides."""
    if columns.medium != "audio":
        return True
    members = next((found for file in files if (found := scan_tar(file, SkippedItems()))), [])
    return any(member.name.lower().endswith(tuple(f".{extension}" for extension in _CAPTIONS)) for member in members)


def _read_shard(path: Path, columns: MediaColumns, text_column: str | None, has_text: bool) -> _Shard:
    """The samples of a tar file with their texts."""
    shard = _Shard()
    found, shard.skipped, problem = _scan_one(path)
    if problem is not None:
        shard.unusable.append((_NO_TAR, problem))
    firsts = _IMAGES if columns.first is None else (columns.first,)
    extensions = (*firsts, *([] if columns.second is None else [columns.second]))
    with path.open("rb", buffering=0) as file:
        for members in _samples_in(found, extensions, path, shard.skipped):
            first = next((members[extension] for extension in firsts if extension in members), None)
            second = None if columns.second is None else members.get(columns.second)
            where = f"{path}:{next(iter(members.values())).name}"
            if first is None:
                shard.skipped.add(f"sample without an {columns.noun}", where)
            elif first.size == 0:
                shard.skipped.add(f"empty {UNREADABLE[columns.medium].file}", f"{path}:{first.name}")
            elif columns.is_edit and second is None:
                shard.skipped.add("sample without a source image", where)
            else:
                captions: list[str] | None = []
                if has_text:
                    captions = _captions(file.fileno(), members, text_column, columns, where, shard)
                if captions is not None:
                    shard.samples.append(_Sample(first.name, captions, first, second))
    return shard


def _samples_in(
    found: Iterable[Member], media: Sequence[str], path: Path, skipped: SkippedItems
) -> Iterator[dict[str, Member]]:
    """Members of a tar file => those of each sample by extension, in lower case."""
    by_key: dict[str, dict[str, Member]] = {}
    for member in found:
        folder, _, base = member.name.rpartition("/")
        key, _, extension = base.partition(".")
        members = by_key.setdefault(f"{folder}/{key}", {})
        if (earlier := members.pop(extension.lower(), None)) is not None:
            skipped.add(SAME_NAME, f"{path}:{earlier.name}")
        members[extension.lower()] = member
    for key, members in by_key.items():
        # Without hidden files, whose names begin with a dot.
        if key.endswith("/") or any(extension in members for extension in media):
            yield members
            continue
        samples: dict[str, dict[str, Member]] = {}
        for extension, member in members.items():
            for known in (*media, *_CAPTIONS):
                if f".{extension}".endswith(f".{known}"):
                    samples.setdefault(f".{extension}".removesuffix(f".{known}"), {})[known] = member
        has_media = any(extension in sample for sample in samples.values() for extension in media)
        yield from samples.values() if has_media else [members]


def _captions(
    file: int,
    members: dict[str, Member],
    text_column: str | None,
    columns: MediaColumns,
    where: str,
    shard: _Shard,
) -> list[str] | None:
    """The captions of a sample; None if it has no usable caption, which is counted."""
    extension = "txt" if "txt" in members and text_column is None else "json"
    if extension not in members:
        shard.skipped.add("sample without a caption", where)
        return None
    member = members[extension]
    try:
        content = os.pread(file, member.size, member.offset).decode("utf-8-sig")
    except UnicodeDecodeError:
        shard.skipped.add("caption not in UTF-8", where)
        return None
    if extension == "txt":
        return texts_in(content, "txt", where)
    try:
        entry = json_object(content, where)
    except UserError as error:
        shard.skipped.add("damaged JSON file", str(error))
        return None
    try:
        column = pick_column(text_column, columns.usual_texts, list(entry), where)
        return texts_in(entry[column], column, where)
    except UserError as error:
        shard.unusable.append(("sample without a caption", str(error)))
        return None
