"""The arms of the paper's settings: what they change, what is equal, and that they are run and compared."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from training_runs import flat

from benchmarks.settings import CONFIGS, SETTINGS, Runs, arm_names, config_files, plot, table, twin_of
from transfusion_mot.config import RunConfig, parse_config, to_dict
from transfusion_mot.data.row_arrays import RowShape
from transfusion_mot.models.architecture import check_architecture
from transfusion_mot.models.transfusion import TransfusionMoT
from transfusion_mot.reporting.flops import weight_flops_per_row

ARMS = arm_names()


def config_of(arm: str) -> RunConfig:
    return parse_config(RunConfig, [word for file in config_files(arm) for word in ("--config", str(file))], "")


def model_of(config: RunConfig) -> TransfusionMoT:
    with torch.device("meta"):
        vocabulary = {"text": config.tokenizer.vocab_size, "image": 512, "speech": 512}
        sizes = {name: vocabulary[name] for name in config.model.modalities}
        if config.model.modalities["image"].objective == "diffusion":
            sizes["image"] = 4
        return TransfusionMoT.from_sections(sizes, config.model, config.diffusion)


def flops(config: RunConfig) -> int:
    side = config.data.image_size // 4
    latents = {"image": [(4, side, side)]} if config.model.of_objective("diffusion") else {}
    shape = RowShape.of(config.model, config.data.slots, latents, 0)
    assert shape.num_slots % 128 == 0
    return config.training.num_rows * weight_flops_per_row(model_of(config), shape)


def test_every_file_is_of_an_arm_and_says_what_it_is_for() -> None:
    assert {file for arm in ARMS for file in config_files(arm)} == set(CONFIGS.glob("*.yaml"))
    assert len(ARMS) == 15
    for file in CONFIGS.glob("*.yaml"):
        header = file.read_text()
        assert "# question:  " in header
        command = re.search(r"# command:   python train.py ((?:.*\\\n)*.*)", header)
        assert command is not None
        assert f"configs/experiments/settings/{file.name}" in command[1]


@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_can_be_built_and_has_the_flops_of_its_dense_twin(arm: str) -> None:
    config = config_of(arm)
    check_architecture(config.model)
    own = sum(parameter.numel() for parameter in model_of(config).parameters())
    if (twin := twin_of(arm)) is None:
        return
    dense = config_of(twin)
    assert flops(config) == pytest.approx(flops(dense), rel=0.02)
    weights = sum(parameter.numel() for parameter in model_of(dense).blocks.parameters())
    num_towers = len({modality.tower for modality in config.model.modalities.values()})
    assert sum(parameter.numel() for parameter in model_of(config).blocks.parameters()) == num_towers * weights
    assert own > 1e6
    # Data, rows, steps and seeds are the same: the curves are of the same documents.
    ours, theirs = (flat(to_dict(one)) for one in (config, dense))
    changed = {path.split("/")[1] for path in ours.keys() | theirs.keys() if ours.get(path) != theirs.get(path)}
    assert changed == {"model", "output_dir"}


def test_two_modalities_share_a_tower() -> None:
    for pair in (("image", "speech"), ("text", "image"), ("text", "speech")):
        modalities = config_of(f"chameleon_speech_{'_'.join(pair)}").model.modalities
        (other,) = modalities.keys() - set(pair)
        assert modalities[pair[0]].tower == modalities[pair[1]].tower != modalities[other].tower


def test_the_settings_have_the_objectives_of_the_paper() -> None:
    found = {name: {key: m.objective for key, m in config_of(name).model.modalities.items()} for name in SETTINGS}
    codes = dict.fromkeys(("text", "image", "speech"), "next_token")
    assert found["chameleon"] == {key: codes[key] for key in ("text", "image")}
    assert found["chameleon_speech"] == codes
    assert found["transfusion_speech"] == codes | {"image": "diffusion"}


def test_the_table_and_the_curves_come_from_the_logs(tmp_path: Path) -> None:
    runs = Runs(tmp_path, [], jobs=1)
    losses = {"chameleon": (3.0, 2.0), "chameleon_dense": (3.5, 2.5)}
    for arm, (text, image) in losses.items():
        for seed in (0, 1):
            runs.folder(arm, seed).mkdir()
            lines = [
                {"step": step, "validation/text_loss": text + 10 / step + seed / 10, "validation/image_loss": image}
                for step in (10, 20, 100)
            ]
            lines.append({"step": 100, "text_loss": 1.0, "image_loss": 1.0, "flops": 5e12})
            (runs.folder(arm, seed) / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = table(runs, list(losses), [0, 1]).splitlines()
    assert rows[0] == "| arm | TFLOPs | text loss | image loss |"
    assert rows[2] == "| chameleon | 5 ± 0 | 3.150 ± 0.071 | 2.000 ± 0.000 |"
    plot(runs, list(losses), [0, 1], tmp_path / "results.png")
    with Image.open(tmp_path / "results.png") as picture:
        # A row of two panels, dense in blue and towers in orange.
        assert picture.size == (880, 330)
        colours = {tuple(c) for c in np.asarray(picture.convert("RGB")).reshape(-1, 3)}
    assert {(0x1F, 0x77, 0xB4), (0xFF, 0x7F, 0x0E)} <= colours


def test_runs_without_held_out_losses_have_no_curves(tmp_path: Path) -> None:
    runs = Runs(tmp_path, [], jobs=1)
    for arm in ("chameleon", "chameleon_dense"):
        runs.folder(arm, 0).mkdir()
        line = {"step": 1, "text_loss": 1.0, "image_loss": 1.0, "flops": 5e12}
        (runs.folder(arm, 0) / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    plot(runs, ["chameleon", "chameleon_dense"], [0], tmp_path / "results.png")
    assert not (tmp_path / "results.png").exists()
