"""Latents of a source's images, encoded once and mapped from disk afterwards."""

import hashlib
import io
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from transfusion_mot.autoencoder import Autoencoder
from transfusion_mot.config import DataConfig
from transfusion_mot.data.encoding import (
    encode_shards,
    remove_partial,
    replace_file,
    shard_folder,
    unreadable_images,
)
from transfusion_mot.data.sources.base import ImageSet, SkippedItems
from transfusion_mot.errors import UserError

# Raise it when the files or what is stored in them change.
_FORMAT = 2
_SHARD_IMAGES = 4096
# A network file system may take that long to show one machine what another has written.
_VISIBLE_SECONDS = 60
_INDEX, _READABLE = "index.json", "readable.npy"
_UNREADABLE = "unreadable image"

_logger = logging.getLogger(__name__)
_Value = TypeVar("_Value")


class LatentCache:
    """Posteriors of the normalised latents of images; a sample is `mean + std * noise`.

    Attributes:
        images: The images.
        folder: Where the latents are.
        readable: [N] False where an image could not be read, and has no latents.
        skipped: What was left out, here and when the source was opened: reason to count.
        latent_shapes: (C, Y, X) of every bucket.
        num_encoded: How many of the readable images were encoded to open it.
        num_bytes: Size of the files.
    """

    num_encoded = 0

    def __init__(self, images: ImageSet, folder: Path) -> None:
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        self.images = images
        self.folder = folder
        self.readable: npt.NDArray[np.bool_] = np.load(folder / _READABLE)
        self.skipped: dict[str, int] = images.skipped | index["skipped"]
        self.latent_shapes: list[tuple[int, int, int]] = [tuple(shape) for shape in index["latent_shapes"]]
        self.num_bytes: int = index["num_bytes"]
        self._shard_images: int = index["made_of"]["images a shard"]
        self._positions = _positions(images.buckets, self._shard_images, len(self.latent_shapes))
        self._mapped: dict[tuple[int, int], npt.NDArray[np.float16]] = {}

    def posterior(self, index: int, flipped: bool = False) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.float16]]:
        """Mean and standard deviation [C, Y, X] of a readable image, or of its mirror image; views of a mapped file.

        Mirrored images are there with `data.random_flip`.
        """
        assert self.readable[index]
        key = index // self._shard_images, int(self.images.buckets[index])
        if key not in self._mapped:
            file = shard_folder(self.folder, key[0]) / f"{key[1]}.npy"
            # As a plain array: indexing numpy's own class for mapped files costs more than reading a small latent.
            self._mapped[key] = np.load(file, mmap_mode="r").view(np.ndarray)
        mean, std = self._mapped[key][self._positions[index], int(flipped)]
        return mean, std

    def __reduce__(self) -> tuple[Callable[..., "LatentCache"], tuple[ImageSet, Path]]:
        # A worker process maps the files again; pickle would send it their bytes.
        return LatentCache, (self.images, self.folder)


def _positions(buckets: npt.NDArray[np.int16], shard_images: int, num_buckets: int) -> npt.NDArray[np.int32]:
    """[N] place of each image among those of its shard and bucket."""
    group = np.arange(len(buckets)) // shard_images * num_buckets + buckets
    order = np.argsort(group, kind="stable")
    ordered = group[order]
    starts = np.flatnonzero(np.diff(ordered, prepend=-1))
    sizes = np.diff(starts, append=len(ordered))
    positions = np.empty(len(buckets), dtype=np.int32)
    positions[order] = np.arange(len(buckets)) - np.repeat(starts, sizes)
    return positions


def cached_latents(
    images: ImageSet,
    autoencoder: Autoencoder,
    data: DataConfig,
    batch_size: int,
    accelerator: Accelerator | None = None,
    shard_images: int = _SHARD_IMAGES,
) -> LatentCache:
    """The latents of `images`; what `data.cache_dir` lacks of them is encoded on the autoencoder's device.

    The folder's name is a hash of what the latents are made of, so that those of another autoencoder or of images of
    another size are never taken for these. All processes of `accelerator` must call this together: they share the work,
    and an interrupted run goes on with the shards that are whole. Of two runs that encode at once both end up with the
    same files.

    Args:
        data: The images' transform, the place of the cache, the worker processes that decode, and whether to encode.
        batch_size: Images encoded at a time.
        shard_images: Images a shard, the least that an interrupted run does again.

    Raises:
        UserError: None of the images can be read; the place cannot be written or is not seen by all processes; or
            `data.latents` is `prepared` and the latents are not there: the message says what there is instead.
    """
    made_of = {
        "format": _FORMAT,
        "autoencoder": autoencoder.fingerprint,
        "image sizes": [list(size) for size in data.image_sizes],
        "image_fit": data.image_fit,
        "random_flip": data.random_flip,
        "images": images.fingerprint,
        "images a shard": shard_images,
    }
    key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]
    folder = Path(data.cache_dir) / f"latents-{key}"
    num_shards = -(-len(images) // shard_images)
    is_main = accelerator is None or accelerator.is_main_process
    rank, world_size = (accelerator.process_index, accelerator.num_processes) if accelerator is not None else (0, 1)

    # Decided by one: others could see a shard that has been finished a moment later.
    whole, missing = _agreed(
        ((folder / _INDEX).is_file(), [i for i in range(num_shards) if not shard_folder(folder, i).is_dir()]),
        accelerator,
    )
    if not whole:
        reason = _agreed(_why_not(Path(data.cache_dir), folder, images, made_of, num_shards, len(missing)), accelerator)
        if data.latents == "prepared":
            raise UserError(
                f"{reason}; encode them with `python -m transfusion_mot.data.cache` and the same configuration, or set "
                "data.latents to cache or online"
            )
        if is_main:
            _logger.info("%s; encoding %d of %d shards", reason, len(missing), num_shards)
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"cannot make the folder '{folder}': {error.strerror}; set data.cache_dir") from None
            remove_partial(folder, everything=False)
        if mine := missing[rank::world_size]:
            share = f" (process 1 of {world_size})" if world_size > 1 else ""
            description = f"encoding {images.name}{share}" if is_main else None
            begun = time.perf_counter()
            waited = encode_shards(images, autoencoder, data, folder, mine, shard_images, batch_size, description)
            if is_main and waited > 0.5 and time.perf_counter() - begun > 30:
                _logger.info(
                    "the autoencoder waited for images in %.0f %% of the time; more than %d data.num_workers may help",
                    100 * waited,
                    data.num_workers,
                )
        if accelerator is not None:
            accelerator.wait_for_everyone()
        problem = _agreed(_finish(folder, images, autoencoder, made_of, num_shards) if is_main else None, accelerator)
        if problem is not None:
            raise UserError(problem)
    _wait_for(folder / _INDEX)
    cache = LatentCache(images, folder)
    if len(images) and not cache.readable.any():
        _, problem = next(iter(unreadable_images(shard_folder(folder, 0)).items()))
        raise UserError(f"none of the {len(images)} images of '{images.name}' can be read; the first: {problem}")
    if not whole:
        shards = (cache.readable[shard * shard_images : (shard + 1) * shard_images] for shard in missing)
        cache.num_encoded = sum(int(shard.sum()) for shard in shards)
    return cache


def _agreed(value: _Value, accelerator: Accelerator | None) -> _Value:
    """The main process's value, on all of them."""
    if accelerator is None or accelerator.num_processes == 1:
        return value
    (agreed,) = broadcast_object_list([value])
    return agreed


def _why_not(
    cache_dir: Path, folder: Path, images: ImageSet, made_of: dict[str, Any], num_shards: int, num_missing: int
) -> str:
    """Why the latents that are wanted are not there, in a sentence."""
    if num_missing < num_shards:
        return f"'{folder}' has {num_shards - num_missing} of the {num_shards} shards of latents of '{images.name}'"
    others = []
    for file in cache_dir.glob(f"latents-*/{_INDEX}"):
        index = json.loads(file.read_text(encoding="utf-8"))
        if index.get("name") == images.name:
            before = index["made_of"]
            differing = [part for part in made_of if before.get(part) != made_of[part]]
            others.append((len(differing), str(file.parent), differing, before))
    if not others:
        return f"'{cache_dir}' has no latents of '{images.name}'"
    _, path, differing, before = min(others, key=lambda other: other[:2])
    # Other images of the source are no reason: the other side of the split, say. Their sizes are in their fingerprint.
    differing = [part for part in differing if part != "images"]
    if not differing:
        return f"'{cache_dir}' has no latents of these {len(images):,} images of '{images.name}' yet"
    parts = [
        f"{'other' if part.endswith('s') else 'another'} {part} ({before.get(part)}, and now it is {made_of[part]})"
        for part in differing
    ]
    return f"the latents of '{images.name}' in '{path}' were made with {' and '.join(parts)}"


def _finish(
    folder: Path, images: ImageSet, autoencoder: Autoencoder, made_of: dict[str, Any], num_shards: int
) -> str | None:
    """Write what says that the cache is whole => None, or what is wrong."""
    shards = [shard_folder(folder, shard) for shard in range(num_shards)]
    if absent := [shard.name for shard in shards if not shard.is_dir()]:
        return (
            f"{len(absent)} shards written by other processes are not in '{folder}' ({', '.join(absent[:3])}); "
            "data.cache_dir must be on a file system that all processes see"
        )
    readable = np.ones(len(images), dtype=np.bool_)
    skipped = SkippedItems()
    for shard in shards:
        for index, problem in unreadable_images(shard).items():
            readable[index] = False
            skipped.add(_UNREADABLE, problem)
    skipped.warn(images.name, int(readable.sum()), "image")
    file = io.BytesIO()
    np.save(file, readable)
    replace_file(folder / _READABLE, file.getvalue())
    scale = autoencoder.downsampling
    content = {
        "name": images.name,
        "made_of": made_of,
        "num_images": len(images),
        "latent_shapes": [(autoencoder.latent_channels, y // scale, x // scale) for y, x in made_of["image sizes"]],
        "skipped": skipped.counts,
        "num_bytes": sum(path.stat().st_size for shard in shards for path in shard.iterdir()),
    }
    replace_file(folder / _INDEX, (json.dumps(content, indent=1) + "\n").encode())
    # With all shards there, nobody has anything left to write.
    remove_partial(folder, everything=True)
    return None


def _wait_for(file: Path) -> None:
    deadline = time.monotonic() + _VISIBLE_SECONDS
    while not file.is_file():
        if time.monotonic() > deadline:
            raise UserError(f"'{file}' does not appear; data.cache_dir must be on a file system that all processes see")
        time.sleep(0.5)
