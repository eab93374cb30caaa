"""Protocols: the files in configs/eval, refusals, and the choice of prompts."""

import hashlib
import json
import random
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from transfusion_mot.config import DataConfig, SourceConfig
from transfusion_mot.data.mixture import Sources, open_documents
from transfusion_mot.errors import UserError
from transfusion_mot.evaluation.protocol.assignment import listed_prompts, open_assignment
from transfusion_mot.evaluation.protocol.config import read_protocol
from transfusion_mot.evaluation.protocol.prompts import (
    captioned_hash,
    choose_coco_prompts,
    dpg_prompts,
    geneval_prompts,
    prompts_hash,
    read_coco,
    read_geneval,
    read_karpathy,
    read_text_prompts,
    write_dpg_pictures,
    write_geneval_metadata,
)

CONFIGS = sorted((Path(__file__).parents[1] / "configs" / "eval").glob("*.yaml"))


def write_coco(folder: Path, count: int = 9) -> Path:
    """Images with three captions each, listed in no order, as COCO has them."""
    (folder / "val2014").mkdir(parents=True)
    entries, annotations = [], []
    for number in range(count):
        name = f"COCO_val2014_{number:012d}.jpg"
        Image.new("RGB", (20, 16), (20 * number, 0, 0)).save(folder / "val2014" / name)
        entries.append({"id": number, "file_name": name})
        annotations += [
            {"id": 10 * number + which, "image_id": number, "caption": f" picture {number}, caption {which} "}
            for which in range(3)
        ]
    random.Random(0).shuffle(entries)
    random.Random(1).shuffle(annotations)
    path = folder / "captions.json"
    path.write_text(json.dumps({"images": entries, "annotations": annotations}))
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_protocol_is_read_and_documented(path: Path) -> None:
    protocol = read_protocol(["--config", str(path)])
    assert protocol.name != "Held-out documents"
    assert "# command:" in path.read_text()


def test_coco_is_what_the_papers_describe() -> None:
    protocol = read_protocol(["--config", str(CONFIGS[0].with_name("coco.yaml"))])
    assert (protocol.num_images, protocol.image_size, protocol.references) == (30_000, 256, None)
    assert (protocol.prompts.kind, protocol.captions.kind) == ("coco", "karpathy")
    assert protocol.feature_choices == ["inception", "legacy", "dinov2", "clip"]
    assert (protocol.clips, protocol.num_inference_steps) == (["openai/clip-vit-large-patch14"], 250)


def test_options_are_keys_with_dashes() -> None:
    given = ["--num-images", "3", "--sweep.guidance-scale=[1,2.5]", "features=[efficientnet,dinov2]"]
    protocol = read_protocol(given)
    assert protocol.num_images == 3
    assert protocol.sweep.guidance_scale == [1.0, 2.5]
    assert protocol.feature_choices == ["efficientnet", "dinov2"]
    assert protocol.clips == []
    assert read_protocol(["clip=[a,b]"]).clips == ["a", "b"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-imags", "3"], "unknown key 'num_imags'.*nearest valid: num_images"),
        (["--num-images", "0"], "num_images is 0; it must be at least 1"),
        (["--num-images", "1"], "num_images is 1; a distance from real images needs 2"),
        (["prompts.kind=dpg", "captions.kind=none"], "prompts.kind 'dpg' needs prompts.path, a folder"),
        (
            ["prompts.kind=dpg", "prompts.path=a", "captions.kind=none", "--images-per-prompt", "2"],
            "images_per_prompt is 2; DPG-Bench reads 1 picture of a prompt, or 4 in a square",
        ),
        (["--features", "inceptoin"], "features has 'inceptoin'; known: auto, inception"),
        (["--prompts.kind", "coco"], "prompts.kind 'coco' needs prompts.path, a file"),
        (["--prompts.kind", "coco", "--prompts.path", "a"], "needs prompts.images, a folder"),
        (["--prompts.kind", "text", "--prompts.path", "a"], "belong to no images; set captions.kind to 'none'"),
        (["--captions.kind", "karpathy"], "needs captions.path, the file dataset_coco.json"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_protocol(arguments)


def test_coco_prompts_follow_from_ids_and_seed_alone(tmp_path: Path) -> None:
    images = read_coco(str(write_coco(tmp_path)), str(tmp_path / "val2014"))
    assert [image.image_id for image in images] == [str(number) for number in range(9)]
    assert images[4].captions == [f"picture 4, caption {which}" for which in range(3)]
    # As configs/eval/coco.yaml describes it, written out once more.
    drawn = {n: int(hashlib.sha256(f"7 {n}".encode()).hexdigest()[:16], 16) for n in range(9)}
    expected = sorted(drawn, key=drawn.__getitem__)[:5]
    which = [int(hashlib.sha256(f"7 {n} caption".encode()).hexdigest()[:16], 16) % 3 for n in expected]
    prompts = choose_coco_prompts(images, 5, seed=7)
    assert [prompt.image_id for prompt in prompts] == [str(number) for number in expected]
    assert [p.text for p in prompts] == [f"picture {n}, caption {w}" for n, w in zip(expected, which, strict=True)]
    # Several images of a prompt differ in their noise, and the first is the one that there would be alone.
    twice = choose_coco_prompts(images, 5, seed=7, images_per_prompt=2)
    assert [(prompt.text, prompt.image_seed) for prompt in twice[::2]] == [(p.text, p.image_seed) for p in prompts]
    assert [prompt.image for prompt in twice[1::2]] == [prompt.image for prompt in prompts]
    assert len({prompt.image_seed for prompt in twice}) == len({prompt.file_name for prompt in twice}) == 10
    # More prompts are the same ones and others behind them, and another order of the images changes nothing.
    assert choose_coco_prompts(images[::-1], 9, seed=7)[:5] == prompts
    assert prompts_hash(prompts) != prompts_hash(choose_coco_prompts(images, 5, seed=8))
    with pytest.raises(UserError, match="10 prompts of distinct images are requested, but there are only 9"):
        choose_coco_prompts(images, 10, seed=7)


@pytest.mark.parametrize("kind", ["coco", "text", "geneval", "dpg"])
def test_every_kind_of_prompts_has_several_images_of_each(tmp_path: Path, kind: str) -> None:
    paths = {"coco": write_coco(tmp_path), "dpg": tmp_path}
    for name, lines in (("text", "an owl\na sun\n"), ("geneval", '{"prompt": "an owl"}\n{"prompt": "a sun"}\n')):
        paths[name] = tmp_path / f"{name}.list"
        paths[name].write_text(lines)
    for name in ("owl", "sun"):
        (tmp_path / f"{name}.txt").write_text(name)
    words = [f"prompts.kind={kind}", f"prompts.path={paths[kind]}", f"prompts.images={tmp_path / 'val2014'}"]
    words += ["captions.kind=none", "--num-images", "2"]
    once, _, _ = listed_prompts(read_protocol(words))
    found, _, _ = listed_prompts(read_protocol([*words, "--images-per-prompt", "4"]))
    assert [prompt.text for prompt in found] == [prompt.text for prompt in once for _ in range(4)]
    assert len({prompt.image_seed for prompt in found}) == len({prompt.file_name for prompt in found}) == 8


def test_held_out_captions_have_several_images_of_each(tmp_path: Path) -> None:
    write_coco(tmp_path, 3)
    data = DataConfig(
        sources=[SourceConfig("imagefolder", path=str(tmp_path / "val2014"), use="held_out")],
        image_size=16,
        cache_dir=str(tmp_path / "cache"),
    )
    for path, text in zip(sorted((tmp_path / "val2014").glob("*.jpg")), ("an owl", "a sun", "a fox"), strict=True):
        path.with_suffix(".txt").write_text(text)
    sources = Sources(open_documents(data, "held_out"), {})
    found = open_assignment(read_protocol(["--images-per-prompt", "2"]), sources, data, tmp_path)
    assert [prompt.text for prompt in found.prompts] == ["an owl", "an owl", "a sun", "a sun", "a fox", "a fox"]
    assert len({prompt.image_seed for prompt in found.prompts}) == 6
    # Each real image is reconstructed, captioned and compared with once.
    assert [prompt.text for prompt in found.own] == ["an owl", "a sun", "a fox"]
    assert [item.captions for item in found.captioned] == [["an owl"], ["a sun"], ["a fox"]]
    assert found.references == [item.image for item in found.captioned]


def test_files_of_coco_that_are_wrong_are_named(tmp_path: Path) -> None:
    path = write_coco(tmp_path)
    (tmp_path / "val2014" / "COCO_val2014_000000000003.jpg").unlink()
    with pytest.raises(UserError, match=r"1 of 9 images do not exist, first .*000000000003\.jpg"):
        read_coco(str(path), str(tmp_path / "val2014"))
    content = json.loads(path.read_text())
    path.write_text(json.dumps({"images": content["images"]}))
    with pytest.raises(UserError, match="not a captions file of COCO"):
        read_coco(str(path), str(tmp_path / "val2014"))
    path.write_text(path.read_text()[:50])
    with pytest.raises(UserError, match="was it downloaded whole"):
        read_coco(str(path), str(tmp_path / "val2014"))
    with pytest.raises(UserError, match="cannot be read"):
        read_coco(str(tmp_path / "none.json"), str(tmp_path))


def write_karpathy(folder: Path, count: int = 9) -> Path:
    """Every third image is of the test split."""
    images = [
        {
            "filepath": "val2014",
            "filename": f"COCO_val2014_{number:012d}.jpg",
            "cocoid": number,
            "split": "train" if number % 3 else "test",
            "sentences": [{"raw": f"A picture, number {number}.\n"}, {"raw": "It is red."}],
        }
        for number in reversed(range(count))
    ]
    path = folder / "dataset_coco.json"
    path.write_text(json.dumps({"images": images, "dataset": "coco"}))
    return path


def test_karpathy_split(tmp_path: Path) -> None:
    write_coco(tmp_path)
    path = write_karpathy(tmp_path)
    images = read_karpathy(str(path), str(tmp_path))
    assert [image.image_id for image in images] == ["0", "3", "6"]
    assert images[1].captions == ["A picture, number 3.", "It is red."]
    assert captioned_hash(images) != captioned_hash(images[:2])
    with pytest.raises(UserError, match="no images in the split 'dev'"):
        read_karpathy(str(path), str(tmp_path), "dev")


def test_geneval_layout(tmp_path: Path) -> None:
    lines = [
        {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
        {"tag": "counting", "include": [{"class": "clock", "count": 2}], "prompt": "a photo of two clocks"},
    ]
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    read = read_geneval(str(path))
    prompts = geneval_prompts(read, 4, seed=0)
    assert [p.file_name for p in prompts][3:6] == [
        "00000/samples/00003.png",
        "00001/samples/00000.png",
        "00001/samples/00001.png",
    ]
    assert len({p.image_seed for p in prompts}) == 8
    write_geneval_metadata(read, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "00001" / "metadata.jsonl").read_text()) == lines[1]
    path.write_text('{"tag": "colors"}\n')
    with pytest.raises(UserError, match="line 1: not a JSON object with a 'prompt'"):
        read_geneval(str(path))


@pytest.mark.parametrize("each", [1, 4])
def test_dpg_bench_reads_squares_by_the_names_of_its_prompts(tmp_path: Path, each: int) -> None:
    for name, text in (("countbench12", "a long prompt\n"), ("COCOval2014000000000042", "another one")):
        (tmp_path / f"{name}.txt").write_text(text)
    prompts = dpg_prompts(str(tmp_path), None, each, seed=0)
    assert [prompt.text for prompt in prompts] == ["another one"] * each + ["a long prompt"] * each
    assert prompts[-1].file_name == f"countbench12/{each - 1}.png"
    for place, prompt in enumerate(prompts):
        (tmp_path / prompt.file_name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 6), (place, 0, 0)).save(tmp_path / prompt.file_name)
    write_dpg_pictures(prompts, tmp_path, tmp_path / "dpg")
    assert sorted(path.name for path in (tmp_path / "dpg").iterdir()) == [
        "COCOval2014000000000042.png",
        "countbench12.png",
    ]
    square = np.asarray(Image.open(tmp_path / "dpg" / "countbench12.png"))[..., 0]
    # As its program cuts them: from left to right, then down.
    expected = np.array([[4, 5], [6, 7]]) if each == 4 else np.array([[1]])
    assert (square == np.kron(expected, np.ones((6, 8)))).all()
    with pytest.raises(UserError, match=r"holds no \.txt files"):
        dpg_prompts(str(tmp_path / "dpg"), None, each, seed=0)


def test_prompts_as_a_file(tmp_path: Path, monkeypatch, capsys) -> None:
    write_coco(tmp_path)
    config = CONFIGS[0].with_name("coco.yaml")
    words = ["--config", config, "--prompts.path", tmp_path / "captions.json", "--prompts.images", tmp_path / "val2014"]
    words += ["--num-images", 5, "--output", tmp_path / "list.jsonl"]
    monkeypatch.setattr(sys, "argv", ["prompts.py", *map(str, words)])
    runpy.run_path(str(CONFIGS[0].parents[2] / "evaluate" / "prompts.py"), run_name="__main__")
    prompts = choose_coco_prompts(read_coco(str(tmp_path / "captions.json"), str(tmp_path / "val2014")), 5, seed=0)
    lines = [json.loads(line) for line in (tmp_path / "list.jsonl").read_text().splitlines()]
    assert [(line["text"], line["image_seed"]) for line in lines] == [(p.text, p.image_seed) for p in prompts]
    assert f"5 prompts of 5 distinct images, {prompts_hash(prompts)}" in capsys.readouterr().out
    monkeypatch.setattr(
        sys, "argv", ["prompts.py", "--config", str(CONFIGS[0].with_name("emoji.yaml")), *sys.argv[-2:]]
    )
    with pytest.raises(SystemExit):
        runpy.run_path(str(CONFIGS[0].parents[2] / "evaluate" / "prompts.py"), run_name="__main__")
    assert "prompts of kind 'held_out' belong to a run" in capsys.readouterr().err


def test_text_prompts(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("an owl\n\n  a sun \n")
    assert read_text_prompts(str(path)) == ["an owl", "a sun"]
    path.write_text("\n")
    with pytest.raises(UserError, match="holds no prompts"):
        read_text_prompts(str(path))
    # A mark that editors write in front, and characters that some line readers take for line ends.
    path.write_text("two\u2028owls\x85\r\na sun\n", encoding="utf-8-sig")
    assert read_text_prompts(str(path)) == ["two\u2028owls", "a sun"]
    path.write_text('{"prompt": "two\u2028owls"}\n', encoding="utf-8-sig")
    assert read_geneval(str(path)) == [{"prompt": "two\u2028owls"}]
    path.write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match="cannot be read as UTF-8 text"):
        read_text_prompts(str(path))
