"""Media => latents or codes, shard by shard; known content is recognised and not encoded again."""

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from transfusion_mot.codecs.base import AudioCodec, Codec, check_image_size
from transfusion_mot.codecs.image_codes import ImageCodes
from transfusion_mot.config import TEXT, DataConfig, ModelConfig
from transfusion_mot.data.audio import UnreadableAudio, resample
from transfusion_mot.data.encoded_shards import ShardWriter, content_key
from transfusion_mot.data.images import to_pixels
from transfusion_mot.data.sources.base import NOUNS, MediaSet
from transfusion_mot.data.sources.keys import KeySet
from transfusion_mot.errors import UnreadableMedia, UserError

# Compiling takes half a minute; fewer images are encoded faster without it.
_WORTH_COMPILING = 20_000


def check_media_sizes(data: DataConfig, codecs: Mapping[str, Codec], model: ModelConfig) -> None:
    """Refuse images that do not divide into the patches or codes of each modality, and codes that do not fit a row.

    Args:
        data: Image sizes, maximum length of audio, and slots of a row.
        codecs: Codec of each modality except text.
        model: Patch size of each modality.

    Raises:
        UserError: It gives the size and the required divisor, or the number of slots as codes.
    """
    name = "a side in data.buckets" if data.buckets else "data.image_size"
    for modality, codec in codecs.items():
        if codec.medium == "audio":
            _check_audio(data, modality, codec)
            continue
        is_latents = codec.kind == "latents"
        patch_size, part = (model.modalities[modality].patch_size, "a patch") if is_latents else (1, "a code")
        for side in sorted({side for size in data.image_sizes for side in size}):
            check_image_size(side, codec.downsampling * patch_size, name, part)
        if isinstance(codec, ImageCodes):
            # The start token of the span comes before the codes.
            height, width = max(data.image_sizes, key=lambda size: size[0] * size[1])
            needed = 1 + (height // codec.downsampling) * (width // codec.downsampling)
            if data.slots[modality] < needed:
                raise UserError(
                    f"data.slots.{modality} is {data.slots[modality]}, but an image of {height} x {width} pixels takes "
                    f"{needed} slots as codes; set data.slots.{modality} to {needed} for each image of a row"
                )


def _check_audio(data: DataConfig, modality: str, codec: AudioCodec) -> None:
    """Refuse the longest audio if it does not fit a row."""
    slots, longest = data.slots[modality], data.max_audio_seconds
    needed = 1 + math.ceil(longest * codec.codes_per_second)
    if slots < needed:
        raise UserError(
            f"data.slots.{modality} is {slots}, but audio of {longest:g} seconds (data.max_audio_seconds) takes "
            f"{needed} slots as codes; set data.slots.{modality} to {needed}, or data.max_audio_seconds to "
            f"{math.floor(10 * (slots - 1) / codec.codes_per_second) / 10:g}"
        )


def check_positions(data: DataConfig, codecs: Mapping[str, Codec], model: ModelConfig) -> None:
    """Refuse rows with more rotary positions than the model may have.

    Args:
        data: Slots of a row, and image sizes.
        codecs: Codec of each modality except text.
        model: The limit, and how positions are counted.

    Raises:
        UserError: It gives both numbers.
    """
    longest = data.slots[TEXT]
    for name, codec in codecs.items():
        each = [1]
        if codec.kind == "latents":
            side = codec.downsampling * model.modalities[name].patch_size
            grids = [(height // side, width // side) for height, width in data.image_sizes]
            each = [rows * columns if model.rope == "1d" else max(rows, columns) for rows, columns in grids]
        # The source image of an edit has its own positions; a clean copy has those of its image.
        reader = model.readers.get(name) if data.has_edits else None
        longest += (data.slots[name] + (0 if reader is None else data.slots[reader])) * max(each)
    if model.max_position_embeddings is not None and longest > model.max_position_embeddings:
        raise UserError(
            f"a row has up to {longest} rotary positions, but its language model supports only "
            f"{model.max_position_embeddings} (sliding window or other frequencies); make data.slots smaller"
        )


class Shard(NamedTuple):
    """Media of one file, all of one bucket, by their index."""

    file: Path
    bucket: int
    indices: npt.NDArray[np.int64]


class _Item(NamedTuple):
    """An image or audio clip on its way to the codec.

    Attributes:
        content: Hash of its content.
        decoded: Input of the codec, unless its content is already encoded or it cannot be decoded.
        reason: Why it cannot be decoded.
        failure: Message for the user if it was not read; raised in the worker, it would be hidden in a traceback.
    """

    content: bytes
    decoded: npt.NDArray[Any] | None = None
    reason: str = ""
    failure: str = ""


class _Decoded(NamedTuple):
    """Fields of `_Item` for a batch, which items are new, and the decoded new ones: image tensor or audio tensors."""

    contents: list[bytes]
    reasons: list[str]
    failures: list[str]
    is_new: list[bool]
    decoded: torch.Tensor | list[torch.Tensor]


class _Decoding(Dataset[_Item]):
    """Reads media and decodes those that are not encoded yet; `known` are the encoded contents of each bucket."""

    def __init__(self, media: MediaSet, codec: Codec, known: Sequence[KeySet]) -> None:
        self.media = media
        self.known = known
        # The codec itself is not kept, because workers need no weights.
        self.sample_rate = self.fewest_samples = 0
        if codec.medium == "audio":
            self.sample_rate = codec.sample_rate
            self.fewest_samples = math.ceil(codec.sample_rate / codec.codes_per_second)

    def __getitem__(self, index: int) -> _Item:
        try:
            content = self.media.content(index)
        except UnreadableMedia as error:
            return _Item(content_key(error.reason.encode()), reason=error.reason)
        except FileNotFoundError:
            what = f"{NOUNS[self.media.medium]} '{self.media.where(index)}'"
            return _Item(b"", failure=f"{what} was removed after its source was opened; start again")
        except UserError as error:
            return _Item(b"", failure=str(error))
        key = content_key(content)
        if key in self.known[self.media.buckets[index]]:
            return _Item(key)
        try:
            return _Item(key, self._decoded(index, content))
        except UnreadableMedia as error:
            return _Item(key, reason=error.reason)
        except UserError as error:
            return _Item(b"", failure=str(error))

    def _decoded(self, index: int, content: bytes | Image.Image) -> npt.NDArray[Any]:
        """An image `uint8 [H, W, 3]`, or samples `float32 [T]` at the codec's rate."""
        if self.media.medium != "audio":
            return self.media.image(index, content)
        samples = resample(self.media.audio(index, content), self.sample_rate)
        if len(samples) < self.fewest_samples:
            seconds = self.fewest_samples / self.sample_rate
            raise UnreadableAudio(self.media.where(index), f"is shorter than the {seconds:.3f} seconds of one code")
        return samples


class _Batches(Sampler[list[int]]):
    """The indices of every batch, computed on access, because there may be many millions."""

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
    media: MediaSet,
    codec: Codec,
    data: DataConfig,
    shards: Sequence[Shard],
    *,
    known: Sequence[KeySet],
    batch_size: int,
    description: str | None,
    refusal: str | None,
) -> float:
    """Write shards of `media`; worker processes read and decode ahead of the codec.

    A shard is collected in memory before it is written: latents or codes of its media and of mirrored images.

    Args:
        data: Whether mirrored images are encoded as well, and the number of worker processes.
        known: Already encoded contents, for every bucket.
        batch_size: Media encoded at a time.
        description: Name of the progress bar; None shows none.
        refusal: If encoding is not allowed: the error message if a media item is not encoded yet.

    Returns:
        Share of the time in which the codec waited for media.

    Raises:
        UserError: A file cannot be read, the folder cannot be written, or `refusal`.
    """
    dtype = np.float16 if codec.kind == "latents" else np.min_scalar_type(codec.codebook_size - 1)
    batches = _Batches(shards, batch_size)
    num_media = sum(len(shard.indices) for shard in shards)
    device = codec.device
    compiled = device.type == "cuda" and num_media >= _WORTH_COMPILING
    loader = DataLoader(
        _Decoding(media, codec, known),
        batch_sampler=batches,
        num_workers=min(data.num_workers, len(batches)),
        collate_fn=_collate,
        pin_memory=device.type == "cuda",
    )
    begun = time.perf_counter()
    decoded_media = _Timed(loader)
    stream = iter(decoded_media)
    # None keeps tqdm's own default, which TQDM_DISABLE sets.
    no_bar: dict[str, Any] = {"disable": True} if description is None else {}
    with tqdm(total=num_media, desc=description, unit=NOUNS[media.medium], **no_bar) as progress:
        for shard in shards:
            writer = ShardWriter(codec.kind)
            for start in range(0, len(shard.indices), batch_size):
                indices = shard.indices[start : start + batch_size]
                decoded = next(stream)
                for failure in filter(None, decoded.failures):
                    raise UserError(failure)
                encoded: Sequence[npt.NDArray[Any]] = []
                if any(decoded.is_new):
                    if refusal is not None:
                        raise UserError(refusal)
                    parts = _encode(codec, decoded.decoded, batch_size, compiled, flipped=data.random_flip)
                    encoded = [part.cpu().numpy().astype(dtype, copy=False) for part in parts]
                writer.add(media.stamps[indices], decoded.contents, decoded.is_new, decoded.reasons, encoded)
                progress.update(len(indices))
            try:
                writer.write(shard.file)
            except OSError as error:
                raise UserError(
                    f"cannot write {codec.kind} to '{shard.file.parent}': {error.strerror}; free disk space, or set "
                    "another data.cache_dir"
                ) from None
    return decoded_media.waited / (time.perf_counter() - begun)


def _encode(
    codec: Codec, decoded: torch.Tensor | list[torch.Tensor], batch_size: int, compiled: bool, *, flipped: bool
) -> Sequence[torch.Tensor]:
    """Images `uint8 [n, H, W, 3]` or samples of n audio clips => n latents [versions, mean and std, C, Y, X] or codes
    [versions, P]; the second version is the mirrored image."""
    if codec.medium == "audio":
        return [codes[None] for codes in codec.encode([samples.to(codec.device) for samples in decoded])]
    assert isinstance(decoded, torch.Tensor)
    pixels = to_pixels(decoded.to(codec.device, non_blocking=True))
    parts = []
    for version in [pixels, pixels.flip(-1)] if flipped else [pixels]:
        if codec.kind == "codes":
            parts.append(codec.encode(version).flatten(1))
        else:
            parts.append(torch.stack(codec.encode_fast(version, batch_size, compiled), dim=1).half())
    # One copy to the host for the whole batch.
    return torch.stack(parts, dim=1).cpu().unbind()


def _collate(items: list[_Item]) -> _Decoded:
    contents, decoded, reasons, failures = (list(values) for values in zip(*items, strict=True))
    present = [torch.from_numpy(array) for array in decoded if array is not None]
    # The images of a batch have one size.
    are_images = bool(present) and present[0].dtype == torch.uint8
    is_new = [array is not None for array in decoded]
    return _Decoded(contents, reasons, failures, is_new, torch.stack(present) if are_images else present)


class _Timed:
    """Iterates over an iterable once and measures the waiting time."""

    def __init__(self, batches: Iterable[_Decoded]) -> None:
        self.batches = batches
        self.waited = 0.0

    def __iter__(self) -> Iterator[_Decoded]:
        begun = time.perf_counter()
        for batch in self.batches:
            self.waited += time.perf_counter() - begun
            yield batch
            begun = time.perf_counter()
