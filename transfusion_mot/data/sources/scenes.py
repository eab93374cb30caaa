"""Scenes composed on demand: any number of items, whose pictures are not stored."""

from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from transfusion_mot.config import TEXT, DataConfig, SourceConfig
from transfusion_mot.data.images import ImageArray, nearest_buckets
from transfusion_mot.data.scene_composer import Composer
from transfusion_mot.data.scene_drawing import draw_scene
from transfusion_mot.data.scenes import Scene
from transfusion_mot.data.sources.base import MediaItem, MediaSet, Split, Text, fingerprint_of
from transfusion_mot.data.sources.keys import Keys, key_of, keys_from
from transfusion_mot.data.sprites import Sprites

# Increase it when the same seed and drawings give other scenes.
_VERSION = 1
_NUM_ITEMS = 10_000_000
# Evaluation paints all held-out scenes; this number is enough to compare models.
_NUM_HELD_OUT = 2048


class Scenes:
    """`CaptionedImages` of one side; item i depends only on the drawings, `data.split_seed` and i.

    Attributes:
        is_storable: Whether their latents or codes can be stored: their number is given and at most 10,000,000.
    """

    is_paired = True
    medium: Literal["image"] = "image"

    def __init__(self, name: str, source: SourceConfig, data: DataConfig, split: Split) -> None:
        self.name = name
        self.split = split
        self.sprites = Sprites(name)
        is_split = source.use == "split" and data.held_out_fraction > 0
        self.composer = Composer(
            self.sprites.sprites,
            seed=data.split_seed,
            held_out_fraction=data.held_out_fraction,
            is_split=is_split,
        )
        # A source that is completely held out has scenes drawn as for training; they differ by the seed of their side.
        self._rule: Split = split if is_split else "train"
        num_items = _NUM_ITEMS if source.num_items is None else source.num_items
        has_items = is_split or (source.use == "held_out") == (split == "held_out")
        self._length = has_items * (num_items if split == "train" else min(num_items, _NUM_HELD_OUT))
        self.skipped: dict[str, int] = {}
        sizes = data.image_sizes
        bucket = int(nearest_buckets(np.ones((1, 2), np.int64), sizes)[0])
        self.image_size = sizes[bucket]
        # All are equal, so no array of that length is needed.
        self.buckets: npt.NDArray[np.int16] = np.broadcast_to(np.int16(bucket), self._length)
        fingerprint = repr(
            (_VERSION, self.sprites.fingerprint, data.split_seed, self.composer.fraction, split, source.use)
        )
        self.is_storable = source.num_items is not None and source.num_items <= _NUM_ITEMS
        self._key = key_of(fingerprint.encode())
        self.documents_fingerprint = fingerprint_of(fingerprint.encode(), str(self._length).encode())
        self.fingerprint = fingerprint_of(self.documents_fingerprint.encode(), repr(self.image_size).encode())
        self.modality = source.modality
        self.modalities = (TEXT, source.modality)

    def __len__(self) -> int:
        return self._length

    @property
    def media(self) -> dict[str, MediaSet]:
        """Itself."""
        return {self.modality: self}

    @cached_property
    def stamps(self) -> Keys:
        """See `MediaSet`; used if latents or codes are stored."""
        stamps = np.repeat(keys_from(self._key), self._length, axis=0)
        stamps[:, 1] = np.arange(self._length)
        return stamps

    def scene(self, index: int) -> Scene:
        """The record of an item."""
        return self.composer.scene(index, self._rule)

    def document(self, index: int) -> list[Text | MediaItem]:
        """The captions of one scene, and its picture."""
        return [Text(self.captions(index)), MediaItem(self.modality, index)]

    def captions(self, index: int) -> list[str]:
        """The captions of one scene."""
        return list(self.scene(index).captions)

    def content(self, index: int) -> Image.Image:
        """The picture of one scene."""
        return Image.fromarray(self.image(index))

    def image(self, index: int, content: bytes | Image.Image | None = None) -> ImageArray:
        """The picture of one scene; `content` is that picture."""
        if isinstance(content, Image.Image):
            return np.array(content)
        return draw_scene(self.scene(index), self.sprites, self.image_size)

    def where(self, index: int) -> str:
        """For messages."""
        return f"{self.name}:{index}"
