"""Interleaved documents: reading order, images by path, tar member and bytes, and skipped images."""

import gzip
import json
import logging
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from source_files import open_with, picture, plain, write_tar

from transfusion_mot.errors import UserError

# Texts, and pictures by number, in reading order.
DOCUMENTS: list[list[str | int]] = [
    ["first text", 0, "between", 1, 2],
    [3, "after an image"],
    ["no image at all"],
    ["one", 4, "two", "three"],
]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def obelics(document: list[str | int], image) -> dict:
    """A row as in OBELICS."""
    return {
        "texts": [part if isinstance(part, str) else None for part in document],
        "images": [None if isinstance(part, str) else image(part) for part in document],
        "metadata": "[]",
    }


def mmc4(document: list[str | int]) -> dict:
    """A row as in MMC4: every image belongs to a text, before which it stands."""
    texts: list[str] = []
    images = []
    for part in document:
        if isinstance(part, str):
            texts.append(part)
        else:
            images.append({"image_name": f"{part}.png", "matched_text_index": len(texts), "matched_sim": 0.3})
    return {"text_list": texts, "image_info": images, "url": "http://example.org"}


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_pictures(folder: Path, numbers: range = range(5)) -> None:
    folder.mkdir(exist_ok=True, parents=True)
    for number in numbers:
        (folder / f"{number}.png").write_bytes(picture(number))


def read(documents) -> list[list[str | int]]:
    """Documents with the images by the number that is in their pixels."""
    return [
        [part if isinstance(part, str) else int(documents.media["image"].image(part)[0, 0, 0]) for part in document]
        for document in (plain(documents.document(index)) for index in range(len(documents)))
    ]


def source_of(tmp_path: Path, form: str, documents: list[list[str | int]] = DOCUMENTS) -> dict:
    """The configuration of these documents in one of the forms."""
    folder = tmp_path / form
    folder.mkdir()
    name = str if form == "bytes" else "{}.png".format
    source = {"kind": "interleaved", "path": folder}
    if form == "bytes":
        cell = lambda number: {"bytes": picture(number), "path": None}  # noqa: E731
        rows = [obelics(document, cell) for document in documents]
        pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet", row_group_size=2)
        return source
    rows = [obelics(document, name) for document in documents]
    if form == "parquet paths":
        pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet")
        write_pictures(folder)
        return source
    write_jsonl(folder / "a.jsonl", rows[:2])
    write_jsonl(folder / "b.jsonl", rows[2:])
    if form == "next to them":
        write_pictures(folder)
        return source
    if form == "folder":
        write_pictures(tmp_path / "elsewhere")
        return source | {"images": tmp_path / "elsewhere"}
    (tmp_path / "shards").mkdir()
    write_tar(tmp_path / "shards" / "0.tar", {f"./{number}.png": picture(number) for number in range(2)})
    write_tar(tmp_path / "shards" / "1.tar", {f"{number}.png": picture(number) for number in range(2, 5)})
    return source | {"images": tmp_path / "shards"}


FORMS = ["next to them", "folder", "tars", "bytes", "parquet paths"]


@pytest.mark.parametrize("form", FORMS)
def test_documents_keep_their_reading_order(tmp_path, cache, form: str) -> None:
    source = source_of(tmp_path, form)
    documents = open_with(source, cache)
    assert read(documents) == DOCUMENTS
    assert documents.skipped == {}
    assert len(documents.media["image"]) == 5
    again = open_with(source, cache)
    assert again.documents_fingerprint == documents.documents_fingerprint
    assert again.media["image"].fingerprint == documents.media["image"].fingerprint


@pytest.mark.parametrize("form", FORMS)
def test_each_side_of_the_split_has_its_own_images(tmp_path, cache, form: str) -> None:
    source = source_of(tmp_path, form)
    sides = [open_with(source, cache, split, held_out_fraction=0.5) for split in ("train", "held_out")]
    found = [read(side) for side in sides]
    assert sorted(map(str, found[0] + found[1])) == sorted(map(str, DOCUMENTS))
    assert all(found)
    for side, documents in zip(sides, found, strict=True):
        assert len(side.media["image"]) == sum(isinstance(part, int) for document in documents for part in document)
        used = [part for index in range(len(side)) for part in plain(side.document(index)) if isinstance(part, int)]
        assert used == list(range(len(side.media["image"])))
    assert sides[0].media["image"].fingerprint != sides[1].media["image"].fingerprint


def test_mmc4(tmp_path, cache) -> None:
    documents = [[*document, "last"] for document in DOCUMENTS]
    write_pictures(tmp_path / "docs")
    write_jsonl(tmp_path / "docs" / "a.jsonl", [mmc4(document) for document in documents])
    assert read(open_with({"kind": "interleaved", "path": tmp_path / "docs"}, cache)) == documents


def test_what_cannot_be_used_is_counted_and_the_rest_stays_aligned(tmp_path, cache) -> None:
    source = source_of(tmp_path, "folder", [*DOCUMENTS, [1, 2], [" ", 3], ["http", 9, "last", 4]])
    (tmp_path / "elsewhere" / "1.png").unlink()
    (tmp_path / "elsewhere" / "3.png").write_bytes(b"")
    documents = open_with(source, cache)
    assert documents.skipped == {"document without text": 2, "missing file": 2, "empty file": 1}
    assert read(documents) == [
        ["first text", 0, "between", 2],
        ["after an image"],
        ["no image at all"],
        ["one", 4, "two", "three"],
        ["http", "last", 4],
    ]


def test_members_that_no_tar_has_are_counted(tmp_path, cache) -> None:
    source = source_of(tmp_path, "tars", [*DOCUMENTS, ["text", 77]])
    (tmp_path / "shards" / "2.tar").touch()
    documents = open_with(source, cache)
    assert documents.skipped == {"missing file": 1, "empty shard": 1}
    assert read(documents) == [*DOCUMENTS, ["text"]]


def test_one_file_that_is_no_tar_is_counted_and_all_are_refused(tmp_path, cache) -> None:
    source = source_of(tmp_path, "tars")
    (tmp_path / "shards" / "2.tar").write_bytes(gzip.compress(b"x" * 1000))
    documents = open_with(source, cache)
    assert documents.skipped == {"unreadable tar file": 1}
    assert read(documents) == DOCUMENTS
    for number in range(2):
        (tmp_path / "shards" / f"{number}.tar").unlink()
    with pytest.raises(UserError, match=r"2\.tar' is not an uncompressed tar file"):
        open_with(source, cache)


@pytest.mark.parametrize("form", ["next to them", "folder", "tars", "parquet paths"])
def test_a_source_of_which_no_image_is_there_is_refused(tmp_path, cache, form: str) -> None:
    source = source_of(tmp_path, form)
    (tmp_path / "wrong").mkdir()
    if form == "tars":
        write_tar(tmp_path / "wrong" / "0.tar", {"images/0.png": picture(0)})
    message = {"tars": r"'0\.png'; their members are named like 'images/0\.png'"}.get(
        form, r"wrong/0\.png'; their names"
    )
    with pytest.raises(UserError, match=rf"interleaved source .*it lists 5 images, but none .*{message}"):
        open_with({**source, "images": tmp_path / "wrong"}, cache)


def test_damaged_images_are_told_when_read(tmp_path, cache) -> None:
    source = source_of(tmp_path, "bytes", [["text", 0, 1]])
    rows = pq.read_table(tmp_path / "bytes" / "a.parquet").to_pylist()
    rows[0]["images"][1]["bytes"] = b"no picture"
    rows[0]["images"][2] = None
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "bytes" / "a.parquet")
    documents = open_with(source, cache)
    assert plain(documents.document(0)) == ["text", 0, 1]
    for index, message in ((0, r"a\.parquet:1"), (1, "is missing")):
        with pytest.raises(UserError, match=message):
            documents.media["image"].image(index)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"texts": ["a"]}, "needs a field 'images'; it has"),
        ({"text": "a", "images": []}, "needs a field 'texts'; it has"),
        ({"texts": ["a", None], "images": [None]}, "'texts' has 2 entries and 'images' 1"),
        ({"texts": "a", "images": []}, "'texts' must be a list"),
        ({"texts": [3], "images": [None]}, "must be a text"),
        ({"texts": ["a", None], "images": [None, 5]}, "must be named by its path, got 5"),
        ({"text_list": ["a"], "image_info": [{"image_name": "0.png"}]}, "matched_text_index"),
        ({"text_list": ["a"], "image_info": [{"image_name": "0.png", "matched_text_index": 1}]}, "not one of the 1"),
        (
            {
                "text_list": ["a"],
                "image_info": [{"image_name": "0.png", "matched_text_index": place} for place in ([], 0)],
            },
            r"is \[\], not one of the 1",
        ),
        ({"text_list": ["a"]}, "needs a field 'image_info'"),
    ],
)
def test_a_bad_row_is_counted_and_named_and_refused_where_there_is_no_other(
    tmp_path, cache, caplog, row: dict, message: str
) -> None:
    good = [obelics(document, "{}.png".format) for document in DOCUMENTS]
    write_pictures(tmp_path)
    source = {"kind": "interleaved", "path": tmp_path / "a.jsonl"}
    write_jsonl(tmp_path / "a.jsonl", [*good[:2], row, *good[2:]])
    with caplog.at_level(logging.WARNING):
        documents = open_with(source, cache)
    assert read(documents) == DOCUMENTS, "the rows around it stay aligned with their images"
    assert documents.skipped == {"unusable row": 1}
    assert re.search(rf"a\.jsonl:3: .*{message}", caplog.text)
    write_jsonl(tmp_path / "a.jsonl", [row])
    with pytest.raises(UserError, match=rf"a\.jsonl:1: .*{message}"):
        open_with(source, cache)


def test_two_members_of_one_name_are_one_image_and_counted(tmp_path, cache) -> None:
    """The last one, as when the tar file is unpacked; in tar files of any spelling of `.tar`."""
    source = source_of(tmp_path, "tars")
    write_tar(tmp_path / "shards" / "2.TAR", {"./3.png": picture(77)})
    documents = open_with(source, cache)
    assert documents.skipped == {"member of the same name": 1}
    assert read(documents) == [DOCUMENTS[0], [77, "after an image"], *DOCUMENTS[2:]]


def test_other_column_names_and_sides(tmp_path, cache) -> None:
    rows = [{"t": ["a", None], "i": [None, "0.png"], "split": "test"}, {"t": ["b"], "i": [None], "split": None}]
    write_jsonl(tmp_path / "a.jsonl", rows)
    write_pictures(tmp_path, range(1))
    source = {"kind": "interleaved", "path": tmp_path / "a.jsonl", "text_column": "t", "image_column": "i"}
    assert read(open_with(source, cache)) == [["b"]]
    assert read(open_with(source, cache, "held_out")) == [["a", 0]]


def test_images_of_a_document_share_the_bucket_of_the_first(tmp_path, cache) -> None:
    folder = tmp_path / "docs"
    folder.mkdir()
    shapes = {"wide": (60, 30), "tall": (30, 60)}
    for name, size in shapes.items():
        Image.new("RGB", size, "red").save(folder / f"{name}.png")
    orders = [["wide", "tall", "tall"], ["tall", "wide"], ["gone", "wide", "tall"]]
    rows = [
        {"texts": ["text", *[None] * len(names)], "images": [None, *(f"{n}.png" for n in names)]} for names in orders
    ]
    write_jsonl(folder / "a.jsonl", rows)
    documents = open_with({"kind": "interleaved", "path": folder}, cache, buckets=[[16, 8], [8, 16]])
    np.testing.assert_array_equal(documents.media["image"].buckets, [1, 1, 1, 0, 0, 1, 1])
    assert documents.media["image"].image(1).shape == (8, 16, 3)
    assert documents.media["image"].image(4).shape == (16, 8, 3)
    assert [len(documents.document(index)) for index in range(3)] == [4, 3, 3]
