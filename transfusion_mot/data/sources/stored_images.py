"""Images of one side of a source: their buckets and captions."""

import contextlib
import logging
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from transfusion_mot.config import TEXT, DataConfig, SourceConfig
from transfusion_mot.data.images import ImageArray, UnreadableImage, displayed_size, load_image, nearest_buckets
from transfusion_mot.data.sources.arrays import StoredArrays
from transfusion_mot.data.sources.base import MediaItem, MediaSet, SkippedItems, Split, Text, fingerprint_of
from transfusion_mot.data.sources.stored_audio import StoredAudio
from transfusion_mot.data.sources.stored_media import (
    StoredMedia,
    from_headers,
    is_main_side,
    items_of,
    skipped_on_opening,
)
from transfusion_mot.data.sources.stores import Items, MediaStore
from transfusion_mot.errors import UserError

_logger = logging.getLogger(__name__)


class StoredImages(StoredMedia):
    """`ImageSet` of items of a store.

    Raises:
        UserError: There are items on the side, but all images are missing.
    """

    medium: Literal["image"] = "image"

    def __init__(
        self,
        name: str,
        store: MediaStore,
        items: Items,
        skipped: SkippedItems,
        source: SourceConfig,
        data: DataConfig,
        split: Split,
    ) -> None:
        super().__init__(name, store, items, skipped, source, split)
        skipped.warn(name, len(self), "image")
        self.sizes = data.image_sizes
        self.fit = data.image_fit
        self.buckets = np.zeros(len(self), dtype=np.int16)
        if len(self.sizes) > 1:
            self.buckets = nearest_buckets(_displayed_sizes(self, data.cache_dir), self.sizes)
        self.fingerprint = fingerprint_of(self.stamps, repr((self.sizes, self.fit)).encode())

    def image(self, index: int, content: bytes | Image.Image | None = None) -> ImageArray:
        """One image, fitted to its bucket."""
        content = self.read(index) if content is None else content
        return load_image(content, self.sizes[int(self.buckets[index])], self.fit, self.where(index))

    def share_buckets(self, groups: npt.NDArray[np.int64]) -> None:
        """Give all images of a group the bucket of the first one; groups are consecutive."""
        if len(groups):
            first = np.flatnonzero(np.diff(groups, prepend=groups[0] - 1))
            self.buckets = np.repeat(self.buckets[first], np.diff(first, append=len(groups)))
            self.fingerprint = fingerprint_of(self.fingerprint.encode(), self.buckets)


class StoredCaptionedImages(StoredImages):
    """`CaptionedImages` of items of a store, as written by `CaptionWriter`, with optional audio."""

    is_paired = True

    def __init__(
        self,
        name: str,
        store: MediaStore,
        arrays: StoredArrays,
        source: SourceConfig,
        data: DataConfig,
        split: Split,
        audio: MediaStore | None = None,
    ) -> None:
        items = items_of(arrays, source, data, split)
        super().__init__(name, store, items, skipped_on_opening(arrays, source, split), source, data, split)
        self.arrays = arrays
        self.modality = source.modality
        self.modalities: tuple[str, ...] = (TEXT, source.modality)
        self.media: dict[str, MediaSet] = {source.modality: self}
        # Index of the audio clip of each image, or -1.
        self._spoken = np.full(len(self), -1, dtype=np.int64)
        parts: list[bytes | Items] = [arrays.fingerprint.encode(), self.items]
        if audio is not None:
            self.audio_modality = source.audio_modality
            has_audio = np.diff(arrays["audio_names_ends"], prepend=0) > 0
            clips = StoredAudio(name, audio, self.items[has_audio[self.items]], SkippedItems(), source, data, split)
            self._spoken[np.searchsorted(self.items, clips.items)] = np.arange(len(clips))
            self.modalities += (source.audio_modality,)
            self.media[source.audio_modality] = clips
            parts.append(clips.items)
            if (silent := int((self._spoken < 0).sum())) and is_main_side(source, split):
                _logger.warning("%s: %d of %d images have no audio clip", name, silent, len(self))
        self.documents_fingerprint = fingerprint_of(*parts)

    def document(self, index: int) -> list[Text | MediaItem]:
        """The captions of one image, the image, and its audio if it has any."""
        document: list[Text | MediaItem] = [Text(self.captions(index)), MediaItem(self.modality, index)]
        if (spoken := int(self._spoken[index])) >= 0:
            document.append(MediaItem(self.audio_modality, spoken))
        return document

    def captions(self, index: int) -> list[str]:
        """The captions of one image."""
        return self.arrays.list_at("captions", "item_ends", int(self.items[index]))


def _displayed_sizes(images: StoredImages, cache_dir: str) -> npt.NDArray[np.int64]:
    """(height, width) of every image [N, 2]."""
    return from_headers(images, cache_dir, "sizes", ("heights", "widths"), _sizes_in)


def _sizes_in(store: MediaStore, items: Items) -> list[tuple[int, ...]]:
    sizes: list[tuple[int, ...]] = []
    for item in items.tolist():
        where = store.where(item)
        try:
            source = store.open(item)
            with contextlib.nullcontext() if isinstance(source, Image.Image) else source:
                sizes.append(displayed_size(source, where))
        except UnreadableImage:
            # Reported when it is read; until then it needs a bucket.
            sizes.append((1, 1))
        except OSError as error:
            raise UserError(f"image '{where}' cannot be read: {error.strerror or error}") from None
    return sizes
