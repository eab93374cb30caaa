"""sample.py as it is called from a shell."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import load_dataset
from PIL import Image
from test_pipeline import IMAGE_SIZE, tiny_pipeline

from transfusion_mot.errors import exit_on_user_error
from transfusion_mot.pipeline import TransfusionPipeline

SCRIPT = Path(__file__).parent.parent / "sample.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("sample", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["sample"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder as train.py leaves it, with an older snapshot that cannot be used."""
    folder = tmp_path_factory.mktemp("run")
    tiny_pipeline().save_pretrained(folder / "snapshots" / "step-0000020")
    (folder / "snapshots" / "step-0000010").mkdir()
    return folder


@pytest.fixture
def sample(script, run, monkeypatch):
    """Call the script with these arguments on the run."""

    def call(*arguments: object, checkpoint: object = run) -> None:
        words = ["--checkpoint", checkpoint, "--device", "cpu", *arguments]
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, words)])
        with exit_on_user_error():
            script.main()

    return call


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]


def pixels(folder: Path, line: dict) -> np.ndarray:
    return np.asarray(Image.open(folder / line["file_name"])).astype(int)


def test_pictures_and_what_is_written_about_them(sample, run, tmp_path, capsys):
    output = tmp_path / "out"
    sample("a sun!", "蛸", "--num-images", 2, "--seed", 7, "--guidance-scale", 1.5, "--output", output)
    assert [line["file_name"] for line in lines(output)] == [
        "0000-a-sun.png",
        "0001-a-sun.png",
        "0002-蛸.png",
        "0003-蛸.png",
    ]
    assert [line["text"] for line in lines(output)] == ["a sun!", "a sun!", "蛸", "蛸"]
    assert len({line["image_seed"] for line in lines(output)}) == 4
    for line in lines(output):
        with Image.open(output / line["file_name"]) as image:
            assert image.size == (IMAGE_SIZE, IMAGE_SIZE)
            said = {"text": image.text.pop("prompt"), **image.text}
        assert said == {key: str(value) for key, value in line.items() if key != "file_name"}
        assert said["seed"] == "7"
        assert said["guidance_scale"] == "1.5"
        assert said["num_inference_steps"] == "4"
        assert said["checkpoint"] == str(run / "snapshots" / "step-0000020")
    assert Image.open(output / "grid.png").width > 4 * IMAGE_SIZE
    assert f"4 images and metadata.jsonl in {output}" in capsys.readouterr().out

    last = lines(output)[-1]
    pipeline = TransfusionPipeline.from_pretrained(run / "snapshots" / "step-0000020")
    generator = torch.Generator().manual_seed(last["image_seed"])
    again = pipeline(last["text"], guidance_scale=1.5, generator=generator).images[0]
    assert np.abs(np.asarray(again).astype(int) - pixels(output, last)).max() <= 1


def test_the_folder_is_an_image_folder(sample, tmp_path):
    sample("sun", "an octopus", "--output", tmp_path / "out")
    dataset = load_dataset("imagefolder", data_dir=str(tmp_path / "out"), split="train", cache_dir=str(tmp_path))
    assert dataset["text"] == ["sun", "an octopus"]
    assert all(image.size == (IMAGE_SIZE, IMAGE_SIZE) for image in dataset["image"])


def test_a_picture_is_the_same_in_whatever_company(sample, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("an octopus\n\n  sun \nsun\n")
    sample("--prompts-file", prompts, "--num-images", 2, "--batch-size", 4, "--output", tmp_path / "many")
    sample("sun", "--num-images", 3, "--batch-size", 1, "--output", tmp_path / "one")
    many, one = lines(tmp_path / "many"), lines(tmp_path / "one")
    assert [line["text"] for line in many] == ["an octopus"] * 2 + ["sun"] * 4
    assert [line["image_seed"] for line in many[2:5]] == [line["image_seed"] for line in one]
    assert len({line["image_seed"] for line in many}) == 6
    for first, second in zip(many[2:5], one, strict=True):
        assert np.abs(pixels(tmp_path / "many", first) - pixels(tmp_path / "one", second)).max() <= 1
    sample("sun", "--seed", 1, "--output", tmp_path / "other")
    assert np.abs(pixels(tmp_path / "other", lines(tmp_path / "other")[0]) - pixels(tmp_path / "one", one[0])).max() > 1


def test_another_scheduler_and_number_of_steps(sample, tmp_path):
    scheduler = ["--scheduler", "DPMSolverMultistepScheduler", "--num-inference-steps", 6]
    sample("sun", *scheduler, "--output", tmp_path / "out")
    assert lines(tmp_path / "out")[0]["scheduler"] == "DPMSolverMultistepScheduler"
    assert lines(tmp_path / "out")[0]["num_inference_steps"] == 6


def test_long_prompts_have_short_file_names(script):
    (picture,) = script.plan_pictures(["octopus " * 100], num_images=1, seed=0)
    assert picture.file_name.startswith("0000-octopus-octopus")
    assert len(picture.file_name) < 64
    assert script.plan_pictures(["?!"], num_images=1, seed=0)[0].file_name == "0000-image.png"


def test_captions_are_those_of_the_pipeline(sample, run, tmp_path, capsys):
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{index}.png" for index in range(3)]
    for path in paths:
        Image.fromarray(rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(path)
    settings = {"max_new_tokens": 6, "temperature": 0.0}
    sample("--caption", *paths, "--max-new-tokens", 6, "--batch-size", 2, "--output", tmp_path / "out")
    pipeline = TransfusionPipeline.from_pretrained(run / "snapshots" / "step-0000020")
    expected = pipeline.caption([Image.open(path) for path in paths], **settings)
    written = [json.loads(line) for line in (tmp_path / "out" / "captions.jsonl").read_text("utf-8").splitlines()]
    assert written == [{"file_name": str(p), "text": text} for p, text in zip(paths, expected, strict=True)]
    printed = capsys.readouterr().out
    assert f"{paths[0]}: {expected[0]}" in printed

    def drawn(seed: int) -> str:
        sample("--caption", paths[0], "--temperature", 1, "--top-p", 0.9, "--seed", seed)
        return capsys.readouterr().out

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to do"),
        (["--prompts-file", "empty.txt"], "nothing to do"),
        (["--prompts-file", "missing.txt"], "prompts file 'missing.txt' cannot be read"),
        (["sun", " "], "prompt 2 is empty"),
        (["octopus " * 9], "tokens; the model was trained on at most 8"),
        (["sun", "--guidance-scale", "nan"], "guidance_scale is nan"),
        (["sun", "--guidance-scale", "strong"], "invalid float value: 'strong'"),
        (["sun", "--num-inference-steps", 0], "num_inference_steps is 0"),
        (["sun", "--num-images", 0], "--num-images is 0"),
        (["sun", "--batch-size", 0], "--batch-size is 0"),
        (["sun", "--scheduler", "DDPMScheduler"], "fit: FlowMatchEulerDiscreteScheduler"),
        (["sun", "--scheduler", "Euler"], "fit: FlowMatchEulerDiscreteScheduler"),
        (["sun", "--device", "gpu"], "device 'gpu' cannot be used"),
        (["sun", "--output", "full"], "not an empty folder"),
        (["sun", "--output", "empty.txt"], "not an empty folder"),
        (["sun", "--output", "empty.txt/out"], "cannot be made"),
        (["sun", "--colour", "red"], "unrecognized arguments: --colour red; --help lists the options"),
        (["sun", "--caption", "full/image.png"], "paint and caption in two commands"),
        (["--caption", "missing.png"], "image 'missing.png' does not exist"),
        (["--caption", "empty.txt"], "image 'empty.txt' is not in a format"),
        (["--caption", "full/image.png", "--temperature", "nan"], "temperature is nan"),
        (["--caption", "full/image.png", "--top-p", 2], "top_p is 2"),
        (["--caption", "full/image.png", "--max-new-tokens", 0], "max_new_tokens is 0"),
    ],
)
def test_mistakes_end_with_one_sentence(sample, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("\n")
    Path("full").mkdir()
    Image.new("RGB", (8, 8)).save("full/image.png")
    with pytest.raises(SystemExit) as ended:
        sample(*arguments)
    assert ended.value.code == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert message in said[0]
    assert not Path("samples").exists()


def test_a_missing_checkpoint_ends_the_command(tmp_path):
    command = [sys.executable, str(SCRIPT), "--checkpoint", str(tmp_path / "nothing"), "sun"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("error: ")
    assert "nothing" in ended.stderr


def test_a_snapshot_is_a_checkpoint_too(sample, run, tmp_path):
    sample("sun", "--output", tmp_path / "out", checkpoint=run / "snapshots" / "step-0000020")
    assert len(lines(tmp_path / "out")) == 1
