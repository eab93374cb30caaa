"""Every kind of source trains for some steps, separately and together."""

import json
import math
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from source_files import SIZE, picture, picture_dataset, shard, write_coco, write_tar

import train
from transfusion_mot.errors import UserError
from transfusion_mot.pipeline import TransfusionPipeline
from transfusion_mot.training.metrics import read_metrics

pytestmark = pytest.mark.slow

TOWER = {"hidden_size": 16, "intermediate_size": 32}
NUM_IMAGES = 24


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """The same pictures in every format."""
    folder = tmp_path_factory.mktemp("files")
    write_coco(folder / "coco", NUM_IMAGES)
    for first in (0, 12):
        write_tar(folder / f"shard-{first}.tar", shard(range(first, first + 12)))
    pictures = folder / "pictures"
    pictures.mkdir()
    for number in range(NUM_IMAGES):
        # Upright and flat ones, for the buckets.
        (pictures / f"{number}.png").write_bytes(picture(number, size=(20, 40) if number % 3 else (40, 20)))
    lines = [{"file_name": f"{number}.png", "text": f"picture {number}"} for number in range(NUM_IMAGES)]
    (pictures / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    dataset = picture_dataset(range(NUM_IMAGES))
    dataset.to_parquet(folder / "pictures.parquet")
    dataset.save_to_disk(folder / "dataset")
    texts = [{"text": f"a paragraph about the number {number}, and no image"} for number in range(NUM_IMAGES)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in texts))
    (folder / "texts.txt").write_text("\n\n".join(line["text"] for line in texts))
    documents = [
        {
            "texts": [f"before {n}", None, "between", None, None],
            "images": [None, f"{n}.png", None, f"{n}.png", f"{n - 1}.png"],
        }
        for n in range(1, NUM_IMAGES)
    ]
    (folder / "documents.jsonl").write_text("".join(json.dumps(line) + "\n" for line in documents))
    return folder


def source_of(files: Path, kind: str) -> dict[str, Any]:
    return {
        "imagefolder": {"kind": "imagefolder", "path": str(files / "pictures")},
        "webdataset": {"kind": "webdataset", "path": str(files / "shard-*.tar")},
        "coco": {
            "kind": "coco",
            "path": str(files / "coco" / "train2017"),
            "annotations": str(files / "coco" / "annotations" / "captions_train2017.json"),
        },
        "parquet": {"kind": "parquet", "path": str(files / "pictures.parquet")},
        "datasets": {"kind": "datasets", "path": str(files / "dataset"), "image_column": "image"},
        "text jsonl": {"kind": "text", "path": str(files / "texts.jsonl")},
        "text txt": {"kind": "text", "path": str(files / "texts.txt")},
        "datasets of texts": {"kind": "datasets", "path": str(files / "dataset")},
        "interleaved": {
            "kind": "interleaved",
            "path": str(files / "documents.jsonl"),
            "images": str(files / "pictures"),
        },
        "openmoji": {"kind": "openmoji"},
    }[kind]


def run(tmp_path: Path, vae: Path, sources: list[dict[str, Any]], data: dict[str, Any], steps: int = 2) -> list[dict]:
    """Train => the lines of metrics.jsonl."""
    config = {
        "output_dir": str(tmp_path / "run"),
        "data": {
            "sources": sources,
            "image_size": SIZE,
            "held_out_fraction": 0.2,
            "slots": {"text": 64, "image": 3},
            "num_workers": 0,
            "cache_dir": str(tmp_path / "cache"),
        }
        | data,
        "tokenizer": {"vocab_size": 300},
        "codecs": {"image": {"path": str(vae)}},
        "model": {"towers": {"text": TOWER, "image": TOWER}, "num_layers": 1, "num_heads": 2, "head_dim": 8},
        "training": {
            "num_steps": steps,
            "num_rows": 2,
            "mixed_precision": "no",
            "log_every": 1,
            "num_validation_documents": 6,
            "sample_prompts": [],
            "tracker": None,
        },
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    train.main(["--config", str(tmp_path / "run.yaml")])
    return read_metrics(tmp_path / "run" / "metrics.jsonl")


KINDS = ["imagefolder", "webdataset", "coco", "parquet", "datasets", "interleaved", "text jsonl", "text txt"]


@pytest.mark.parametrize("kind", [*KINDS, "datasets of texts"])
def test_source_trains(files: Path, tmp_path: Path, random_vae: Path, capsys, kind: str) -> None:
    source = source_of(files, kind)
    beside = [source_of(files, "imagefolder")] if "text" in kind else []
    if kind == "text txt":  # no image is held out, and texts are measured all the same
        beside[0]["use"] = "train"
    lines = run(tmp_path, random_vae, [*beside, source], {})
    last = next(line for line in lines if line["step"] == 2 and "loss" in line)
    assert math.isfinite(last["loss"])
    name = Path(source["path"]).name
    seen = {what: last[f"sources/{name}/{what}_seen"] for what in ("documents", "tokens", "items")}
    assert seen["documents"] > 0
    assert seen["tokens"] > 0
    assert (seen["items"] > 0) == ("text" not in kind)
    assert 0 < last[f"sources/{name}/epochs"] < 3
    validation = next(line for line in lines if "validation/text_loss" in line)
    assert ("validation/caption_loss" in validation) == (kind not in ("interleaved", "text txt"))
    assert ("validation/image_loss" in validation) == (kind != "text txt")
    assert math.isfinite(validation["validation/loss"])
    # The report at the end.
    told = capsys.readouterr().out
    assert f" {seen['tokens']} " in told
    assert ("media" in told.split("held out: ")[1].split("\n")[0]) == (kind != "text txt")


@pytest.mark.parametrize("latents", ["cache", "online"])
def test_all_sources_train_together(
    files: Path, tmp_path: Path, random_vae: Path, draw_emoji: Callable[[int, Path], None], latents: str
) -> None:
    """In buckets, mirrored, and with workers."""
    kinds = [*KINDS, "openmoji"]
    draw_emoji(SIZE, tmp_path / "cache")
    data = {
        "latents": latents,
        "buckets": [[16, 16], [24, 8], [8, 24]],
        "image_fit": "pad",
        "random_flip": True,
        "num_workers": 2,
        "slots": {"text": 128, "image": 3},
    }
    lines = run(tmp_path, random_vae, [source_of(files, kind) for kind in kinds], data, steps=30)
    last = next(line for line in lines if line["step"] == 30 and "loss" in line)
    seen = {name: value for name, value in last.items() if name.endswith("/documents_seen")}
    assert len(seen) == len(kinds)
    assert all(count > 0 for count in seen.values()), seen
    assert last["image_items_seen"] == sum(value for name, value in last.items() if name.endswith("/items_seen"))
    assert last["text_slots_seen"] == sum(value for name, value in last.items() if name.endswith("/tokens_seen"))
    assert all(math.isfinite(line["loss"]) for line in lines if "loss" in line)
    sizes = TransfusionPipeline.from_pretrained(tmp_path / "run" / "snapshots" / "step-0000030").sizes
    assert ([list(size) for size in sizes.trained], sizes.fit) == (data["buckets"], "pad")


def test_unreadable_image_lets_a_run_go_on_without_a_cache(files: Path, tmp_path: Path, random_vae: Path) -> None:
    shutil.copytree(files / "pictures", tmp_path / "pictures")
    for number in range(4):
        (tmp_path / "pictures" / f"{number}.png").write_bytes(b"damaged")
    sources = [{"kind": "imagefolder", "path": str(tmp_path / "pictures")}]
    run(tmp_path, random_vae, sources, {"held_out_fraction": 0.0}, steps=1)
    lines = run(tmp_path, random_vae, sources, {"held_out_fraction": 0.0, "latents": "online"}, steps=3)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]


def test_bucket_that_does_not_divide_into_patches_is_refused(files: Path, tmp_path: Path, random_vae: Path) -> None:
    with pytest.raises(UserError, match="is 20; it must be a multiple of 8"):
        run(tmp_path, random_vae, [source_of(files, "imagefolder")], {"buckets": [[16, 20]]})


def test_benchmark_says_why_nothing_is_held_out(files: Path, tmp_path: Path, random_vae: Path, monkeypatch) -> None:
    run(tmp_path, random_vae, [source_of(files, "imagefolder") | {"use": "train"}], {})
    script = Path(__file__).parents[1] / "evaluate" / "benchmark.py"
    given = ["--checkpoint", str(tmp_path / "run"), "--features", "efficientnet", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [str(script), *given])
    namespace = runpy.run_path(str(script))
    with pytest.raises(UserError, match=r"^0 captioned images .*held_out_fraction \(.*'use: split'"):
        namespace["main"]()
