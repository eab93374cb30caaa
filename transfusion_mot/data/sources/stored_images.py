"""Images of one side of a source: which items are on it, which bucket each takes, and their captions."""

from array import array
from collections.abc import Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from transfusion_mot.config import DataConfig, SourceConfig
from transfusion_mot.data.images import ImageArray, displayed_size, load_image, nearest_buckets
from transfusion_mot.data.sources.arrays import ArrayWriter, StoredArrays, stored_arrays
from transfusion_mot.data.sources.base import SkippedItems, Split, counted, fingerprint_of, share_of
from transfusion_mot.data.sources.parallel import map_in_processes
from transfusion_mot.data.sources.stores import ImageStore, Items
from transfusion_mot.errors import UserError

_SIZES_AT_ONCE = 4096

# Where none of the images is found: what to look at.
_CHECK = {
    "coco": "perhaps the annotations are of another folder",
    "interleaved": "their names begin below 'images', or beside the documents if it is not given",
}


class SplitWriter:
    """Writes what decides on which side of the held-out split an item is."""

    def __init__(self, writer: ArrayWriter, split_seed: int) -> None:
        self._shares = writer.floats("shares")
        self._sides = writer.integers("sides")
        self._by_name = array("d")
        self._split_seed = split_seed
        writer.before_close.append(self._finish)

    def add(self, text: str, side: Split | None, name: str | None = None) -> None:
        """One item: by its own word for a side, or else by a hash of `text`.

        With a `name`, by a hash of that where another item has the same text: a text that repeats may be that of a
        class, all of which would be held out, or the text of all items.
        """
        self._shares.append(share_of(text, self._split_seed))
        self._by_name.append(share_of(text if name is None else name, self._split_seed))
        self._sides.append(-1 if side is None else int(side == "held_out"))

    def _finish(self) -> None:
        if self._shares:
            shares = np.frombuffer(self._shares)
            _, texts, counts = np.unique(shares, return_inverse=True, return_counts=True)
            repeats = counts[texts] > 1
            shares[repeats] = np.frombuffer(self._by_name)[repeats]


def items_of(arrays: StoredArrays, source: SourceConfig, data: DataConfig, split: Split) -> Items:
    """The items on one side, in order.

    A share that happens to hold out every item, as it may of a few, holds out none: there is something to train on.
    """
    sides = arrays["sides"]
    if source.use == "split":
        held_out = np.where(sides >= 0, sides == 1, arrays["shares"] < data.held_out_fraction)
        if data.held_out_fraction < 1 and held_out.all():
            held_out = sides == 1
    else:
        held_out = np.where(sides >= 0, sides == 1, source.use == "held_out")
    return np.flatnonzero(held_out == (split == "held_out"))


def skipped_on_opening(arrays: StoredArrays, source: SourceConfig, split: Split) -> SkippedItems:
    """What was left out of the whole source, told on one side only: with the training items, if there are any."""
    return arrays.skipped() if _is_main_side(source, split) else SkippedItems()


def _is_main_side(source: SourceConfig, split: Split) -> bool:
    return split == "train" or source.use == "held_out"


class CaptionWriter:
    """Writes items with captions: the strings `names` and `captions`, and where the captions of each item end."""

    def __init__(self, writer: ArrayWriter, split_seed: int) -> None:
        self._skipped = writer.skipped
        self._names = writer.strings("names")
        self._captions = writer.strings("captions")
        self._ends = writer.integers("item_ends")
        self._split = SplitWriter(writer, split_seed)

    def add(self, name: str, captions: Sequence[str], where: str, side: Split | None = None) -> bool:
        """One item, by the name of its image; False if it has no caption and is left out.

        Held out is by the caption if the item has one and no other item has it, else by the name.
        """
        if not captions:
            self._skipped.add("empty caption", where)
            return False
        self._names.add(name)
        for caption in captions:
            self._captions.add(caption)
        self._ends.append(len(self._captions.ends))
        self._split.add(captions[0] if len(captions) == 1 else name, side, name)
        return True


class StoredImages:
    """`ImageSet` of items of a store.

    Raises:
        UserError: There are items on the side, and the image of none is there.
    """

    def __init__(
        self,
        name: str,
        store: ImageStore,
        items: Items,
        skipped: SkippedItems,
        source: SourceConfig,
        data: DataConfig,
        split: Split,
    ) -> None:
        listed = items
        items, identity = store.present(listed, skipped)
        # A few held out of a source may be missing by chance.
        if len(listed) and not len(items) and _is_main_side(source, split):
            raise UserError(
                f"{source.kind} source '{name}': it lists {counted({'image': len(listed)})}, and none is there "
                f"({counted(skipped.counts)}), for example '{store.where(int(listed[0]))}'; "
                + _CHECK.get(source.kind, "check the path of the source and the names in its metadata")
            )
        skipped.warn(name, len(items), "image")
        self.name = name
        self.store = store
        self.items = items
        self.skipped = skipped.counts
        self.sizes = data.image_sizes
        self.fit = data.image_fit
        self.buckets = np.zeros(len(items), dtype=np.int16)
        if len(self.sizes) > 1:
            self.buckets = nearest_buckets(_displayed_sizes(self, identity, data.cache_dir), self.sizes)
        self.fingerprint = fingerprint_of(identity.encode(), repr((self.sizes, self.fit)).encode())

    def __len__(self) -> int:
        return len(self.items)

    def image(self, index: int) -> ImageArray:
        """One image, fitted to its bucket."""
        item = int(self.items[index])
        size = self.sizes[int(self.buckets[index])]
        return load_image(self.store.content(item), size, self.fit, self.store.where(item))

    def share_buckets(self, groups: npt.NDArray[np.int64]) -> None:
        """Give all images of a group, which are neighbours, the bucket of the first of them."""
        if len(groups):
            first = np.flatnonzero(np.diff(groups, prepend=groups[0] - 1))
            self.buckets = np.repeat(self.buckets[first], np.diff(first, append=len(groups)))
            self.fingerprint = fingerprint_of(self.fingerprint.encode(), self.buckets)


class StoredCaptionedImages(StoredImages):
    """`CaptionedImages` of items of a store, as `CaptionWriter` has written them."""

    def __init__(
        self,
        name: str,
        store: ImageStore,
        arrays: StoredArrays,
        source: SourceConfig,
        data: DataConfig,
        split: Split,
    ) -> None:
        items = items_of(arrays, source, data, split)
        super().__init__(name, store, items, skipped_on_opening(arrays, source, split), source, data, split)
        self.arrays = arrays
        self.captions_fingerprint = fingerprint_of(arrays.fingerprint.encode(), self.items)

    def captions(self, index: int) -> list[str]:
        """The captions of one image."""
        item = int(self.items[index])
        ends = self.arrays["item_ends"]
        start = int(ends[item - 1]) if item > 0 else 0
        return self.arrays.strings("captions")[start : int(ends[item])]


def _displayed_sizes(images: StoredImages, identity: str, cache_dir: str) -> npt.NDArray[np.int64]:
    """(height, width) of every image [N, 2], from headers, kept in `cache_dir`."""

    def build(writer: ArrayWriter) -> None:
        heights, widths = writer.integers("heights"), writer.integers("widths")
        chunks = [images.items[start : start + _SIZES_AT_ONCE] for start in range(0, len(images), _SIZES_AT_ONCE)]
        with tqdm(total=len(images), desc=f"reading image sizes of {images.name}", unit="image") as progress:
            for sizes in map_in_processes(partial(_sizes_in, images.store), chunks):
                for height, width in sizes:
                    heights.append(height)
                    widths.append(width)
                progress.update(len(sizes))

    arrays = stored_arrays(cache_dir, "sizes", identity, build)
    return np.stack([arrays["heights"], arrays["widths"]], axis=1)


def _sizes_in(store: ImageStore, items: Items) -> list[tuple[int, int]]:
    sizes = []
    for item in items.tolist():
        try:
            sizes.append(displayed_size(store.content(item), store.where(item)))
        except UserError:
            # Told when it is read; until then it has to have some bucket.
            sizes.append((1, 1))
    return sizes
