"""The named colour emoji of OpenMoji as captioned images."""

import numpy as np
from PIL import Image

from transfusion_mot.config import DataConfig
from transfusion_mot.data.emoji import emoji_captions, emoji_versions, rendered_emoji
from transfusion_mot.data.images import UnreadableImage, nearest_buckets
from transfusion_mot.data.sources.arrays import ArrayWriter, StoredArrays, stored_arrays
from transfusion_mot.data.sources.base import SkippedItems
from transfusion_mot.data.sources.keys import Keys
from transfusion_mot.data.sources.stored_media import CaptionWriter
from transfusion_mot.data.sources.stores import Items, stamps_of
from transfusion_mot.errors import UnreadableMedia


class EmojiStore:
    """Drawn emoji in the order of `emoji_captions`, at the size of their bucket."""

    unreadable: type[UnreadableMedia] = UnreadableImage

    def __init__(self, data: DataConfig) -> None:
        sizes = data.image_sizes
        size = max(sizes[int(nearest_buckets(np.ones((1, 2), np.int64), sizes)[0])])
        self.images_uint8 = rendered_emoji(size, data.cache_dir)

    def present(self, items: Items, skipped: SkippedItems) -> tuple[Items, Keys]:
        """All of them."""
        drawn = (emoji_versions(), self.images_uint8.shape)
        return items, stamps_of([drawn], np.zeros_like(items), items)

    def open(self, item: int) -> Image.Image:
        """One drawing."""
        return Image.fromarray(self.images_uint8[item])

    def where(self, item: int) -> str:
        """For messages."""
        return f"openmoji:{item}"


def index_openmoji(data: DataConfig) -> StoredArrays:
    """Names and captions of the emoji.

    Raises:
        UserError: One of the packages of the extra `emoji` is not installed.
    """

    def build(writer: ArrayWriter) -> None:
        items = CaptionWriter(writer, data.split_seed)
        for stem, caption in emoji_captions().items():
            items.add(stem, [caption], stem)

    return stored_arrays(data.cache_dir, "openmoji", [emoji_versions(), data.split_seed], build)
