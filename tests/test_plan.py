"""The output of `train.py --plan`, against real models and sums computed by hand."""

import re
from pathlib import Path

import pytest
import torch
from conftest import tiny_config
from diffusers import AutoencoderKL, VQModel

import train
from transfusion_mot.config import CodecConfig, DiffusionConfig, RunConfig, parse_config, save_config
from transfusion_mot.errors import UserError
from transfusion_mot.models.transfusion import TransfusionMoT
from transfusion_mot.reporting.memory import Setting, step_memory
from transfusion_mot.reporting.plan import (
    GIB,
    GPU_MEMORY,
    USABLE,
    largest_microbatch,
    open_model,
    plan,
    time_line,
)
from transfusion_mot.run.begin import settled_config

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PAPER = [f"--config={ROOT / 'configs' / 'paper' / name}.yaml" for name in ("recipe", "760m")]


@pytest.fixture
def tiny_run(tmp_path: Path) -> RunConfig:
    """A run of the tiny model with a separate autoencoder."""
    AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=3,
        norm_num_groups=4,
    ).save_pretrained(tmp_path / "vae")
    config = RunConfig(model=tiny_config())
    config.codecs = {"image": CodecConfig(str(tmp_path / "vae"))}
    config.tokenizer.vocab_size = 300
    config.data.image_size, config.data.slots = 16, {"text": 24, "image": 2}
    config.training.num_rows, config.training.num_steps = 12, 1000
    save_config(config, tmp_path / "config.yaml")
    return config


def test_plan_of_buckets_is_that_of_the_largest(tiny_run: RunConfig) -> None:
    assert open_model(tiny_run)[-1] == []
    tiny_run.data.buckets = [[8, 24], [16, 32], [24, 8]]
    _, shape, assumed = open_model(tiny_run)
    assert shape.blocks["image"].latent_shape == (3, 8, 16)
    assert assumed == ["all images of 16 x 32 pixels, the largest of data.buckets"]


def numbers(text: str, title: str) -> list[float]:
    """The numbers of a row of a table."""
    (line,) = (line for line in text.splitlines() if line.startswith(title))
    return [float(word) for word in line[34:].split() if re.fullmatch(r"[\d.]+", word)]


def test_plan_of_a_tiny_run(tiny_run: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train.main(["--plan", f"--config={tmp_path / 'config.yaml'}", "--gpus=4", "--gpu", "H100", "--mfu=0.5"])
    shown = capsys.readouterr().out
    assert "assumed" not in shown
    model = TransfusionMoT.from_sections({"text": 300, "image": 3}, tiny_run.model, DiffusionConfig())
    count = sum(parameter.numel() for parameter in model.parameters())
    assert numbers(shown, "all ")[-1] == pytest.approx(count / 1e6, abs=0.006)
    # A row has 24 tokens and 2 images of 8 x 8 latents, which are 16 patches each.
    pairs = 56 * 57 / 2 + 2 * 16 * 15 / 2
    block = 16 * 48 + 16 * 16 + 3 * 16 * 24
    # Patches meet two linear layers of the adapter, an image the two of its timestep; what the first one of each
    # multiplies has no gradient.
    row = 6 * (24 * (2 * block + 300 * 16) + 32 * (2 * block + 12 * 16)) + 12 * 2 * 16 * pairs
    row += 4 * 32 * 12 * 16 + 2 * (4 * 256 * 16 + 6 * 16 * 16)
    seconds = 12 * row / (4 * 989e12 * 0.5)
    model_line, time = shown.strip().splitlines()[-2:]
    assert model_line.startswith(f"{row / 56 / 1e9:.3g} GFLOP a token")
    assert time == (
        f"{seconds:.3g} s a step and {1000 * seconds / 86400:.3g} days for 1000 steps (0.000672B tokens) on 4 H100 at "
        "an MFU of 0.5"
    )
    assert "for microbatches of 3 of 3 rows of 56 slots" in shown


def test_plan_of_the_paper_is_what_the_paper_says() -> None:
    shown = plan(["--plan", *PAPER, "--gpus", "128", "training.microbatch_rows=4"], settled_config)
    assert "assumed: latents of 8 channels" in shown
    assert numbers(shown, "tower text")[-1] == pytest.approx(778, rel=0.003)
    # Weights, gradients, moments and averages in float32 of 1.72B parameters.
    assert numbers(shown, "weights")[0] == pytest.approx(1724.4e6 * 4 / 2**30, rel=0.002)
    assert numbers(shown, "optimizer") == pytest.approx([1724.4e6 * 8 / 2**30, 1724.4e6 * 8 / 2**30 / 128], rel=0.06)
    # The papers' batch: 4 rows on each of 128 GPUs of 80 GB.
    assert "for microbatches of 4 of 4 rows" in shown
    assert shown.count("fits") == 2
    assert "524.3B tokens" in shown
    # 6ND of table 4.6 alone is 2.5e21 FLOP; attention and the U-Net come on top.
    flops = float(re.search(r"([\d.]+) PFLOP", shown)[1]) * 1e15 * 250000
    assert 2.5e21 < flops < 4e21


@pytest.mark.parametrize("parallelism", ["ddp", "fsdp2"])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_largest_microbatch_fits_and_the_next_does_not(parallelism, checkpointing) -> None:
    config = parse_config(RunConfig, PAPER, "")
    model, shape, _ = open_model(config)
    found = largest_microbatch(model, shape, config, 8, "A100-80GB", parallelism, checkpointing)
    assert 64 % found == 0
    limit = USABLE * GPU_MEMORY["A100-80GB"] * GIB
    peaks = [
        step_memory(
            model, shape, Setting(rows, 64 // rows, gpus=8, parallelism=parallelism, checkpointing=checkpointing)
        ).peak
        for rows in (found, 2 * found)
    ]
    assert peaks[0] <= limit < peaks[1]


def test_less_checkpointing_never_fits_more(tiny_run: RunConfig) -> None:
    model, shape, _ = open_model(tiny_run)
    peaks = [
        step_memory(model, shape, Setting(64, checkpointing=mode)).blocks for mode in ("none", "selective", "full")
    ]
    assert peaks[0] > peaks[1] > peaks[2] > 0


def test_frozen_tower_and_muon_are_in_the_plan(tiny_run: RunConfig, tmp_path: Path) -> None:
    shown = plan(
        ["--plan", f"--config={tmp_path / 'config.yaml'}", "--gpus=1", "training.frozen_towers=[text]"], settled_config
    )
    assert re.search(r"tower text .* frozen", shown)
    muon = plan(["--plan", f"--config={tmp_path / 'config.yaml'}", "--gpus=1", "optimizer.name=muon"], settled_config)
    assert "fsdp2" in shown
    assert "fsdp2" not in muon
    assert "fsdp2" not in plan(
        ["--plan", f"--config={tmp_path / 'config.yaml'}", "--gpus=1", "training.float8=true"], settled_config
    )


def test_where_a_step_is_not_recorded_the_plan_says_so() -> None:
    for gpus, is_recorded in (("1", True), ("2", False)):
        shown = plan(["--plan", f"--config={ROOT / 'configs' / 'emoji_128.yaml'}", "--gpus", gpus], settled_config)
        assert ("cuda_graph works on one CUDA device: on 2 x cuda" not in shown) == is_recorded


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpus=5"], ["num_rows is 12", "5 GPUs"]),
        (["--gpus=0"], ["0 GPUs"]),
        (["--mfu=40"], ["--mfu is 40"]),
        (["--gpsu=4"], ["gpsu"]),
        (["training.frozen_towers=[x]"], ["training.frozen_towers"]),
    ],
)
def test_mistakes_are_refused(tiny_run: RunConfig, tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        plan(["--plan", f"--config={tmp_path / 'config.yaml'}", "--gpus=4", *arguments], settled_config)
    assert all(word in str(error.value) for word in words)


def test_plan_touches_no_file(tiny_run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    plan(["--plan", "--config=config.yaml", "--gpus=4"], settled_config)
    assert sorted(tmp_path.rglob("*")) == before
    assert not torch.cuda.is_initialized()


COMMANDS = [
    line.split()
    for line in (ROOT / "docs" / "scaling.md").read_text().splitlines()
    if line.startswith("accelerate launch")
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: Path(command[8]).stem)
def test_commands_of_the_document_are_what_the_plan_says(command: list[str]) -> None:
    parallelism = Path(command[3]).stem
    arguments = [str(ROOT / word) if word.endswith(".yaml") else word for word in command[5:]]
    config = parse_config(RunConfig, arguments, "")
    model, shape, _ = open_model(config)
    checkpointing = config.training.activation_checkpointing
    rows = largest_microbatch(model, shape, config, 8, "A100-80GB", parallelism, checkpointing)
    assert config.training.microbatch_rows == rows
    # The table above them.
    days = re.search(r"([\d.]+) days", time_line(model, shape, config, 8, "A100-80GB", 0.4))[1]
    count = sum(parameter.numel() for parameter in model.parameters())
    row = f"| {count / 1e9:.2f}B | {parallelism} | {rows} | {checkpointing} | {days} |"
    assert row in (ROOT / "docs" / "scaling.md").read_text()


def test_the_document_has_a_command_for_every_size() -> None:
    sizes = {path.stem for path in (ROOT / "configs" / "paper").iterdir()} - {"recipe", "dense"}
    assert {Path(command[8]).stem for command in COMMANDS} == sizes


def test_plan_of_images_as_codes_reads_their_number_from_the_codec(tmp_path: Path, capsys) -> None:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    sizes = {"block_out_channels": (8, 8), "latent_channels": 4, "num_vq_embeddings": 24, "norm_num_groups": 4}
    VQModel(**blocks, **sizes).save_pretrained(tmp_path)
    arguments = ["model.modalities.image.objective=next_token", "data.slots.image=2000"]
    config = parse_config(RunConfig, [*arguments, f"codecs.image.path={tmp_path}"], "")
    model, _, assumed = open_model(config)
    assert model.modality("image").vocab_size == 24 + 2
    assert not any("codes" in sentence for sentence in assumed)
    config.codecs["image"].path = str(tmp_path / "nothing")
    model, _, assumed = open_model(config)
    assert any("codes" in sentence for sentence in assumed)
