"""Distances to means and principal components of hidden states, and evaluate/feature_space.py on tiny runs."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import tiny_config
from PIL import Image
from test_validation import held_out, make_validation

import train
from transfusion_mot.config import TowerConfig
from transfusion_mot.errors import UserError
from transfusion_mot.evaluation.feature_space import layer_space
from transfusion_mot.sampling.hidden_states import TIMESTEP, check_one_width, hidden_states

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[1] / "evaluate" / "feature_space.py"


def test_components_of_a_layer() -> None:
    """Against the eigenvalues of the covariance."""
    rng = np.random.default_rng(0)
    states = {name: rng.standard_normal((50, 6)).astype(np.float32) + 2 * place for place, name in enumerate("abc")}
    space = layer_space(states)
    scaled = {name: own / np.sqrt((own**2).mean(axis=1, keepdims=True)) for name, own in states.items()}
    together = np.concatenate(list(scaled.values()))
    eigenvalues = np.linalg.eigvalsh(np.cov(together.T))[::-1]
    assert space.explained == pytest.approx(tuple(eigenvalues[:2] / eigenvalues.sum()), abs=1e-5)
    points = np.concatenate(list(space.points.values()))
    assert points.shape == (150, 2)
    np.testing.assert_allclose(np.cov(points.T), np.diag(eigenvalues[:2]), atol=1e-4)


def test_share_of_states_whose_nearest_mean_is_their_own() -> None:
    """State by state, each half judged by the other."""
    rng = np.random.default_rng(0)
    states = {
        name: rng.standard_normal((300, 6)).astype(np.float32) + place / 2 for place, name in enumerate(("a", "b", "c"))
    }
    scaled = {name: own / np.sqrt((own**2).mean(axis=1, keepdims=True)) for name, own in states.items()}
    right = 0
    for name, own in scaled.items():
        for place, state in enumerate(own):
            means = {other: of[1 - place % 2 :: 2].mean(axis=0) for other, of in scaled.items()}
            right += min(means, key=lambda other: float(np.linalg.norm(state - means[other]))) == name
    assert layer_space(states).apart == pytest.approx(right / 900, abs=1e-6)
    assert 0.4 < right / 900 < 0.9


def test_modalities_that_are_the_same_or_far_apart() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.standard_normal((2, 2000, 8)).astype(np.float32)
    # Six deviations of 4,000 guesses.
    assert layer_space({"a": one, "b": other}).apart == pytest.approx(0.5, abs=0.05)
    shift = np.zeros(8, np.float32)
    shift[0] = 100
    assert layer_space({"a": one + shift, "b": other - shift}).apart == 1
    # Lengths do not count: the next layer's norm takes them away.
    assert layer_space({"a": one, "b": 1000 * other}).apart == pytest.approx(0.5, abs=0.05)


def test_states_are_those_of_filled_slots(byte_tokenizer, accelerator) -> None:
    """Each is a row of what the blocks give, computed without hooks."""
    validation, model = make_validation(byte_tokenizer, held_out())
    layers = hidden_states(model, validation, accelerator, most=10**6, seed=0)
    assert len(layers) == len(model.blocks) + 1
    expected: list[dict[str, list[torch.Tensor]]] = [{} for _ in layers]
    with torch.no_grad():
        for batch in validation.batches(model, accelerator):
            given = batch.at(TIMESTEP)
            texts = given.inputs["text"].ids.shape[1]
            filled = given.slots.document_ids >= 0
            parts = {"text": filled[:, :texts], "image": filled[:, texts:]}
            for number, of_layer in enumerate(expected):
                # Without the blocks behind it, what comes out of the final norm is the norm of what this one gives.
                blocks, model.blocks = model.blocks, model.blocks[:number]
                seen: dict[str, torch.Tensor] = {}
                norms = {name: model.final_norm[name] for name in parts}
                handles = [
                    norm.register_forward_pre_hook(
                        lambda _, inputs, name=name, seen=seen: seen.update({name: inputs[0]})
                    )
                    for name, norm in norms.items()
                ]
                model(inputs=given.inputs, slots=given.slots)
                model.blocks = blocks
                for handle in handles:
                    handle.remove()
                for name, part in parts.items():
                    of_layer.setdefault(name, []).append(seen[name][part])
    for ours, theirs in zip(layers, expected, strict=True):
        assert ours.keys() == theirs.keys()
        counts = {name: len(states) for name, states in ours.items()}
        assert len(set(counts.values())) == 1
        assert counts["text"] == min(sum(len(part) for part in parts) for parts in theirs.values())
        for name, states in ours.items():
            distances = torch.cdist(
                torch.from_numpy(states), torch.cat(theirs[name]), compute_mode="donot_use_mm_for_euclid_dist"
            )
            assert distances.min(dim=1).values.max() < 1e-5
    few = hidden_states(model, validation, accelerator, most=5, seed=0)
    assert {name: states.shape[0] for name, states in few[0].items()} == {"text": 5, "image": 5}


def test_a_dense_run_beside_one_with_towers(arguments, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    train.main(arguments("dense", training={"num_steps": 1}, model={"untied": []}))
    train.main(arguments("mot", training={"num_steps": 1}))
    capsys.readouterr()
    output = tmp_path / "spaces"

    def call(*words: object) -> int:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, words), "--device", "cpu", "--output", str(output)])
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as ended:
            return int(ended.code or 0)
        return 0

    assert call(tmp_path / "dense", tmp_path / "mot") == 0
    found = json.loads((output / "feature_space.json").read_text())
    assert {run: len(layers) for run, layers in found.items()} == {"dense": 3, "mot": 3}
    assert all(0 <= layer["apart"] <= 1 for layers in found.values() for layer in layers)
    table = capsys.readouterr().out
    assert f"| 2 | {found['dense'][2]['apart']:.3f} | {found['mot'][2]['apart']:.3f} |" in table
    colours = {tuple(c) for c in np.asarray(Image.open(output / "feature_space.png").convert("RGB")).reshape(-1, 3)}
    assert {(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)} <= colours
    # The model is that of the checkpoint, also with another configuration.
    other = yaml.safe_load((tmp_path / "mot" / "config.yaml").read_text())
    other["model"]["rope"] = {"1d": "3d", "3d": "1d"}[other["model"]["rope"]]
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(other))
    assert call(tmp_path / "mot", "--config", tmp_path / "other.yaml") == 0
    assert json.loads((output / "feature_space.json").read_text())["mot"] == found["mot"]


def test_towers_of_two_widths_are_refused() -> None:
    check_one_width(tiny_config())
    uneven = tiny_config(towers={"text": TowerConfig(16, 24), "image": TowerConfig(32, 24)})
    with pytest.raises(UserError, match="have the widths 16, 32; comparing hidden states needs"):
        check_one_width(uneven)
