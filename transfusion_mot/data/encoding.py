"""Images => latents, shard by shard, in a folder that holds nothing but whole shards.

A shard is a folder of its own: for every bucket a `.npy` of posteriors, and what was wrong with images that could not
be read. It is written aside, flushed to the disk and renamed, so that a killed run goes on with what is whole, and
processes need no more than different shards to work on one cache.
"""

import itertools
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from transfusion_mot.autoencoder import Autoencoder, check_image_size
from transfusion_mot.config import DataConfig
from transfusion_mot.data.images import ImageArray, to_pixels
from transfusion_mot.data.sources.base import ImageSet
from transfusion_mot.errors import UserError

# Compiling takes half a minute; fewer images are encoded sooner without.
_WORTH_COMPILING = 20_000
# Writing a shard takes seconds: what has not been touched for this long belongs to a run that is dead.
_STALE_SECONDS = 3600

_UNREADABLE = "unreadable.json"


def check_image_sizes(data: DataConfig, autoencoder: Autoencoder, patch_size: int) -> None:
    """Refuse images that do not divide into patches.

    Raises:
        UserError: Names the size and what it must be a multiple of.
    """
    name = "a side in data.buckets" if data.buckets else "data.image_size"
    for side in sorted({side for size in data.image_sizes for side in size}):
        check_image_size(side, autoencoder.downsampling * patch_size, name)


class _Part(NamedTuple):
    """A batch of images of one shard and bucket."""

    shard: int
    bucket: int
    indices: npt.NDArray[np.int64]


class _Decoded(NamedTuple):
    """The images of a part, and why one could not be read, by index."""

    images_uint8: torch.Tensor
    problems: dict[int, str]


class _Decoding(Dataset[tuple[int, ImageArray, str]]):
    """Index => (index, image, ""), or a black image and the reason in place of one that cannot be read."""

    def __init__(self, images: ImageSet, image_sizes: Sequence[tuple[int, int]]) -> None:
        self.images = images
        self.image_sizes = image_sizes

    def __getitem__(self, index: int) -> tuple[int, ImageArray, str]:
        try:
            return index, self.images.image(index), ""
        except UserError as error:
            return index, np.zeros((*self.image_sizes[self.images.buckets[index]], 3), np.uint8), str(error)


class _Indices(Sampler[list[int]]):
    """The indices of every part, made into a list only when they are asked for: there may be many millions."""

    def __init__(self, parts: Sequence[_Part]) -> None:
        self.parts = parts

    def __iter__(self) -> Iterator[list[int]]:
        return (part.indices.tolist() for part in self.parts)

    def __len__(self) -> int:
        return len(self.parts)


def encode_shards(
    images: ImageSet,
    autoencoder: Autoencoder,
    data: DataConfig,
    folder: Path,
    shards: Sequence[int],
    shard_images: int,
    batch_size: int,
    description: str | None,
) -> float:
    """Encode shards of `images` into `folder`; worker processes decode what the autoencoder takes next.

    A shard is gathered in memory before it is written: at most `shard_images` posteriors, and the mirrored ones.

    Args:
        data: Sizes of the buckets, whether mirrored images are encoded as well, number of worker processes.
        shards: Which of them; shard i holds images `i * shard_images` up to the next one's first.
        batch_size: Images encoded at a time.
        description: What the progress bar is called; None shows none.

    Returns:
        Share of the time in which the autoencoder waited for images.

    Raises:
        UserError: The folder cannot be written.
    """
    parts = [part for shard in shards for part in _parts_of(images, shard, shard_images, batch_size)]
    num_images = sum(len(part.indices) for part in parts)
    device = autoencoder.vae.device
    compiled = device.type == "cuda" and num_images >= _WORTH_COMPILING
    loader = DataLoader(
        _Decoding(images, data.image_sizes),
        batch_sampler=_Indices(parts),
        num_workers=min(data.num_workers, len(parts)),
        collate_fn=_collate,
        pin_memory=device.type == "cuda",
        worker_init_fn=_single_thread,
    )
    begun = time.perf_counter()
    decoded_images = _Timed(loader)
    with tqdm(total=num_images, desc=description, unit="image", disable=description is None) as progress:
        batches = zip(parts, decoded_images, strict=True)
        for shard, group in itertools.groupby(batches, key=lambda pair: pair[0].shard):
            posteriors: dict[int, list[npt.NDArray[np.float16]]] = {}
            problems: dict[int, str] = {}
            for part, decoded in group:
                pixels = to_pixels(decoded.images_uint8.to(device, non_blocking=True))
                versions = [pixels, pixels.flip(-1)] if data.random_flip else [pixels]
                encoded = [autoencoder.encode_fast(version, batch_size, compiled) for version in versions]
                # [images, versions, mean and std, C, Y, X]
                posterior = torch.stack([torch.stack(pair, dim=1) for pair in encoded], dim=1)
                posteriors.setdefault(part.bucket, []).append(posterior.to("cpu", torch.float16).numpy())
                problems |= decoded.problems
                progress.update(len(part.indices))
            try:
                _write_shard(folder, shard, posteriors, problems)
            except OSError as error:
                raise UserError(
                    f"cannot write latents to '{folder}': {error.strerror}; free or choose a place"
                ) from None
    return decoded_images.waited / (time.perf_counter() - begun)


def _parts_of(images: ImageSet, shard: int, shard_images: int, batch_size: int) -> Iterator[_Part]:
    first = shard * shard_images
    buckets = images.buckets[first : first + shard_images]
    for bucket in np.unique(buckets):
        indices = first + np.flatnonzero(buckets == bucket)
        for start in range(0, len(indices), batch_size):
            yield _Part(shard, int(bucket), indices[start : start + batch_size])


def _collate(items: Sequence[tuple[int, ImageArray, str]]) -> _Decoded:
    images_uint8 = torch.from_numpy(np.stack([image for _, image, _ in items]))
    return _Decoded(images_uint8, {index: problem for index, _, problem in items if problem})


def _single_thread(worker: int) -> None:
    torch.set_num_threads(1)


class _Timed:
    """Goes through an iterable once and adds up how long that took."""

    def __init__(self, batches: Iterable[_Decoded]) -> None:
        self.batches = batches
        self.waited = 0.0

    def __iter__(self) -> Iterator[_Decoded]:
        begun = time.perf_counter()
        for batch in self.batches:
            self.waited += time.perf_counter() - begun
            yield batch
            begun = time.perf_counter()


def shard_folder(folder: Path, shard: int) -> Path:
    """Where a shard is, once it is whole."""
    return folder / f"{shard:06d}"


def unreadable_images(shard: Path) -> dict[int, str]:
    """Index of every image of a whole shard that could not be read => why."""
    problems = json.loads((shard / _UNREADABLE).read_text(encoding="utf-8"))
    return {int(index): problem for index, problem in problems.items()}


def _write_shard(
    folder: Path, shard: int, posteriors: dict[int, list[npt.NDArray[np.float16]]], problems: dict[int, str]
) -> None:
    target = shard_folder(folder, shard)
    partial = target.with_name(f"{target.name}.partial-{uuid.uuid4().hex[:8]}")
    partial.mkdir(parents=True)
    try:
        for bucket, rows in posteriors.items():
            with (partial / f"{bucket}.npy").open("wb") as file:
                np.save(file, np.concatenate(rows))
                file.flush()
                os.fsync(file.fileno())
        with (partial / _UNREADABLE).open("w", encoding="utf-8") as text:
            json.dump(problems, text)
            text.flush()
            os.fsync(text.fileno())
        _flush_folder(partial)
        os.replace(partial, target)
        _flush_folder(folder)
    except OSError:
        # A folder that is not empty is not replaced: another run was faster.
        if not target.exists():
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def replace_file(path: Path, content: bytes) -> None:
    """Write a file aside, flush it to the disk and rename it: it is there as a whole or not at all."""
    partial = path.with_name(f"{path.name}.partial-{uuid.uuid4().hex[:8]}")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    _flush_folder(path.parent)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_partial(folder: Path, everything: bool) -> None:
    """Remove what killed runs have left half written; while others may be at work, only what is old."""
    for path in folder.glob("*.partial-*"):
        try:
            if everything or time.time() - path.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        except FileNotFoundError:
            continue  # Its owner was not dead, and has just renamed it.
