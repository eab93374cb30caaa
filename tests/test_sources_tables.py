"""Captioned images in COCO's layout, with metadata of three formats, in parquet and Arrow files, and by `datasets`."""

import csv
import json
import logging
import pickle
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from process_group import run_script
from source_files import (
    SIZE,
    all_captions,
    numbers_of,
    open_with,
    picture,
    picture_dataset,
    write_coco,
    write_tar,
)

from transfusion_mot.data.sources import stores
from transfusion_mot.data.sources.base import share_of
from transfusion_mot.errors import UserError


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


# --- COCO ----------------------------------------------------------------------------------------------------------


def coco(folder: Path, cache: Path, split: str = "train", data: dict | None = None, **source):
    source = {"path": folder / "train2017", "annotations": folder / "annotations" / "captions_train2017.json"} | source
    return open_with({"kind": "coco", **source}, cache, split, **(data or {}))


def test_coco_gives_every_caption_with_its_image(tmp_path, cache) -> None:
    write_coco(tmp_path / "coco", 12)
    images = coco(tmp_path / "coco", cache)
    assert numbers_of(images) == list(range(12))
    assert all_captions(images) == [[f"Picture {n}, described {turn}." for turn in range(5)] for n in range(12)]
    assert images.skipped == {}
    again = coco(tmp_path / "coco", cache)
    assert (again.fingerprint, again.documents_fingerprint) == (images.fingerprint, images.documents_fingerprint)


def test_coco_holds_out_by_file_name_and_whole_sets_by_use(tmp_path, cache) -> None:
    write_coco(tmp_path / "coco", 40)
    data = {"held_out_fraction": 0.3}
    held_out = coco(tmp_path / "coco", cache, "held_out", data)
    expected = [number for number in range(40) if share_of(f"{number + 1000:012d}.jpg", 0) < 0.3]
    assert numbers_of(held_out) == expected
    assert len(expected) > 5
    train = coco(tmp_path / "coco", cache, "train", data)
    assert sorted(numbers_of(train) + expected) == list(range(40))
    assert len(coco(tmp_path / "coco", cache, "held_out", data, use="held_out")) == 40


def test_what_coco_lacks_is_counted(tmp_path, cache, caplog) -> None:
    path = write_coco(tmp_path / "coco", 6)
    folder = tmp_path / "coco" / "train2017"
    (folder / "000000001000.jpg").unlink()
    (folder / "000000001001.jpg").write_bytes(b"")
    (folder / "000000001002.jpg").write_bytes(picture(2, "jpg")[:150])
    content = json.loads(path.read_text())
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 1003]
    content["annotations"].append({"image_id": 77, "id": 0, "caption": "of nothing"})
    path.write_text(json.dumps(content))
    with caplog.at_level(logging.WARNING):
        images = coco(tmp_path / "coco", cache)
    assert images.skipped == {"missing file": 1, "empty file": 1, "empty caption": 1, "caption without an image": 1}
    assert "000000001000.jpg" in caplog.messages[0]
    assert len(images) == 3
    with pytest.raises(UserError, match=r"000000001002\.jpg"):
        images.image(0)
    assert images.image(1)[0, 0, 0] == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a complete JSON file"),
        (b'{"images": [], "annotations": [{"ima', "not a complete JSON file"),
        (b'{"images": [{"file_name": "\xe4.jpg"}]}', "not a complete JSON file"),
        (b"[" * 100_000, "not a complete JSON file.*nested too deeply"),
        (b'{"images": [{"file_name": 7, "id": 1}], "annotations": []}', "image 0: the field 'file_name' must be"),
        (b"[]", "needs the lists 'images' and 'annotations'.*list"),
        (b'{"images": []}', r"needs the lists 'images' and 'annotations'.*\['images'\]"),
        (
            b'{"images": [{"file_name": "a.jpg", "id": 1}], "annotations": [{"image_id": 1, "bbox": []}]}',
            r"annotation 0: needs a field 'caption'; it has \['bbox', 'image_id'\].*not the instances",
        ),
        (b'{"images": [{"name": "a.jpg"}], "annotations": []}', "image 0: needs a field 'file_name'"),
        (b'{"images": [], "annotations": [{"image_id": 1, "caption": 3}]}', "'caption' must be a text"),
    ],
)
def test_other_annotations_are_refused(tmp_path, cache, content: bytes, message: str) -> None:
    path = write_coco(tmp_path / "coco", 1)
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"captions_train2017\.json.*{message}"):
        coco(tmp_path / "coco", cache)


def test_coco_lists_a_file_twice_and_it_is_one_image(tmp_path, cache) -> None:
    path = write_coco(tmp_path / "coco", 2, captions_per_image=1)
    content = json.loads(path.read_text())
    content["images"].append({"file_name": "./000000001000.jpg", "id": 7})
    content["annotations"].append({"image_id": 7, "caption": "once more"})
    path.write_text(json.dumps(content))
    assert all_captions(coco(tmp_path / "coco", cache)) == [
        ["Picture 0, described 0.", "once more"],
        ["Picture 1, described 0."],
    ]


def test_coco_needs_both_paths(tmp_path, cache) -> None:
    write_coco(tmp_path / "coco", 1)
    with pytest.raises(UserError, match="needs 'annotations'"):
        coco(tmp_path / "coco", cache, annotations=None)
    with pytest.raises(UserError, match=r"annotations of coco source .* are missing: '.*caption\.json' is not a file"):
        coco(tmp_path / "coco", cache, annotations=tmp_path / "coco" / "caption.json")
    (tmp_path / "val2017").mkdir()
    with pytest.raises(
        UserError, match=r"val2017.*it lists 1 image, but none exists.*perhaps the annotations belong"
    ) as refused:
        coco(tmp_path / "coco", cache, path=tmp_path / "val2017")
    assert "held_out_fraction" not in str(refused.value)
    with pytest.raises(UserError, match="is not a folder"):
        coco(tmp_path / "coco", cache, path=tmp_path / "nowhere")
    with pytest.raises(UserError, match="'coco' has no key 'text_column'"):
        coco(tmp_path / "coco", cache, text_column="caption")


# --- metadata of image folders -------------------------------------------------------------------------------------


def write_metadata(folder: Path, suffix: str, rows: list[dict]) -> None:
    if suffix == ".jsonl":
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif suffix == ".csv":
        with (folder / "metadata.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), folder / "metadata.parquet")


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_metadata_formats_agree(tmp_path, cache, suffix: str) -> None:
    """With captions that CSV must quote, given sides of the split, and an image on two lines."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.png").write_bytes(picture(number))
    captions = ["plain", 'a "quoted", one', "two\nlines", "ä 🍎"]
    splits = ["train", "validation", "test", "train"]
    rows = [{"file_name": f"{n}.png", "text": captions[n], "split": splits[n]} for n in range(4)]
    rows.append({"file_name": "3.png", "text": "another", "split": "train"})
    write_metadata(folder, suffix, rows)
    source = {"kind": "imagefolder", "path": folder}
    train, held_out = (open_with(source, cache, split) for split in ("train", "held_out"))
    assert (numbers_of(train), all_captions(train)) == ([0, 3], [["plain"], ["ä 🍎", "another"]])
    assert (numbers_of(held_out), all_captions(held_out)) == ([1, 2], [[captions[1]], [captions[2]]])
    # The data's own word stands above `use`.
    assert numbers_of(open_with({**source, "use": "held_out"}, cache, "held_out")) == [1, 2]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["0.png,a cat, a dog"], r"csv:2: has 3 fields where the header has 2; .* must be in double quotes"),
        (["0.png,a cat", "", "1.png,a dog", "with a hat"], r"csv:5: has 1 field where the header has 2"),
        (['0.png,"a cat', "1.png,a dog", "2.png,a cow"], r"csv:2: the row that begins there is not CSV"),
        (["0.png,a dog", '1.png,"a cat', '2.png,"a dog"', "3.png,a cow"], r"csv:3: the row that begins there is not"),
        (['0.png,"a "big" dog"'], r"csv:2: the row that begins there is not CSV"),
    ],
)
def test_a_csv_that_is_not_quoted_is_refused_and_loses_nothing(tmp_path, cache, lines: list[str], message: str) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.png").write_bytes(picture(number))
    (folder / "metadata.csv").write_text("\n".join(["file_name,text", *lines]) + "\n")
    with pytest.raises(UserError, match=message):
        open_with({"kind": "imagefolder", "path": folder}, cache)


def test_a_csv_of_any_line_ends_and_blank_lines(tmp_path, cache) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(2):
        (folder / f"{number}.png").write_bytes(picture(number))
    lines = ["file_name,text", "", '0.png,"a cat, ""a dog"""', "  ", '1.png,says "miaow"', ""]
    (folder / "metadata.csv").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    images = open_with({"kind": "imagefolder", "path": folder}, cache)
    assert all_captions(images) == [['a cat, "a dog"'], ['says "miaow"']]


def test_columns_of_other_names(tmp_path, cache) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "0.png").write_bytes(picture(0))
    write_metadata(folder, ".csv", [{"image": "0.png", "comment": "a caption"}])
    source = {"kind": "imagefolder", "path": folder}
    with pytest.raises(UserError, match=r"metadata\.csv:2: needs a field 'file_name'; it has \['comment', 'image'\]"):
        open_with(source, cache)
    with pytest.raises(UserError, match="needs a field 'text' or 'caption'"):
        open_with({**source, "image_column": "image"}, cache)
    with pytest.raises(UserError, match="needs a field 'title'"):
        open_with({**source, "image_column": "image", "text_column": "title"}, cache)
    images = open_with({**source, "image_column": "image", "text_column": "comment"}, cache)
    assert all_captions(images) == [["a caption"]]


def test_a_side_that_does_not_exist_is_refused(tmp_path, cache) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    write_metadata(folder, ".jsonl", [{"file_name": "0.png", "text": "x", "split": "restval"}])
    with pytest.raises(UserError, match=r"metadata\.jsonl:1: the field 'split' is 'restval'; it must be one of"):
        open_with({"kind": "imagefolder", "path": folder}, cache)


# --- parquet, Arrow, datasets --------------------------------------------------------------------------------------


def saved(tmp_path: Path, kind: str, texts: list[str] | None = None) -> dict:
    """The configuration of a source of that kind with nine pictures, or one for each text, in two files."""
    dataset = picture_dataset(range(len(texts or range(9))))
    if texts is not None:
        dataset = dataset.remove_columns("text").add_column("text", texts)
    folder = tmp_path / kind
    folder.mkdir()
    middle = len(dataset) // 2
    halves = [dataset.select(range(middle)), dataset.select(range(middle, len(dataset)))]
    if kind == "parquet":
        for index, half in enumerate(halves):
            # Small row groups, so that reading one row crosses their borders.
            half.to_parquet(folder / f"{index}.parquet", batch_size=2)
        return {"kind": "parquet", "path": folder}
    dataset.save_to_disk(folder, num_shards=2)
    if kind == "arrow":
        return {"kind": "parquet", "path": folder}
    return {"kind": "datasets", "path": folder, "image_column": "image"}


KINDS = ["parquet", "arrow", "datasets"]


@pytest.mark.parametrize("kind", KINDS)
def test_tables_of_images(tmp_path, cache, kind: str) -> None:
    source = saved(tmp_path, kind)
    images = open_with(source, cache)
    assert images.image(0).shape == (SIZE, SIZE, 3)
    assert numbers_of(images) == list(range(9))
    assert [int(images.image(index)[0, 0, 0]) for index in (8, 0, 5, 4, 1)] == [8, 0, 5, 4, 1]
    assert all_captions(images) == [[f"picture {number}"] for number in range(9)]
    assert numbers_of(pickle.loads(pickle.dumps(images))) == list(range(9))
    data = {"held_out_fraction": 0.4}
    train, held_out = (numbers_of(open_with(source, cache, split, **data)) for split in ("train", "held_out"))
    assert sorted(train + held_out) == list(range(9))
    assert held_out == [number for number in range(9) if share_of(f"picture {number}", 0) < 0.4]
    assert 0 < len(held_out) < 9


@pytest.mark.parametrize("kind", KINDS)
def test_rows_behind_one_without_a_caption_keep_their_images(tmp_path, cache, kind: str) -> None:
    source = saved(tmp_path, kind, texts=["picture 0", " ", "picture 2", "picture 3"])
    images = open_with(source, cache)
    assert images.skipped == {"empty caption": 1}
    assert numbers_of(images) == [0, 2, 3]
    assert all_captions(images) == [["picture 0"], ["picture 2"], ["picture 3"]]


@pytest.mark.parametrize("kind", KINDS)
def test_tables_are_the_same_in_another_process(tmp_path, cache, kind: str) -> None:
    """The latents of a run must be found again by the next."""
    source = {key: str(value) for key, value in saved(tmp_path, kind).items()}
    program = (
        "from source_files import open_with; from pathlib import Path;"
        f"images = open_with({source!r}, Path({str(cache)!r})); print(images.fingerprint, images.documents_fingerprint)"
    )
    log = tmp_path / "log"
    assert run_script(["-c", program], tmp_path, {}, log) == 0, log.read_text()
    before = sorted(cache.iterdir())
    images = open_with(source, cache)
    assert log.read_text().splitlines()[-1].split() == [images.fingerprint, images.documents_fingerprint]
    assert sorted(cache.iterdir()) == before, "nothing is read twice"


@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_column_lists_those_that_exist(tmp_path, cache, kind: str) -> None:
    source = saved(tmp_path, kind)
    with pytest.raises(UserError, match=r"needs a field 'img'; it has \['image', 'text'\]"):
        open_with({**source, "image_column": "img"}, cache)
    with pytest.raises(UserError, match=r"needs a field 'title'; it has \['image', 'text'\]"):
        open_with({**source, "text_column": "title"}, cache)


@pytest.mark.parametrize("kind", KINDS)
def test_a_column_without_images_is_named(tmp_path, cache, kind: str) -> None:
    """One of numbers when it is opened, one of titles when it is read."""
    folder = tmp_path / "tables"
    folder.mkdir()
    table = picture_dataset(range(3)).add_column("id", [7, 8, 9])
    if kind == "parquet":
        table.to_parquet(folder / "a.parquet")
    else:
        table.save_to_disk(folder)
    source = {"kind": "datasets" if kind == "datasets" else "parquet", "path": folder}
    with pytest.raises(UserError, match=r"the column 'id' is of type int64;.*\['image', 'text'\]"):
        open_with({**source, "image_column": "id"}, cache)
    images = open_with({**source, "image_column": "text"}, cache)
    with pytest.raises(UserError, match="the column 'text' holds 'picture 0', which is not a valid file"):
        images.image(0)


def test_parquet_is_read_in_place(tmp_path, cache) -> None:
    """The captions are kept, the images are not copied."""
    folder = tmp_path / "tables"
    folder.mkdir()
    generator = np.random.default_rng(0)
    rows = [{"image": {"bytes": generator.bytes(200_000), "path": None}, "caption": f"noise {n}"} for n in range(20)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet")
    images = open_with({"kind": "parquet", "path": folder}, cache)
    assert len(images) == 20
    assert sum(path.stat().st_size for path in cache.rglob("*") if path.is_file()) < 10_000


@pytest.mark.parametrize("value", ["path", "bytes", "struct"])
def test_images_as_paths_and_bytes(tmp_path, cache, value: str) -> None:
    folder = tmp_path / "tables"
    folder.mkdir()
    cells: list = []
    for number in range(3):
        (folder / f"{number}.png").write_bytes(picture(number))
        path, content = f"{number}.png", picture(number)
        cells.append({"path": path, "bytes": content, "struct": {"path": path, "bytes": None}}[value])
    rows = [{"image": cell, "text": f"picture {number}", "split": "train"} for number, cell in enumerate(cells)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet")
    assert numbers_of(open_with({"kind": "parquet", "path": folder}, cache)) == [0, 1, 2]


def test_bad_rows_are_counted_or_told_when_read(tmp_path, cache) -> None:
    rows = [
        {"image": picture(0), "text": None},
        {"image": None, "text": "no image"},
        {"image": b"no picture", "text": "damaged"},
        {"image": picture(3)[:60], "text": "cut off"},
        {"image": picture(4), "text": ["a", "", "b"]},
    ]
    (tmp_path / "tables").mkdir()
    for row in rows:
        row["text"] = row["text"] if isinstance(row["text"], list) or row["text"] is None else [row["text"]]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "tables" / "a.parquet")
    images = open_with({"kind": "parquet", "path": tmp_path / "tables"}, cache)
    assert images.skipped == {"empty caption": 1}
    assert all_captions(images) == [["no image"], ["damaged"], ["cut off"], ["a", "b"]]
    for index, message in enumerate((r"a\.parquet:2' is missing", r"a\.parquet:3", r"a\.parquet:4")):
        with pytest.raises(UserError, match=message):
            images.image(index)
    assert images.image(3)[0, 0, 0] == 4


def test_damaged_tables_are_refused_by_name(tmp_path, cache) -> None:
    source = saved(tmp_path, "parquet")
    file = tmp_path / "parquet" / "1.parquet"
    for content in (b"", file.read_bytes()[:-20], b"no table"):
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"1\.parquet' is not a whole parquet file"):
            open_with(source, cache)
    source = saved(tmp_path, "arrow")
    file = next(iter(sorted((tmp_path / "arrow").glob("*.arrow"))))
    for content in (b"", b"no table at all"):
        file.write_bytes(content)
        with pytest.raises(UserError, match=rf"{file.name}' is not a whole Arrow file"):
            open_with(source, cache)


def test_a_damaged_page_is_told_when_it_is_read(tmp_path, cache) -> None:
    source = saved(tmp_path, "parquet")
    images = open_with(source, cache)
    file = tmp_path / "parquet" / "1.parquet"
    content = bytearray(file.read_bytes())
    content[4:400] = b"\x00" * 396
    file.write_bytes(content)
    stores._row_group.cache_clear()
    with pytest.raises(UserError, match=r"1\.parquet"):
        images.image(len(images) - 5)


def test_datasets_by_split_and_by_name(tmp_path, cache) -> None:
    parts = {"train": picture_dataset(range(3)), "test": picture_dataset(range(3, 5))}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "dict")
    source = {"kind": "datasets", "path": tmp_path / "dict", "image_column": "image"}
    assert numbers_of(open_with(source, cache)) == [0, 1, 2]
    assert numbers_of(open_with({**source, "split": "test", "use": "held_out"}, cache, "held_out")) == [3, 4]
    with pytest.raises(UserError, match=r"no split 'dev'; it has \['test', 'train'\]"):
        open_with({**source, "split": "dev"}, cache)
    # What `load_dataset` makes of a folder of files, as it would of a name.
    (tmp_path / "files" / "data").mkdir(parents=True)
    parts["train"].to_parquet(tmp_path / "files" / "data" / "train-0.parquet")
    assert numbers_of(open_with({**source, "path": tmp_path / "files"}, cache)) == [0, 1, 2]
    with pytest.raises(UserError, match=r"cannot load '.*files' \(name None, split dev\)"):
        open_with({**source, "path": tmp_path / "files", "split": "dev"}, cache)
    with pytest.raises(UserError, match="cannot load 'no/such_data'"):
        open_with({**source, "path": "no/such_data"}, cache)
    for path in (tmp_path / "saved-not", "./saved", "a/b/c"):
        with pytest.raises(UserError, match=r"datasets source '.*' does not exist; there is '.*', but no '.*' in it"):
            open_with({**source, "path": path}, cache)


def test_a_shuffled_data_set_keeps_its_order(tmp_path, cache) -> None:
    picture_dataset(range(8)).shuffle(seed=1).save_to_disk(tmp_path / "shuffled")
    images = open_with({"kind": "datasets", "path": tmp_path / "shuffled", "image_column": "image"}, cache)
    assert all_captions(images) == [[f"picture {number}"] for number in numbers_of(images)]
    assert numbers_of(images) != list(range(8))


@pytest.mark.parametrize("kind", ["imagefolder", "webdataset", "parquet", "datasets"])
def test_other_captions_of_the_same_images_need_no_other_latents(tmp_path, cache, kind: str) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    columns = {column: [f"{column} {number}" for number in range(3)] for column in ("one", "two")}
    table = picture_dataset(range(3)).remove_columns("text")
    for column, values in columns.items():
        table = table.add_column(column, values)
    if kind == "imagefolder":
        for number in range(3):
            (folder / f"{number}.png").write_bytes(picture(number))
        rows = [{"file_name": f"{n}.png", "one": columns["one"][n], "two": columns["two"][n]} for n in range(3)]
        write_metadata(folder, ".jsonl", rows)
    elif kind == "webdataset":
        members: dict[str, bytes | str] = {}
        for number in range(3):
            members[f"{number}.png"] = picture(number)
            members[f"{number}.json"] = json.dumps({name: values[number] for name, values in columns.items()})
        write_tar(folder / "a.tar", members)
    elif kind == "parquet":
        table.to_parquet(folder / "a.parquet")
    else:
        table.save_to_disk(folder)
    source = {"kind": kind, "path": folder, **({"image_column": "image"} if kind == "datasets" else {})}
    one, two = (open_with({**source, "text_column": column}, cache) for column in columns)
    assert all_captions(one) == [[caption] for caption in columns["one"]]
    assert all_captions(two) == [[caption] for caption in columns["two"]]
    assert one.fingerprint == two.fingerprint
    assert one.documents_fingerprint != two.documents_fingerprint
