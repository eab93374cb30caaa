"""The media of a source as latents or codes, encoded once and mapped from disk afterwards."""

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from transfusion_mot.codecs.base import Codec
from transfusion_mot.config import DataConfig
from transfusion_mot.data.encoded_shards import ELSEWHERE, SUFFIX, ShardEntries, mapped_array, remove_partial
from transfusion_mot.data.encoding import Shard, encode_shards
from transfusion_mot.data.sources.arrays import ArrayWriter, StoredArrays, arrays_folder, stored_arrays
from transfusion_mot.data.sources.base import NOUNS, MediaSet, counted, fingerprint_of
from transfusion_mot.data.sources.keys import KeySet, places_of
from transfusion_mot.errors import UserError

# Increase it when the contents of the files change.
_FORMAT = 3
_SHARD_MEDIA = 4096
# Seconds until a network file system shows the files of another machine.
_VISIBLE_SECONDS = 60
_INDEX, _ABOUT = "index", "about"
_PREFIXES = {"latents": "latent-cache", "codes": "code-cache"}

_logger = logging.getLogger(__name__)
_Value = TypeVar("_Value")


class EncodedLatents(Protocol):
    """Media of a source as latents.

    Attributes:
        readable: [N] False for media that could not be decoded and have no latents.
        skipped: Skipped media: reason => count.
    """

    kind: Literal["latents"]
    readable: npt.NDArray[np.bool_]
    skipped: dict[str, int]

    def posterior(self, index: int, flipped: bool = False) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Mean and standard deviation [C, Y, X] of readable media, or of their mirror image."""
        ...


class EncodedCodes(Protocol):
    """Media of a source as codes; attributes as in `EncodedLatents`."""

    kind: Literal["codes"]
    readable: npt.NDArray[np.bool_]
    skipped: dict[str, int]

    def span(self, index: int, flipped: bool = False) -> list[int]:
        """`start`, the codes and `end` of readable media, or of their mirror image."""
        ...


EncodedMedia = EncodedLatents | EncodedCodes


class _Cached:
    """Encoded media of a source.

    Attributes:
        media: The media.
        folder: Folder of the encoded media.
        readable: [N] False for media that could not be decoded and are missing.
        skipped: Media skipped here and when the source was opened: reason => count.
        num_encoded: Number of media that were newly encoded.
    """

    num_encoded = 0

    def __init__(self, media: MediaSet, folder: Path, index: StoredArrays) -> None:
        self.media = media
        self.folder = folder
        self.skipped: dict[str, int] = media.skipped | index.skipped().counts
        self._about: dict[str, Any] = json.loads(index.strings(_ABOUT)[0])
        self._index = index
        # Plain arrays: indexing numpy's class for mapped files takes longer than reading a small latent.
        self._shards, self._rows = (index[name].view(np.ndarray) for name in ("shards", "rows"))
        self._files = [str(folder / name) for name in index.strings("files")]
        self.readable: npt.NDArray[np.bool_] = self._rows >= 0

    def _place(self, index: int) -> tuple[str, int]:
        """File and row of readable media."""
        row = self._rows[index]
        assert row >= 0
        return self._files[self._shards[index]], row

    @property
    def num_bytes(self) -> int:
        """Size of all encoded media in bytes."""
        total = 0
        for number, file in enumerate(self._files):
            # Media that a source lists several times are stored once.
            rows = np.unique(self._rows[(self._shards == number) & self.readable])
            total += self._bytes_in(file, rows) if len(rows) else 0
        return total

    def _bytes_in(self, file: str, rows: npt.NDArray[np.int64]) -> int:
        """Size of some rows of a file."""
        raise NotImplementedError

    def count_encoded(self, known_files: set[str]) -> None:
        """Count the media in new shards."""
        is_new = np.array([file not in known_files for file in self._files], dtype=np.bool_)
        self.num_encoded = int(is_new[self._shards[self.readable]].sum())

    def __reduce__(self) -> tuple[Callable[..., "_Cached"], tuple[Any, ...]]:
        # A worker process maps the files again; pickle would send it their bytes.
        return type(self), (self.media, self.folder, self._index)


class CachedLatents(_Cached):
    """Posteriors of the normalised latents of images; a sample is `mean + std * noise`.

    Attributes:
        latent_shapes: (C, Y, X) of every bucket.
    """

    kind: Literal["latents"] = "latents"

    def __init__(self, media: MediaSet, folder: Path, index: StoredArrays) -> None:
        super().__init__(media, folder, index)
        self.latent_shapes: list[tuple[int, int, int]] = [tuple(shape) for shape in self._about["latent_shapes"]]

    def posterior(self, index: int, flipped: bool = False) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.float16]]:
        """Mean and standard deviation [C, Y, X] of a readable image, or of its mirror image; views of a mapped file.

        Mirrored images are there with `data.random_flip`.
        """
        file, row = self._place(index)
        mean, std = mapped_array(file, "latents")[row, int(flipped)]
        return mean, std

    def _bytes_in(self, file: str, rows: npt.NDArray[np.int64]) -> int:
        return len(rows) * mapped_array(file, "latents")[0].nbytes


class CachedCodes(_Cached):
    """Codes of images, in raster order, or of audio.

    Attributes:
        codebook_size: Number of codes; `start` and `end` of a span are the next two ids.
    """

    kind: Literal["codes"] = "codes"

    def __init__(self, media: MediaSet, folder: Path, index: StoredArrays) -> None:
        super().__init__(media, folder, index)
        self.codebook_size: int = self._about["codebook_size"]

    def span(self, index: int, flipped: bool = False) -> list[int]:
        """`start`, the codes and `end` of readable media; of an image, or of its mirror image.

        Mirrored images are there with `data.random_flip`.
        """
        file, row = self._place(index)
        ends = mapped_array(file, "ends")
        # Audio has one version.
        version = row * ends.shape[1] + (int(flipped) if ends.shape[1] > 1 else 0)
        ends = ends.reshape(-1)
        first = int(ends[version - 1]) if version else 0
        codes: list[int] = mapped_array(file, "codes")[first : int(ends[version])].tolist()
        return [self.codebook_size, *codes, self.codebook_size + 1]

    def _bytes_in(self, file: str, rows: npt.NDArray[np.int64]) -> int:
        ends = mapped_array(file, "ends")
        lengths = np.diff(ends.reshape(-1), prepend=0).reshape(ends.shape)
        return int(lengths[rows].sum()) * mapped_array(file, "codes").itemsize


CachedMedia = CachedLatents | CachedCodes


def encoded_media(
    media: MediaSet,
    codec: Codec,
    data: DataConfig,
    *,
    batch_size: int,
    accelerator: Accelerator | None = None,
    shard_media: int = _SHARD_MEDIA,
) -> CachedMedia:
    """The latents or codes of `media`; those that `data.cache_dir` lacks are encoded on the codec's device.

    They are identified by the content of a file. Files that were moved or touched are read again, but not encoded
    again; their location, their neighbours and their side of the held-out split do not matter. A file with the same
    path, size and modification time is not read again.

    The folder's name is a hash of the codec and the transform of images, so that outputs of different codecs are never
    mixed. All processes of `accelerator` must call this together and share the work. An interrupted run keeps its
    complete shards. Two runs that encode at the same time get the same result.

    Args:
        data: The images' transform, the cache folder, the worker processes that decode, and whether to encode.
        batch_size: Media encoded at a time.
        shard_media: Media in a shard; an interrupted run repeats at most one shard.

    Raises:
        UserError: The codec reads other media; none is readable; a file cannot be read; the folder cannot be written or
            is not shared by all processes; or `data.latents` is `prepared` and some media are missing.
    """
    noun = NOUNS[media.medium]
    if codec.medium != media.medium:
        raise UserError(
            f"the source '{media.name}' has {noun}s, but the codec of their modality reads {NOUNS[codec.medium]}s; set "
            "'modality' or 'audio_modality' of the source to another, or codecs.MODALITY.path to another codec"
        )
    made_with: dict[str, Any] = {
        "format": _FORMAT,
        "autoencoder" if codec.kind == "latents" else "codec": codec.fingerprint,
    }
    fingerprint = made_with
    if codec.medium != "audio":
        made_with |= {"image_fit": data.image_fit, "random_flip": data.random_flip}
        fingerprint = made_with | {"image sizes": [list(size) for size in data.image_sizes]}
    made_hash = hashlib.sha256(json.dumps(made_with).encode()).hexdigest()[:16]
    folder = Path(data.cache_dir) / f"{_PREFIXES[codec.kind]}-{made_hash}"
    sizes = [folder / f"{height}x{width}" for height, width in data.image_sizes]
    if codec.medium == "audio":
        sizes = [folder / "audio"]
    key = [fingerprint, media.fingerprint]
    is_main = accelerator is None or accelerator.is_main_process

    # One process decides for all: another could already see a shard that was finished in the meantime.
    known_files = None
    if is_main and not _is_indexed(folder, key):
        known_files = [sorted(size.glob(f"*{SUFFIX}")) for size in sizes]
    known_files = _agreed(known_files, accelerator)
    if known_files is not None:
        entries = [ShardEntries(files) for files in known_files]
        missing = np.flatnonzero(_places(media, entries) < 0)
        plan = _plan(media, missing, sizes, shard_media)
        if plan:
            reason = _why_not(folder, media, codec.kind, fingerprint, len(missing))
            _encode(
                media,
                codec,
                data,
                plan,
                entries=entries,
                reason=reason,
                batch_size=batch_size,
                accelerator=accelerator,
            )
        problem = None
        if is_main:
            files = [
                sorted({*known, *(shard.file for shard in plan if shard.bucket == bucket)})
                for bucket, known in enumerate(known_files)
            ]
            problem = _write_index(folder, key, media, about=_about(media, codec, fingerprint), files=files)
        if (problem := _agreed(problem, accelerator)) is not None:
            raise UserError(problem)
    place = arrays_folder(str(folder), _INDEX, key)
    _wait_for(place)
    index = StoredArrays(place)
    encoded = (CachedLatents if codec.kind == "latents" else CachedCodes)(media, folder, index)
    if known_files is not None:
        encoded.count_encoded({str(file) for files in known_files for file in files})
    if len(media) and not encoded.readable.any():
        (example, *_) = index.skipped().examples[f"unreadable {noun}"]
        raise UserError(f"none of the {len(media)} {noun}s of '{media.name}' is readable; the first: {example}")
    return encoded


def _about(media: MediaSet, codec: Codec, fingerprint: dict[str, Any]) -> dict[str, Any]:
    """Description that an index stores about itself."""
    about = {"name": media.name, "made_of": fingerprint}
    if codec.kind == "codes":
        return about | {"codebook_size": codec.codebook_size}
    sizes = [
        (height // codec.downsampling, width // codec.downsampling) for height, width in fingerprint["image sizes"]
    ]
    return about | {"latent_shapes": [(codec.latent_channels, *size) for size in sizes]}


def _agreed(value: _Value, accelerator: Accelerator | None) -> _Value:
    """The main process's value on all processes."""
    if accelerator is None or accelerator.num_processes == 1:
        return value
    (agreed,) = broadcast_object_list([value])
    return agreed


def _is_indexed(folder: Path, key: object) -> bool:
    """Whether the index is complete and all of its shards exist."""
    place = arrays_folder(str(folder), _INDEX, key)
    if not place.is_dir():
        return False
    if all((folder / name).is_file() for name in StoredArrays(place).strings("files")):
        return True
    # Shards were removed.
    shutil.rmtree(place, ignore_errors=True)
    return False


def _places(media: MediaSet, entries: Sequence[ShardEntries]) -> npt.NDArray[np.int64]:
    """[N], index of each item in the shards of its size; -1 if it has none."""
    places = np.full(len(media), -1, dtype=np.int64)
    for bucket, of_size in enumerate(entries):
        here = media.buckets == bucket
        places[here] = of_size.places_of(media.stamps[here])
    return places


def _plan(media: MediaSet, missing: npt.NDArray[np.int64], sizes: Sequence[Path], shard_media: int) -> list[Shard]:
    """Plan the shards to encode; repeated media are encoded once for each size."""
    plan = []
    is_first = np.zeros(len(missing), dtype=np.bool_)
    for bucket in range(len(sizes)):
        here = np.flatnonzero(media.buckets[missing] == bucket)
        stamps = media.stamps[missing[here]]
        is_first[here] = places_of(stamps, stamps) == np.arange(len(here))
    missing = missing[is_first]
    # In groups, so that almost every file is read only once, although each bucket has its own shards.
    at_a_time = shard_media * len(sizes)
    for some in (missing[start : start + at_a_time] for start in range(0, len(missing), at_a_time)):
        for bucket, folder in enumerate(sizes):
            of_bucket = some[media.buckets[some] == bucket]
            for start in range(0, len(of_bucket), shard_media):
                indices = of_bucket[start : start + shard_media]
                if media.medium == "audio":
                    # Sorted, so that items of similar length are encoded together.
                    indices = indices[np.argsort(media.seconds[indices], kind="stable")]
                # Two runs with the same work write the same files.
                plan.append(Shard(folder / f"{fingerprint_of(media.stamps[indices])}{SUFFIX}", bucket, indices))
    return plan


def _encode(
    media: MediaSet,
    codec: Codec,
    data: DataConfig,
    plan: Sequence[Shard],
    *,
    entries: Sequence[ShardEntries],
    reason: str,
    batch_size: int,
    accelerator: Accelerator | None,
) -> None:
    """Write this process's share of the shards and wait for the others; `reason` explains why shards are missing."""
    is_main = accelerator is None or accelerator.is_main_process
    rank, world_size = (accelerator.process_index, accelerator.num_processes) if accelerator is not None else (0, 1)
    refusal = None
    if data.latents == "prepared":
        refusal = (
            f"{reason}; encode them with `python -m transfusion_mot.data.cache` and the same configuration, or set "
            f"data.latents to cache{' or online' if codec.kind == 'latents' else ''}"
        )
        # If nothing of this size is encoded yet, the media are missing for sure and need not be read.
        if any(not len(entries[shard.bucket].files) for shard in plan):
            raise UserError(refusal)
    for folder in {shard.file.parent for shard in plan}:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the folder '{folder}': {error.strerror}; set data.cache_dir") from None
    if is_main:
        number = counted({NOUNS[media.medium]: sum(len(shard.indices) for shard in plan)})
        _logger.info("%s; reading %s, and encoding new ones", reason, number)
        remove_partial(plan[0].file.parents[1])
    mine, loads = [], [0] * world_size
    for shard in plan:
        least = loads.index(min(loads))
        loads[least] += len(shard.indices)
        if least == rank:
            mine.append(shard)
    if mine:
        share = f" (process 1 of {world_size})" if world_size > 1 else ""
        description = f"encoding {media.name}{share}" if is_main else None
        known = [KeySet(of_size.contents[of_size.rows != ELSEWHERE]) for of_size in entries]
        begun = time.perf_counter()
        waited = encode_shards(
            media,
            codec,
            data,
            mine,
            known=known,
            batch_size=batch_size,
            description=description,
            refusal=refusal,
        )
        if is_main and waited > 0.5 and time.perf_counter() - begun > 30:
            _logger.info(
                "the codec waited for media %.0f %% of the time; data.num_workers above %d may help",
                100 * waited,
                data.num_workers,
            )
    if accelerator is not None:
        accelerator.wait_for_everyone()


def _why_not(
    folder: Path, media: MediaSet, kind: Literal["latents", "codes"], fingerprint: dict[str, Any], num_missing: int
) -> str:
    """A sentence that explains why latents or codes are missing."""
    cache_dir, noun = folder.parent, NOUNS[media.medium]
    old = ""
    if kind == "latents" and any(cache_dir.glob("latents-*/index.json")):
        old = f" (those of an earlier version are not used any more; remove them: rm -r '{cache_dir}'/latents-*)"
    if num_missing < len(media):
        known = len(media) - num_missing
        return f"'{folder}' has {kind} of {known:,} of the {len(media):,} {noun}s of '{media.name}'{old}"
    others = []
    for place in cache_dir.glob(f"{_PREFIXES[kind]}-*/{_INDEX}-*"):
        if "." not in place.name:
            about = json.loads(StoredArrays(place).strings(_ABOUT)[0])
            before = about["made_of"]
            # A source may have images and audio.
            if about["name"] == media.name and before.keys() == fingerprint.keys():
                differing = [part for part in fingerprint if before.get(part) != fingerprint[part]]
                others.append((len(differing), str(place.parent), differing, before))
    if not others:
        return f"'{cache_dir}' has no {kind} of '{media.name}'{old}"
    _, path, differing, before = min(others, key=lambda other: other[:2])
    # Other media of the source, such as those of the other split, do not count.
    if not differing:
        return f"'{cache_dir}' has no {kind} of these {len(media):,} {noun}s of '{media.name}' yet{old}"
    parts = [
        f"{'other' if part.endswith('s') else 'another'} {part} ({before.get(part)}, and now it is {fingerprint[part]})"
        for part in differing
    ]
    return f"the {kind} of '{media.name}' in '{path}' were made with {' and '.join(parts)}{old}"


def _write_index(
    folder: Path, key: object, media: MediaSet, *, about: dict[str, Any], files: Sequence[Sequence[Path]]
) -> str | None:
    """Write the index of all encoded media => None, or an error message."""
    entries, noun = [], NOUNS[media.medium]
    try:
        for of_size in files:
            for file in of_size:
                _wait_for(file)
            entries.append(ShardEntries(of_size))
    except UserError as error:
        return str(error)
    places = _places(media, entries)
    if (places < 0).any():
        return f"files were removed from '{folder}' during encoding; start again"

    def build(writer: ArrayWriter) -> None:
        shards = np.zeros(len(media), dtype=np.int64)
        rows = np.zeros(len(media), dtype=np.int64)
        names = writer.strings("files")
        for bucket, of_size in enumerate(entries):
            here = np.flatnonzero(media.buckets == bucket)
            used, numbers = np.unique(of_size.shards[places[here]], return_inverse=True)
            shards[here] = numbers + len(names.ends)
            rows[here] = of_size.rows[places[here]]
            for shard in used.tolist():
                names.add(str(of_size.files[shard].relative_to(folder)))
        for index in np.flatnonzero(rows < 0).tolist():
            reason = entries[media.buckets[index]].reason(int(places[index]))
            writer.skipped.add(f"unreadable {noun}", f"{noun} '{media.where(index)}' {reason}")
        writer.skipped.warn(media.name, int((rows >= 0).sum()), noun)
        writer.integers("shards").frombytes(shards.tobytes())
        writer.integers("rows").frombytes(rows.tobytes())
        writer.strings(_ABOUT).add(json.dumps(about))

    try:
        stored_arrays(str(folder), _INDEX, key, build)
    except OSError as error:
        return f"cannot write to '{folder}': {error.strerror}; free disk space, or set another data.cache_dir"
    return None


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + _VISIBLE_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            raise UserError(f"'{path}' does not appear; data.cache_dir must be on a file system that all processes see")
        time.sleep(0.5)
