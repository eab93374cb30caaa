"""Latents of a source, encoded once and mapped from disk afterwards."""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from transfusion_mot.autoencoder import Autoencoder
from transfusion_mot.data.images import to_pixels
from transfusion_mot.data.sources import CaptionedImages, SkippedItems, read_images
from transfusion_mot.errors import UserError

# Part of the key: raise it when the files or what is stored in them change.
_FORMAT = 1


class LatentCache:
    """Normalised latents of all images of a source that could be read.

    Attributes:
        images: The source.
        indices: Index in the source of every item.
        captions: Caption of every item.
        mean, std: Posterior of the normalised latents, float16 `[N, C, h, w]`, mapped from disk; a sample is
            `mean + std * noise`.
        skipped: What was left out, here and when the source was opened: reason to count.
    """

    def __init__(self, images: CaptionedImages, folder: Path) -> None:
        index = json.loads((folder / "index.json").read_text())
        self.images = images
        self.folder = folder
        self.indices: list[int] = index["indices"]
        self.captions = [images.captions[item] for item in self.indices]
        self.skipped: dict[str, int] = images.skipped | index["skipped"]
        # The files have room for the images that could not be read.
        self.mean: npt.NDArray[np.float16] = np.load(folder / "mean.npy", mmap_mode="r")[: len(self.indices)]
        self.std: npt.NDArray[np.float16] = np.load(folder / "std.npy", mmap_mode="r")[: len(self.indices)]

    def __len__(self) -> int:
        return len(self.indices)

    def __reduce__(self) -> tuple[Callable[..., "LatentCache"], tuple[CaptionedImages, Path]]:
        # A worker process maps the files again; pickle would send it their bytes.
        return LatentCache, (self.images, self.folder)


def cached_latents(images: CaptionedImages, autoencoder: Autoencoder, cache_dir: str, batch_size: int) -> LatentCache:
    """The latents of `images`, encoded on the autoencoder's device unless `cache_dir` has them.

    The key is made of the autoencoder's and the images' fingerprints, the latter of which holds the image size. Files
    are written aside and renamed at the end: what an interrupted run leaves behind is never taken for the whole, and of
    two processes that encode at once both end up with the same files.

    Args:
        batch_size: Images encoded at a time.

    Raises:
        UserError: None of the images can be read.
    """
    key = hashlib.sha256(f"{_FORMAT} {autoencoder.fingerprint} {images.fingerprint}".encode()).hexdigest()[:16]
    folder = Path(cache_dir) / f"latents-{key}"
    if not folder.exists():
        partial = folder.with_name(f"{folder.name}.partial-{uuid.uuid4().hex[:8]}")
        partial.mkdir(parents=True)
        try:
            _encode_all(images, autoencoder, partial, batch_size)
            os.replace(partial, folder)
        except OSError:
            # A folder that is not empty is not replaced: another process was faster.
            if not folder.exists():
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return LatentCache(images, folder)


def _encode_all(images: CaptionedImages, autoencoder: Autoencoder, folder: Path, batch_size: int) -> None:
    skipped = SkippedItems()
    indices: list[int] = []
    files: list[npt.NDArray[np.float16]] = []
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm(total=len(images), desc=f"encoding {images.name}", unit="image") as progress,
    ):
        for start in range(0, len(images), batch_size):
            batch = range(start, min(start + batch_size, len(images)))
            readable = read_images(images, batch, skipped, pool)
            progress.update(len(batch))
            if not readable:
                continue
            pixels = to_pixels(np.stack(list(readable.values()))).to(autoencoder.vae.device)
            posterior = [part.to("cpu", torch.float16).numpy() for part in autoencoder.encode(pixels)]
            if not files:
                shape = (len(images), *posterior[0].shape[1:])
                files = [
                    np.lib.format.open_memmap(folder / name, mode="w+", dtype=np.float16, shape=shape)
                    for name in ("mean.npy", "std.npy")
                ]
            for file, part in zip(files, posterior, strict=True):
                file[len(indices) : len(indices) + len(part)] = part
            indices += readable
    skipped.warn(images.name, len(images))
    if not indices:
        raise UserError(f"none of the {len(images)} images of '{images.name}' can be read: {skipped or 'it is empty'}")
    for file in files:
        file.flush()  # type: ignore[attr-defined]
    (folder / "index.json").write_text(json.dumps({"indices": indices, "skipped": skipped.counts}))
