"""Arrays of sources on disk: strings and numbers, complete or not at all, mapped by every process."""

import functools
import io
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image
from process_group import clean_context, clean_process
from source_files import SIZE, all_captions, open_with, picture, shard, write_tar

from transfusion_mot.data import images as images_module
from transfusion_mot.data.emoji import emoji_captions, render_emoji
from transfusion_mot.data.images import load_image
from transfusion_mot.data.sources import stored_images, stored_media
from transfusion_mot.data.sources.arrays import StoredArrays, stored_arrays
from transfusion_mot.data.sources.base import fingerprint_of
from transfusion_mot.data.sources.parallel import map_in_processes

pytest.importorskip("hypothesis")
from hypothesis import given
from hypothesis import strategies as st


@given(texts=st.lists(st.text()))
def test_strings_round_trip(tmp_path_factory, texts: list[str]) -> None:
    """Of any characters, UTF-8's and not, empty ones and none at all."""
    folder = tmp_path_factory.mktemp("strings")

    def build(writer) -> None:
        strings = writer.strings("s")
        for text in [*texts, "half \ud83d"]:
            strings.add(text)

    strings = stored_arrays(str(folder), "x", 0, build).strings("s")
    assert list(strings) == [*texts, "half ?"]
    assert strings[1:] == [*texts, "half ?"][1:]


def numbered(writer, numbers=(3, 1, 2)) -> None:
    writer.integers("a").extend(numbers)
    writer.strings("s")
    writer.skipped.add("reason", "place")


def test_arrays_are_mapped_and_pickled_by_path(tmp_path) -> None:
    arrays = stored_arrays(str(tmp_path), "x", ["key", 1], numbered)
    for opened in (arrays, pickle.loads(pickle.dumps(arrays))):
        assert isinstance(opened["a"], np.memmap)
        assert opened["a"].tolist() == [3, 1, 2]
        assert list(opened.strings("s")) == []
        assert opened.skipped().counts == {"reason": 1}
    skipped = arrays.skipped()
    skipped.add("reason", "elsewhere")
    assert arrays.skipped().counts == {"reason": 1}, "a copy of its own"
    large = stored_arrays(str(tmp_path), "x", "large", lambda writer: numbered(writer, range(10_000)))
    assert len(large["a"]) == 10_000
    assert len(pickle.dumps(large)) < 1000, "also once they are mapped"


def test_arrays_are_built_once_for_a_key(tmp_path) -> None:
    calls = []

    def build(writer) -> None:
        calls.append(1)
        numbered(writer)

    first = stored_arrays(str(tmp_path), "x", "key", build)
    again = stored_arrays(str(tmp_path), "x", "key", build)
    assert (len(calls), again.fingerprint) == (1, first.fingerprint)
    other = stored_arrays(str(tmp_path), "x", "other key", lambda writer: numbered(writer, (3, 1, 1)))
    assert other.fingerprint != first.fingerprint
    same = stored_arrays(str(tmp_path), "x", "third key", numbered)
    assert same.fingerprint == first.fingerprint


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("disk full")])
def test_an_interrupted_build_leaves_nothing(tmp_path, error) -> None:
    def interrupted(writer) -> None:
        numbered(writer)
        raise error

    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else OSError):
        stored_arrays(str(tmp_path), "x", "key", interrupted)
    assert list(tmp_path.iterdir()) == []
    assert stored_arrays(str(tmp_path), "x", "key", numbered)["a"].tolist() == [3, 1, 2]


def numbered_together(barrier, writer) -> None:
    barrier.wait(30)
    numbered(writer)


def test_processes_that_build_at_once_end_with_the_same(tmp_path) -> None:
    build = functools.partial(numbered_together, clean_context().Barrier(3))
    children = [clean_process(stored_arrays, str(tmp_path), "x", "key", build) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(30)
    assert [child.exitcode for child in children] == [0, 0, 0]
    (folder,) = tmp_path.iterdir()
    assert StoredArrays(folder)["a"].tolist() == [3, 1, 2]


def test_fingerprints_tell_parts_apart() -> None:
    parts = [(b"ab", b"c"), (b"a", b"bc"), (b"abc",), (b"abc", b""), (np.array([1, 2]),), (np.array([[1], [2]]), b"")]
    assert len({fingerprint_of(*part) for part in parts}) == len(parts)
    assert fingerprint_of(np.zeros((0, 2), np.int64)) == fingerprint_of(b"")


def test_buckets_follow_the_pictures_and_are_kept(tmp_path, monkeypatch) -> None:
    members = shard(range(3))
    for number, size in ((3, (60, 30)), (4, (30, 60)), (5, (50, 40))):
        members[f"{number:06d}.jpg"] = picture(number, "jpg", size)
        members[f"{number:06d}.txt"] = f"picture {number}"
    members["000006.jpg"], members["000006.txt"] = b"no picture", "picture 6"
    write_tar(tmp_path / "a.tar", members)
    source = {"kind": "webdataset", "path": tmp_path / "a.tar"}
    buckets = [[SIZE, SIZE], [SIZE, 2 * SIZE], [2 * SIZE, SIZE]]
    monkeypatch.setattr(stored_media, "_HEADERS_AT_ONCE", 2)
    images = open_with(source, tmp_path / "cache", buckets=buckets)
    # What cannot be read is told when it is; until then it counts as square.
    assert images.buckets.tolist() == [0, 0, 0, 1, 2, 0, 0]
    assert images.buckets.dtype == np.int16
    for index in range(6):
        assert images.image(index).shape == (*buckets[images.buckets[index]], 3)

    def refuse(*arguments: object) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr(stored_images, "displayed_size", refuse)
    other = open_with(source, tmp_path / "cache", buckets=buckets[1:])
    assert other.buckets.tolist() == [1, 1, 1, 0, 1, 0, 0]
    assert other.fingerprint != images.fingerprint
    assert all_captions(other) == all_captions(images)


def noise(number: int, format_name: str) -> bytes:
    """A picture that no format makes small, lying on its side in formats that say so."""
    size = (200 + number, 300)
    pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format_name, exif=exif)
    return buffer.getvalue()


def bytes_read() -> int:
    """By this process, from files of any kind."""
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("kind", ["webdataset", "imagefolder"])
def test_sizes_are_read_from_the_heads_of_files(tmp_path, monkeypatch, kind: str, format_name: str) -> None:
    contents = [noise(number, format_name) for number in range(8)]
    extension = format_name.lower()
    path = tmp_path / "images"
    if kind == "webdataset":
        path = tmp_path / "images.tar"
        members = {f"{number}.{extension}": content for number, content in enumerate(contents)}
        write_tar(path, {name: part for pair in members.items() for name, part in (pair, (f"{pair[0][0]}.txt", "a"))})
    else:
        path.mkdir()
        lines = [json.dumps({"file_name": f"{number}.{extension}", "text": "a"}) for number in range(8)]
        (path / "metadata.jsonl").write_text("\n".join(lines))
        for number, content in enumerate(contents):
            (path / f"{number}.{extension}").write_bytes(content)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})
    seen = []

    def nearest(sizes, buckets):
        seen.append((bytes_read(), sizes.tolist()))
        return images_module.nearest_buckets(sizes, buckets)

    def build(*arguments):
        seen.append(bytes_read())
        return read_sizes(*arguments)

    read_sizes = stored_images._displayed_sizes
    monkeypatch.setattr(stored_images, "nearest_buckets", nearest)
    monkeypatch.setattr(stored_images, "_displayed_sizes", build)
    open_with({"kind": kind, "path": path}, tmp_path / "cache", buckets=[[16, 16], [16, 32]])
    before, (after, sizes) = seen
    assert sizes == [[300, 200 + number] for number in range(8)]
    read, size = (after - before) / 8, min(map(len, contents))
    assert read < 8192 < size / 4


def test_sizes_that_are_known_are_not_read_again(tmp_path, monkeypatch) -> None:
    """After a tar was added, and with something else held out."""
    folder = tmp_path / "tars"
    folder.mkdir()
    write_tar(folder / "b.tar", shard(range(10)))
    source = {"kind": "webdataset", "path": folder}
    buckets = [[SIZE, SIZE], [SIZE, 2 * SIZE]]
    read = []

    def displayed_size(file, name):
        read.append(name)
        return images_module.displayed_size(file, name)

    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})
    monkeypatch.setattr(stored_images, "displayed_size", displayed_size)
    open_with(source, tmp_path / "cache", buckets=buckets)
    assert len(read) == 10
    for side in ("train", "held_out"):
        open_with(source, tmp_path / "cache", side, buckets=buckets, held_out_fraction=0.4)
    assert len(read) == 10
    write_tar(folder / "a.tar", {"x.jpg": picture(77, "jpg", (60, 30)), "x.txt": "flat"})
    added = open_with(source, tmp_path / "cache", buckets=buckets)
    assert read[10:] == [f"{folder / 'a.tar'}:x.jpg"]
    assert added.buckets.tolist() == [1] + [0] * 10


class CountsPickling:
    """Doubles numbers."""

    pickled = 0

    def __call__(self, number: int) -> int:
        return 2 * number

    def __reduce__(self):
        CountsPickling.pickled += 1
        return CountsPickling, ()


def test_processes_are_given_the_function_once(monkeypatch) -> None:
    """It may hold the names of thousands of tar files."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    assert list(map_in_processes(CountsPickling(), range(20))) == list(range(0, 40, 2))
    assert CountsPickling.pickled <= 2


def test_emoji_fill_the_bucket_nearest_to_a_square(tmp_path, draw_emoji) -> None:
    draw_emoji(16, tmp_path)
    emoji = open_with({"kind": "openmoji"}, tmp_path, buckets=[[16, 32], [16, 14], [40, 16]])
    assert set(emoji.buckets.tolist()) == {1}
    # Drawn as large as the bucket, not drawn larger and shrunk.
    stem = list(emoji_captions())[int(emoji.items[5])]
    np.testing.assert_array_equal(emoji.image(5), load_image(Image.fromarray(render_emoji(stem, 16)), (16, 14)))
