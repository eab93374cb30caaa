"""Media of one side of a source: their items, texts and headers."""

from array import array
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from tqdm import tqdm

from transfusion_mot.config import DataConfig, SourceConfig
from transfusion_mot.data.sources.arrays import ArrayWriter, StoredArrays, stored_arrays
from transfusion_mot.data.sources.base import SkippedItems, Split, counted, fingerprint_of, share_of
from transfusion_mot.data.sources.columns import IMAGES_ALONE, MediaColumns
from transfusion_mot.data.sources.keys import Keys, places_of
from transfusion_mot.data.sources.parallel import map_in_processes
from transfusion_mot.data.sources.stores import Items, MediaStore, content_of
from transfusion_mot.errors import UserError

_HEADERS_AT_ONCE = 4096
# Names of both halves of the stamps of media whose headers have been read.
_STAMPS = ("first_halves", "second_halves")
# Hints if none of the media is found.
_CHECK = {
    "coco": "perhaps the annotations belong to another folder",
    "interleaved": "their names begin below 'images', or beside the documents if it is not given",
}


class SplitWriter:
    """Writes the data that decide the side of each item in the held-out split."""

    def __init__(self, writer: ArrayWriter, split_seed: int) -> None:
        self._shares = writer.floats("shares")
        self._sides = writer.integers("sides")
        self._by_name = array("d")
        self._split_seed = split_seed
        writer.before_close.append(self._finish)

    def add(self, text: str, side: Split | None, name: str | None = None) -> None:
        """Add one item; its side is given, or follows from a hash of `text`.

        If another item has the same text and there is a `name`, the side follows from a hash of the name. A repeated
        text may be the name of a class, which would be held out completely, or the text of all items.
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

    With few items, a share may hold out all of them. Then none is held out, so training has data.
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
    """Skipped items of the whole source, reported on only one side: the training side, if it has items."""
    return arrays.skipped() if is_main_side(source, split) else SkippedItems()


def is_main_side(source: SourceConfig, split: Split) -> bool:
    """Whether most of the source is on this side."""
    return split == "train" or source.use == "held_out"


class CaptionWriter:
    """Writes items with texts: the strings `names` and `captions`, and the end of each item's captions.

    The names of second media are the strings `source_names` (of editing pairs, where a caption is the instruction and
    the first image the target) or `audio_names` (audio of images).

    Args:
        columns: Media columns of an item.
        has_text: Whether items have texts; those without are then skipped.
    """

    def __init__(
        self,
        writer: ArrayWriter,
        split_seed: int,
        columns: MediaColumns = IMAGES_ALONE,
        *,
        has_text: bool = True,
    ) -> None:
        self._skipped = writer.skipped
        self._names = writer.strings("names")
        self._seconds = writer.strings(f"{columns.prefix}names") if columns.second is not None else None
        self._captions = writer.strings("captions")
        self._ends = writer.integers("item_ends")
        self._split = SplitWriter(writer, split_seed)
        self._columns = columns
        self._has_text = has_text

    def add(
        self,
        name: str,
        captions: Sequence[str],
        where: str,
        side: Split | None = None,
        *,
        second: str = "",
    ) -> bool:
        """Add one item, by the name of its media; False if it has no text and is skipped.

        The side (training or held out) depends on the caption if no other item has the same one, else on the name. For
        speech it depends on the text: all voices with one text are on one side. For a pair it depends on the name of
        the source image: all edits of an image are on one side.

        Args:
            second: Name of its second media; empty if it has none.
        """
        if not captions and self._has_text:
            self._skipped.add("empty caption", where)
            return False
        self._names.add(name)
        for caption in captions:
            self._captions.add(caption)
        self._ends.append(len(self._captions.ends))
        if self._seconds is not None:
            self._seconds.add(second)
        if self._columns.is_edit:
            self._split.add(second, side)
        elif self._columns.has_audio:
            self._split.add(captions[0] if captions else name, side)
        else:
            self._split.add(captions[0] if len(captions) == 1 else name, side, name)
        return True


class StoredMedia:
    """Shared code for stored images and audio clips.

    Raises:
        UserError: There are items on the side, but all media are missing.

    Attributes:
        items: [N] items of the store.
        stamps: [N, 2] stamp of each.
    """

    def __init__(
        self, name: str, store: MediaStore, items: Items, skipped: SkippedItems, source: SourceConfig, split: Split
    ) -> None:
        self.name = name
        self.store = store
        self.items, self.stamps = store.present(items, skipped)
        self.skipped = skipped.counts
        # A few held-out items may be missing by chance.
        if len(items) and not len(self.items) and is_main_side(source, split):
            raise UserError(
                f"{source.kind} source '{name}': it lists {counted({store.unreadable.what: len(items)})}, but none "
                f"exists ({counted(skipped.counts)}), for example '{store.where(int(items[0]))}'; "
                + _CHECK.get(source.kind, "check the path of the source and the names in its metadata")
            )

    def __len__(self) -> int:
        return len(self.items)

    def content(self, index: int) -> bytes | Image.Image:
        """One stored media item."""
        return content_of(self.store, int(self.items[index]))

    def where(self, index: int) -> str:
        """Place of an item, for messages."""
        return self.store.where(int(self.items[index]))

    def read(self, index: int) -> bytes | Image.Image:
        """Like `content`, but a file that was removed after the source was opened is unreadable."""
        try:
            return self.content(index)
        except FileNotFoundError:
            raise self.store.unreadable(self.where(index), "does not exist") from None


def from_headers(
    media: StoredMedia,
    cache_dir: str,
    name: str,
    values: Sequence[str],
    read: Callable[[MediaStore, Items], list[tuple[int, ...]]],
) -> npt.NDArray[np.int64]:
    """Header values of `media`, [N, values], cached in `cache_dir`; headers of unchanged files are not read again.

    Args:
        name: Name of the cached values.
        values: Names of the numbers in a header.
        read: Reads the numbers of some items of a store.
    """

    def build(writer: ArrayWriter) -> None:
        stamps, known = _known(cache_dir, name, values)
        places = places_of(media.stamps, stamps)
        unknown = np.flatnonzero(places < 0)
        found = np.zeros((len(media), len(values)), dtype=np.int64)
        found[places >= 0] = known[places[places >= 0]]
        chunks = [unknown[start : start + _HEADERS_AT_ONCE] for start in range(0, len(unknown), _HEADERS_AT_ONCE)]
        what = media.store.unreadable.what
        with tqdm(total=len(unknown), desc=f"reading {what} {name} of {media.name}", unit=what) as progress:
            told = map_in_processes(partial(read, media.store), [media.items[chunk] for chunk in chunks])
            for chunk, numbers in zip(chunks, told, strict=True):
                found[chunk] = numbers
                progress.update(len(chunk))
        for own, numbers in (*zip(values, found.T, strict=True), *zip(_STAMPS, media.stamps.T, strict=True)):
            writer.integers(own).frombytes(numbers.tobytes())

    arrays = stored_arrays(cache_dir, name, fingerprint_of(media.stamps), build)
    return np.stack([arrays[own] for own in values], axis=1)


def _known(cache_dir: str, name: str, values: Sequence[str]) -> tuple[Keys, npt.NDArray[np.int64]]:
    """Stamps [N, 2] and numbers [N, values] of all media of other sources and of earlier versions of this one."""
    stamps = [np.empty((0, 2), dtype=np.uint64)]
    known = [np.empty((0, len(values)), dtype=np.int64)]
    for folder in Path(cache_dir).glob(f"{name}-*"):
        # Without files that are being written, and without those of versions that had no stamps.
        if "." not in folder.name and all((folder / f"{half}.npy").is_file() for half in _STAMPS):
            arrays = StoredArrays(folder)
            stamps.append(np.stack([arrays[half].view(np.uint64) for half in _STAMPS], axis=1))
            known.append(np.stack([arrays[own] for own in values], axis=1))
    return np.concatenate(stamps), np.concatenate(known)
