"""The papers' recipe at the papers' sizes, as configuration files that build on each other."""

from pathlib import Path

import pytest
import torch

from transfusion_mot.config import RunConfig, parse_config
from transfusion_mot.models.architecture import check_architecture
from transfusion_mot.models.transfusion import TransfusionMoT
from transfusion_mot.schedulers import make_scheduler

PAPER = Path(__file__).parents[1] / "configs" / "paper"
# Parameters without the U-Net, in millions: dense, and with two towers. Layers, widths and head counts are those of
# Transfusion, table 2; the sums follow from them with Llama's feed-forward widths and an untied vocabulary of 32,000.
SIZES = {
    "163m": (162, 276),
    "370m": (374, 682),
    "760m": (778, 1458),
    "1.4b": (1364, 2598),
    "7b": (6738, 13215),
}


def paper_config(*names: str) -> RunConfig:
    return parse_config(RunConfig, [f"--config={PAPER / name}.yaml" for name in ("recipe", *names)], "")


def sizes_of(config: RunConfig) -> dict[str, int]:
    """The papers' autoencoder has 8 latent channels."""
    return {"text": config.tokenizer.vocab_size, "image": 8}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "mot"])
def test_parameters_are_those_of_the_paper(size: str, dense: bool) -> None:
    config = paper_config(size, *(["dense"] if dense else []))
    check_architecture(config.model)
    with torch.device("meta"):
        model = TransfusionMoT.from_sections(sizes_of(config), config.model, config.diffusion)
    adapter = sum(parameter.numel() for parameter in model.modality("image").adapter.parameters())
    assert adapter / 1e9 == pytest.approx(0.27, abs=0.005)
    total = sum(parameter.numel() for parameter in model.parameters()) - adapter
    assert total / 1e6 == pytest.approx(SIZES[size][0 if dense else 1], rel=0.003)


def test_recipe_is_that_of_the_papers() -> None:
    config = paper_config("760m")
    slots = config.data.slots["text"] + config.data.slots["image"] * 256
    assert slots == 4096
    assert config.training.num_rows * slots == pytest.approx(2.1e6, rel=0.01)
    assert config.training.num_rows * slots * config.training.num_steps == pytest.approx(0.524e12, rel=0.01)
    assert config.optimizer.lr * config.optimizer.min_lr_ratio == pytest.approx(1.5e-5)
    scheduler = make_scheduler(config.diffusion.scheduler, config.diffusion.scheduler_args)
    # Nichol and Dhariwal, arXiv 2102.09672, equation 17: cosine of time, with an offset of 0.008.
    times = torch.arange(1, 1001) / 1000
    expected = torch.cos((times + 0.008) / 1.008 * torch.pi / 2) ** 2
    torch.testing.assert_close(scheduler.alphas_cumprod[:-5], (expected / expected[0])[:-5], rtol=5e-3, atol=1e-4)


def test_dense_model_has_the_weights_of_one_tower() -> None:
    config = paper_config("163m", "dense")
    with torch.device("meta"):
        model = TransfusionMoT.from_sections(sizes_of(config), config.model, config.diffusion)
    owners = {name.split(".owned.")[1].split(".")[0] for name, _ in model.named_parameters() if ".owned." in name}
    assert owners == {"shared"}
