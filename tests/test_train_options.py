"""Optimizers, towers and checkpointing in whole runs of train.py: they resume exactly and have their effect."""

from pathlib import Path
from typing import Any

import pytest
import torch
from process_group import run_processes
from test_train import interrupt_after
from training_runs import TOWER, assert_same, final_state

import train
from transfusion_mot.training.checkpoint import find_state
from transfusion_mot.training.metrics import read_metrics

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "muon": {"optimizer": {"name": "muon"}},
    "tower rate": {"optimizer": {"tower_lr_scale": {"image": 0.5}}},
    "frozen tower": {"training": {"frozen_towers": ["text"], "z_loss_weight": 1e-4}},
    "selective checkpointing": {"training": {"activation_checkpointing": "selective"}},
    "full checkpointing": {"training": {"activation_checkpointing": "full"}},
    "dropout": {"model": {"towers": {"text": TOWER | {"dropout": 0.1}, "image": TOWER | {"dropout": 0.5}}}},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_the_step_resume_exactly(arguments, tmp_path: Path, monkeypatch, name: str) -> None:
    changes = OPTIONS[name]
    train.main(arguments("whole", **changes))
    training = changes.get("training", {})
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            train.main(arguments("parts", **changes | {"training": training | {"save_every": 2}}))
    before = final_state(tmp_path / "parts")
    train.main(arguments("parts", **changes))
    whole, parts = final_state(tmp_path / "whole"), final_state(tmp_path / "parts")
    assert_same(whole, parts)
    parameters = [key for key in parts if key.startswith("model/")]
    moved = {key for key in parameters if not torch.equal(parts[key], before[key])}
    assert any("image" in key for key in moved)
    assert any("text" in key for key in moved) != (name == "frozen tower")
    line = read_metrics(tmp_path / "whole" / "metrics.jsonl")[-2]
    towers = {"image"} if name == "frozen tower" else {"image", "text"}
    assert {key for key in line if key.startswith("grad_norm/")} == {f"grad_norm/{tower}" for tower in towers}


def test_dropout_may_change_in_a_run(arguments, tmp_path: Path) -> None:
    """A state does not contain the setting, so that states of earlier versions can be resumed, too."""
    constant = {"optimizer": {"lr_schedule": "constant"}}
    train.main(arguments(**constant, training={"num_steps": 2}))
    assert final_state(tmp_path / "run")["made_of"]["model"]["towers"] == {"text": TOWER, "image": TOWER}
    dropout = {"model": {"towers": {"text": TOWER | {"dropout": 0.5}, "image": TOWER}}}
    train.main(arguments(**constant, **dropout, training={"num_steps": 3}))
    train.main(arguments("plain", **constant, training={"num_steps": 3}))
    losses = [
        [line["text_loss"] for line in read_metrics(tmp_path / run / "metrics.jsonl") if "loss" in line]
        for run in ("run", "plain")
    ]
    assert losses[0][:2] == losses[1][:2]
    assert losses[0][2] != losses[1][2]


def test_step_that_cannot_be_recorded_is_taken_without(arguments, tmp_path: Path, capsys) -> None:
    train.main(arguments("run", training={"cuda_graph": True, "num_steps": 1}))
    assert "training.cuda_graph works on one CUDA device: on 1 x cpu steps are not recorded" in capsys.readouterr().out
    assert find_state(tmp_path / "run", "auto").name == "step-0000001"


def test_frozen_tower_on_two_processes_equals_one(arguments, tmp_path: Path) -> None:
    changes = {"training": {"frozen_towers": ["image"], "num_steps": 3}, "optimizer": {"name": "muon"}}
    train.main(arguments("one", **changes))
    run_processes(train.main, 2, {}, tmp_path / "ddp", arguments("two", **changes))
    # Muon rounds to bfloat16, where a difference of the last bit of float32 can be one of the first 8.
    assert_same(final_state(tmp_path / "one"), final_state(tmp_path / "two"), tolerance=1e-3)
