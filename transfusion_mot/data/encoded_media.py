"""The images of a source as latents or codes, encoded once and mapped from disk afterwards."""

import hashlib
import json
import logging
import math
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
from transfusion_mot.data.sources.base import ImageSet, fingerprint_of
from transfusion_mot.data.sources.keys import KeySet
from transfusion_mot.errors import UserError

# Raise it when what the files hold changes.
_FORMAT = 3
_SHARD_IMAGES = 4096
# A network file system may take that long to show one machine what another has written.
_VISIBLE_SECONDS = 60
_INDEX, _ABOUT = "index", "about"
_UNREADABLE = "unreadable image"
_PREFIXES = {"latents": "latent-cache", "codes": "code-cache"}

_logger = logging.getLogger(__name__)
_Value = TypeVar("_Value")


class EncodedLatents(Protocol):
    """Media of a source as latents.

    Attributes:
        readable: [N] False where they could not be decoded, and have no latents.
        skipped: What was left out: reason to count.
    """

    kind: Literal["latents"]
    readable: npt.NDArray[np.bool_]
    skipped: dict[str, int]

    def posterior(self, index: int, flipped: bool = False) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Mean and standard deviation [C, Y, X] of readable media, or of their mirror image."""
        ...


class EncodedCodes(Protocol):
    """Media of a source as codes; attributes as of `EncodedLatents`."""

    kind: Literal["codes"]
    readable: npt.NDArray[np.bool_]
    skipped: dict[str, int]

    def span(self, index: int, flipped: bool = False) -> list[int]:
        """`start`, the codes and `end` of readable media, or of their mirror image."""
        ...


EncodedMedia = EncodedLatents | EncodedCodes


class _Cached:
    """Images of a source as they were encoded.

    Attributes:
        images: The images.
        folder: Where they are encoded.
        readable: [N] False where an image could not be decoded, and is not there.
        skipped: What was left out, here and when the source was opened: reason to count.
        num_encoded: How many of the readable images were encoded to open it.
        num_bytes: Size of them all.
    """

    num_encoded = 0

    def __init__(self, images: ImageSet, folder: Path, index: StoredArrays) -> None:
        self.images = images
        self.folder = folder
        self.skipped: dict[str, int] = images.skipped | index.skipped().counts
        self._about: dict[str, Any] = json.loads(index.strings(_ABOUT)[0])
        self._index = index
        # As plain arrays: indexing numpy's own class for mapped files costs more than reading a small latent.
        self._shards, self._rows = (index[name].view(np.ndarray) for name in ("shards", "rows"))
        self._files = [str(folder / name) for name in index.strings("files")]
        self.readable: npt.NDArray[np.bool_] = self._rows >= 0

    def _place(self, index: int) -> tuple[str, int]:
        """File and row of a readable image."""
        row = self._rows[index]
        assert row >= 0
        return self._files[self._shards[index]], row

    def _size(self, bytes_of_bucket: Sequence[int]) -> int:
        """Bytes of all readable images, from those of one image and version of each bucket."""
        counts = np.bincount(self.images.buckets[self.readable], minlength=len(bytes_of_bucket)).tolist()
        versions = 1 + self._about["made_of"]["random_flip"]
        return sum(count * size for count, size in zip(counts, bytes_of_bucket, strict=True)) * versions

    def count_encoded(self, known_files: set[str]) -> None:
        """Count what is in other shards than those that were there before."""
        is_new = np.array([file not in known_files for file in self._files], dtype=np.bool_)
        self.num_encoded = int(is_new[self._shards[self.readable]].sum())

    def __reduce__(self) -> tuple[Callable[..., "_Cached"], tuple[Any, ...]]:
        # A worker process maps the files again; pickle would send it their bytes.
        return type(self), (self.images, self.folder, self._index)


class CachedLatents(_Cached):
    """Posteriors of the normalised latents of images; a sample is `mean + std * noise`.

    Attributes:
        latent_shapes: (C, Y, X) of every bucket.
    """

    kind: Literal["latents"] = "latents"

    def __init__(self, images: ImageSet, folder: Path, index: StoredArrays) -> None:
        super().__init__(images, folder, index)
        self.latent_shapes: list[tuple[int, int, int]] = [tuple(shape) for shape in self._about["latent_shapes"]]
        # Mean and standard deviation in half precision.
        self.num_bytes = self._size([4 * math.prod(shape) for shape in self.latent_shapes])

    def posterior(self, index: int, flipped: bool = False) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.float16]]:
        """Mean and standard deviation [C, Y, X] of a readable image, or of its mirror image; views of a mapped file.

        Mirrored images are there with `data.random_flip`.
        """
        file, row = self._place(index)
        mean, std = mapped_array(file, "latents")[row, int(flipped)]
        return mean, std


class CachedCodes(_Cached):
    """Codes of images, in raster order.

    Attributes:
        codebook_size: Number of codes; `start` and `end` of a span are the two integers behind them.
        grid_shapes: (rows, columns) of codes of every bucket.
    """

    kind: Literal["codes"] = "codes"

    def __init__(self, images: ImageSet, folder: Path, index: StoredArrays) -> None:
        super().__init__(images, folder, index)
        self.codebook_size: int = self._about["codebook_size"]
        self.grid_shapes: list[tuple[int, int]] = [tuple(shape) for shape in self._about["grid_shapes"]]
        itemsize = np.min_scalar_type(self.codebook_size - 1).itemsize
        self.num_bytes = self._size([itemsize * math.prod(shape) for shape in self.grid_shapes])

    def span(self, index: int, flipped: bool = False) -> list[int]:
        """`start`, the codes and `end` of a readable image, or of its mirror image.

        Mirrored images are there with `data.random_flip`.
        """
        file, row = self._place(index)
        ends = mapped_array(file, "ends")
        version = row * ends.shape[1] + int(flipped)
        ends = ends.reshape(-1)
        first = int(ends[version - 1]) if version else 0
        codes: list[int] = mapped_array(file, "codes")[first : int(ends[version])].tolist()
        return [self.codebook_size, *codes, self.codebook_size + 1]


CachedMedia = CachedLatents | CachedCodes


def encoded_media(
    images: ImageSet,
    codec: Codec,
    data: DataConfig,
    *,
    batch_size: int,
    accelerator: Accelerator | None = None,
    shard_images: int = _SHARD_IMAGES,
) -> CachedMedia:
    """The latents or codes of `images`; those that `data.cache_dir` lacks are encoded on the codec's device.

    They are known by the content of an image's file. Files that were moved or touched are read again, and not encoded
    again; which files they lie in, what stands beside them and on which side of the held-out split they are makes no
    difference. A file of the same path, size and time of change is not read again.

    The folder's name is a hash of the codec and the transform of images, so that what another codec has made is never
    taken for what this one makes. All processes of `accelerator` must call this together: they share the work, and an
    interrupted run goes on with the shards that are whole. Of two runs that encode at once both end up with the same.

    Args:
        data: The images' transform, the place of the cache, the worker processes that decode, and whether to encode.
        batch_size: Images encoded at a time.
        shard_images: Images a shard, the least that an interrupted run does again.

    Raises:
        UserError: None of the images can be decoded; a file cannot be read; the place cannot be written or is not seen
            by all processes; or `data.latents` is `prepared` and some are missing: the message says what there is.
    """
    made_with = {
        "format": _FORMAT,
        "autoencoder" if codec.kind == "latents" else "codec": codec.fingerprint,
        "image_fit": data.image_fit,
        "random_flip": data.random_flip,
    }
    made_of = made_with | {"image sizes": [list(size) for size in data.image_sizes]}
    made_hash = hashlib.sha256(json.dumps(made_with).encode()).hexdigest()[:16]
    folder = Path(data.cache_dir) / f"{_PREFIXES[codec.kind]}-{made_hash}"
    sizes = [folder / f"{height}x{width}" for height, width in data.image_sizes]
    key = [made_of, images.fingerprint]
    is_main = accelerator is None or accelerator.is_main_process

    # Decided by one: others could see a shard that has been finished a moment later.
    known_files = None
    if is_main and not _is_indexed(folder, key):
        known_files = [sorted(size.glob(f"*{SUFFIX}")) for size in sizes]
    known_files = _agreed(known_files, accelerator)
    if known_files is not None:
        entries = [ShardEntries(files) for files in known_files]
        missing = np.flatnonzero(_places(images, entries) < 0)
        plan = _plan(images, missing, sizes, shard_images)
        if plan:
            reason = _why_not(folder, images, codec.kind, made_of, len(missing))
            _encode(
                images,
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
            problem = _write_index(folder, key, images, about=_about(images, codec, made_of), files=files)
        if (problem := _agreed(problem, accelerator)) is not None:
            raise UserError(problem)
    place = arrays_folder(str(folder), _INDEX, key)
    _wait_for(place)
    index = StoredArrays(place)
    encoded = (CachedLatents if codec.kind == "latents" else CachedCodes)(images, folder, index)
    if known_files is not None:
        encoded.count_encoded({str(file) for files in known_files for file in files})
    if len(images) and not encoded.readable.any():
        (example, *_) = index.skipped().examples[_UNREADABLE]
        raise UserError(f"none of the {len(images)} images of '{images.name}' can be read; the first: {example}")
    return encoded


def _about(images: ImageSet, codec: Codec, made_of: dict[str, Any]) -> dict[str, Any]:
    """What an index says of itself."""
    sizes = [(height // codec.downsampling, width // codec.downsampling) for height, width in made_of["image sizes"]]
    about = {"name": images.name, "made_of": made_of}
    if codec.kind == "latents":
        return about | {"latent_shapes": [(codec.latent_channels, *size) for size in sizes]}
    return about | {"codebook_size": codec.codebook_size, "grid_shapes": sizes}


def _agreed(value: _Value, accelerator: Accelerator | None) -> _Value:
    """The main process's value, on all of them."""
    if accelerator is None or accelerator.num_processes == 1:
        return value
    (agreed,) = broadcast_object_list([value])
    return agreed


def _is_indexed(folder: Path, key: object) -> bool:
    """Whether it is written where each image is encoded, and all of that is there."""
    place = arrays_folder(str(folder), _INDEX, key)
    if not place.is_dir():
        return False
    if all((folder / name).is_file() for name in StoredArrays(place).strings("files")):
        return True
    # Someone has removed shards.
    shutil.rmtree(place, ignore_errors=True)
    return False


def _places(images: ImageSet, entries: Sequence[ShardEntries]) -> npt.NDArray[np.int64]:
    """[N], which entry of its size's shards is that of an image; -1 if none is."""
    places = np.full(len(images), -1, dtype=np.int64)
    for bucket, of_size in enumerate(entries):
        here = images.buckets == bucket
        places[here] = of_size.places_of(images.stamps[here])
    return places


def _plan(images: ImageSet, missing: npt.NDArray[np.int64], sizes: Sequence[Path], shard_images: int) -> list[Shard]:
    """What to encode, as shards."""
    plan = []
    # Some at a time, so that files are read once or nearly so, although each bucket has shards of its own.
    at_a_time = shard_images * len(sizes)
    for some in (missing[start : start + at_a_time] for start in range(0, len(missing), at_a_time)):
        for bucket, folder in enumerate(sizes):
            of_bucket = some[images.buckets[some] == bucket]
            for start in range(0, len(of_bucket), shard_images):
                indices = of_bucket[start : start + shard_images]
                # Two runs that do the same work write the same files.
                plan.append(Shard(folder / f"{fingerprint_of(images.stamps[indices])}{SUFFIX}", bucket, indices))
    return plan


def _encode(
    images: ImageSet,
    codec: Codec,
    data: DataConfig,
    plan: Sequence[Shard],
    *,
    entries: Sequence[ShardEntries],
    reason: str,
    batch_size: int,
    accelerator: Accelerator | None,
) -> None:
    """Write this process's share of the shards, and wait for the others; `reason` says why there is something to do."""
    is_main = accelerator is None or accelerator.is_main_process
    rank, world_size = (accelerator.process_index, accelerator.num_processes) if accelerator is not None else (0, 1)
    refusal = None
    if data.latents == "prepared":
        refusal = (
            f"{reason}; encode them with `python -m transfusion_mot.data.cache` and the same configuration, or set "
            f"data.latents to cache{' or online' if codec.kind == 'latents' else ''}"
        )
        # Without anything encoded of such a size, the images need not be read to know that theirs are missing.
        if any(not len(entries[shard.bucket].files) for shard in plan):
            raise UserError(refusal)
    for folder in {shard.file.parent for shard in plan}:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the folder '{folder}': {error.strerror}; set data.cache_dir") from None
    if is_main:
        _logger.info("%s; reading %d images, and encoding what is new", reason, sum(len(s.indices) for s in plan))
        remove_partial(plan[0].file.parents[1])
    mine, loads = [], [0] * world_size
    for shard in plan:
        least = loads.index(min(loads))
        loads[least] += len(shard.indices)
        if least == rank:
            mine.append(shard)
    if mine:
        share = f" (process 1 of {world_size})" if world_size > 1 else ""
        description = f"encoding {images.name}{share}" if is_main else None
        known = [KeySet(of_size.contents[of_size.rows != ELSEWHERE]) for of_size in entries]
        begun = time.perf_counter()
        waited = encode_shards(
            images,
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
                "the codec waited for images in %.0f %% of the time; more than %d data.num_workers may help",
                100 * waited,
                data.num_workers,
            )
    if accelerator is not None:
        accelerator.wait_for_everyone()


def _why_not(
    folder: Path, images: ImageSet, kind: Literal["latents", "codes"], made_of: dict[str, Any], num_missing: int
) -> str:
    """Why the latents or codes that are wanted are not there, in a sentence."""
    cache_dir = folder.parent
    old = ""
    if kind == "latents" and any(cache_dir.glob("latents-*/index.json")):
        old = f" (those of an earlier version are not used any more; remove them: rm -r '{cache_dir}'/latents-*)"
    if num_missing < len(images):
        known = len(images) - num_missing
        return f"'{folder}' has {kind} of {known:,} of the {len(images):,} images of '{images.name}'{old}"
    others = []
    for place in cache_dir.glob(f"{_PREFIXES[kind]}-*/{_INDEX}-*"):
        if "." not in place.name:
            about = json.loads(StoredArrays(place).strings(_ABOUT)[0])
            if about["name"] == images.name:
                before = about["made_of"]
                differing = [part for part in made_of if before.get(part) != made_of[part]]
                others.append((len(differing), str(place.parent), differing, before))
    if not others:
        return f"'{cache_dir}' has no {kind} of '{images.name}'{old}"
    _, path, differing, before = min(others, key=lambda other: other[:2])
    # Other images of the source are no reason: the other side of the split, say.
    if not differing:
        return f"'{cache_dir}' has no {kind} of these {len(images):,} images of '{images.name}' yet{old}"
    parts = [
        f"{'other' if part.endswith('s') else 'another'} {part} ({before.get(part)}, and now it is {made_of[part]})"
        for part in differing
    ]
    return f"the {kind} of '{images.name}' in '{path}' were made with {' and '.join(parts)}{old}"


def _write_index(
    folder: Path, key: object, images: ImageSet, *, about: dict[str, Any], files: Sequence[Sequence[Path]]
) -> str | None:
    """Write where each image is encoded => None, or what is wrong."""
    entries = []
    try:
        for of_size in files:
            for file in of_size:
                _wait_for(file)
            entries.append(ShardEntries(of_size))
    except UserError as error:
        return str(error)
    places = _places(images, entries)
    if (places < 0).any():
        return f"files have vanished from '{folder}' while others were encoded; start again"

    def build(writer: ArrayWriter) -> None:
        shards = np.zeros(len(images), dtype=np.int64)
        rows = np.zeros(len(images), dtype=np.int64)
        names = writer.strings("files")
        for bucket, of_size in enumerate(entries):
            here = np.flatnonzero(images.buckets == bucket)
            used, numbers = np.unique(of_size.shards[places[here]], return_inverse=True)
            shards[here] = numbers + len(names.ends)
            rows[here] = of_size.rows[places[here]]
            for shard in used.tolist():
                names.add(str(of_size.files[shard].relative_to(folder)))
        for index in np.flatnonzero(rows < 0).tolist():
            reason = entries[images.buckets[index]].reason(int(places[index]))
            writer.skipped.add(_UNREADABLE, f"image '{images.where(index)}' {reason}")
        writer.skipped.warn(images.name, int((rows >= 0).sum()), "image")
        writer.integers("shards").frombytes(shards.tobytes())
        writer.integers("rows").frombytes(rows.tobytes())
        writer.strings(_ABOUT).add(json.dumps(about))

    try:
        stored_arrays(str(folder), _INDEX, key, build)
    except OSError as error:
        return f"cannot write to '{folder}': {error.strerror}; free or choose a place"
    return None


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + _VISIBLE_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            raise UserError(f"'{path}' does not appear; data.cache_dir must be on a file system that all processes see")
        time.sleep(0.5)
