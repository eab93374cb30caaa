"""The length of a run in epochs: all documents of the data are used that number of times."""

import math
import os
import re
from pathlib import Path

import pytest
import yaml

import train
from transfusion_mot.config import RunConfig, parse_config
from transfusion_mot.errors import UserError
from transfusion_mot.training.metrics import read_metrics


def read(*arguments: str) -> RunConfig:
    return parse_config(RunConfig, list(arguments), "")


def write(path: Path, **training: float | None) -> str:
    path.write_text(yaml.safe_dump({"training": training}))
    return f"--config={path}"


def test_what_comes_later_says_how_long_a_run_is(tmp_path: Path) -> None:
    steps, epochs = write(tmp_path / "steps.yaml", num_steps=7), write(tmp_path / "epochs.yaml", num_epochs=3)
    assert read().training.num_epochs is None
    assert read(epochs).training.num_epochs == 3
    assert read(steps, epochs).training.num_epochs == 3
    assert read(epochs, steps).training.num_epochs is None
    assert read(epochs, steps).training.num_steps == 7
    assert read(steps, "training.num_epochs=2.5").training.num_epochs == 2.5
    assert read(epochs, "--training.num_steps", "9").training.num_epochs is None
    # As the config.yaml of a run has it.
    assert read(write(tmp_path / "run.yaml", num_steps=7, num_epochs=None)).training.num_steps == 7


def test_two_lengths_in_one_place_are_refused(tmp_path: Path) -> None:
    both = write(tmp_path / "both.yaml", num_steps=7, num_epochs=3)
    with pytest.raises(UserError, match=r"both\.yaml gives both training\.num_steps and training\.num_epochs"):
        read(both)
    with pytest.raises(UserError, match="the command line gives"):
        read("training.num_steps=7", "training.num_epochs=3")
    with pytest.raises(UserError, match=r"training\.num_epochs is 0\.0; it must be above 0"):
        read("training.num_epochs=0")


@pytest.mark.slow
@pytest.mark.parametrize("rows", [4, 6])
def test_a_run_ends_after_its_epochs(
    arguments, picture_folder: Path, tmp_path: Path, monkeypatch, capsys, rows: int
) -> None:
    """Counted by the run's own log. The last step may take more than is left, and a few documents wait for rows."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    train.main(
        arguments(
            data={"sources": [{"kind": "imagefolder", "path": str(picture_folder)}], "slots": {"text": 48, "image": 2}},
            training={"num_steps": None, "num_epochs": 2, "num_rows": rows, "microbatch_rows": rows},
        )
    )
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    (epochs,) = {value for name, value in lines[-1].items() if name.endswith("/epochs")}
    # 33 images are trained on, two a row.
    num_steps = math.ceil(2 * 33 / (2 * rows))
    assert lines[-1]["step"] == num_steps
    assert 2 <= epochs < 2 + 6 * rows / 33
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["training"]
    assert (saved["num_steps"], saved["num_epochs"]) == (num_steps, None)
    told = re.search(rf"steps: {num_steps}, about ([\d.]+) epochs of 33 documents", capsys.readouterr().out)
    assert told is not None
    # Rows that are packed on trial do not all begin with as many waiting documents as they end with.
    assert float(told[1]) == pytest.approx(2 * rows * num_steps / 33, rel=0.03)


@pytest.mark.slow
def test_quiet_prints_lines_of_losses_alone(arguments, monkeypatch, capfd) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("TQDM_DISABLE", "0")
    train.main([*arguments(training={"num_steps": 4, "log_every": 2}), "--quiet"])
    printed = capfd.readouterr()
    assert [line.split("  ")[0] for line in printed.out.splitlines()] == ["step 1", "step 2", "step 4", "step 4"]
    # tqdm has read this when it was imported, so that here bars of reading are shown.
    assert os.environ["TQDM_DISABLE"] == "1"
    assert "step" not in printed.err
