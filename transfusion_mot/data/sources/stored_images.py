"""Images of one side of a source: which items are on it, which bucket each takes, and their captions."""

import contextlib
from array import array
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from tqdm import tqdm

from transfusion_mot.config import TEXT, DataConfig, SourceConfig
from transfusion_mot.data.images import ImageArray, UnreadableImage, displayed_size, load_image, nearest_buckets
from transfusion_mot.data.sources.arrays import ArrayWriter, StoredArrays, stored_arrays
from transfusion_mot.data.sources.base import (
    ImageSet,
    MediaItem,
    SkippedItems,
    Split,
    Text,
    counted,
    fingerprint_of,
    share_of,
)
from transfusion_mot.data.sources.keys import Keys, places_of
from transfusion_mot.data.sources.parallel import map_in_processes
from transfusion_mot.data.sources.stores import ImageStore, Items, content_of
from transfusion_mot.errors import UserError

_SIZES_AT_ONCE = 4096
# Halves of the stamps of images whose sizes are known.
_STAMPS = ("first_halves", "second_halves")

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
    """Writes items with captions: the strings `names` and `captions`, and where the captions of each item end.

    Of editing pairs, a caption is the instruction, a name that of the target image, and `source_names` are those of the
    source images.
    """

    def __init__(self, writer: ArrayWriter, split_seed: int, *, is_pairs: bool = False) -> None:
        self._skipped = writer.skipped
        self._names = writer.strings("names")
        self._source_names = writer.strings("source_names") if is_pairs else None
        self._captions = writer.strings("captions")
        self._ends = writer.integers("item_ends")
        self._split = SplitWriter(writer, split_seed)

    def add(
        self,
        name: str,
        captions: Sequence[str],
        where: str,
        side: Split | None = None,
        *,
        source_name: str | None = None,
    ) -> bool:
        """One item, by the name of its image; False if it has no caption and is left out.

        Held out is by the caption if the item has one and no other item has it, else by the name; a pair by the name of
        its source image, so that all edits of an image are on one side.
        """
        if not captions:
            self._skipped.add("empty caption", where)
            return False
        self._names.add(name)
        for caption in captions:
            self._captions.add(caption)
        self._ends.append(len(self._captions.ends))
        if self._source_names is None:
            self._split.add(captions[0] if len(captions) == 1 else name, side, name)
        else:
            assert source_name is not None
            self._source_names.add(source_name)
            self._split.add(source_name, side)
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
        items, self.stamps = store.present(listed, skipped)
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
            self.buckets = nearest_buckets(_displayed_sizes(self, data.cache_dir), self.sizes)
        self.fingerprint = fingerprint_of(self.stamps, repr((self.sizes, self.fit)).encode())

    def __len__(self) -> int:
        return len(self.items)

    def content(self, index: int) -> bytes | Image.Image:
        """One image as it is stored."""
        return content_of(self.store, int(self.items[index]))

    def image(self, index: int, content: bytes | Image.Image | None = None) -> ImageArray:
        """One image, fitted to its bucket."""
        where = self.where(index)
        try:
            content = self.content(index) if content is None else content
        except FileNotFoundError:
            raise UnreadableImage(where, "does not exist") from None
        return load_image(content, self.sizes[int(self.buckets[index])], self.fit, where)

    def where(self, index: int) -> str:
        """Where an image lies, for messages."""
        return self.store.where(int(self.items[index]))

    def share_buckets(self, groups: npt.NDArray[np.int64]) -> None:
        """Give all images of a group, which are neighbours, the bucket of the first of them."""
        if len(groups):
            first = np.flatnonzero(np.diff(groups, prepend=groups[0] - 1))
            self.buckets = np.repeat(self.buckets[first], np.diff(first, append=len(groups)))
            self.fingerprint = fingerprint_of(self.fingerprint.encode(), self.buckets)


class StoredCaptionedImages(StoredImages):
    """`CaptionedImages` of items of a store, as `CaptionWriter` has written them."""

    is_paired = True

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
        self.documents_fingerprint = fingerprint_of(arrays.fingerprint.encode(), self.items)
        self.modality = source.modality
        self.modalities = (TEXT, source.modality)

    @property
    def media(self) -> dict[str, ImageSet]:
        """Itself."""
        return {self.modality: self}

    def document(self, index: int) -> list[Text | MediaItem]:
        """The captions of one image, and the image."""
        return [Text(self.captions(index)), MediaItem(self.modality, index)]

    def captions(self, index: int) -> list[str]:
        """The captions of one image."""
        return self.arrays.list_at("captions", "item_ends", int(self.items[index]))


def _displayed_sizes(images: StoredImages, cache_dir: str) -> npt.NDArray[np.int64]:
    """(height, width) of every image [N, 2], kept in `cache_dir`; from headers, unless known by the stamp."""

    def build(writer: ArrayWriter) -> None:
        stamps, known = _known_sizes(cache_dir)
        places = places_of(images.stamps, stamps)
        unknown = np.flatnonzero(places < 0)
        sizes = np.zeros((len(images), 2), dtype=np.int64)
        sizes[places >= 0] = known[places[places >= 0]]
        chunks = [unknown[start : start + _SIZES_AT_ONCE] for start in range(0, len(unknown), _SIZES_AT_ONCE)]
        with tqdm(total=len(unknown), desc=f"reading image sizes of {images.name}", unit="image") as progress:
            read = map_in_processes(partial(_sizes_in, images.store), [images.items[chunk] for chunk in chunks])
            for chunk, found in zip(chunks, read, strict=True):
                sizes[chunk] = found
                progress.update(len(chunk))
        for name, values in zip(("heights", "widths"), sizes.T, strict=True):
            writer.integers(name).frombytes(values.tobytes())
        for name, values in zip(_STAMPS, images.stamps.T, strict=True):
            writer.integers(name).frombytes(values.tobytes())

    arrays = stored_arrays(cache_dir, "sizes", fingerprint_of(images.stamps), build)
    return np.stack([arrays["heights"], arrays["widths"]], axis=1)


def _known_sizes(cache_dir: str) -> tuple[Keys, npt.NDArray[np.int64]]:
    """Stamps [N, 2] and sizes [N, 2] of all images that other sources, or this one before a change, have had."""
    stamps = [np.empty((0, 2), dtype=np.uint64)]
    sizes = [np.empty((0, 2), dtype=np.int64)]
    for folder in Path(cache_dir).glob("sizes-*"):
        # Not those that are being written, nor those of versions that kept no stamps.
        if "." not in folder.name and all((folder / f"{name}.npy").is_file() for name in _STAMPS):
            arrays = StoredArrays(folder)
            stamps.append(np.stack([arrays[name].view(np.uint64) for name in _STAMPS], axis=1))
            sizes.append(np.stack([arrays["heights"], arrays["widths"]], axis=1))
    return np.concatenate(stamps), np.concatenate(sizes)


def _sizes_in(store: ImageStore, items: Items) -> list[tuple[int, int]]:
    sizes = []
    for item in items.tolist():
        where = store.where(item)
        try:
            source = store.open(item)
            with contextlib.nullcontext() if isinstance(source, Image.Image) else source:
                sizes.append(displayed_size(source, where))
        except UnreadableImage:
            # Told when it is read; until then it has to have some bucket.
            sizes.append((1, 1))
        except OSError as error:
            raise UserError(f"image '{where}' cannot be read: {error.strerror or error}") from None
    return sizes
