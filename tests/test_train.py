"""Whole runs of train.py on real emoji: exact resuming, one and two processes, learning, and refusals."""

import fnmatch
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from process_group import run_processes, run_script
from test_pipeline_codes import tiny_vq
from training_runs import assert_same, final_state, load_all

import train
from transfusion_mot.config import DataConfig, SourceConfig
from transfusion_mot.config_checks import merged
from transfusion_mot.data.loader import LaneLoader
from transfusion_mot.data.sources.open import open_source
from transfusion_mot.data.tokenizer import load_tokenizer
from transfusion_mot.errors import UserError, exit_on_user_error
from transfusion_mot.files import find_snapshot
from transfusion_mot.pipeline import TransfusionPipeline
from transfusion_mot.training.checkpoint import find_state
from transfusion_mot.training.metrics import read_metrics

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
IMAGE = {"tower": "image", "objective": "diffusion", "loss_weight": 5.0}
DOCS = (ROOT / "docs" / "monitoring.md").read_text()


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def interrupt_after(monkeypatch, step: int) -> None:
    """Make the next run end, as by an error, after that step and its save."""
    original = LaneLoader.__iter__

    def iterate(loader):
        for number, item in enumerate(original(loader), loader.first_step):
            if number == step:
                raise KeyboardInterrupt
            yield item

    monkeypatch.setattr(LaneLoader, "__iter__", iterate)


def with_noisy_codes(folder: Path) -> dict[str, dict[str, Any]]:
    """Changes of a run, whose pictures become codes: 64 of each and a start, half of them replaced."""
    tiny_vq().save_pretrained(folder / "vq")
    image = IMAGE | {"objective": "next_token", "code_noise_prob": 0.5}
    return {
        "data": {"image_size": 16, "slots": {"text": 32, "image": 130}},
        "codecs": {"image": {"path": str(folder / "vq")}},
        "model": {"modalities": {"text": {"tower": "text"}, "image": image}},
    }


@pytest.mark.parametrize(
    ("workers", "image_context", "has_codes"), [(0, "noised", False), (2, "clean", False), (0, "noised", True)]
)
def test_three_and_three_steps_equal_six_bit_for_bit(
    arguments, tmp_path, monkeypatch, workers: int, image_context: str, has_codes: bool
) -> None:
    changes: dict[str, dict[str, Any]] = {"data": {"num_workers": workers, "image_context": image_context}}
    if has_codes:
        changes = merged(changes, with_noisy_codes(tmp_path))
    train.main(arguments("whole", **changes))
    with monkeypatch.context() as patch:
        interrupt_after(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            # Validation and samples in between must not touch the run's randomness.
            train.main(
                arguments("parts", **changes, training={"save_every": 3, "validate_every": 2, "sample_every": 1})
            )
    assert find_state(tmp_path / "parts", "auto").name == "step-0000003"
    before = final_state(tmp_path / "parts")
    train.main(arguments("parts", **changes))
    whole, parts = final_state(tmp_path / "whole"), final_state(tmp_path / "parts")
    assert_same(whole, parts)
    assert not torch.equal(before["model/modalities.text.head.weight"], parts["model/modalities.text.head.weight"])
    assert parts["optimizer/modalities.text.head.weight/step"] == 6
    assert not torch.equal(parts["model/modalities.text.head.weight"], parts["ema/modalities.text.head.weight"])
    lines = [
        [line for line in read_metrics(tmp_path / run / "metrics.jsonl") if "loss" in line]
        for run in ("whole", "parts")
    ]
    timed = ("seconds_per_step", "tokens_per_second", "image_items_per_second", "data_wait_fraction", "seconds")
    for one, two in zip(*lines, strict=True):
        assert {k: v for k, v in one.items() if k not in timed} == {k: v for k, v in two.items() if k not in timed}
    assert [line["step"] for line in lines[1]] == [1, 2, 3, 4, 5, 6]


def test_run_folder_holds_what_is_promised(arguments, tmp_path) -> None:
    train.main(arguments())
    run = tmp_path / "run"
    assert {"config.yaml", "metrics.jsonl", "tokenizer", "samples", "loss.png", "state", "snapshots"} <= {
        path.name for path in run.iterdir()
    }
    assert Image.open(run / "samples" / "step-0000006.png").size > (0, 0)
    line = next(line for line in read_metrics(run / "metrics.jsonl") if line["step"] == 6)
    # Every number that the documentation of a run names.
    documented = re.findall(r"`([^`]+)`", "".join(re.findall(r"^\| (`.*?) \|", DOCS, flags=re.MULTILINE)))
    found = {name for name in documented if any(fnmatch.fnmatch(key, name.replace("NAME", "*")) for key in line)}
    on_gpus = {"mfu", "peak_memory_gib"}
    assert {"text_loss", "data_wait_fraction", "sources/NAME/text_loss", "flops", "seconds", "spikes"} <= found
    assert {name for name in documented if name not in found and "t=" not in name} == {"validation/...", *on_gpus}
    assert sum(key.startswith("image_loss/t=") for key in line) >= 2
    assert Image.open(run / "samples" / "step-0000006-captions.png").size > (0, 0)
    card = (run / "snapshots" / "step-0000006" / "README.md").read_text()
    assert f"{line['text_loss']:.4f} (step 6)" in card
    validation = next(line for line in read_metrics(run / "metrics.jsonl") if "validation/caption_loss" in line)
    assert validation["step"] == 6
    # The run's own configuration repeats it.
    text = (run / "config.yaml").read_text().replace(str(run), str(tmp_path / "again"))
    (tmp_path / "again.yaml").write_text(text)
    train.main(["--config", str(tmp_path / "again.yaml")])
    one, two = final_state(run), final_state(tmp_path / "again")
    assert_same(one, two)

    pipeline = TransfusionPipeline.from_pretrained(find_snapshot(str(run)))
    pipeline.set_progress_bar_config(disable=True)
    for name, parameter in pipeline.transformer.state_dict().items():
        assert torch.equal(parameter, one[f"ema/{name}"]), name
    assert pipeline("sun").images[0].size == (32, 32)


def test_finished_run_started_again_changes_nothing(arguments, tmp_path) -> None:
    train.main(arguments())
    before = final_state(tmp_path / "run")
    train.main(arguments())
    assert_same(before, final_state(tmp_path / "run"))


def test_run_can_be_made_longer(arguments, tmp_path) -> None:
    """The rows go on where they were; with a constant rate it is the longer run."""
    constant = {"lr_schedule": "constant", "warmup_steps": 0}
    train.main(arguments("whole", optimizer=constant))
    train.main(arguments("short", optimizer=constant, training={"num_steps": 4}))
    train.main(arguments("short", optimizer=constant))
    assert_same(final_state(tmp_path / "whole"), final_state(tmp_path / "short"))


# --- More than one process, and an end without warning. ---


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(ROOT)}


def launch(arguments: list[str], processes: int) -> subprocess.CompletedProcess:
    # With --cpu the launcher would start one process, whatever the number; ACCELERATE_USE_CPU keeps these off GPUs.
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--mixed_precision", "no"]
    launcher += ["--num_processes", str(processes), "--main_process_port", "0", "--dynamo_backend", "no"]
    command = [sys.executable, *launcher, str(ROOT / "train.py"), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)


def test_two_processes_equal_one_and_resume_each_other(arguments, tmp_path) -> None:
    train.main(arguments("one"))
    finished = launch(arguments("two"), processes=2)
    assert finished.returncode == 0, finished.stderr
    assert "on 2 x cpu" in finished.stdout
    one, two = final_state(tmp_path / "one"), final_state(tmp_path / "two")
    assert_same(one, two, tolerance=2e-5)
    losses = [
        [
            (line["step"], line["text_loss"], line["image_loss"], line["image_items_seen"])
            for line in lines
            if "loss" in line
        ]
        for lines in (read_metrics(tmp_path / run / "metrics.jsonl") for run in ("one", "two"))
    ]
    for first, second in zip(*losses, strict=True):
        assert second == pytest.approx(first, rel=1e-4)
    validations = [
        next(line for line in read_metrics(tmp_path / run / "metrics.jsonl") if "validation/text_loss" in line)
        for run in ("one", "two")
    ]
    assert validations[1] == pytest.approx(validations[0], rel=1e-3)

    # From one process to two, and back.
    changes = {"optimizer": {"lr_schedule": "constant"}}
    train.main(arguments("constant", **changes))
    train.main(arguments("mixed", **changes, training={"num_steps": 2}))
    run_processes(train.main, 2, {}, tmp_path / "group", arguments("mixed", **changes, training={"num_steps": 4}))
    train.main(arguments("mixed", **changes))
    assert_same(final_state(tmp_path / "constant"), final_state(tmp_path / "mixed"), tolerance=2e-5)


def test_run_killed_between_its_last_state_and_snapshot_still_gets_the_snapshot(
    arguments, tmp_path, monkeypatch
) -> None:
    def killed(*_args, **_kwargs) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TransfusionPipeline, "save_pretrained", killed)
        with pytest.raises(KeyboardInterrupt):
            train.main(arguments())
    train.main(arguments())
    assert find_snapshot(str(tmp_path / "run")).name == "step-0000006"


def test_run_is_taken_back_to_an_earlier_state(arguments, tmp_path) -> None:
    """Later steps are removed, so that they are not read as the newest of the run."""
    train.main(arguments(training={"save_every": 2}))
    run = tmp_path / "run"
    train.main(arguments("other", str(run / "state" / "step-0000004")))
    assert find_snapshot(str(tmp_path / "other")).name == "step-0000006"
    assert (run / "snapshots" / "step-0000006").exists(), "another run is left alone"
    changes = {"num_steps": 5, "save_every": 0}
    train.main(arguments(resume=str(run / "state" / "step-0000004"), training=changes))
    assert find_snapshot(str(run)).name == "step-0000005"
    assert not (run / "state" / "step-0000006").exists()


def test_run_without_its_states_is_not_started_over(arguments, tmp_path, capfd) -> None:
    train.main(arguments())
    shutil.rmtree(tmp_path / "run" / "state")
    assert "no training state" in refused(arguments(), capfd)
    assert find_snapshot(str(tmp_path / "run"))


# --- Learning. ---


def test_both_losses_fall_on_real_emoji(arguments, tmp_path, emoji_cache, draw_emoji) -> None:
    draw_emoji(32, emoji_cache)
    train.main(
        arguments(
            data={"sources": [{"kind": "openmoji"}], "held_out_fraction": 0.05, "slots": {"text": 48, "image": 4}},
            tokenizer={"vocab_size": 512},
            model={"towers": {name: {"hidden_size": 48, "intermediate_size": 96} for name in ("text", "image")}},
            optimizer={"lr": 0.01, "warmup_steps": 10},
            training={"num_steps": 150, "num_rows": 8, "microbatch_rows": None, "log_every": 15},
        )
    )
    tokenizer = load_tokenizer(str(tmp_path / "run" / "tokenizer"), ["text", "image"])
    data = DataConfig(image_size=32, held_out_fraction=0.05, cache_dir=str(emoji_cache))
    images = open_source(SourceConfig("openmoji"), data, "train")
    captions = [images.captions(index)[0] for index in range(len(images))]
    tokens = Counter(token for caption in captions for token in [*tokenizer.encode(caption), tokenizer.eos_id])
    total = sum(tokens.values())
    frequencies_alone = -sum(count / total * math.log(count / total) for count in tokens.values())
    # From each noisy element alone, with data of variance one, nothing predicts noise - clean better than
    # 2 - integral of (2t - 1)^2 / (t^2 + (1 - t)^2) = pi / 2.
    elements_alone = math.pi / 2

    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    first, last = ([line for line in lines if "loss" in line][i] for i in (0, -1))
    (validation,) = (line for line in lines if "validation/text_loss" in line)
    assert first["text_loss"] == pytest.approx(math.log(512), abs=0.2)
    assert first["image_loss"] == pytest.approx(2.0, abs=0.2)
    for text_loss, image_loss in (
        (last["text_loss"], last["image_loss"]),
        (validation["validation/text_loss"], validation["validation/image_loss"]),
        (validation["validation/caption_loss"], validation["validation/image_loss"]),
    ):
        assert text_loss < frequencies_alone - 1
        assert image_loss < elements_alone - 0.1


# --- Refusals. ---


def refused(arguments: list[str], capfd) -> str:
    """The sentence with which a run ends."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop, exit_on_user_error():
        train.main(arguments)
    assert stop.value.code == 2
    errors = capfd.readouterr().err
    assert "Traceback" not in errors
    (sentence,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert errors.rstrip().endswith(sentence)
    return sentence


def test_error_of_the_user_is_one_sentence_and_status_two(arguments, tmp_path) -> None:
    """As a user meets it; the other refusals are tested in this process."""
    words, log = [str(ROOT / "train.py"), *arguments(codecs={"image": {"path": "no/such/vae"}})], tmp_path / "log"
    assert run_script(words, tmp_path, {}, log) == 2
    assert "Traceback" not in log.read_text()
    assert log.read_text().splitlines()[-1].startswith("error: ")
    assert "no/such/vae" in log.read_text()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"codecs": {"image": {"path": "no/such/vae"}}}, ["no/such/vae"]),
        ({"data": {"sources": []}}, ["no source with image media", "openmoji"]),
        ({"data": {"sources": [{"kind": "imagefolder", "path": "no/such/folder"}]}}, ["no/such/folder"]),
        ({"tokenizer": {"path": "no/such/tokenizer"}}, ["no/such/tokenizer"]),
        ({"tokenizer": {"vocab_size": 100}}, ["tokenizer.vocab_size is 100", "261"]),
        ({"model": {"num_heads": 3, "num_kv_heads": 2}}, ["num_heads 3"]),
        ({"diffusion": {"scheduler": "PNDMScheduler"}}, ["PNDMScheduler", "DDPMScheduler"]),
        ({"training": {"num_stepz": 3}}, ["num_stepz", "training.num_steps"]),
        # Numbers that no run can have.
        ({"training": {"num_rows": 0}}, ["num_rows"]),
        ({"training": {"microbatch_rows": -1}}, ["microbatch_rows"]),
        ({"training": {"num_steps": 0}}, ["num_steps"]),
        ({"data": {"slots": {"text": 3, "image": 2}}}, ["data.slots.text"]),
        ({"data": {"slots": {"text": 32, "image": 0}}}, ["data.slots.image"]),
        ({"data": {"image_size": 30}}, ["image_size"]),
        (
            {
                "model": {"modalities": {"text": {"tower": "text"}, "image": IMAGE | {"patch_size": 8}}},
                "data": {"image_size": 16},
            },
            ["image_size is 16", "32"],
        ),
        ({"data": {"sources": [{"kind": "openmoji", "weight": 0.0}]}}, ["weight"]),
    ],
)
def test_what_cannot_be_trained_is_refused(arguments, capfd, changes, words) -> None:
    sentence = refused(arguments(**changes), capfd)
    assert all(word in sentence for word in words), sentence


def test_everything_trained_on_and_nothing_held_out(arguments, tmp_path) -> None:
    train.main(arguments(data={"held_out_fraction": 0.0}))
    assert find_snapshot(str(tmp_path / "run"))


def test_text_source_of_which_nothing_is_held_out(arguments, tmp_path, picture_folder) -> None:
    (tmp_path / "one.txt").write_text("a single paragraph of text")
    sources = [
        {"kind": "imagefolder", "path": str(picture_folder)},
        {"kind": "text", "path": str(tmp_path / "one.txt")},
    ]
    train.main(arguments(data={"sources": sources}))
    assert find_snapshot(str(tmp_path / "run"))


def other_vae(tmp_path: Path, random_vae: Path) -> str:
    folder = tmp_path / "vae"
    folder.mkdir()
    config = json.loads((random_vae / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"latents_mean": [0.5] * 4}))
    weights = "diffusion_pytorch_model.safetensors"
    (folder / weights).write_bytes((random_vae / weights).read_bytes())
    return str(folder)


def test_resuming_something_else_is_refused_and_the_run_stays_as_it_was(
    arguments, tmp_path, capfd, picture_folder, random_vae, monkeypatch
) -> None:
    def too_late(*_: object, **__: object) -> None:
        raise AssertionError("media were encoded first")

    train.main(arguments())
    run = tmp_path / "run"
    kept = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    cases = {
        "never": ({"resume": "never"}, ["resume=auto"]),
        "model": ({"model": {"num_layers": 3}}, ["another model"]),
        "rows": ({"training": {"num_rows": 8}}, ["training.num_rows: 4", "8"]),
        "codec": ({"codecs": {"image": {"path": other_vae(tmp_path, random_vae)}}}, ["another codec of image"]),
        "tokenizer": ({"tokenizer": {"vocab_size": 301}}, ["another tokenizer", "tokenizer.vocab_size is 301", "300"]),
        "sources": ({"data": {"sources": [{"kind": "imagefolder", "path": str(picture_folder)}]}}, ["sources"]),
        "lookahead": ({"data": {"lookahead": 3}}, ["another data", "'lookahead': 16", "'lookahead': 3"]),
        "image size": ({"data": {"image_size": 16}}, ["another data", "image_size"]),
        "layout": ({"data": {"slots": {"text": 80, "image": 2}}}, ["another data", "slots"]),
        "optimizer": ({"optimizer": {"name": "muon"}}, ["another optimizer.name", "adamw", "muon"]),
        "path": ({"resume": str(tmp_path / "none")}, ["not a training state"]),
    }
    for other, (changes, words) in cases.items():
        if other not in ("never", "path"):
            changes["training"] = {"num_steps": 8} | changes.get("training", {})
        with monkeypatch.context() as patch:
            if other != "sources":
                patch.setattr("transfusion_mot.run.data.with_encoded", too_late)
            sentence = refused(arguments(**changes), capfd)
        assert all(word in sentence for word in words), sentence
        now = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        assert [path.name for path in kept.keys() | now.keys() if kept.get(path) != now.get(path)] == [], other


def test_loss_that_is_not_finite_stops_the_run_and_spoils_no_state(arguments, tmp_path) -> None:
    changes = {"optimizer": {"lr": 1e30, "warmup_steps": 0}, "training": {"save_every": 1, "log_every": 4}}
    with pytest.raises(FloatingPointError, match=r"step 2 is not finite .* in every row"):
        train.main(arguments(**changes))
    for folder in (tmp_path / "run" / "state").glob("step-*"):
        leaves = [tensor for name, tensor in load_all(folder).items() if name.startswith("model/")]
        assert all(leaf.isfinite().all() for leaf in leaves), f"{folder.name} cannot be resumed from"


def test_prompt_that_is_too_long_is_refused_before_training(arguments, tmp_path, capfd) -> None:
    """Not at its end, before the state is saved."""
    sentence = refused(arguments(training={"sample_prompts": ["a very long prompt, " * 20]}), capfd)
    assert "prompt" in sentence
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_run_without_sample_prompts_ends_well(arguments, tmp_path) -> None:
    train.main(arguments(training={"sample_prompts": []}))
    assert find_snapshot(str(tmp_path / "run"))


def test_folder_in_which_nobody_can_make_a_file_is_refused(arguments, capfd) -> None:
    sentence = refused([*arguments(codecs={"image": {"path": str(ROOT / "docs")}}), "--output_dir", "/proc"], capfd)
    assert "/proc" in sentence
    assert sentence.endswith("choose another")


def test_user_error_is_a_value_error() -> None:
    assert issubclass(UserError, ValueError)
