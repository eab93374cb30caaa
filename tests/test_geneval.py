"""GenEval's rules against outcomes of the published program, and its networks against naive versions of each step."""

import json
import runpy
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_clip import save_tiny_clip
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

from transfusion_mot.errors import UserError
from transfusion_mot.evaluation.clip_score import clip_embeddings, load_clip, text_embeddings
from transfusion_mot.evaluation.geneval import (
    CLASSES,
    COLOURS,
    ColourNames,
    Detector,
    Thing,
    geneval_metrics,
    is_right,
    load_detector,
    relations,
    things_of,
)
from transfusion_mot.evaluation.protocol.prompts import read_painted

CPU = torch.device("cpu")
LINES = [
    json.loads(line) for line in (Path(__file__).parent / "data" / "geneval_judgements.jsonl").read_text().splitlines()
]


def thing(box):
    return Thing(tuple(box), 0.9, np.ones((4, 4), dtype=bool))


def test_judgements_are_those_of_the_published_program():
    judged = [case for case in LINES if "line" in case]
    assert {case["right"] for case in judged} == {True, False}
    for case in judged:
        colours = {}
        things = defaultdict(list)
        for name, found in case["things"].items():
            for entry in found:
                things[name].append(thing(entry["box"]))
                colours[id(things[name][-1])] = entry["colour"]
        judged_right = is_right(case["line"], things, lambda some, _, known=colours: [known[id(one)] for one in some])
        assert judged_right == case["right"], case


def test_places_are_those_of_the_published_program():
    pairs = [case for case in LINES if "boxes" in case]
    assert {len(case["relations"]) for case in pairs} == {0, 1, 2}
    for case in pairs:
        assert sorted(relations(*case["boxes"])) == case["relations"], case


def test_things_by_loops():
    """Every query and class: the class's probability times the mean of the mask's where that is above a half."""
    generator = torch.Generator().manual_seed(0)
    class_logits = 3 * torch.randn(5, 81, generator=generator)
    mask_logits = torch.randn(5, 6, 7, generator=generator) - 1
    mask_logits[4] = -1
    expected = []
    for query in range(5):
        probabilities = class_logits[query].softmax(0)
        mask = mask_logits[query].sigmoid()
        inside = mask > 0.5
        if inside.any():
            rows, columns = inside.nonzero().T
            box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            score = mask[inside].mean()
            expected += [(CLASSES[n], (probabilities[n] * score).item(), tuple(map(int, box))) for n in range(80)]
    expected = sorted((row for row in expected if row[1] > 0.02), key=lambda row: -row[1])
    found = things_of(class_logits, mask_logits, 0.02)
    flat = sorted(((name, one.score, one.box) for name, some in found.items() for one in some), key=lambda row: -row[1])
    assert len(flat) > 10
    assert [(name, box) for name, _, box in flat] == [(name, box) for name, _, box in expected]
    assert [row[1] for row in flat] == pytest.approx([row[1] for row in expected], rel=1e-4)
    # At most sixteen of a class, the surest first.
    same = things_of(torch.full((30, 81), -5.0).index_fill(1, torch.tensor(3), 5.0), torch.ones(30, 4, 4), 0.3)
    assert {name: len(some) for name, some in same.items()} == {"motorcycle": 16}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return load_clip(str(save_tiny_clip(tmp_path_factory.mktemp("clip"))), CPU)


def test_colours_are_the_nearest_of_the_mean_texts(clip):
    """CLIP of only the part, on grey, against the three texts of each colour."""
    names = ColourNames(clip)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))
    mask = np.zeros((60, 80), dtype=bool)
    mask[10:40, 20:70] = np.random.default_rng(1).random((30, 50)) < 0.5
    of_colours = {}
    for colour in COLOURS:
        texts = [f"a photo of a {colour} cat", f"a photo of a {colour}-colored cat", f"a photo of a {colour} object"]
        of_colours[colour] = text_embeddings(texts, clip).mean(0)
    grey, white, black = (np.where(mask[..., None], np.array(image), level).astype(np.uint8) for level in (153, 255, 0))
    part = slice(10, 40), slice(20, 70)
    variants = [grey[part], white[part], black[part], grey, np.array(image)[part]]
    of_variants = clip_embeddings([Image.fromarray(v) for v in variants], ["any"] * 5, clip).images
    cosines = {name: torch.cosine_similarity(of_variants[0], text, dim=0).item() for name, text in of_colours.items()}
    things = [Thing((20, 10, 70, 40), 0.9, mask)] * 2
    assert names.of(image)(things, "cat") == [max(cosines, key=cosines.__getitem__)] * 2
    # Of pictures that differ in their ground or their part, the one that CLIP sees is the nearest to itself.
    names.of_class["variants"] = of_variants
    assert names.of(image)(things, "variants") == [COLOURS[0]] * 2


@pytest.fixture(scope="module")
def detector_folder(tmp_path_factory):
    """A Mask2Former of toy size with random weights."""
    torch.manual_seed(0)
    backbone = SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    sizes = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 16}
    config = Mask2FormerConfig(
        backbone_config=backbone,
        **sizes,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        num_queries=5,
        num_attention_heads=2,
        num_labels=80,
    )
    folder = tmp_path_factory.mktemp("detector")
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    return folder


def test_a_folder_of_pictures_is_scored(detector_folder, clip, tmp_path, monkeypatch):
    """Tasks have equal weight for any number of prompts; the detector gets a picture of its own size."""
    detector = load_detector(str(detector_folder), CPU)
    small = Detector(detector.name, detector.weights, detector.model, CPU, input_sizes=(64, 96))
    tags = ["counting", "single_object", "single_object", "single_object"]
    for number, tag in enumerate(tags):
        folder = tmp_path / f"{number:05d}"
        (folder / "samples").mkdir(parents=True)
        line = {"tag": tag, "include": [{"class": "cat", "count": 1}], "prompt": f"a photo of a cat {number}"}
        (folder / "metadata.jsonl").write_text(json.dumps(line))
        for sample in range(2):
            Image.new("RGB", (50, 40), (number, sample, 9)).save(folder / "samples" / f"{sample:05d}.png")
    seen, really = [], Detector.things

    def things(self, image, threshold):
        number, sample, _ = image.getpixel((0, 0))
        found = really(self, image, 0.0)
        assert all(one.mask.shape == (40, 50) for some in found.values() for one in some)
        seen.append((number, sample, threshold))
        # The first picture of every prompt has a cat, and both of the last one.
        return {"cat": [thing((0, 0, 4, 4))]} if sample == 0 or number == 3 else {}

    monkeypatch.setattr(Detector, "things", things)
    metrics = {metric.name: metric for metric in geneval_metrics(read_painted(tmp_path), small, clip)}
    assert [threshold for number, sample, threshold in seen if sample == 0] == [0.9, 0.3, 0.3, 0.3]
    assert metrics["GenEval, counting"].value == 0.5
    assert metrics["GenEval, single_object"].value == pytest.approx(4 / 6)
    assert metrics["GenEval"].value == pytest.approx((0.5 + 4 / 6) / 2)
    assert metrics["GenEval"].interval is None
    low, high = metrics["GenEval, single_object"].interval
    assert 0.5 <= low < 4 / 6 < high <= 1
    assert metrics["GenEval, single_object"].protocol["of prompts"] == 3


def test_a_model_that_is_always_wrong_has_an_interval(detector_folder, clip, tmp_path, monkeypatch):
    monkeypatch.setattr(Detector, "things", lambda self, image, threshold: {})
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    lines = [
        {"tag": tag, "include": [{"class": "cat", "count": 1}], "prompt": f"{tag} {number}"}
        for tag in ("colors", "position")
        for number in range(10)
    ]
    detector = load_detector(str(detector_folder), CPU)
    whole, *tasks = geneval_metrics([(line, tmp_path / "a.png") for line in lines], detector, clip)
    # Wilson's of 0 of 10, and half of two of them that are independent.
    assert [task.interval for task in tasks] == [(0.0, pytest.approx(0.2775, abs=1e-4))] * 2
    assert (whole.value, whole.interval) == (0.0, (0.0, pytest.approx(0.2775 / 2 / 2**0.5, abs=1e-4)))


def test_the_detectors_input_is_that_of_mmdetection(detector_folder):
    """The shorter side as wanted, ImageNet's mean and deviation, filled up with zeros on the right and below."""
    detector = load_detector(str(detector_folder), CPU)
    assert detector.input_sizes == (800, 1333)
    inputs = []
    detector.model.register_forward_pre_hook(
        lambda _, a, kwargs: inputs.append(kwargs["pixel_values"]), with_kwargs=True
    )
    for size in ((50, 40), (200, 40)):
        Detector(detector.name, "", detector.model, CPU, (64, 96)).things(Image.new("RGB", size, (10, 200, 30)), 0.3)
    wide, wider = inputs
    assert (wide.shape, wider.shape) == ((1, 3, 64, 96), (1, 3, 32, 96))
    colour = torch.tensor([(10 - 123.675) / 58.395, (200 - 116.28) / 57.12, (30 - 103.53) / 57.375])
    torch.testing.assert_close(wide[0, :, :, :80], colour[:, None, None].expand(3, 64, 80))
    assert not wide[..., 80:].any()
    assert not wider[:, :, 19:].any()
    assert wider[:, :, :19].all()


def test_mistakes_of_the_user(detector_folder, clip, tmp_path):
    with pytest.raises(UserError, match="--detector"):
        load_detector("./no/detector", CPU)
    model = Mask2FormerForUniversalSegmentation.from_pretrained(detector_folder)
    model.config.num_labels = 3
    Mask2FormerForUniversalSegmentation(model.config).save_pretrained(tmp_path / "three")
    with pytest.raises(UserError, match="knows 3 classes"):
        load_detector(str(tmp_path / "three"), CPU)
    line = {"tag": "counting", "include": [{"class": "waffle", "count": 3}], "prompt": "three waffles"}
    with pytest.raises(UserError, match=r"asks for 'waffle'.*evaluate/composition\.py"):
        geneval_metrics([(line, Path("a.png"))], load_detector(str(detector_folder), CPU), clip)


@pytest.mark.slow
def test_the_command(detector_folder, clip, tmp_path, monkeypatch):
    """Random networks find no bench in a plain picture."""
    (tmp_path / "00000" / "samples").mkdir(parents=True)
    line = {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}
    (tmp_path / "00000" / "metadata.jsonl").write_text(json.dumps(line))
    for number in range(2):
        Image.new("RGB", (16, 16)).save(tmp_path / "00000" / "samples" / f"{number:05d}.png")
    script = Path(__file__).parents[1] / "evaluate" / "geneval.py"
    words = [tmp_path, "--detector", detector_folder, "--clip", clip.name, "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [str(script), *map(str, words), "--output", str(tmp_path / "out.json")])
    runpy.run_path(str(script), run_name="__main__")
    whole, task = json.loads((tmp_path / "out.json").read_text())["metrics"]
    assert (whole["name"], whole["value"], whole["protocol"]["images"]) == ("GenEval", 0.0, 2)
    assert (task["name"], task["protocol"]["detector"]) == ("GenEval, single_object", str(detector_folder))
