"""Files of encoded media: written atomically, and found by the content of media, not by their path.

A shard is a safetensors file of images of one size, or of audio. It lists the media that a process has handled:

- `stamps` [N, 2]: location of each, and modification time of its file
- `contents` [N, 2]: hash of its content
- `rows` [N]: its row in the encoded data
- `latents` [n, versions, mean and std, C, Y, X]; or `codes` [sum of lengths], of all items and versions in order, and
  `ends` [n, versions], where each of them ends

Media whose content is in another shard are listed without a row, so that they are not read again. Media that cannot be
decoded are also listed, with the reason. Processes share only a folder.
"""

import json
import os
import shutil
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from transfusion_mot.data.sources.keys import Keys, key_of, keys_from, places_of
from transfusion_mot.data.sources.reading import with_retries
from transfusion_mot.errors import UserError
from transfusion_mot.files import flush_to_disk

# Row number of media without a row.
ELSEWHERE, UNREADABLE = -1, -2

SUFFIX = ".safetensors"
# Type names of safetensors.
_DTYPES = {"F16": np.float16, "U8": np.uint8, "U16": np.uint16, "U32": np.uint32, "I64": np.int64}
# Writing a shard takes seconds, so an older temporary file belongs to a dead run.
_STALE_SECONDS = 3600
# Half of the files that Linux lets a process map (vm.max_map_count). A mapped file needs no descriptor.
_MOST_MAPPED = 2**15


def content_key(content: bytes | Image.Image) -> bytes:
    """Key that identifies an encoded image or audio clip."""
    if isinstance(content, bytes):
        return key_of(content)
    return key_of(content.mode.encode(), repr(content.size).encode(), content.tobytes())


@dataclass
class ShardWriter:
    """Collects a shard of one kind in memory."""

    kind: Literal["latents", "codes"]
    stamps: list[Keys] = field(default_factory=list)
    contents: list[bytes] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    reasons: dict[int, str] = field(default_factory=dict)
    encoded: list[npt.NDArray[Any]] = field(default_factory=list)
    num_encoded: int = 0

    def add(
        self,
        stamps: Keys,
        contents: Sequence[bytes],
        is_encoded: Sequence[bool],
        reasons: Sequence[str],
        encoded: Sequence[npt.NDArray[Any]],
    ) -> None:
        """Add some media [N].

        Args:
            stamps: [N, 2] location of each, and modification time of its file.
            contents: Hashes of their contents.
            is_encoded: Which of them are in `encoded`.
            reasons: Why each cannot be decoded; empty if it can.
            encoded: [n] latents [versions, mean and std, C, Y, X] or codes [versions, P] of each.
        """
        self.stamps.append(stamps)
        self.contents += contents
        for is_here, reason in zip(is_encoded, reasons, strict=True):
            if reason:
                self.reasons[len(self.rows)] = reason
            self.rows.append(self.num_encoded if is_here else UNREADABLE if reason else ELSEWHERE)
            self.num_encoded += is_here
        self.encoded += encoded

    def write(self, file: Path) -> None:
        """Write it to a temporary file, flush it to the disk and rename it.

        Raises:
            OSError: It cannot be written.
        """
        tensors: dict[str, npt.NDArray[Any]] = {
            "stamps": np.concatenate(self.stamps),
            "contents": keys_from(b"".join(self.contents)),
            "rows": np.array(self.rows, dtype=np.int32),
        }
        if self.encoded and self.kind == "latents":
            tensors["latents"] = np.stack(self.encoded)
        elif self.encoded:
            lengths = np.array([[codes.shape[1]] * codes.shape[0] for codes in self.encoded])
            tensors["codes"] = np.concatenate([codes.reshape(-1) for codes in self.encoded])
            tensors["ends"] = lengths.cumsum().reshape(lengths.shape)
        partial = file.with_name(f"{file.name}.partial-{uuid.uuid4().hex[:8]}")
        try:
            save_file(tensors, partial, {"unreadable": json.dumps(self.reasons)})
            flush_to_disk(partial)
            # Another run with the same work may have been faster. Its file may be in use, and on a network file system
            # readers lose a file that is replaced.
            if not file.exists():
                os.replace(partial, file)
                flush_to_disk(file.parent)
        finally:
            partial.unlink(missing_ok=True)


def remove_partial(folder: Path) -> None:
    """Remove partial files of killed runs; new ones may belong to another process that is writing."""
    for path in folder.rglob("*.partial-*"):
        try:
            if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        except FileNotFoundError:
            continue  # Its owner is alive and has just renamed it.


class ShardEntries:
    """Entries of all shards of one image size.

    Args:
        files: The shards.

    Raises:
        UserError: A shard is damaged.

    Attributes:
        files: The shards.
        contents: [M, 2] hash of the content of every listed image.
        shards, rows: [M] index of its shard, and its row in the shard.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = list(files)
        stamps, contents = [np.empty((0, 2), dtype=np.uint64)], [np.empty((0, 2), dtype=np.uint64)]
        rows = [np.empty(0, dtype=np.int32)]
        lengths: list[int] = []
        count = 0
        self._reasons: dict[int, str] = {}
        for file in self.files:
            try:
                with with_retries(partial(safe_open, file, "numpy")) as shard:
                    reasons = json.loads(shard.metadata()["unreadable"])
                    for arrays, name in ((stamps, "stamps"), (contents, "contents"), (rows, "rows")):
                        arrays.append(shard.get_tensor(name))
            except SafetensorError as error:
                raise UserError(f"'{file}' is damaged ({error}); remove it: its items are then encoded again") from None
            self._reasons |= {count + int(entry): reason for entry, reason in reasons.items()}
            lengths.append(len(rows[-1]))
            count += lengths[-1]
        self.contents = np.concatenate(contents)
        self.rows = np.concatenate(rows)
        self.shards = np.repeat(np.arange(len(self.files)), lengths)
        self._stamps = np.concatenate(stamps)

    def places_of(self, stamps: Keys) -> npt.NDArray[np.int64]:
        """[N] index of the entry with the encoded image or the reason why it cannot be decoded; -1 if there is none."""
        homes = np.flatnonzero(self.rows != ELSEWHERE)
        home_of = places_of(self.contents, self.contents[homes])
        home_of = np.where(home_of >= 0, homes[home_of] if len(homes) else -1, -1)
        places = places_of(stamps, self._stamps)
        return np.where(places >= 0, home_of[places] if len(home_of) else -1, -1)

    def reason(self, entry: int) -> str:
        """The reason why an image cannot be decoded."""
        return self._reasons[entry]


@lru_cache(maxsize=_MOST_MAPPED)
def mapped_array(file: str, name: str) -> npt.NDArray[Any]:
    """A memory-mapped array of a shard by name."""
    # numpy and safetensors keep a descriptor for each mapped file, and a process may have only 1,024.
    with with_retries(partial(pa.memory_map, file)) as mapped:
        header_size = int.from_bytes(mapped.read(8), "little")
        entry = json.loads(mapped.read(header_size))[name]
        first, end = entry["data_offsets"]
        mapped.seek(8 + header_size + first)
        content = mapped.read_buffer(end - first)
    return np.frombuffer(content, dtype=_DTYPES[entry["dtype"]]).reshape(entry["shape"])
