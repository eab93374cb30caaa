"""Images => latents or codes, shard by shard: new images are encoded, the others only recognised by their content."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from transfusion_mot.codecs.base import Codec, check_image_size
from transfusion_mot.codecs.image_codes import ImageCodes
from transfusion_mot.config import TEXT, DataConfig, ModelConfig
from transfusion_mot.data.encoded_shards import ShardWriter, content_key
from transfusion_mot.data.images import ImageArray, UnreadableImage, to_pixels
from transfusion_mot.data.sources.base import ImageSet
from transfusion_mot.data.sources.keys import KeySet
from transfusion_mot.errors import UserError

# Compiling takes half a minute; fewer images are encoded sooner without.
_WORTH_COMPILING = 20_000


def check_image_sizes(data: DataConfig, codecs: Mapping[str, Codec], model: ModelConfig) -> None:
    """Refuse images that do not divide into the patches or codes of each modality.

    Args:
        data: The sizes of images.
        codecs: Of each modality but text.
        model: The patch size of each modality.

    Raises:
        UserError: Names the size and what it must be a multiple of, or the slots that an image takes as codes.
    """
    name = "a side in data.buckets" if data.buckets else "data.image_size"
    for modality, codec in codecs.items():
        is_latents = codec.kind == "latents"
        patch_size, part = (model.modalities[modality].patch_size, "a patch") if is_latents else (1, "a code")
        for side in sorted({side for size in data.image_sizes for side in size}):
            check_image_size(side, codec.downsampling * patch_size, name, part)
        if isinstance(codec, ImageCodes):
            # Before the codes stands the start of their span.
            height, width = max(data.image_sizes, key=lambda size: size[0] * size[1])
            needed = 1 + (height // codec.downsampling) * (width // codec.downsampling)
            if data.slots[modality] < needed:
                raise UserError(
                    f"data.slots.{modality} is {data.slots[modality]}, and an image of {height} x {width} pixels takes "
                    f"{needed} slots as codes; set data.slots.{modality} to {needed} for each image of a row"
                )


def check_positions(data: DataConfig, codecs: Mapping[str, Codec], model: ModelConfig) -> None:
    """Refuse rows with more rotary positions than the model may have.

    Args:
        data: Slots of a row, and the sizes of images.
        codecs: Of each modality but text.
        model: The limit, and how positions are counted.

    Raises:
        UserError: Names both numbers.
    """
    longest = data.slots[TEXT]
    for name, codec in codecs.items():
        each = [1]
        if codec.kind == "latents":
            side = codec.downsampling * model.modalities[name].patch_size
            grids = [(height // side, width // side) for height, width in data.image_sizes]
            each = [rows * columns if model.rope == "1d" else max(rows, columns) for rows, columns in grids]
        # Sources of edits have positions of their own; a clean copy has those of its image.
        reader = model.readers.get(name) if data.has_edits else None
        longest += (data.slots[name] + (0 if reader is None else data.slots[reader])) * max(each)
    if model.max_position_embeddings is not None and longest > model.max_position_embeddings:
        raise UserError(
            f"a row has up to {longest} rotary positions, and the model has {model.max_position_embeddings}, beyond "
            "which its language model has a sliding window or other frequencies; make data.slots smaller"
        )


class Shard(NamedTuple):
    """What becomes one file: images of one bucket, by their index."""

    file: Path
    bucket: int
    indices: npt.NDArray[np.int64]


class _Item(NamedTuple):
    """An image on its way to the codec.

    Attributes:
        content: Hash of its content.
        image: It, unless its content is encoded already or it cannot be decoded.
        reason: Why it cannot be decoded.
        failure: A sentence for the user, which the data loader would bury under a traceback: why it was not read.
    """

    content: bytes
    image: ImageArray | None = None
    reason: str = ""
    failure: str = ""


class _Decoded(NamedTuple):
    """What `_Item` says of some images, which of them are new, and the pixels of these."""

    contents: list[bytes]
    reasons: list[str]
    failures: list[str]
    is_new: list[bool]
    images_uint8: torch.Tensor


class _Decoding(Dataset[_Item]):
    """Reads, recognises and decodes images; `known` are the contents of each bucket that are encoded."""

    def __init__(self, images: ImageSet, known: Sequence[KeySet]) -> None:
        self.images = images
        self.known = known

    def __getitem__(self, index: int) -> _Item:
        try:
            content = self.images.content(index)
        except UnreadableImage as error:
            return _Item(content_key(error.reason.encode()), reason=error.reason)
        except FileNotFoundError:
            where = self.images.where(index)
            return _Item(b"", failure=f"image '{where}' was there when its source was opened, and is not; start again")
        except UserError as error:
            return _Item(b"", failure=str(error))
        key = content_key(content)
        if key in self.known[self.images.buckets[index]]:
            return _Item(key)
        try:
            return _Item(key, self.images.image(index, content))
        except UnreadableImage as error:
            return _Item(key, reason=error.reason)
        except UserError as error:
            return _Item(b"", failure=str(error))


class _Batches(Sampler[list[int]]):
    """The indices of every batch, made into a list only when they are asked for: there may be many millions."""

    def __init__(self, shards: Sequence[Shard], batch_size: int) -> None:
        self.shards = shards
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[list[int]]:
        for shard in self.shards:
            for start in range(0, len(shard.indices), self.batch_size):
                yield shard.indices[start : start + self.batch_size].tolist()

    def __len__(self) -> int:
        return sum(-(-len(shard.indices) // self.batch_size) for shard in self.shards)


def encode_shards(
    images: ImageSet,
    codec: Codec,
    data: DataConfig,
    shards: Sequence[Shard],
    *,
    known: Sequence[KeySet],
    batch_size: int,
    description: str | None,
    refusal: str | None,
) -> float:
    """Write shards of `images`; worker processes read and decode what the codec takes next.

    A shard is gathered in memory before it is written: its images as latents or codes, and the mirrored ones.

    Args:
        data: Whether mirrored images are encoded as well, number of worker processes.
        known: For every bucket the contents that are encoded already.
        batch_size: Images encoded at a time.
        description: What the progress bar is called; None shows none.
        refusal: If no image may be encoded: what to say if one would have to be.

    Returns:
        Share of the time in which the codec waited for images.

    Raises:
        UserError: A file cannot be read, the folder cannot be written, or `refusal`.
    """
    dtype = np.float16 if codec.kind == "latents" else np.min_scalar_type(codec.codebook_size - 1)
    batches = _Batches(shards, batch_size)
    num_images = sum(len(shard.indices) for shard in shards)
    device = codec.device
    compiled = device.type == "cuda" and num_images >= _WORTH_COMPILING
    loader = DataLoader(
        _Decoding(images, known),
        batch_sampler=batches,
        num_workers=min(data.num_workers, len(batches)),
        collate_fn=_collate,
        pin_memory=device.type == "cuda",
        worker_init_fn=_single_thread,
    )
    begun = time.perf_counter()
    decoded_images = _Timed(loader)
    stream = iter(decoded_images)
    # Otherwise tqdm's own default holds, which TQDM_DISABLE sets.
    no_bar = {"disable": True} if description is None else {}
    with tqdm(total=num_images, desc=description, unit="image", **no_bar) as progress:
        for shard in shards:
            writer = ShardWriter(codec.kind)
            for start in range(0, len(shard.indices), batch_size):
                indices = shard.indices[start : start + batch_size]
                decoded = next(stream)
                for failure in filter(None, decoded.failures):
                    raise UserError(failure)
                encoded = None
                if any(decoded.is_new):
                    if refusal is not None:
                        raise UserError(refusal)
                    pixels = to_pixels(decoded.images_uint8.to(device, non_blocking=True))
                    versions = [pixels, pixels.flip(-1)] if data.random_flip else [pixels]
                    parts = [_encode(codec, version, batch_size, compiled) for version in versions]
                    # Contiguous, which safetensors needs and does not check.
                    encoded = torch.stack(parts, dim=1).contiguous().cpu().numpy().astype(dtype, copy=False)
                writer.add(images.stamps[indices], decoded.contents, decoded.is_new, decoded.reasons, encoded)
                progress.update(len(indices))
            try:
                writer.write(shard.file)
            except OSError as error:
                raise UserError(
                    f"cannot write {codec.kind} to '{shard.file.parent}': {error.strerror}; free or choose a place"
                ) from None
    return decoded_images.waited / (time.perf_counter() - begun)


def _encode(codec: Codec, pixels: torch.Tensor, batch_size: int, compiled: bool) -> torch.Tensor:
    """Pixels [n, 3, H, W] => latents [n, mean and std, C, Y, X], or codes [n, P]."""
    if codec.kind == "codes":
        return codec.encode(pixels).flatten(1)
    return torch.stack(codec.encode_fast(pixels, batch_size, compiled), dim=1).half()


def _collate(items: list[_Item]) -> _Decoded:
    contents, pixels, reasons, failures = (list(values) for values in zip(*items, strict=True))
    present = [torch.from_numpy(image) for image in pixels if image is not None]
    images_uint8 = torch.stack(present) if present else torch.empty(0, dtype=torch.uint8)
    return _Decoded(contents, reasons, failures, [image is not None for image in pixels], images_uint8)


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
