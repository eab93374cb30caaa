"""sample.py, called from a shell."""

import importlib.util
import io
import itertools
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from datasets import load_dataset
from PIL import Image
from process_group import clean_process, run_processes, run_script
from test_pipeline import IMAGE_SIZE, tiny_pipeline

from transfusion_mot.cli import sampling
from transfusion_mot.cli.outputs import ResultFolder
from transfusion_mot.data.images import to_pixels
from transfusion_mot.errors import exit_on_user_error
from transfusion_mot.pipeline import TransfusionPipeline
from transfusion_mot.schedulers import STOCHASTIC_SOLVER, make_sampling_scheduler

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
        words = [*(["--checkpoint", checkpoint] if checkpoint else []), "--device", "cpu", *arguments]
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, words)])
        with exit_on_user_error():
            script.main()

    return call


def lines(folder: Path, file: str = "metadata.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / file).read_text(encoding="utf-8").splitlines()]


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
        assert said["dtype"] == "float32"
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


def test_the_scheduler_of_a_snapshot_is_written_down_by_its_whole_name(sample, tmp_path):
    pipeline = tiny_pipeline()
    pipeline.scheduler = make_sampling_scheduler(pipeline.scheduler, STOCHASTIC_SOLVER)
    pipeline.save_pretrained(tmp_path / "snapshot")
    sample("sun", "--output", tmp_path / "out", checkpoint=tmp_path / "snapshot")
    assert lines(tmp_path / "out")[0]["scheduler"] == STOCHASTIC_SOLVER


def test_the_transformer_computes_in_the_format_asked_for(sample, tmp_path):
    sample("sun", "--dtype", "bf16", "--output", tmp_path / "bf16")
    sample("sun", "--dtype", "fp32", "--output", tmp_path / "fp32")
    half, whole = lines(tmp_path / "bf16")[0], lines(tmp_path / "fp32")[0]
    assert (half["dtype"], whole["dtype"]) == ("bfloat16", "float32")
    difference = np.abs(pixels(tmp_path / "bf16", half) - pixels(tmp_path / "fp32", whole))
    assert difference.max() > 0
    assert difference.mean() < 8


def test_long_prompts_have_short_file_names(script):
    (item,) = sampling.plan(["octopus " * 100], num_images=1, seed=0)
    assert item.name.startswith("0000-octopus-octopus")
    assert len(item.name) < 64
    assert sampling.plan(["?!"], num_images=1, seed=0)[0].name == "0000-image"


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


def test_prompts_come_from_standard_input(sample, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"an octopus\n\nsun\n")))
    sample("moon", "--prompts-file", "-", "--output", tmp_path / "out")
    assert [line["text"] for line in lines(tmp_path / "out")] == ["moon", "an octopus", "sun"]


def test_texts_are_those_of_the_pipeline(sample, run, tmp_path, capsys):
    settings = {"max_new_tokens": 5, "temperature": 0.0}
    sample("--task", "text", "sun", "a", "--max-new-tokens", 5, "--output", tmp_path / "out")
    pipeline = TransfusionPipeline.from_pretrained(run / "snapshots" / "step-0000020")
    expected = pipeline.complete(["sun", "a"], **settings)
    assert lines(tmp_path / "out", "texts.jsonl") == [
        {"prompt": prompt, "text": text} for prompt, text in zip(["sun", "a"], expected, strict=True)
    ]
    assert f"sun{expected[0]}" in capsys.readouterr().out
    sample("--task", "text", "sun", "--max-new-tokens", 5)
    assert capsys.readouterr().out == f"sun{expected[0]}\n"


def test_the_model_decides_what_comes(sample, run, tmp_path, capsys):
    sample("--task", "auto", "sun", "moon", "--max-images", 2, "--max-new-tokens", 12, "--output", tmp_path / "out")
    pipeline = TransfusionPipeline.from_pretrained(run / "snapshots" / "step-0000020")
    told = lines(tmp_path / "out", "documents.jsonl")
    assert [line["prompt"] for line in told] == ["sun", "moon"]
    for line in told:
        expected = pipeline.interleave(
            [line["prompt"]],
            max_images=2,
            max_new_tokens=12,
            generator=torch.Generator().manual_seed(line["seed"]),
        )
        assert len(line["segments"]) == len(expected)
        for segment, part in zip(line["segments"], expected, strict=True):
            if isinstance(part, str):
                assert segment == {"text": part}
            else:
                assert np.abs(np.asarray(part).astype(int) - pixels(tmp_path / "out", segment)).max() <= 1
    printed = capsys.readouterr().out
    assert printed.startswith("sun")
    assert "documents.jsonl" in printed


GUIDANCE = {
    "scale": ["--guidance-scale", 4],
    "interval": ["--guidance-interval", 0.2, 0.7],
    "rescale": ["--guidance-rescale", 0.7],
    "renorm": ["--guidance-renorm"],
    "negative": ["--negative-prompt", "octopus"],
    "scheduler": ["--scheduler", "DPMSolverMultistepScheduler:sde"],
}


def test_every_knob_of_guidance_does_something_and_is_written_down(sample, tmp_path):
    sample("sun", "--output", tmp_path / "plain")
    plain = lines(tmp_path / "plain")[0]
    for name, options in GUIDANCE.items():
        sample("sun", *options, "--output", tmp_path / name)
        line = lines(tmp_path / name)[0]
        assert np.abs(pixels(tmp_path / name, line) - pixels(tmp_path / "plain", plain)).max() > 0, name
        assert {key for key in line if line[key] != plain.get(key)} == {
            {"negative": "negative_prompt", "scheduler": "scheduler"}.get(name, f"guidance_{name}")
        }


@pytest.fixture
def photo(tmp_path) -> Path:
    gradient = np.linspace(0, 255, 3 * IMAGE_SIZE**2).reshape(IMAGE_SIZE, IMAGE_SIZE, 3)
    Image.fromarray(gradient.astype(np.uint8)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_variations_are_the_nearer_the_weaker_and_a_mask_keeps_what_is_black(sample, run, tmp_path, photo):
    mask = np.zeros((IMAGE_SIZE, IMAGE_SIZE), dtype=np.uint8)
    mask[:, IMAGE_SIZE // 2 :] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    pipeline = TransfusionPipeline.from_pretrained(run / "snapshots" / "step-0000020")
    for name, options in {
        "weak": ["--strength", 0.02, "--num-inference-steps", 100],
        "strong": ["--strength", 1.0],
        "masked": ["--strength", 1.0, "--mask", tmp_path / "mask.png"],
    }.items():
        sample("sun", "--image", photo, "--num-images", 2, *options, "--output", tmp_path / name)
    painted = {name: pixels(tmp_path / name, lines(tmp_path / name)[0]) for name in ("weak", "strong", "masked")}
    source = np.array(Image.open(photo))
    # What the untrained autoencoder makes of it.
    (seen,) = pipeline.decode_latents(pipeline.codec.encode(to_pixels(source[None]))[0])
    distance = {name: np.abs(image - np.asarray(seen).astype(int)).mean() for name, image in painted.items()}
    assert distance["weak"] < distance["strong"] / 2
    assert np.abs(painted["masked"] - source.astype(int))[:, : IMAGE_SIZE // 2].max() <= 1
    settings = {"image": Image.open(photo), "strength": 1.0, "mask_image": Image.fromarray(mask)}
    generator = torch.Generator().manual_seed(lines(tmp_path / "masked")[0]["image_seed"])
    expected = np.asarray(pipeline("sun", generator=generator, **settings).images[0]).astype(int)
    assert np.abs(painted["masked"] - expected).max() <= 1
    assert np.abs(painted["masked"] - painted["strong"]).mean() > 1
    assert lines(tmp_path / "masked")[1]["mask"] == str(tmp_path / "mask.png")


def test_the_denoising_is_shown_from_the_first_estimate_to_the_picture(sample, tmp_path):
    sample("sun", "moon", "--strip", "--gif", "--num-inference-steps", 30, "--seed", 1, "--output", tmp_path / "out")
    for line in lines(tmp_path / "out"):
        stem = tmp_path / "out" / "denoising" / Path(line["file_name"]).stem
        strip = Image.open(stem.with_suffix(".png"))
        assert strip.width > 8 * IMAGE_SIZE
        with Image.open(stem.with_suffix(".gif")) as gif:
            frames = [
                np.asarray(gif.convert("RGB")).astype(int)
                for gif.n_read in range(gif.n_frames)
                if not gif.seek(gif.n_read)
            ]
        assert len(frames) == 24
        # A GIF has 256 colours, and the picture has fewer pixels.
        assert np.abs(frames[-1] - pixels(tmp_path / "out", line)).max() <= 1
        assert np.abs(frames[0] - frames[-1]).mean() > 1
    dataset = load_dataset("imagefolder", data_dir=str(tmp_path / "out"), split="train", cache_dir=str(tmp_path))
    assert dataset["text"] == ["sun", "moon"]


# --- Large jobs: several processes, a kill in between. ---

WORDS = [f"{adjective} {noun}" for adjective in ("red", "old", "big") for noun in ("sun", "moon", "cat", "car")]


def call(arguments: list[object], kill_after: int | None = None) -> None:
    """The script in a separate process; it can be killed while it records batch `kill_after`."""
    import sample

    original, batches = ResultFolder.add, itertools.count(1)

    def add(folder: ResultFolder, made: dict) -> None:
        if next(batches) == kill_after:
            # The last line is written in part only.
            original(folder, {min(made): {"text": "lost"}})
            (part,) = folder.path.glob(".commands/*.parts/*.jsonl")
            os.truncate(part, part.stat().st_size - 5)
            os.kill(os.getpid(), signal.SIGKILL)
        original(folder, made)

    ResultFolder.add = add
    sys.argv = ["sample.py", *map(str, arguments)]
    sample.main()


def test_a_command_that_runs_twice_at_a_time_names_each_result_once(tmp_path):
    one, two = (ResultFolder(str(tmp_path / "out"), {"seed": 0}, "metadata.jsonl", 2, PartialState()) for _ in range(2))
    for index in one.missing():
        one.add({index: {"text": str(index)}})
        two.add({index: {"text": str(index)}})
    one.finish()
    two.finish()
    assert list(two.read()) == [{"text": "0"}, {"text": "1"}]
    assert {path.name for path in one.path.iterdir()} == {".commands", "metadata.jsonl"}


@pytest.mark.slow
def test_processes_share_the_work_and_go_on_where_a_killed_one_stopped(sample, run, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(WORDS))
    arguments = ["--checkpoint", run, "--device", "cpu", "--prompts-file", prompts, "--num-images", 2]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    sample(*arguments[4:], "--batch-size", 5, "--output", whole)

    killed = clean_process(call, [*arguments, "--batch-size", 4, "--output", parts], 3)
    killed.start()
    killed.join(120)
    assert killed.exitcode == -signal.SIGKILL
    assert len(list(parts.glob("*.png"))) == 12
    assert not (parts / "metadata.jsonl").exists()
    before = {path: path.stat().st_mtime_ns for path in sorted(parts.glob("*.png"))[:8]}

    run_processes(call, 2, {}, tmp_path / "ranks", [*arguments, "--batch-size", 3, "--output", parts])
    # What was noted was not made again.
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert lines(parts) == lines(whole)
    assert len(lines(parts)) == 24
    for line in lines(whole):
        assert np.abs(pixels(whole, line) - pixels(parts, line)).max() <= 1
    assert sorted(path.name for path in parts.iterdir()) == sorted(path.name for path in whole.iterdir())


def test_a_finished_command_does_nothing_again_and_others_add_their_results(sample, tmp_path):
    out = tmp_path / "out"
    sample("sun", "--output", out)
    before = {path: path.stat().st_mtime_ns for path in out.glob("0*.png")}
    sample("sun", "--batch-size", 3, "--output", out)
    assert before == {path: path.stat().st_mtime_ns for path in out.glob("0*.png")}
    sample("moon", "car", "--output", out)
    sample("sun", "--seed", 1, "--output", out)
    # The words of another task are in a file of their own, and take numbers, too.
    sample("sun", "--task", "text", "--output", out)
    sample("sun", "--guidance-scale", 7, "--output", out)
    names = ["0000-sun", "0001-moon", "0002-car", "0003-sun", "0005-sun"]
    assert [line["file_name"] for line in lines(out)] == [f"{name}.png" for name in names]
    assert {path.stem for path in out.glob("0*.png")} == set(names)
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert len((out / "texts.jsonl").read_text().splitlines()) == 1
    # The grid is of the last command alone: as high as that of one picture.
    sample("sun", "--output", tmp_path / "alone")
    assert Image.open(out / "grid.png").size == Image.open(tmp_path / "alone" / "grid.png").size
    alone = lines(tmp_path / "alone")[0]
    assert np.array_equal(pixels(out, lines(out)[0]), pixels(tmp_path / "alone", alone))


def test_another_command_leaves_an_interrupted_one_to_be_gone_on_with(sample, run, tmp_path):
    out = tmp_path / "out"
    job = ["--checkpoint", run, "--device", "cpu", *WORDS[:5], "--batch-size", 2, "--output", out]
    killed = clean_process(call, job, 2)
    killed.start()
    killed.join(120)
    assert killed.exitcode == -signal.SIGKILL
    sample("sun", "--output", out)
    assert [line["file_name"] for line in lines(out)] == ["0005-sun.png"]
    sample(*WORDS[:5], "--output", out)
    assert [line["text"] for line in lines(out)] == [*WORDS[:5], "sun"]


def test_ten_thousand_prompts_are_painted(sample, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"{number}\n" for number in range(10_000)))
    fast = ["--num-inference-steps", 1, "--guidance-scale", 1, "--batch-size", 1000]
    sample("--prompts-file", prompts, *fast, "--output", tmp_path / "out")
    metadata = lines(tmp_path / "out")
    assert [line["text"] for line in metadata] == [str(number) for number in range(10_000)]
    assert metadata[-1]["file_name"] == "9999-9999.png"
    assert len(list((tmp_path / "out").glob("*.png"))) == 10_001


def test_a_checkpoint_in_the_repository_is_the_default(sample, run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("transfusion_mot.cli.options.SHIPPED_CHECKPOINT", tmp_path / "nothing")
    with pytest.raises(SystemExit):
        sample("sun", "--output", tmp_path / "out", checkpoint=None)
    assert capsys.readouterr().err.startswith("error: no --checkpoint is given and checkpoints/emoji does not exist")
    monkeypatch.setattr("transfusion_mot.cli.options.SHIPPED_CHECKPOINT", run)
    sample("sun", "--output", tmp_path / "out", checkpoint=None)
    assert len(lines(tmp_path / "out")) == 1


def test_a_snapshot_without_its_vae_ends_with_one_sentence(sample, run, tmp_path, capsys):
    shutil.copytree(run / "snapshots" / "step-0000020", tmp_path / "snapshot")
    shutil.rmtree(tmp_path / "snapshot" / "vae")
    with pytest.raises(SystemExit):
        sample("sun", "--output", tmp_path / "out", checkpoint=tmp_path / "snapshot")
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert said.endswith(
        f"no pipeline can be loaded from {tmp_path / 'snapshot'}: its part 'vae' is missing; give a whole snapshot"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to do"),
        (["--prompts-file", "empty.txt"], "nothing to do"),
        (["--prompts-file", "missing.txt"], "prompts file 'missing.txt' cannot be read"),
        (["sun", " "], "prompt 2 is empty"),
        (["octopus " * 9], "tokens; the model was trained on at most 8"),
        (["sun", "--guidance-scale", "nan"], "guidance_scale is nan"),
        (["sun", "--guidance-interval", "0.9", "0.1"], "guidance_interval"),
        (["sun", "--guidance-interval", "nan", "0.1"], "guidance_interval"),
        (["sun", "--guidance-rescale", "nan"], "guidance_rescale"),
        (["sun", "--negative-prompt", "octopus " * 9], "tokens; the model was trained on at most 8"),
        (["sun", "--image", "missing.png"], "image 'missing.png' does not exist"),
        (["sun", "--image", "empty.txt"], "image 'empty.txt' is not in a format"),
        (["sun", "--image", "full/image.png", "--strength", 0], "strength"),
        (["sun", "--image", "full/image.png", "--strength", "nan"], "strength"),
        (["sun", "--image", "full/image.png", "--mask", "mask.png"], "mask"),
        (["sun", "--strength", 0.5], "--strength needs a picture to vary"),
        (["sun", "--edit", "full/image.png", "--strength", 0.5], "--strength needs a picture to vary"),
        (["sun", "--image-guidance-scale", 2], "--image-guidance-scale goes with --edit"),
        (["sun", "--mask", "mask.png"], "--mask needs a picture to repaint"),
        (["sun", "--task", "text", "--image", "full/image.png"], "--image goes with --task image, auto or speech"),
        (["sun", "--task", "text", "--gif"], "--strip and --gif go with --task image"),
        (["sun", "--task", "song"], "invalid choice: 'song'"),
        (["--task", "caption"], "--task caption has nothing to do"),
        (["--task", "auto", "--caption", "full/image.png"], "both --task auto and --caption"),
        (["sun", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["sun", "--guidance-scale", "strong"], "invalid float value: 'strong'"),
        (["sun", "--num-inference-steps", 0], "num_inference_steps is 0"),
        (["sun", "--num-inference-steps", 1001], "num_inference_steps is 1001"),
        (["sun", "--num-images", 0], "--num-images is 0"),
        (["sun", "--code-top-k", 5], "--code-top-k is given, and this model paints by diffusion"),
        (["sun", "--batch-size", 0], "--batch-size is 0"),
        (["sun", "--scheduler", "DDPMScheduler"], "suitable: FlowMatchEulerDiscreteScheduler"),
        (["sun", "--scheduler", "Euler"], "suitable: FlowMatchEulerDiscreteScheduler"),
        (["sun", "--device", "gpu"], "device 'gpu' cannot be used"),
        (["sun", "--output", "full"], "holds files that sample.py did not write"),
        (["sun", "--output", "empty.txt"], "cannot be written"),
        (["sun", "--output", "empty.txt/out"], "cannot be written"),
        (["sun", "--colour", "red"], "unrecognized arguments: --colour red; --help lists the options"),
        (["sun", "--caption", "full/image.png"], "both prompts and --caption are given; give them in two commands"),
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
    Image.new("L", (9, 8)).save("mask.png")
    with pytest.raises(SystemExit) as ended:
        sample(*arguments)
    assert ended.value.code == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert message in said[0]
    assert not Path("samples").exists()


def test_a_missing_checkpoint_ends_the_command(tmp_path):
    log = tmp_path / "log"
    assert run_script([str(SCRIPT), "--checkpoint", str(tmp_path / "nothing"), "sun"], tmp_path, {}, log) == 2
    assert "Traceback" not in log.read_text()
    assert log.read_text().splitlines()[-1].startswith("error: ")
    assert "nothing" in log.read_text()


def test_a_snapshot_is_a_checkpoint_too(sample, run, tmp_path):
    sample("sun", "--output", tmp_path / "out", checkpoint=run / "snapshots" / "step-0000020")
    assert len(lines(tmp_path / "out")) == 1
