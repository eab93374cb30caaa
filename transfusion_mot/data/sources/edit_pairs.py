"""Editing pairs: a source image, an instruction, and the target image."""

import logging
from typing import BinaryIO

import numpy as np
from PIL import Image

from transfusion_mot.config import TEXT, DataConfig, SourceConfig
from transfusion_mot.data.images import UnreadableImage, displayed_size
from transfusion_mot.data.sources.arrays import StoredArrays
from transfusion_mot.data.sources.base import MediaItem, MediaSet, SkippedItems, Split, Text, counted, fingerprint_of
from transfusion_mot.data.sources.keys import Keys
from transfusion_mot.data.sources.stored_images import StoredImages
from transfusion_mot.data.sources.stored_media import items_of, skipped_on_opening
from transfusion_mot.data.sources.stores import Items, MediaStore, content_of
from transfusion_mot.errors import UnreadableMedia

# Number of pairs whose aspect ratios are compared, and the difference that rounding can make.
_NUM_COMPARED = 32
_PROPORTION_TOLERANCE = 0.03

_logger = logging.getLogger(__name__)


class PairStore:
    """Both images of pairs as one store: item 2 i is the source of pair i, item 2 i + 1 its target."""

    unreadable: type[UnreadableMedia] = UnreadableImage

    def __init__(self, sources: MediaStore, targets: MediaStore) -> None:
        self._stores = sources, targets

    def present(self, items: Items, skipped: SkippedItems) -> tuple[Items, Keys]:
        """The pairs in `items` whose two images both exist; `items` consists of whole pairs."""
        there = np.zeros(len(items), dtype=np.bool_)
        stamps = np.zeros((len(items), 2), dtype=np.uint64)
        for side, store in enumerate(self._stores):
            places = np.flatnonzero(items % 2 == side)
            found, keys = store.present(items[places] // 2, skipped)
            places = places[np.isin(items[places] // 2, found)]
            there[places], stamps[places] = True, keys
        there = np.repeat(there[::2] & there[1::2], 2)
        return items[there], stamps[there]

    def open(self, item: int) -> BinaryIO | Image.Image:
        return self._stores[item % 2].open(item // 2)

    def where(self, item: int) -> str:
        return self._stores[item % 2].where(item // 2)


class EditPairs:
    """Documents of one side of a source: source image, instruction, target image.

    A pair with a missing image is skipped when the source is opened, and a pair with a damaged image when it is drawn.

    Args:
        name: Name of the source in messages.
        store: Both images of pairs.
        arrays: Arrays that `CaptionWriter` has written.
        source, data, split: Source, data section and split.
    """

    is_paired = False

    def __init__(
        self,
        name: str,
        store: PairStore,
        arrays: StoredArrays,
        source: SourceConfig,
        data: DataConfig,
        split: Split,
    ) -> None:
        self.name = name
        self.arrays = arrays
        pairs = items_of(arrays, source, data, split)
        items = np.stack([2 * pairs, 2 * pairs + 1], axis=1).reshape(-1)
        images = StoredImages(name, store, items, skipped_on_opening(arrays, source, split), source, data, split)
        # Both images use the bucket of the source image: in sampling only the source image is known.
        images.share_buckets(images.items // 2)
        self.skipped = images.skipped
        self.pairs = images.items[::2] // 2
        self.modality = source.modality
        self.modalities = (TEXT, source.modality)
        self.media: dict[str, MediaSet] = {source.modality: images}
        self.documents_fingerprint = fingerprint_of(arrays.fingerprint.encode(), self.pairs)
        if split == "train":
            _compare_proportions(name, store, self.pairs)

    def __len__(self) -> int:
        return len(self.pairs)

    def document(self, index: int) -> list[Text | MediaItem]:
        """The source image, its instructions (one is used), and the target."""
        return [
            MediaItem(self.modality, 2 * index, is_condition=True),
            Text(self.instructions(index)),
            MediaItem(self.modality, 2 * index + 1),
        ]

    def instructions(self, index: int) -> list[str]:
        """Instructions of a pair: at least one, none empty."""
        return self.arrays.list_at("captions", "item_ends", int(self.pairs[index]))


def _compare_proportions(name: str, store: PairStore, pairs: Items) -> None:
    """Warn if the two images of a pair have different aspect ratios, because both are fitted to one size."""
    different, example = 0, ""
    some = pairs[:: 1 + len(pairs) // _NUM_COMPARED]
    for pair in some.tolist():
        try:
            sizes = [displayed_size(content_of(store, item), store.where(item)) for item in (2 * pair, 2 * pair + 1)]
        except (UnreadableImage, FileNotFoundError):
            continue
        ratio = (sizes[0][0] * sizes[1][1]) / (sizes[0][1] * sizes[1][0])
        if abs(np.log(ratio)) > _PROPORTION_TOLERANCE:
            different += 1
            shown = " and ".join(f"{width} x {height}" for height, width in sizes)
            example = example or f"'{store.where(2 * pair)}' and its target have {shown} pixels"
    if different:
        _logger.warning(
            "%s: of %s checked, %d have a source and a target of different proportions (%s); data.image_fit gives "
            "both one size, so their contents may not be aligned: give pairs of equal proportions",
            name,
            counted({"pair": len(some)}),
            different,
            example,
        )
