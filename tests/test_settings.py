"""The arms of the paper's settings: what they change, what is equal, and that they are run and compared."""

import re

import pytest
import torch
from training_runs import flat

from benchmarks.settings import CONFIGS, SETTINGS, arm_names, config_files, twin_of
from transfusion_mot.config import RunConfig, parse_config, to_dict
from transfusion_mot.data.row_arrays import RowShape
from transfusion_mot.models.mot import check_architecture
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
