"""Audio clips of one side of a source: their durations and texts."""

from typing import Literal

import numpy as np
from PIL import Image

from transfusion_mot.config import TEXT, DataConfig, SourceConfig
from transfusion_mot.data.audio import Audio, UnreadableAudio, audio_seconds, decode_audio
from transfusion_mot.data.sources.arrays import StoredArrays
from transfusion_mot.data.sources.base import MediaItem, MediaSet, SkippedItems, Split, Text, fingerprint_of
from transfusion_mot.data.sources.stored_media import StoredMedia, from_headers, items_of, skipped_on_opening
from transfusion_mot.data.sources.stores import Items, MediaStore
from transfusion_mot.errors import UserError


class StoredAudio(StoredMedia):
    """`AudioSet` of items of a store, without clips that are too long.

    Raises:
        UserError: There are items on the side, but all audio files are missing.
    """

    medium: Literal["audio"] = "audio"

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
        seconds = from_headers(self, data.cache_dir, "seconds", ("milliseconds",), _milliseconds_in)[:, 0] / 1000
        fits = seconds <= data.max_audio_seconds
        for index in np.flatnonzero(~fits).tolist():
            skipped.add(f"audio clip of more than {data.max_audio_seconds:g} seconds", self.where(index))
        self.items, self.stamps, self.seconds = self.items[fits], self.stamps[fits], seconds[fits]
        skipped.warn(name, len(self), "audio clip")
        self.buckets = np.zeros(len(self), dtype=np.int16)
        self.fingerprint = fingerprint_of(self.stamps)

    def audio(self, index: int, content: bytes | Image.Image | None = None) -> Audio:
        """One audio clip, at its own sample rate."""
        content = self.read(index) if content is None else content
        assert isinstance(content, bytes)
        return decode_audio(content, self.where(index))


class StoredSpeech(StoredAudio):
    """Audio clips of a store with or without transcripts, as written by `CaptionWriter`."""

    def __init__(
        self,
        name: str,
        store: MediaStore,
        arrays: StoredArrays,
        source: SourceConfig,
        data: DataConfig,
        split: Split,
    ) -> None:
        items = items_of(arrays, source, data, split)
        super().__init__(name, store, items, skipped_on_opening(arrays, source, split), source, data, split)
        self.arrays = arrays
        self.documents_fingerprint = fingerprint_of(arrays.fingerprint.encode(), self.items)
        self.modality = source.audio_modality
        # Either all items have texts or none.
        self.is_paired = len(arrays["captions_ends"]) > 0
        self.modalities = (TEXT, self.modality) if self.is_paired else (self.modality,)
        self.media: dict[str, MediaSet] = {self.modality: self}

    def document(self, index: int) -> list[Text | MediaItem]:
        """The text of one audio clip, if known, and the clip."""
        texts = [Text(self.captions(index))] if self.is_paired else []
        return [*texts, MediaItem(self.modality, index)]

    def captions(self, index: int) -> list[str]:
        """Transcripts of one audio clip; none if they are not known."""
        return self.arrays.list_at("captions", "item_ends", int(self.items[index]))


def _milliseconds_in(store: MediaStore, items: Items) -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = []
    for item in items.tolist():
        where = store.where(item)
        try:
            source = store.open(item)
            assert not isinstance(source, Image.Image)
            with source:
                # Rounded up, so that a clip slightly above the limit is too long.
                found.append((int(np.ceil(round(1000 * audio_seconds(source, where), 3))),))
        except UnreadableAudio:
            # Reported when it is read.
            found.append((0,))
        except OSError as error:
            raise UserError(f"audio clip '{where}' cannot be read: {error.strerror or error}") from None
    return found
