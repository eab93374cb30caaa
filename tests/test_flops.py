"""FLOPs of a step with frozen towers, low-rank adapters, insulated towers and latents that are only read, against a
count of torch's."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import CHANNELS, data_config, documents_of, numbered_images, sources_of, tiny_config
from test_packing import rows_of_lane
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from transfusion_mot.config import DiffusionConfig, LoraConfig, ModalityConfig, RunConfig, TowerConfig, TrainingConfig
from transfusion_mot.data.packing import Packer
from transfusion_mot.data.row_arrays import RowShape
from transfusion_mot.models.transfusion import TransfusionMoT
from transfusion_mot.reporting.flops import flops_per_pair, weight_flops_per_row
from transfusion_mot.training.lora import choose_trained
from transfusion_mot.training.step import loss_terms

TOWERS = {"text": TowerConfig(16, 24), "image": TowerConfig(24, 40)}
READ = {"clean_image": ModalityConfig("text", "read", reads="image")}
CASES: dict[str, dict[str, Any]] = {
    "everything is trained": {},
    "frozen text tower": {"frozen": ["text"]},
    "frozen image tower": {"frozen": ["image"]},
    "insulated text tower": {"insulated": ["text"]},
    "both towers insulated, one of them frozen": {"insulated": ["text", "image"], "frozen": ["text"]},
    "low-rank adapters": {"lora": LoraConfig(rank=2)},
    "low-rank adapters of one tower": {"lora": LoraConfig(2, towers=["text"], also_train=["image"])},
    "low-rank adapters of a feed-forward": {
        "lora": LoraConfig(2, towers=["image"], modules=["gate", "down"], also_train=["image.adapter"])
    },
    "clean images by a frozen text tower": {"frozen": ["text"], "read": True},
    "clean images by an insulated text tower": {"insulated": ["text"], "read": True},
    "a U-Net, frozen": {"frozen": ["image"], "image": {"adapter": "unet", "unet_channels": [32, 32]}},
    "one tower": {"dense": True},
}


@pytest.mark.parametrize("case", CASES)
def test_flops_of_weights_and_attention_are_those_that_torch_counts(byte_tokenizer, case: str) -> None:
    given = CASES[case]
    config = tiny_config(given.get("image"), towers=TOWERS)
    if given.get("dense"):
        modalities = {name: replace(modality, tower="all") for name, modality in config.modalities.items()}
        config = replace(config, towers={"all": TowerConfig(16, 24)}, modalities=modalities)
    slots = {"text": 48, "image": 3}
    if given.get("read"):
        config.modalities = config.modalities | READ
        slots |= {"clean_image": 2}
    data = replace(data_config(image_context="clean"), slots=slots)
    training = TrainingConfig(
        mixed_precision="no", frozen_towers=given.get("frozen", []), insulated_towers=given.get("insulated", [])
    )
    run = RunConfig(model=config, data=data, training=training, lora=given.get("lora"))
    with torch.device("meta"):
        model = TransfusionMoT.from_sections(
            {"text": byte_tokenizer.vocab_size, "image": CHANNELS}, config, DiffusionConfig()
        )
        choose_trained(model, run)
    model.to_empty(device="cpu")
    model.initialise(0)
    model.insulate(training.insulated_towers)
    sources = sources_of(documents_of([["a red apple", 0, "sun"], [1, "fox"]]), numbered_images(["moon", "a car"]))
    packer = Packer(
        sources, byte_tokenizer, data, config, num_lanes=1, seed=0, timesteps_from_uniform=lambda uniform: uniform
    )
    ((batch, _),) = rows_of_lane(packer, 0, 1)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        sum(term.loss for term in loss_terms(model, batch).values()).backward()
    shape = RowShape.of_batch(config, batch)
    # The mask is dense.
    pairs = shape.num_slots**2
    assert counter.get_total_flops() == weight_flops_per_row(model, shape) + pairs * flops_per_pair(model)
