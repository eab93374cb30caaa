"""Editing pairs of each kind of source, on real files; unusable pairs; and equality of cache and `online`."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import packer_of
from PIL import Image
from test_pipeline import IMAGE_SIZE, tiny_pipeline

from transfusion_mot.codecs.autoencoder_kl import Autoencoder
from transfusion_mot.config import CodecConfig, DataConfig, EditDropoutConfig, RunConfig, SourceConfig
from transfusion_mot.data.inspect import Inspection, thumbnails_of
from transfusion_mot.data.mixture import Sources, open_documents, with_encoded
from transfusion_mot.data.online import OnlineEncoder
from transfusion_mot.data.sources.base import MediaItem, Text
from transfusion_mot.data.sources.edit_pairs import EditPairs
from transfusion_mot.data.sources.open import open_source
from transfusion_mot.errors import UserError

COUNT = 6


def pictures(count: int = 2 * COUNT, size: tuple[int, int] = (IMAGE_SIZE, IMAGE_SIZE)) -> list[Image.Image]:
    """Of the model's size, so that they are read as they are: source and target in turn."""
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)) for _ in range(count)]


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def instruction(pair: int) -> str:
    return ["make it green", "mirror it"][pair % 2]


def as_imagefolder(folder: Path) -> SourceConfig:
    folder.mkdir(exist_ok=True)
    lines = []
    for pair, (before, after) in enumerate(zip(pictures()[::2], pictures()[1::2], strict=True)):
        before.save(folder / f"before{pair}.png")
        after.save(folder / f"after{pair}.png")
        names = {"source_file_name": f"before{pair}.png", "file_name": f"after{pair}.png"}
        lines.append(json.dumps({**names, "text": instruction(pair)}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return SourceConfig("imagefolder", str(folder), source_image_column="source_file_name")


def columns() -> dict[str, list]:
    """As InstructPix2Pix has them."""
    return {
        "input_image": [{"bytes": png(image), "path": None} for image in pictures()[::2]],
        "edit_prompt": [instruction(pair) for pair in range(COUNT)],
        "edited_image": [{"bytes": png(image), "path": None} for image in pictures()[1::2]],
    }


def as_parquet(folder: Path) -> SourceConfig:
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns()), folder / "pairs.parquet", row_group_size=2)
    keys = {"source_image_column": "input_image", "image_column": "edited_image", "text_column": "edit_prompt"}
    return SourceConfig("parquet", str(folder), **keys)


def as_dataset(folder: Path) -> SourceConfig:
    features = datasets.Features(
        {"source_img": datasets.Image(), "instruction": datasets.Value("string"), "target_img": datasets.Image()}
    )
    renamed = dict(zip(features, columns().values(), strict=True))
    datasets.Dataset.from_dict(renamed, features=features).save_to_disk(folder)
    keys = {"source_image_column": "source_img", "image_column": "target_img", "text_column": "instruction"}
    return SourceConfig("datasets", str(folder), **keys)


def as_webdataset(folder: Path) -> SourceConfig:
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / "shard.tar", "w") as tar:
        for pair in range(COUNT):
            before, after = pictures()[2 * pair : 2 * pair + 2]
            members = {"txt": instruction(pair).encode(), "target.png": png(after), "source.png": png(before)}
            for ending, content in members.items():
                info = tarfile.TarInfo(f"{pair:04d}.{ending}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return SourceConfig("webdataset", str(folder), source_image_column="source.png", image_column="target.png")


KINDS: dict[str, Callable[[Path], SourceConfig]] = {
    "imagefolder": as_imagefolder,
    "parquet": as_parquet,
    "datasets": as_dataset,
    "webdataset": as_webdataset,
}


def config_of(source: SourceConfig, folder: Path, **changes: object) -> DataConfig:
    return DataConfig(
        **{
            "sources": [source],
            "image_size": IMAGE_SIZE,
            "held_out_fraction": 0.0,
            "cache_dir": str(folder / "cache"),
            "slots": {"text": 64, "image": 4},
            "edit_dropout": EditDropoutConfig(0.0, 0.0, 0.0),
            **changes,
        }
    )


def opened(source: SourceConfig, folder: Path, split: str = "train", **changes: object) -> EditPairs:
    return open_source(source, config_of(source, folder, **changes), split)


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_are_read_from_each_kind(kind, tmp_path) -> None:
    pairs = opened(KINDS[kind](tmp_path / "pairs"), tmp_path)
    assert len(pairs) == COUNT
    found = {}
    for index in range(COUNT):
        before, text, after = pairs.document(index)
        assert isinstance(before, MediaItem)
        assert isinstance(text, Text)
        assert (before.is_condition, after.is_condition) == (True, False)
        shown = [pairs.media["image"].image(item.index) for item in (before, after)]
        found[shown[0].tobytes()] = list(text.choices), shown[1]
    for pair, (before, after) in enumerate(zip(pictures()[::2], pictures()[1::2], strict=True)):
        texts, target = found[np.asarray(before).tobytes()]
        assert texts == [instruction(pair)]
        assert np.array_equal(target, after)


def test_all_edits_of_an_image_are_on_one_side(tmp_path) -> None:
    source = as_imagefolder(tmp_path / "pairs")
    lines = [
        {"source_file_name": f"before{pair % 4}.png", "file_name": f"after{pair % COUNT}.png", "text": f"way {pair}"}
        for pair in range(40)
    ]
    (tmp_path / "pairs" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    sides = [opened(source, tmp_path, side, held_out_fraction=0.5) for side in ("train", "held_out")]
    assert [len(side) > 0 for side in sides] == [True, True]
    names = [{side.media["image"].where(side.document(index)[0].index) for index in range(len(side))} for side in sides]
    assert not names[0] & names[1]
    # Several lines of one pair are several ways to say it.
    assert sum(len(side.instructions(index)) for side in sides for index in range(len(side))) == 40


def test_a_pair_without_one_of_its_images_is_left_out_and_counted(tmp_path, caplog) -> None:
    source = as_imagefolder(tmp_path / "pairs")
    (tmp_path / "pairs" / "before1.png").unlink()
    (tmp_path / "pairs" / "after2.png").write_bytes(b"")
    pairs = opened(source, tmp_path)
    assert len(pairs) == COUNT - 2
    assert pairs.skipped == {"missing file": 1, "empty file": 1}
    assert "1 missing file (before1.png), 1 empty file (after2.png)" in caplog.text
    shown = {Path(pairs.media["image"].where(index)).name for index in range(len(pairs.media["image"]))}
    assert shown == {f"{side}{pair}.png" for side in ("before", "after") for pair in (0, 3, 4, 5)}


def test_a_tar_sample_without_a_source_image_is_counted(tmp_path) -> None:
    source = as_webdataset(tmp_path / "pairs")
    with tarfile.open(tmp_path / "pairs" / "shard.tar", "a") as tar:
        for ending, content in {"txt": b"x", "target.png": png(pictures()[0])}.items():
            info = tarfile.TarInfo(f"9999.{ending}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    pairs = opened(source, tmp_path)
    assert len(pairs) == COUNT
    assert pairs.skipped == {"sample without a source image": 1}


def test_images_of_other_proportions_are_told_with_an_example(tmp_path, caplog) -> None:
    source = as_imagefolder(tmp_path / "pairs")
    assert opened(source, tmp_path) is not None
    # Twice as large is the same picture.
    pictures(1, (2 * IMAGE_SIZE, 2 * IMAGE_SIZE))[0].save(tmp_path / "pairs" / "before0.png")
    opened(source, tmp_path)
    assert "proportions" not in caplog.text
    pictures(1, (40, 20))[0].save(tmp_path / "pairs" / "before3.png")
    pairs = opened(source, tmp_path)
    assert f"of {COUNT} pairs checked, 1 have a source and a target of different proportions" in caplog.text
    assert f"before3.png' and its target have 40 x 20 and {IMAGE_SIZE} x {IMAGE_SIZE} pixels" in caplog.text
    assert len(pairs) == COUNT


def test_both_images_take_the_bucket_of_the_source(tmp_path) -> None:
    source = as_imagefolder(tmp_path / "pairs")
    pictures(1, (2 * IMAGE_SIZE, IMAGE_SIZE))[0].save(tmp_path / "pairs" / "before1.png")
    buckets = [[IMAGE_SIZE, IMAGE_SIZE], [IMAGE_SIZE, 2 * IMAGE_SIZE]]
    pairs = opened(source, tmp_path, buckets=buckets)
    assert pairs.media["image"].buckets.reshape(-1, 2).tolist() == [[0, 0], [1, 1], *[[0, 0]] * 4]


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("imagefolder", {"source_image_column": "before"}, r"metadata.jsonl:1: needs a field 'before'; it has \['file"),
        ("imagefolder", {"source_image_column": "text", "image_column": "text"}, "but none exists"),
        (
            "parquet",
            {"source_image_column": "before"},
            r"needs a field 'before'; it has \['edit_prompt', 'edited_image",
        ),
        ("datasets", {"source_image_column": "before"}, r"needs a field 'before'; it has \['instruction', 'source_img"),
        ("datasets", {"image_column": None}, "source_image_column 'source_img' but no image_column; give image_column"),
        ("webdataset", {"source_image_column": "before.png"}, "no pair to train on .*6 samples without a source image"),
    ],
)
def test_mistakes_are_told_in_one_sentence(kind, changes, message, tmp_path) -> None:
    source = KINDS[kind](tmp_path / "pairs")
    for key, value in changes.items():
        setattr(source, key, value)
    with pytest.raises(UserError, match=message):
        opened(source, tmp_path)


def test_a_column_of_numbers_is_no_column_of_source_images(tmp_path) -> None:
    source = as_parquet(tmp_path)
    pq.write_table(pa.table({**columns(), "number": list(range(COUNT))}), tmp_path / "pairs.parquet")
    source.source_image_column = "number"
    with pytest.raises(UserError, match=r"the column 'number' is of type int64.*set source_image_column to one of"):
        opened(source, tmp_path)


@pytest.mark.parametrize("kind", ["openmoji", "coco", "interleaved", "text"])
def test_kinds_without_pairs_have_no_such_key(kind, tmp_path) -> None:
    source = SourceConfig(kind, str(tmp_path), source_image_column="before")
    with pytest.raises(UserError, match=f"'{kind}' has no key 'source_image_column'; imagefolder and webdataset and"):
        opened(source, tmp_path)


# --- Encoded. ---


def encoded(data: DataConfig, codec: Autoencoder) -> Sources:
    return with_encoded(open_documents(data, "train"), data, {"image": codec}, {"image": CodecConfig()})


@torch.no_grad()
def test_training_shows_the_picture_that_an_edit_gives_to_the_model(byte_tokenizer, tmp_path) -> None:
    """From files to latents, by a cache and by encoding while training, and by the pipeline."""
    pipeline = tiny_pipeline(trained_on_edits=True)
    codec = Autoencoder(pipeline.vae)
    source = as_imagefolder(tmp_path / "pairs")
    batches = {}
    for latents in ("cache", "online"):
        data = config_of(source, tmp_path, latents=latents)
        packer = packer_of(encoded(data, codec), byte_tokenizer, data)
        rows = packer.rows([0], 0, packer.initial_state()[None])[0]
        batches[latents] = OnlineEncoder({"image": codec}, {"image": 8})(rows)
    cached, online = (batch.latents("image") for batch in batches.values())
    assert torch.equal(cached.conditions, online.conditions)
    torch.testing.assert_close(cached.latents, online.latents)
    given = [media.content for media in pipeline._encode(pictures()[::2])]
    shown = cached.latents[cached.conditions]
    assert len(shown) == 2
    # A cache keeps latents in half precision.
    nearest = [min((latents - own).abs().max() for own in given) for latents in shown]
    assert max(nearest) < 2e-3
    assert all(cached.timesteps[cached.conditions] == 0)


def test_a_row_of_pairs_can_be_looked_at(tmp_path, random_vae) -> None:
    source = as_imagefolder(tmp_path / "pairs")
    config = RunConfig(data=config_of(source, tmp_path, image_size=64), codecs={"image": CodecConfig(str(random_vae))})
    inspection = Inspection(config)
    counts, batch, _ = inspection.pack(inspection.data, 8)
    assert inspection.num_captioned(counts) == counts["sources/pairs/documents"] > 0
    shown = thumbnails_of(batch.split(1)[0], inspection.sources, inspection.config.model)["image"]
    assert [picture is not None for picture in shown] == [True] * 4
