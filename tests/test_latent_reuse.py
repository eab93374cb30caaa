"""After a change of the data only new images are encoded, wherever the others were moved."""

import errno
import itertools
import json
import logging
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from source_files import picture, picture_dataset, shard, write_tar
from test_latents import (
    EventfulImages,
    ImagesOfBuckets,
    assert_encoded,
    build_codec,
    cache_folders,
    config,
    counting,
    encode,
    open_images,
    read,
    write_images,
)

from transfusion_mot.config import DataConfig, SourceConfig
from transfusion_mot.data import encoded_shards
from transfusion_mot.data.encoded_media import EncodedMedia, encoded_media
from transfusion_mot.data.images import to_pixels
from transfusion_mot.data.sources import reading, stores
from transfusion_mot.data.sources.keys import KeySet, places_of
from transfusion_mot.data.sources.open import open_source
from transfusion_mot.errors import UserError

pytestmark = pytest.mark.slow


class Encoding:
    """Encodes a source of `kind` below a folder, and counts."""

    def __init__(self, folder: Path, codec: str = "latents", kind: str = "webdataset", **source: str) -> None:
        self.codec = counting(build_codec(codec))
        self.cache = str(folder / "cache")
        self.source = {"kind": kind, "path": str(folder / "data"), **source}

    def __call__(self, split: str = "train", path: str | None = None, **data) -> EncodedMedia:
        """The cache of one side."""
        settings = {"image_size": 16, "held_out_fraction": 0.0, "num_workers": 0, "cache_dir": self.cache}
        config = DataConfig(**(settings | data))
        source = SourceConfig(**(self.source | ({} if path is None else {"path": path})))
        images = open_source(source, config, split)
        cache = encoded_media(images, self.codec, config, batch_size=4, shard_media=5)
        num_encoded = self.codec.num_encoded
        for index in np.flatnonzero(cache.readable):
            assert_encoded(cache, index, to_pixels(images.image(index)), self.codec)
        self.codec.num_encoded = num_encoded
        return cache

    def new(self, *arguments, **keywords) -> int:
        """How many images are encoded for it."""
        before = self.codec.num_encoded
        cache = self(*arguments, **keywords)
        assert cache.num_encoded == self.codec.num_encoded - before
        return cache.num_encoded


@pytest.fixture(params=["latents", "codes"])
def kind(request):
    """What codecs give."""
    return request.param


@pytest.fixture
def tars(tmp_path, kind):
    (tmp_path / "data").mkdir()
    write_tar(tmp_path / "data" / "a.tar", shard(range(10)))
    write_tar(tmp_path / "data" / "b.tar", shard(range(10, 20)))
    return Encoding(tmp_path, kind)


def test_tars_that_are_moved_touched_added_or_packed_anew(tars, tmp_path):
    assert tars.new() == 20
    os.utime(tmp_path / "data" / "a.tar", (1, 1))
    assert tars.new() == 0
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    path = str(tmp_path / "elsewhere")
    assert tars.new(path=path) == 0
    write_tar(tmp_path / "elsewhere" / "0.tar", shard(range(20, 23)))
    assert tars.new(path=path) == 3
    write_tar(tmp_path / "elsewhere" / "b.tar", shard(range(15, 25), caption="a drawing of {}"))
    assert tars.new(path=path) == 2, "numbers 23 and 24"
    shutil.rmtree(tmp_path / "elsewhere")
    write_tar(tmp_path / "one.tar", shard(range(24, -1, -1)))
    assert tars.new(path=str(tmp_path / "one.tar"), latents="prepared") == 0
    assert len(cache_folders(tmp_path / "data")) == 1


def test_what_is_held_out_may_change(tars):
    assert tars.new() == 20
    for fraction in (0.3, 0.6):
        sides = [tars(split, held_out_fraction=fraction) for split in ("train", "held_out")]
        assert sum(len(side.media) for side in sides) == 20
        assert [side.num_encoded for side in sides] == [0, 0]


def test_files_of_a_folder_that_are_added_or_renamed(tmp_path):
    write_images(tmp_path / "data", [(16, 16)] * 7)
    encoding = Encoding(tmp_path, kind="imagefolder")
    assert encoding.new() == 7
    lines = (tmp_path / "data" / "metadata.jsonl").read_text()
    (tmp_path / "data" / "0.png").rename(tmp_path / "data" / "zero.png")
    (tmp_path / "data" / "new.png").write_bytes(picture(200))
    entry = json.dumps({"file_name": "new.png", "text": "new"})
    (tmp_path / "data" / "metadata.jsonl").write_text(entry + "\n" + lines.replace("0.png", "zero.png"))
    assert encoding.new() == 1
    shards = [*(tmp_path / "cache").glob("latent-cache-*/16x16/*")]
    # Of seven in fives, of the two that had to be read; never one for each image.
    assert len(shards) == 3


def test_tables_that_are_written_anew(tmp_path):
    (tmp_path / "data").mkdir()
    picture_dataset(range(8)).to_parquet(tmp_path / "data" / "a.parquet")
    encoding = Encoding(tmp_path, kind="parquet")
    assert encoding.new() == 8
    picture_dataset(range(9)).select(range(8, -1, -1)).to_parquet(tmp_path / "data" / "a.parquet", batch_size=2)
    assert encoding.new() == 1
    # The same files, as tar members, and as rows of an Arrow data set.
    write_tar(tmp_path / "b.tar", shard(range(9), "png"))
    assert Encoding(tmp_path).new(path=str(tmp_path / "b.tar")) == 0
    picture_dataset(range(9)).save_to_disk(tmp_path / "arrow")
    assert Encoding(tmp_path, kind="datasets", image_column="image").new(path=str(tmp_path / "arrow")) == 0


def test_another_bucket_encodes_what_takes_it(tmp_path):
    write_images(tmp_path / "data", [(16, 16), (8, 16), (16, 16), (8, 18), (16, 8)])
    encoding = Encoding(tmp_path, kind="imagefolder")
    assert encoding.new(buckets=[[16, 16], [16, 8]]) == 5
    assert encoding.new(buckets=[[16, 16], [8, 16], [16, 8]]) == 2


def test_an_edited_file_is_encoded_again_and_its_stamp_decides(tmp_path):
    """The path, size and time of change are a short cut: with all three the same, nothing is read."""
    folder = tmp_path / "data"
    write_images(folder, [(16, 16)] * 3)
    for number in range(3):
        Image.new("RGB", (16, 16), (number,) * 3).save(folder / f"{number}.bmp")
    metadata = (folder / "metadata.jsonl").read_text().replace(".png", ".bmp")
    (folder / "metadata.jsonl").write_text(metadata)
    encoding = Encoding(tmp_path, kind="imagefolder")
    assert encoding.new() == 3
    status = os.stat(folder / "1.bmp")
    Image.new("RGB", (16, 16), (77,) * 3).save(folder / "1.bmp")
    assert os.stat(folder / "1.bmp").st_size == status.st_size
    assert encoding.new() == 1


def test_unreadable_images_that_move_are_told_by_their_new_place(tmp_path, caplog, kind):
    members = shard(range(6)) | {"000002.jpg": b"no picture"}
    write_tar(tmp_path / "a.tar", members)
    encoding = Encoding(tmp_path, kind)
    assert encoding.new(path=str(tmp_path / "a.tar")) == 5
    (tmp_path / "a.tar").rename(tmp_path / "b.tar")
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        moved = encoding(path=str(tmp_path / "b.tar"), latents="prepared")
    assert moved.readable.tolist() == [index != 2 for index in range(6)]
    assert "b.tar:000002.jpg' is not in a format that Pillow reads" in caplog.text
    assert "a.tar" not in caplog.text


def test_prepared_reads_what_has_moved_and_encodes_nothing(tars, tmp_path, kind):
    tars()
    write_tar(tmp_path / "data" / "b.tar", shard(range(10, 21)))
    before = tars.codec.num_encoded
    with pytest.raises(UserError, match=rf"has {kind} of 10 of the 21 images.*python -m transfusion_mot\.data\.cache"):
        tars(latents="prepared")
    assert tars.codec.num_encoded == before
    assert tars.new() == 1


def test_removed_shards_are_noticed(tars, tmp_path):
    tars()
    files = sorted(tmp_path.glob("cache/*-cache-*/16x16/*"))
    files[1].unlink()
    assert tars.new() == 5
    shutil.rmtree(files[0].parent)
    assert tars.new() == 20


def test_a_damaged_shard_is_named(tars, tmp_path):
    tars()
    file = min(tmp_path.glob("cache/*-cache-*/16x16/*"))
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match=rf"{file.name}' is damaged .*; remove it"):
        tars("held_out", held_out_fraction=0.5)
    file.unlink()
    # As in another process: this one has mapped what was there.
    encoded_shards.mapped_array.cache_clear()
    assert tars.new() == 5


@pytest.mark.parametrize("kind", ["latents"])
def test_latents_of_an_earlier_version_are_told(tars, tmp_path, caplog):
    old = tmp_path / "cache" / "latents-0123456789abcdef"
    old.mkdir(parents=True)
    (old / "index.json").write_text('{"name": "data", "made_of": {"format": 2}}')
    sentence = f"those of an earlier version are not used any more; remove them: rm -r '{tmp_path}/cache'/latents-*"
    with caplog.at_level(logging.INFO):
        tars()
    assert sentence in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        tars()
    assert "earlier version" not in caplog.text, "once"


# --- descriptors and failures of the system -----------------------------------------------------------------------


def test_a_process_with_few_descriptors_reads_any_number_of_shards(tmp_path, kind):
    """One for each shard and bucket would be more than there are."""
    sizes = [[16, 16], [8, 16], [16, 8]]
    images = ImagesOfBuckets(sizes, [0, 1, 2] * 40)
    data = config(tmp_path / "images", buckets=sizes)
    cache = encoded_media(images, build_codec(kind), data, batch_size=8, shard_media=2)
    assert len([*cache.folder.glob("*x*/*")]) > 50
    expected = {index: read(cache, index) for index in np.flatnonzero(cache.readable)}
    encoded_shards.mapped_array.cache_clear()
    with few_descriptors(20):
        for index, content in expected.items():
            np.testing.assert_array_equal(read(cache, index), content)


@contextmanager
def few_descriptors(number: int) -> Iterator[None]:
    """Let this process open only a number of additional files."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    listed = os.listdir("/proc/self/fd")
    # Without that of the list itself.
    taken = {int(name) for name in listed if Path("/proc/self/fd", name).exists()}
    free = (descriptor for descriptor in itertools.count() if descriptor not in taken)
    resource.setrlimit(resource.RLIMIT_NOFILE, (next(itertools.islice(free, number, None)), limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.fixture
def pauses(monkeypatch):
    """No waiting; the pauses that there would have been."""
    waited = []
    monkeypatch.setattr(reading.time, "sleep", waited.append)
    return waited


class OutOfDescriptors(EventfulImages):
    """While image number 5 is read, no file can be opened."""

    def __init__(self, images) -> None:
        super().__init__(images, lambda: None)

    def content(self, index):
        if index != 5:
            return self.images.content(index)
        with few_descriptors(0):
            return self.images.content(index)


def test_an_image_that_cannot_be_opened_is_not_an_unreadable_image(tmp_path, pauses, kind):
    folder = tmp_path / "images"
    write_images(folder, [(16, 16)] * 7)
    data = config(folder)
    images = OutOfDescriptors(open_images(folder, data))
    with pytest.raises(UserError, match=r"image '.*5\.png' cannot be read: Too many open files"):
        encoded_media(images, build_codec(kind), data, batch_size=1, shard_media=3)
    assert pauses == list(reading.PAUSES), "several attempts"
    cache = encode(folder, build_codec(kind))
    assert cache.readable.all()
    assert cache.num_encoded == 4


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("function", ["open", "preadv"])
def test_a_failure_that_passes_leaves_no_trace(tars, monkeypatch, pauses, number, function):
    """Of a system call on the files that are read, once in so many."""
    plain, calls = getattr(os, function), []

    def fails(*arguments, **keywords):
        if function == "open" and Path(arguments[0]).suffix != ".tar":
            return plain(*arguments, **keywords)
        calls.append(1)
        if len(calls) % 7 == 3:
            raise OSError(number, os.strerror(number))
        return plain(*arguments, **keywords)

    expected = tars(cache_dir=tars.cache + "2")
    with monkeypatch.context() as patch:
        patch.setattr(reading.os, function, fails)
        cache = tars()
    assert len(pauses) > 0
    assert cache.readable.all()
    for index in range(20):
        np.testing.assert_array_equal(read(cache, index), read(expected, index))


def test_a_file_that_cannot_be_looked_at_is_not_a_missing_file(tmp_path, monkeypatch, pauses):
    folder = tmp_path / "images"
    write_images(folder, [(16, 16)] * 3)
    plain = Path.stat

    def fails(path, *arguments, **keywords):
        if path.name == "1.png":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return plain(path, *arguments, **keywords)

    monkeypatch.setattr(Path, "stat", fails)
    with pytest.raises(UserError, match=r"1\.png' cannot be read: Input/output error"):
        open_images(folder, config(folder))
    assert pauses == list(reading.PAUSES)


def test_a_file_that_vanishes_while_images_are_encoded_is_told(tmp_path, kind):
    folder = tmp_path / "images"
    write_images(folder, [(16, 16)] * 7)
    data = config(folder)
    images = EventfulImages(open_images(folder, data), (folder / "5.png").unlink)
    with pytest.raises(UserError, match=r"5\.png' was removed after its source was opened"):
        encoded_media(images, build_codec(kind), data, batch_size=1, shard_media=3)
    assert encode(folder, build_codec(kind)).skipped == {"missing file": 1}


def test_a_folder_in_place_of_an_image_is_a_missing_file(tmp_path, kind):
    folder = tmp_path / "images"
    write_images(folder, [(16, 16)] * 3)
    (folder / "1.png").unlink()
    (folder / "1.png").mkdir()
    assert encode(folder, build_codec(kind)).skipped == {"missing file": 1}


@pytest.mark.parametrize("content", [b"", b"damaged", None])
def test_damaged_tables_are_unreadable_images(tmp_path, content):
    """A null, nothing and nonsense: counted once, and not read again."""
    dataset = picture_dataset(range(5)).to_list()
    dataset[2]["image"] = None if content is None else {"bytes": content, "path": None}
    (tmp_path / "data").mkdir()
    features = picture_dataset(range(1)).features
    datasets.Dataset.from_list(dataset, features=features).to_parquet(tmp_path / "data" / "a.parquet")
    encoding = Encoding(tmp_path, kind="parquet")
    first = encoding()
    assert first.readable.tolist() == [True, True, False, True, True]
    assert encoding(latents="prepared").skipped == {"unreadable image": 1}


# --- keys -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_places_of_keys_against_a_dictionary(seed):
    """Few different ones, so that halves and whole keys are equal to others."""
    rng = np.random.default_rng(seed)
    wanted, among = (rng.integers(0, 4, (rng.integers(20), 2)).astype(np.uint64) for _ in range(2))
    first = {}
    for place, key in enumerate(among.tolist()):
        first.setdefault(tuple(key), place)
    assert places_of(wanted, among).tolist() == [first.get(tuple(key), -1) for key in wanted.tolist()]
    known = KeySet(among)
    assert [key.tobytes() in known for key in wanted] == [tuple(key) in first for key in wanted.tolist()]


def test_stamps_tell_all_items_of_a_store_apart(tars, tmp_path):
    stamps = tars().media.stamps
    assert len(np.unique(stamps, axis=0)) == 20
    assert stores.stamps_of(["x"], np.zeros(3, int), np.arange(3)).dtype == np.uint64
