"""Data sources: what is read, skipped, refused and held out."""

import itertools
import json
import logging
import pickle
import random
import re
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from source_files import (
    SIZE,
    all_captions,
    numbers_of,
    open_with,
    picture_dataset,
    plain,
    shard,
    write_coco,
    write_tar,
)

from transfusion_mot.config import DataConfig, SourceConfig
from transfusion_mot.data.emoji import emoji_captions, render_emoji, rendered_emoji
from transfusion_mot.data.sources.base import share_of
from transfusion_mot.data.sources.open import open_source
from transfusion_mot.errors import UserError

pytest.importorskip("hypothesis")
from hypothesis import given
from hypothesis import strategies as st

SPLITS = ("train", "held_out")


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory, draw_emoji):
    """With the drawings of all emoji."""
    folder = tmp_path_factory.mktemp("cache")
    draw_emoji(SIZE, folder)
    return str(folder)


def image_folder(folder, num_images=60, seed=None):
    """A folder of flat pictures; picture number i has the grey value i and the caption "picture i"."""
    folder.mkdir(exist_ok=True)
    entries = []
    for number in range(num_images):
        Image.new("RGB", (20, 24), (number, number, number)).save(folder / f"{number}.png")
        entries.append({"file_name": f"{number}.png", "text": f"picture {number}"})
    if seed is not None:
        random.Random(seed).shuffle(entries)
    write_metadata(folder, entries)
    return entries


def write_metadata(folder, entries):
    (folder / "metadata.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def open_folder(folder, split="train", **data):
    data = {"held_out_fraction": 0.2} | data
    return open_with({"kind": "imagefolder", "path": folder}, folder.parent / f"{folder.name}-cache", split, **data)


def captions_of(images):
    """The one caption of every image."""
    return [caption for (caption,) in all_captions(images)]


# --- emoji ---------------------------------------------------------------------------------------------------------


def test_emoji_have_clean_distinct_captions():
    captions = emoji_captions()
    assert len(captions) >= 3790, "as many as the oldest packages have"
    assert captions["1F34E"] == "red apple"
    assert captions["1F419"] == "octopus"
    assert captions["1F1EF-1F1F5"] == "flag: Japan"
    assert captions["1F3F4-E0067-E0062-E0065-E006E-E0067-E007F"] == "flag: England"
    assert captions["1F3F3-FE0F-200D-1F308"] == "rainbow flag"
    assert len(set(captions.values())) == len(captions)
    assert not any(re.search(r"[_\n]|^:|:$|  ", caption) for caption in captions.values())
    assert sum(caption.startswith("flag: ") for caption in captions.values()) > 250


def test_emoji_are_drawn_on_white_and_in_colour():
    apple = render_emoji("1F34E", 64)
    assert apple.shape == (64, 64, 3)
    assert apple.dtype == np.uint8
    assert (apple[0, 0] == 255).all()
    red, green, blue = apple[40, 32].astype(int)
    assert red > green + 50
    assert red > blue + 50


def test_emoji_split_shares_nothing_and_loses_nothing(cache_dir):
    data = DataConfig(image_size=SIZE, cache_dir=cache_dir)
    train = open_source(SourceConfig(), data, "train")
    held_out = open_source(SourceConfig(), data, "held_out")
    assert not set(captions_of(train)) & set(captions_of(held_out))
    assert set(captions_of(train)) | set(captions_of(held_out)) == set(emoji_captions().values())
    assert 0.03 < len(held_out) / len(emoji_captions()) < 0.07
    assert train.fingerprint != held_out.fingerprint

    stem_of = {caption: stem for stem, caption in emoji_captions().items()}
    for images in (train, held_out):
        for index in (0, len(images) // 2, len(images) - 1):
            np.testing.assert_array_equal(
                images.image(index), render_emoji(stem_of[images.captions(index)[0]], SIZE), images.captions(index)[0]
            )


def test_emoji_are_drawn_once(cache_dir):
    first = rendered_emoji(SIZE, cache_dir)
    assert isinstance(first, np.memmap)
    (file,) = Path(cache_dir).glob("*.npy")
    before = file.stat()
    again = rendered_emoji(SIZE, cache_dir)
    np.testing.assert_array_equal(first, again)
    after = file.stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert not list(file.parent.glob("*.partial*")), "nothing is left beside it"


# --- image folders -------------------------------------------------------------------------------------------------


def test_image_folder_gives_images_with_their_captions(tmp_path):
    image_folder(tmp_path)
    numbers = set()
    for split in ("train", "held_out"):
        images = open_folder(tmp_path, split)
        for index in range(len(images)):
            image = images.image(index)
            number = int(image[0, 0, 0])
            assert image.shape == (SIZE, SIZE, 3)
            assert images.captions(index)[0] == f"picture {number}"
            numbers.add(number)
    assert numbers == set(range(60))


def test_split_does_not_depend_on_order_or_on_other_items(tmp_path):
    entries = image_folder(tmp_path)
    held_out = set(captions_of(open_folder(tmp_path, "held_out")))
    assert 0 < len(held_out) < 30
    random.Random(1).shuffle(entries)
    kept = entries[:40]
    write_metadata(tmp_path, kept)
    assert set(captions_of(open_folder(tmp_path, "held_out"))) == held_out & {entry["text"] for entry in kept}
    assert set(captions_of(open_folder(tmp_path, "held_out", split_seed=1))) != held_out & {e["text"] for e in kept}


def test_of_every_class_a_share_is_held_out_where_captions_repeat(tmp_path):
    """By file name; an image whose caption no other image has keeps the side that its caption gives it."""
    entries = image_folder(tmp_path, 240)
    labelled = [
        entry | {"text": f"a kind {number % 6}" if number < 200 else entry["text"]}
        for number, entry in enumerate(entries)
    ]
    write_metadata(tmp_path, labelled)
    sides = [captions_of(open_folder(tmp_path, split, held_out_fraction=0.3)) for split in ("train", "held_out")]
    assert len(sides[0]) + len(sides[1]) == 240
    for kind in range(6):
        assert 0.1 < sides[1].count(f"a kind {kind}") / 33 < 0.5
    expected = [
        entry["text"]
        for number, entry in enumerate(labelled)
        if share_of(entry["file_name"] if number < 200 else entry["text"], 0) < 0.3
    ]
    assert sides[1] == expected


@pytest.mark.parametrize("kind", ["webdataset", "parquet", "datasets", "coco", "interleaved"])
def test_where_all_captions_are_the_same_a_share_is_held_out(tmp_path, monkeypatch, kind):
    """For any kind of source and any fraction."""
    monkeypatch.chdir(tmp_path)
    source: dict = {"kind": kind, "path": tmp_path / "data"}
    if kind == "webdataset":
        write_tar(tmp_path / "data", shard(range(60), "png", "a picture of my dog"))
        source["path"] = (tmp_path / "data").rename(tmp_path / "data.tar")
    elif kind == "coco":
        path = write_coco(tmp_path, 60, captions_per_image=1)
        content = json.loads(path.read_text())
        content["annotations"] = [entry | {"caption": "a picture of my dog"} for entry in content["annotations"]]
        path.write_text(json.dumps(content))
        source |= {"path": tmp_path / "train2017", "annotations": path}
    elif kind == "interleaved":
        image_folder(tmp_path / "data")
        rows = [{"texts": ["make it red", None], "images": [None, f"{number}.png"]} for number in range(60)]
        (tmp_path / "data" / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "data" / "metadata.jsonl").unlink()
    else:
        table = picture_dataset(range(60)).remove_columns("text").add_column("text", ["a picture of my dog"] * 60)
        (tmp_path / "data").mkdir()
        if kind == "parquet":
            table.to_parquet(tmp_path / "data" / "a.parquet")
        else:
            table.save_to_disk(tmp_path / "data")
            # The share follows from the path as it is given, too: another one in every run would be another draw.
            source |= {"path": "data", "image_column": "image"}
    for fraction in (0.2, 0.5, 0.8):
        sizes = [
            len(open_with(source, tmp_path / "cache", split, held_out_fraction=fraction))
            for split in ("train", "held_out")
        ]
        assert sum(sizes) == 60
        assert abs(sizes[1] / 60 - fraction) < 0.15


def test_documents_without_images_are_held_out_by_their_text(tmp_path):
    """A copy of a text that is held out is no text to train on."""
    rows = [{"texts": [f"text {number % 10}"], "images": [None]} for number in range(60)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"kind": "interleaved", "path": tmp_path / "a.jsonl"}
    opened = [open_with(source, tmp_path / "cache", split, held_out_fraction=0.4) for split in ("train", "held_out")]
    texts = [{str(side.document(index)) for index in range(len(side))} for side in opened]
    assert not texts[0] & texts[1]
    assert len(texts[0] | texts[1]) == 10


def test_so_few_images_that_a_share_would_be_all_or_none_are_all_trained_on(tmp_path, caplog):
    """And it is said that nothing is held out."""
    entries = image_folder(tmp_path, 12)
    for number, caption in ((12, "my drawing"), (1, "picture 0"), (1, "picture 1"), (2, "my drawing")):
        write_metadata(tmp_path, [entry | {"text": caption} for entry in entries[:number]])
        for fraction in (0.05, 0.5, 0.999):
            caplog.clear()
            train, held_out = (open_folder(tmp_path, split, held_out_fraction=fraction) for split in SPLITS)
            assert len(train) >= 1
            assert len(train) + len(held_out) == number
            told = [message for message in caplog.messages if "nothing is held out" in message]
            assert len(told) == (len(held_out) == 0), "said once, and only then"
    with pytest.raises(UserError, match=r"no image to train on \(held_out_fraction is 1\.0\)"):
        open_folder(tmp_path, held_out_fraction=1.0)
    write_metadata(tmp_path, [entry | {"split": "test"} for entry in entries])
    with pytest.raises(UserError, match="no image to train on"):
        open_folder(tmp_path)


def test_split_grows_with_its_fraction(tmp_path):
    entries = image_folder(tmp_path)
    write_metadata(tmp_path, [entry | {"text": f"kind {max(40, number)}"} for number, entry in enumerate(entries)])
    found = [
        set(numbers_of(open_folder(tmp_path, "held_out", held_out_fraction=fraction)))
        for fraction in (0.0, 0.05, 0.3, 0.31, 0.9)
    ]
    assert all(smaller <= larger for smaller, larger in itertools.pairwise(found))
    assert not found[0]
    assert len(found[-1]) > 45


def test_what_cannot_be_used_is_counted_and_told(tmp_path, caplog):
    entries = image_folder(tmp_path, 8)
    (tmp_path / "3.png").unlink()
    entries[5]["text"] = " "
    entries[6]["text"] = None
    write_metadata(tmp_path, entries)
    with caplog.at_level(logging.WARNING):
        images = open_folder(tmp_path, held_out_fraction=0.0)
    assert images.skipped == {"missing file": 1, "empty caption": 2}
    assert len(images) == 5
    message = caplog.messages[0]
    assert "skipped 3 and kept 5 images: 2 empty captions (" in message
    assert "3.png" in message
    assert "metadata.jsonl:6" in message


def test_caption_field_and_unicode(tmp_path):
    image_folder(tmp_path, 2)
    lines = [
        '{"file_name": "0.png", "caption": "ein Äpfelchen 🍎"}',
        "",
        '{"file_name": "1.png", "text": "half \\ud83d"}',
    ]
    (tmp_path / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert captions_of(open_folder(tmp_path, held_out_fraction=0.0)) == ["ein Äpfelchen 🍎", "half ?"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"file_name": "0.png", "text": ', "not JSON"),
        (b'{"file_name": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"file_name": "0.png", "text": ' + b"1" * 5000 + b"}", "not JSON"),
        (b'["0.png", "x"]', "must be a JSON object"),
        (b'{"text": "x"}', "'file_name'"),
        (b'{"file_name": "0.png"}', "'text' or 'caption'"),
        (b'{"file_name": "0.png", "text": 3}', "must be a text"),
        (b'{"file_name": "0.png", "text": "\xe4pfel"}', "not UTF-8"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    image_folder(tmp_path, 1)
    good = (tmp_path / "metadata.jsonl").read_bytes()
    (tmp_path / "metadata.jsonl").write_bytes(good * 2 + line + b"\n" + good)
    with pytest.raises(UserError, match=rf"metadata\.jsonl:3: .*{re.escape(message)}"):
        open_folder(tmp_path)


def test_an_image_of_two_spellings_is_one_image_on_one_side(tmp_path):
    image_folder(tmp_path, 2)
    lines = [
        {"file_name": "./0.png", "text": "one"},
        {"file_name": "0.png", "text": "two"},
        {"file_name": "below/../0.png", "text": "three"},
        {"file_name": str(tmp_path / "0.png"), "text": "four"},
        {"file_name": "1.png", "text": "other", "split": "train"},
    ]
    write_metadata(tmp_path, lines)
    assert all_captions(open_folder(tmp_path, held_out_fraction=0.0)) == [["one", "two", "three", "four"], ["other"]]
    # A side that any of the lines names is that of the image.
    write_metadata(tmp_path, [lines[0], lines[1] | {"split": "test"}, *lines[2:]])
    assert all_captions(open_folder(tmp_path, held_out_fraction=0.0)) == [["other"]]
    write_metadata(tmp_path, [lines[0] | {"split": "train"}, lines[1] | {"split": "test"}])
    with pytest.raises(UserError, match=r"jsonl:2: has another 'split' for '0\.png' than .*jsonl:1; give"):
        open_folder(tmp_path)


def test_folders_that_cannot_be_used(tmp_path):
    for path in (None, ""):
        with pytest.raises(UserError, match="needs 'path'"):
            open_source(SourceConfig(kind="imagefolder", path=path), DataConfig(), "train")
    with pytest.raises(UserError, match="is not a folder"):
        open_folder(tmp_path / "missing")
    with pytest.raises(UserError, match=r"has no images; known: \.png"):
        open_folder(tmp_path)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "gone.png", "text": "x"}\n')
    with pytest.raises(UserError, match=r"it lists 1 image, but none exists .*1 missing file.*'.*gone\.png'"):
        open_folder(tmp_path, held_out_fraction=0.0)
    assert len(open_folder(tmp_path, "held_out", held_out_fraction=0.0)) == 0


def test_without_metadata_captions_are_in_text_files_or_names_of_folders(tmp_path):
    for number, name in enumerate(
        ["a.png", "b.JPG", "red_fox/1.png", "red_fox/2.png", "blue-jay/x/3.webp", ".thumb/4.png"]
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / name)
    (tmp_path / "a.txt").write_text("\ufeffan apple\non a table \n", encoding="utf-8")
    (tmp_path / "b.txt").write_text(" \n")
    (tmp_path / "red_fox" / "2.txt").write_text("two foxes")
    images = open_folder(tmp_path, held_out_fraction=0.0)
    found = {caption: images.image(index)[0, 0, 0] for index, (caption,) in enumerate(all_captions(images))}
    assert found.keys() == {"an apple on a table", "red fox", "two foxes", "x"}
    assert found["red fox"] == 2
    assert images.skipped == {"empty caption": 1}
    # A caption that is written later is found.
    (tmp_path / "b.txt").write_text("a bee")
    assert len(open_folder(tmp_path, held_out_fraction=0.0)) == 5
    (tmp_path / "b.txt").unlink()
    with pytest.raises(UserError, match=r"b\.JPG' has no caption: there is no metadata\.jsonl, no 'b\.txt' beside it"):
        open_folder(tmp_path)
    with pytest.raises(
        UserError, match=r"has no metadata\.jsonl.* where text_column would be; write it, with one line"
    ):
        open_with({"kind": "imagefolder", "path": tmp_path, "text_column": "caption"}, tmp_path / "cache")


def test_a_corrupt_image_is_told_when_it_is_read(tmp_path):
    image_folder(tmp_path, 3)
    (tmp_path / "1.png").write_bytes(b"no picture")
    images = open_folder(tmp_path, held_out_fraction=0.0)
    with pytest.raises(UserError, match=r"1\.png"):
        images.image(1)
    assert images.image(2)[0, 0, 0] == 2


def test_fingerprint_follows_what_decides_the_pixels(tmp_path):
    entries = image_folder(tmp_path)
    first = open_folder(tmp_path).fingerprint
    assert open_folder(tmp_path).fingerprint == first
    assert open_folder(tmp_path, image_size=SIZE * 2).fingerprint != first
    write_metadata(tmp_path, entries[::-1])
    assert open_folder(tmp_path).fingerprint != first
    write_metadata(tmp_path, entries)
    assert open_folder(tmp_path).fingerprint == first
    for number in range(60):
        Image.new("RGB", (20, 24), "red").save(tmp_path / f"{number}.png")
    assert open_folder(tmp_path).fingerprint != first


# --- text ----------------------------------------------------------------------------------------------------------


def open_text(path, split="train", **data):
    return open_with({"kind": "text", "path": path}, path.parent / f"{path.name}-cache", split, **data)


def all_texts(documents):
    return [text for index in range(len(documents)) for text in plain(documents.document(index))]


TEXT = "First paragraph,\ntwo lines.\n\n  Second, indented.\n   \n\n\nDritter Absatz: äöü 🦑\n"


def test_paragraphs_of_a_text_file(tmp_path):
    expected = [part.strip() for part in re.split(r"\n\s*\n", TEXT) if part.strip()]
    assert len(expected) == 3
    for name, content in (
        ("a.txt", TEXT.encode()),
        ("crlf.txt", b"\xef\xbb\xbf" + TEXT.replace("\n", "\r\n").encode()),
    ):
        (tmp_path / name).write_bytes(content)
        documents = open_text(tmp_path / name)
        assert all_texts(documents) == expected
        assert all_texts(pickle.loads(pickle.dumps(documents))) == expected


@given(texts=st.lists(st.text(min_size=1).filter(lambda text: text.strip() == text and text), min_size=1, max_size=5))
def test_json_lines_round_trip(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("texts") / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    assert all_texts(open_text(path)) == texts


def test_a_folder_of_texts_and_its_split(tmp_path):
    (tmp_path / "below").mkdir()
    (tmp_path / "b.txt").write_text("\n\n".join(f"paragraph {number}" for number in range(50)))
    lines = [json.dumps({"text": f"line {number}"}) for number in range(50)] + [json.dumps({"text": ""})]
    (tmp_path / "below" / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "below" / "B.TXT").write_text("paragraph 50")
    (tmp_path / "readme.md").write_text("not read")
    documents = open_text(tmp_path)
    numbered = [f"{kind} {n}" for kind in ("paragraph", "line") for n in range(50)]
    assert sorted(all_texts(documents)) == sorted([*numbered, "paragraph 50"])
    assert documents.skipped == {"empty text": 1}
    train = open_text(tmp_path, held_out_fraction=0.3)
    held_out = open_text(tmp_path, "held_out", held_out_fraction=0.3)
    assert sorted(all_texts(train) + all_texts(held_out)) == sorted(all_texts(documents))
    assert len(held_out) > 10
    assert len({side.documents_fingerprint for side in (documents, train, held_out)}) == 3
    assert open_text(tmp_path).documents_fingerprint == documents.documents_fingerprint


def test_lines_that_cannot_be_used_are_counted_and_the_others_read(tmp_path, caplog):
    """One damaged line does not discard a large file; a file without usable lines is refused."""
    bad = [
        (b'{"text": "cut o', "not JSON"),
        (b'["a list"]', "must be a JSON object"),
        (b'{"text": "\xe4pfel"}', "not UTF-8 text"),
        (b'{"text": 3}', "must be a text"),
        (b'{"body": "other field"}', "needs a field 'text'"),
        (b'{"text": ' + b"[" * 100_000, "nested too deeply"),
    ]
    for number, (line, message) in enumerate(bad):
        path = tmp_path / f"{number}.jsonl"
        path.write_bytes(line + b'\n{"text": "first"}\n' + line + b'\n{"text": "second"}\n')
        caplog.clear()
        documents = open_text(path)
        assert all_texts(documents) == ["first", "second"]
        assert documents.skipped == {"unusable row": 2}
        assert f"{path}:1: " in caplog.text
        assert f"{path}:3: " in caplog.text
        assert caplog.text.count(message) == 2
        path.write_bytes(line + b"\n" + line + b"\n")
        with pytest.raises(UserError, match=rf"{path.name}:1: .*{re.escape(message)}"):
            open_text(path)
    # Long before the end of a large file.
    path = tmp_path / "all.jsonl"
    path.write_bytes(b'{"body": "x"}\n' * 5000 + b'{"text": "the only one"}\n')
    with pytest.raises(UserError, match=r"all\.jsonl:1: needs a field 'text'; it has \['body'\]"):
        open_text(path)


def write_texts(folder, texts):
    """The same texts as a parquet file and as a data set => the configurations of both."""
    dataset = datasets.Dataset.from_dict({"content": texts, "split": ["train"] * (len(texts) - 1) + ["dev"]})
    dataset.to_parquet(folder / "texts.parquet")
    dataset.save_to_disk(folder / "saved")
    return [{"kind": "text", "path": folder / "texts.parquet"}, {"kind": "datasets", "path": folder / "saved"}]


def test_texts_of_tables(tmp_path):
    texts = [f"line {number} äöü 🦑" for number in range(1500)]
    texts[3], texts[1200] = "", None
    for source in write_texts(tmp_path, texts):
        with pytest.raises(UserError, match=r"needs a field 'text'; it has \['content', 'split'\]"):
            open_with(source, tmp_path / "cache")
        source["text_column"] = "content"
        documents = open_with(source, tmp_path / "cache")
        assert all_texts(documents) == [text for text in texts[:-1] if text]
        assert documents.skipped == {"empty text": 2}
        assert all_texts(open_with(source, tmp_path / "cache", "held_out")) == texts[-1:]
        assert all_texts(pickle.loads(pickle.dumps(documents))) == all_texts(documents)


def test_a_damaged_table_of_texts_is_refused(tmp_path):
    source = write_texts(tmp_path, ["a", "b"])[0]
    source["path"].write_bytes(source["path"].read_bytes()[:-9])
    with pytest.raises(UserError, match=r"texts\.parquet' is not a whole parquet file"):
        open_with(source, tmp_path / "cache")


def test_texts_that_cannot_be_used(tmp_path):
    with pytest.raises(UserError, match="is not a file or folder"):
        open_text(tmp_path / "missing.txt")
    with pytest.raises(UserError, match=r"\.txt, \.jsonl or \.parquet"):
        open_text(tmp_path)
    (tmp_path / "latin.txt").write_bytes("gut\n\nÄpfel".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.txt:3: not UTF-8"):
        open_text(tmp_path)
    (tmp_path / "latin.txt").write_text("\n\n")
    with pytest.raises(UserError, match="no document to train on"):
        open_text(tmp_path)
    (tmp_path / "table.csv").write_text("a,b")
    with pytest.raises(UserError, match=r"\.txt, \.jsonl or \.parquet"):
        open_text(tmp_path / "table.csv")
