"""Tar files, indexed once and read in place: WebDataset shards, and images that other documents name."""

import json
import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tqdm import tqdm

from transfusion_mot.config import DataConfig, SourceConfig
from transfusion_mot.data.sources.arrays import ArrayWriter, StoredArrays, file_stamp, stored_arrays
from transfusion_mot.data.sources.base import SkippedItems
from transfusion_mot.data.sources.parallel import map_in_processes
from transfusion_mot.data.sources.stored_images import CaptionWriter
from transfusion_mot.data.sources.tables import pick_column, texts_in
from transfusion_mot.errors import UserError

_IMAGES = ("jpg", "jpeg", "png", "webp")


@dataclass
class Member:
    """A file in a tar file: its name, and where its content lies."""

    name: str
    offset: int
    size: int


@dataclass
class _Sample:
    name: str
    captions: list[str]
    image: Member


@dataclass
class _Shard:
    samples: list[_Sample] = field(default_factory=list)
    skipped: SkippedItems = field(default_factory=SkippedItems)


def scan_tar(path: Path, skipped: SkippedItems) -> list[Member]:
    """The regular files of a tar file, in order, from its headers alone.

    What stands before a damaged place is used, and the damage counted in `skipped`, as is an empty file.

    Raises:
        UserError: It is no uncompressed tar file.
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
            # The library takes a header that is cut off or damaged for the end, which is a block of zeros.
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


def scan_tars(files: Sequence[Path]) -> list[tuple[list[Member], SkippedItems]]:
    """`scan_tar` of each, on all cores."""
    return list(tqdm(map_in_processes(_scan_one, files), total=len(files), desc="indexing tar files", unit="file"))


def _scan_one(path: Path) -> tuple[list[Member], SkippedItems]:
    skipped = SkippedItems()
    return scan_tar(path, skipped), skipped


def index_webdataset(source: SourceConfig, data: DataConfig, files: Sequence[Path]) -> StoredArrays:
    """Names, places and captions of the images of WebDataset shards.

    Members whose names agree up to the first dot are a sample: an image, and its caption in a `.txt`, or in the field
    `text` or `caption` of a `.json` if there is no `.txt`; with `text_column`, in that field.

    Raises:
        UserError: A file is no tar file, or no `.json` has the field.
    """

    def build(writer: ArrayWriter) -> None:
        items = CaptionWriter(writer, data.split_seed)
        numbers, offsets, sizes = (writer.integers(name) for name in ("files", "offsets", "sizes"))
        read = partial(_read_shard, text_column=source.text_column, image_column=source.image_column)
        shards = tqdm(map_in_processes(read, files), total=len(files), desc=f"indexing {source.path}", unit="file")
        for number, shard in enumerate(shards):
            writer.skipped.update(shard.skipped)
            for sample in shard.samples:
                if items.add(sample.name, sample.captions, f"{files[number]}:{sample.name}"):
                    numbers.append(number)
                    offsets.append(sample.image.offset)
                    sizes.append(sample.image.size)

    columns = [source.text_column, source.image_column]
    key = [[file_stamp(file) for file in files], columns, data.split_seed]
    return stored_arrays(data.cache_dir, "webdataset", key, build)


def _read_shard(path: Path, text_column: str | None, image_column: str | None) -> _Shard:
    """The samples of a tar file with their captions."""
    shard = _Shard()
    by_key: dict[str, dict[str, Member]] = {}
    for member in scan_tar(path, shard.skipped):
        folder, _, base = member.name.rpartition("/")
        key, _, extension = base.partition(".")
        by_key.setdefault(f"{folder}/{key}", {})[extension.lower()] = member
    with path.open("rb", buffering=0) as file:
        for members in by_key.values():
            extensions = _IMAGES if image_column is None else (image_column,)
            image = next((members[extension] for extension in extensions if extension in members), None)
            where = f"{path}:{next(iter(members.values())).name}"
            if image is None:
                shard.skipped.add("sample without an image", where)
            elif image.size == 0:
                shard.skipped.add("empty file", f"{path}:{image.name}")
            else:
                captions = _captions(file.fileno(), members, text_column, where, shard.skipped)
                if captions is not None:
                    shard.samples.append(_Sample(image.name, captions, image))
    return shard


def _captions(
    file: int, members: dict[str, Member], text_column: str | None, where: str, skipped: SkippedItems
) -> list[str] | None:
    """The captions of a sample; None if they cannot be read, which is counted."""
    extension = "txt" if "txt" in members and text_column is None else "json"
    if extension not in members:
        skipped.add("sample without a caption", where)
        return None
    member = members[extension]
    try:
        content = os.pread(file, member.size, member.offset).decode("utf-8-sig")
    except UnicodeDecodeError:
        skipped.add("caption not in UTF-8", where)
        return None
    if extension == "txt":
        return texts_in(content, "txt", where)
    try:
        entry = json.loads(content)
    except json.JSONDecodeError:
        entry = None
    if not isinstance(entry, dict):
        skipped.add("damaged JSON file", where)
        return None
    column = pick_column(text_column, ("text", "caption"), list(entry), where)
    return texts_in(entry[column], column, where)
