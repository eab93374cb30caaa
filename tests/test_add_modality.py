"""A new modality needs an entry in the configuration and a codec: the example of docs/architecture.md is trained."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import VQModel
from training_runs import write_pictures

import train
from transfusion_mot.pipeline import TransfusionPipeline
from transfusion_mot.training.metrics import read_metrics

pytestmark = pytest.mark.slow

ARCHITECTURE = (Path(__file__).parents[1] / "docs" / "architecture.md").read_text()


def shown() -> str:
    """The configuration under "Add a modality"."""
    section = ARCHITECTURE.split("## Add a modality")[1].split("\n## ")[0]
    (block,) = re.findall(r"```yaml\n(.*?)```", section, flags=re.DOTALL)
    return block


@pytest.fixture
def configuration(tmp_path: Path, random_vae: Path, monkeypatch) -> Path:
    """The example at toy size, with toy data."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    for name in ("photos", "sketches"):
        (tmp_path / name).mkdir()
        write_pictures(tmp_path / name)
        (tmp_path / name / "texts.txt").unlink()
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    codec = VQModel(**blocks, block_out_channels=(8, 8, 8), latent_channels=4, num_vq_embeddings=24, norm_num_groups=4)
    codec.save_pretrained(tmp_path / "vq-sketches")
    text = shown().replace("checkpoints/vae-emoji", str(random_vae))
    sections: dict[str, dict[str, Any]] = yaml.safe_load(
        re.sub(r"\b(photos|vq-sketches|sketches)(?=[,}])", rf"{tmp_path}/\1", text)
    )
    sections["data"] |= {"image_size": 32, "held_out_fraction": 0.2, "num_workers": 0, "cache_dir": f"{tmp_path}/cache"}
    sections["model"] |= {"num_layers": 1, "num_heads": 2, "head_dim": 16}
    sections["tokenizer"] = {"vocab_size": 300}
    sections["diffusion"] = {"num_inference_steps": 2}
    sections["training"] = {
        "num_steps": 3, "num_rows": 2, "mixed_precision": "no", "log_every": 1, "tracker": None,
        "num_validation_documents": 4, "sample_prompts": ["sun"],
    }  # fmt: skip
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"output_dir": str(tmp_path / "run"), **sections}))
    return file


def test_it_takes_about_twenty_lines() -> None:
    assert len(shown().splitlines()) <= 20


def test_what_is_shown_is_trained_saved_and_sampled(configuration: Path, tmp_path: Path) -> None:
    train.main(["--config", str(configuration)])
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    trained = [line for line in lines if "loss" in line][-1]
    assert trained["loss"] == pytest.approx(
        trained["text_loss"] + 5 * trained["image_loss"] + trained["sketch_loss"], rel=1e-5
    )
    assert trained["sketch_slots_seen"] > 0
    assert any("validation/sketch_loss" in line for line in lines)
    pipeline = TransfusionPipeline.from_pretrained(tmp_path / "run" / "snapshots" / "step-0000003")
    assert set(pipeline.transformer.modalities) == {"text", "image", "sketch"}
    assert (
        "<begin_of_sketch>"
        in json.loads((tmp_path / "run/snapshots/step-0000003/tokenizer/tokenizer.json").read_text())["model"]["vocab"]
    )
