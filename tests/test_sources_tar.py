"""WebDataset tar files: read in place, indexed once; damaged parts are counted and the rest is used."""

import gzip
import io
import json
import logging
import pickle
import tarfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from source_files import SIZE, all_captions, numbers_of, open_with, picture, shard, write_tar

from transfusion_mot.data.sources import tars
from transfusion_mot.errors import UserError


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "shards").mkdir()
    return tmp_path / "shards"


def opened(folder: Path, cache: Path, split: str = "train", data: dict | None = None, **source):
    return open_with({"kind": "webdataset", "path": folder, **source}, cache, split, **(data or {}))


@pytest.mark.parametrize("extension", ["jpg", "jpeg", "png", "webp"])
def test_images_and_captions_of_several_shards(folder, cache, extension: str) -> None:
    write_tar(folder / "a-0.tar", shard(range(5), extension))
    write_tar(folder / "a-1.tar", shard(range(5, 9), extension))
    images = opened(folder, cache)
    assert len(images) == 9
    assert images.skipped == {}
    assert images.image(0).shape == (SIZE, SIZE, 3)
    assert numbers_of(images) == list(range(9))
    assert all_captions(images) == [[f"picture {number}"] for number in range(9)]
    assert images.buckets.tolist() == [0] * 9


def test_every_header_that_tar_knows(folder, cache) -> None:
    """Long names, folders and links between the members; the offsets are those that `tarfile` extracts from."""
    for number, tar_format in enumerate((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        long = "deep/" * 15 + "ä" * 60 if tar_format != tarfile.USTAR_FORMAT else "deep/" * 15 + "name"
        members = {f"{long}.jpg": picture(number, "jpg"), f"{long}.txt": f"picture {number}"}
        path = folder / f"{number}.tar"
        write_tar(path, members, format=tar_format)
        with tarfile.open(path, "a", format=tar_format) as tar:
            tar.add(folder, "a folder", recursive=False)
            link = tarfile.TarInfo("link.jpg")
            link.type, link.linkname = tarfile.SYMTYPE, "elsewhere.jpg"
            tar.addfile(link)
    images = opened(folder, cache)
    assert numbers_of(images) == [0, 1, 2]
    assert all_captions(images) == [["picture 0"], ["picture 1"], ["picture 2"]]
    assert images.skipped == {}


def test_captions_from_json(folder, cache) -> None:
    write_tar(
        folder / "a.tar",
        {
            "0.jpg": picture(0, "jpg"),
            "0.json": json.dumps({"caption": "from json", "alt": "other"}),
            "1.jpg": picture(1, "jpg"),
            "1.json": json.dumps({"caption": "from json", "alt": ["two", " of them ", ""]}),
            "1.txt": "from txt",
        },
    )
    assert all_captions(opened(folder, cache)) == [["from json"], ["from txt"]]
    assert all_captions(opened(folder, cache, text_column="alt")) == [["other"], ["two", "of them"]]
    with pytest.raises(UserError, match=r"a\.tar:0\.jpg: needs a field 'title'; it has \['alt', 'caption'\]"):
        opened(folder, cache, text_column="title")


def test_one_sample_that_cannot_be_understood_does_not_discard_the_rest(folder, cache, caplog) -> None:
    bad = {
        "00.json": '{"caption": ',
        "01.json": "[" * 100_000,
        "02.json": '["a list"]',
        "03.json": '{"title": "no caption"}',
        "04.json": '{"caption": 3}',
        "05.json": '{"caption": ' + "1" * 5000 + "}",
        "06.json": b'{"caption": "\xe4pfel"}',
    }
    members: dict[str, bytes | str] = {}
    for number in range(9):
        members[f"{number:02d}.jpg"] = picture(number, "jpg")
        members[f"{number:02d}.json"] = bad.get(f"{number:02d}.json", json.dumps({"caption": f"picture {number}"}))
    write_tar(folder / "a.tar", members)
    (folder / "b.tar").write_bytes(gzip.compress(b"x" * 1000))
    with caplog.at_level(logging.WARNING):
        images = opened(folder, cache)
    assert numbers_of(images) == [7, 8]
    assert images.skipped == {
        "damaged JSON file": 4,
        "sample without a caption": 2,
        "caption not in UTF-8": 1,
        "unreadable tar file": 1,
    }
    for place in ("a.tar:00", "a.tar:03", "a.tar:04", "a.tar:06", "b.tar"):
        assert place in caplog.text, place
    assert "needs a field 'text' or 'caption'; it has ['title']" in caplog.text


def test_shards_of_which_no_sample_has_the_field_are_refused_long_before_the_end(folder, cache, monkeypatch) -> None:
    members: dict[str, bytes | str] = {}
    for number in range(1001):
        members[f"{number:04d}.jpg"], members[f"{number:04d}.json"] = b"x", '{"title": "x"}'
    write_tar(folder / "a.tar", members)
    write_tar(folder / "b.tar", shard(range(3)))
    seen = []
    monkeypatch.setattr(
        tars, "map_in_processes", lambda read, files: (read(file) for file in files if not seen.append(file))
    )
    with pytest.raises(UserError, match=r"a\.tar:0000\.jpg: needs a field 'text' or 'caption'; it has \['title'\]"):
        opened(folder, cache)
    assert [file.name for file in seen] == ["a.tar"]


def test_names_with_dots_are_samples_of_their_own(folder, cache) -> None:
    members: dict[str, bytes | str] = {}
    for number, name in enumerate(("cat 2.0", "cat 2.1", "v1.dog.v2", "plain")):
        members[f"./x.y/{name}.JPG"] = picture(number, "jpg")
        members[f"./x.y/{name}.json"] = json.dumps({"caption": f"a {name}"})
    members |= {"cat 2.2.jpg": picture(4, "jpg"), "cat 2.3.txt": "no image", "._hidden.jpg": b"x", "._hidden.txt": "x"}
    write_tar(folder / "a.tar", members)
    images = opened(folder, cache)
    assert numbers_of(images) == [0, 1, 2, 3]
    assert all_captions(images) == [["a cat 2.0"], ["a cat 2.1"], ["a v1.dog.v2"], ["a plain"]]
    assert images.skipped == {"sample without a caption": 1, "sample without an image": 2}
    write_tar(folder / "a.tar", {"1.5.small.png": picture(9), "1.5.png": picture(8), "1.5.txt": "named"})
    assert numbers_of(opened(folder, cache)) == [8]
    assert numbers_of(opened(folder, cache, image_column="small.png")) == [9]


def test_the_last_of_two_members_of_one_name_is_used_and_the_other_counted(folder, cache, caplog) -> None:
    """As when the file is unpacked, which `tar --append` counts on."""
    write_tar(folder / "a.tar", shard(range(3)))
    with tarfile.open(folder / "a.tar", "a") as tar:
        for name, content in (("000001.jpg", picture(77, "jpg")), ("000001.txt", b"mended"), ("000002.JPG", b"x")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    with caplog.at_level(logging.WARNING):
        images = opened(folder, cache)
    assert [int(images.image(index)[0, 0, 0]) for index in range(2)] == [0, 77]
    assert all_captions(images) == [["picture 0"], ["mended"], ["picture 2"]]
    assert images.skipped == {"member of the same name": 3}
    assert "3 members of the same name (" in caplog.text
    assert "a.tar:000002.jpg" in caplog.text


def test_endings_in_upper_case_are_read(folder, cache) -> None:
    write_tar(folder / "A.TAR", {name.upper(): content for name, content in shard(range(3)).items()})
    assert numbers_of(opened(folder, cache)) == [0, 1, 2]
    assert numbers_of(opened(folder / "*.TAR", cache)) == [0, 1, 2]
    (folder / "A.TAR").rename(folder / "A.TAR.GZ")
    with pytest.raises(UserError, match=r"'A\.TAR\.GZ' is compressed"):
        opened(folder, cache)


def test_members_of_a_sample_need_not_be_neighbours_and_one_of_several_images_is_named(folder, cache) -> None:
    members = {
        "a/0.txt": "picture 0",
        "b/0.txt": "picture 1",
        "a/0.seg.png": picture(50),
        "b/0.seg.png": picture(51),
        "a/0.JPG": picture(0, "jpg"),
        "b/0.jpg": picture(1, "jpg"),
    }
    write_tar(folder / "a.tar", members)
    assert numbers_of(opened(folder, cache)) == [0, 1]
    assert numbers_of(opened(folder, cache, image_column="seg.png")) == [50, 51]
    assert opened(folder, cache).fingerprint != opened(folder, cache, image_column="seg.png").fingerprint


def test_what_cannot_be_used_is_counted_and_told(folder, cache, caplog) -> None:
    members = shard(range(12))
    del members["000001.txt"], members["000002.jpg"]
    members["000003.txt"] = "  \n"
    members["000004.txt"] = b"\xc4pfel"
    members["000005.jpg"] = b""
    members["000006.jpg"] = members["000006.jpg"][:200]  # type: ignore[index]
    members["000007.jpg"] = b"no picture"
    del members["000008.txt"]
    members["000008.json"] = "{"
    write_tar(folder / "a.tar", members)
    (folder / "empty.tar").touch()
    write_tar(folder / "hollow.tar", {})
    with caplog.at_level(logging.WARNING):
        images = opened(folder, cache)
    assert images.skipped == {
        "sample without a caption": 1,
        "sample without an image": 1,
        "empty caption": 1,
        "caption not in UTF-8": 1,
        "empty file": 1,
        "damaged JSON file": 1,
        "empty shard": 2,
    }
    assert [images.captions(index)[0] for index in range(len(images))] == [f"picture {n}" for n in (0, 6, 7, 9, 10, 11)]
    (message,) = caplog.messages
    for place in ("000001.jpg", "000002.txt", "000003", "000004", "000005.jpg", "empty.tar", "hollow.tar"):
        assert place in message, place
    for index, name in ((1, "000006.jpg"), (2, "000007.jpg")):
        with pytest.raises(UserError, match=rf"a\.tar:{name}"):
            images.image(index)
    assert images.image(3)[0, 0, 0] == 9
    again = opened(folder, cache)
    assert again.skipped == images.skipped


@pytest.mark.parametrize("cut", ["content", "header", "end"])
def test_a_truncated_tar_gives_what_stands_before_the_cut(folder, cache, cut: str) -> None:
    write_tar(folder / "a.tar", shard(range(5)))
    with tarfile.open(folder / "a.tar") as tar:
        member = tar.getmember("000003.jpg")
    whole = (folder / "a.tar").read_bytes()
    length = {"content": member.offset_data + 100, "header": member.offset + 100, "end": member.offset}[cut]
    (folder / "a.tar").write_bytes(whole[:length])
    write_tar(folder / "b.tar", shard(range(5, 7)))
    images = opened(folder, cache)
    assert numbers_of(images) == [0, 1, 2, 5, 6]
    assert images.skipped == {"truncated tar file": 1}


def test_a_damaged_header_is_no_silent_end(folder, cache) -> None:
    write_tar(folder / "a.tar", shard(range(5)))
    with tarfile.open(folder / "a.tar") as tar:
        offset = tar.getmember("000003.jpg").offset
    content = bytearray((folder / "a.tar").read_bytes())
    content[offset : offset + 512] = b"\x55" * 512
    (folder / "a.tar").write_bytes(content)
    images = opened(folder, cache)
    assert len(images) == 3
    assert images.skipped == {"truncated tar file": 1}


def test_paths_that_cannot_be_used(folder, cache) -> None:
    with pytest.raises(UserError, match=r"is a folder without any \.tar file: it is empty"):
        opened(folder, cache)
    with pytest.raises(UserError, match="no file matches the pattern"):
        opened(folder / "part-*.tar", cache)
    (folder / "a.tar.gz").write_bytes(gzip.compress(b"x" * 1000))
    for path in (folder, folder / "a.tar.gz", folder / "a*"):
        with pytest.raises(UserError, match=r"\.tar file.*'a\.tar\.gz' is compressed .*uncompress it"):
            opened(path, cache)
    (folder / "a.tar.gz").rename(folder / "a.txt")
    with pytest.raises(UserError, match=r"it has other files, such as 'a\.txt'"):
        opened(folder, cache)
    with pytest.raises(UserError, match="is not a file or folder"):
        opened(folder / "missing", cache)
    (folder / "a.tar").write_bytes(gzip.compress(b"x" * 1000))
    with pytest.raises(UserError, match=r"a\.tar' is not an uncompressed tar file"):
        opened(folder, cache)
    (folder / "a.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"no image to train on.*empty shard"):
        opened(folder, cache)
    assert not [path for path in cache.iterdir() if "partial" in path.name]


def test_patterns_choose_shards(folder, cache) -> None:
    for number in range(4):
        write_tar(folder / f"part-{number}.tar", shard(range(number, number + 1)))
    assert numbers_of(opened(folder / "part-*.tar", cache)) == [0, 1, 2, 3]
    assert numbers_of(opened(folder / "part-2.tar", cache)) == [2]
    assert numbers_of(opened(folder / "part-{1..3}.tar", cache)) == [1, 2, 3]
    with pytest.raises(UserError, match=r"part-4\.tar' is not a file"):
        opened(folder / "part-{2..5}.tar", cache)
    for number in (9, 10, 11):
        write_tar(folder / f"{number:05d}.tar", shard(range(number, number + 1)))
    assert numbers_of(opened(folder / "{00009..00010}.tar", cache)) == [9, 10]


def test_the_index_is_made_once_and_again_after_a_change(folder, cache, monkeypatch) -> None:
    write_tar(folder / "a.tar", shard(range(4)))
    write_tar(folder / "b.tar", shard(range(4, 6)))
    first = opened(folder, cache)

    def refuse(*arguments: object) -> None:
        raise AssertionError("read again")

    with monkeypatch.context() as patch:
        patch.setattr(tars, "scan_tar", refuse)
        second = opened(folder, cache)
        held_out = opened(folder, cache, "held_out", data={"held_out_fraction": 0.5})
    assert second.fingerprint == first.fingerprint
    assert second.documents_fingerprint == first.documents_fingerprint
    assert 0 < len(held_out) < 6
    write_tar(folder / "b.tar", shard(range(7, 9)))
    changed = opened(folder, cache)
    assert numbers_of(changed) == [0, 1, 2, 3, 7, 8]
    assert changed.fingerprint != first.fingerprint


def test_the_fingerprint_is_of_the_images_and_their_size(folder, cache) -> None:
    write_tar(folder / "a.tar", shard(range(20)))
    first = opened(folder, cache)
    assert opened(folder, cache, data={"image_size": 8}).fingerprint != first.fingerprint
    assert opened(folder, cache, data={"image_fit": "pad"}).fingerprint != first.fingerprint
    assert opened(folder, cache, data={"image_size": 8}).documents_fingerprint == first.documents_fingerprint
    assert opened(folder, cache, data={"held_out_fraction": 0.5}).fingerprint != first.fingerprint


def test_the_split_shares_nothing_and_does_not_depend_on_the_shards(folder, cache, tmp_path) -> None:
    write_tar(folder / "a.tar", shard(range(60)))
    data = {"held_out_fraction": 0.3}
    train, held_out = (set(numbers_of(opened(folder, cache, split, data))) for split in ("train", "held_out"))
    assert train | held_out == set(range(60))
    assert not train & held_out
    assert len(held_out) > 5
    (tmp_path / "other").mkdir()
    write_tar(tmp_path / "other" / "x.tar", shard(range(30, 60)))
    write_tar(tmp_path / "other" / "y.tar", shard(range(30)))
    assert set(numbers_of(opened(tmp_path / "other", cache, "held_out", data))) == held_out
    assert len(opened(folder, cache, "train", data, use="train")) == 60
    assert len(opened(folder, cache, "held_out", data, use="train")) == 0
    assert len(opened(folder, cache, "held_out", data, use="held_out")) == 60
    assert len(opened(folder, cache, "train", data, use="held_out")) == 0


def test_worker_processes_map_the_index_and_get_no_copy(folder, cache) -> None:
    write_tar(folder / "a.tar", shard(range(200)))
    images = opened(folder, cache)
    sent = pickle.dumps(images.arrays)
    assert len(sent) < 1000
    assert isinstance(pickle.loads(sent)["offsets"], np.memmap)
    with ProcessPoolExecutor(1) as pool:
        assert pool.submit(numbers_of, images).result(60) == numbers_of(images)


def test_a_tar_that_shrinks_under_the_run_is_told(folder, cache) -> None:
    write_tar(folder / "a.tar", shard(range(3)))
    images = opened(folder, cache)
    (folder / "a.tar").write_bytes((folder / "a.tar").read_bytes()[:600])
    with pytest.raises(UserError, match=r"a\.tar:000002\.jpg' is cut off"):
        images.image(2)
    (folder / "a.tar").unlink()
    with pytest.raises(UserError, match=r"a\.tar:000000\.jpg' does not exist"):
        images.image(0)
