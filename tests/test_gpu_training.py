"""Whole training steps on a CUDA device: `pytest -m gpu`."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import numbered_images, sources_of, texts_of, tiny_config
from torch._dynamo.utils import counters

from transfusion_mot.config import DataConfig, OptimizerConfig
from transfusion_mot.data.batch import Batch
from transfusion_mot.data.packing import Packer
from transfusion_mot.data.tokenizer import TextTokenizer
from transfusion_mot.diffusion import Diffusion, make_scheduler
from transfusion_mot.models.transfusion import TransfusionMoT
from transfusion_mot.training.optimizer import make_optimizer
from transfusion_mot.training.step import StepResult, train_step

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CHANNELS = 3
ROWS = 8


class Run:
    """A tiny model on the rows of some lanes: eager in float32 on the CPU, compiled in bfloat16 on CUDA."""

    def __init__(self, device: str, tokenizer: TextTokenizer) -> None:
        self.device = torch.device(device)
        on_gpu = device == "cuda"
        self.diffusion = Diffusion(make_scheduler("FlowMatchEulerDiscreteScheduler", {}))
        captions = [f"picture {number}" for number in range(20)]
        texts = ["to be or not to be, that is the question", "all the world is a stage"]
        data = DataConfig(text_slots=64, images_per_row=16)
        self.packer = Packer(
            sources_of(numbered_images(captions), texts_of(texts)),
            tokenizer, data, "3d", 2, ROWS, 0, self.diffusion.timesteps_from_uniform,
        )  # fmt: skip
        self.states = self.packer.initial_state()[None].repeat(ROWS, axis=0)
        torch.manual_seed(0)
        config = tiny_config(head_dim=32, rope="3d")
        self.bare = TransfusionMoT.from_config_section(tokenizer.vocab_size, CHANNELS, config).to(self.device)
        self.optimizer = make_optimizer(self.bare, OptimizerConfig(lr=3e-3))
        AcceleratorState._reset_state(reset_partial_state=True)
        self.accelerator = Accelerator(cpu=not on_gpu, mixed_precision="bf16" if on_gpu else "no")
        if on_gpu:
            self.bare.compile_blocks()
        self.model = self.accelerator.prepare_model(self.bare)
        self.done = 0

    def batch(self) -> Batch:
        rows, self.states, _ = self.packer.rows(range(ROWS), self.done, self.states)
        self.done += 1
        return rows.batch.to(self.device)

    def step(self, batch: Batch) -> StepResult:
        return train_step(self.model, batch, self.diffusion, self.optimizer, self.accelerator, ROWS // 2, 5.0, 1.0)


def curve(run: Run, num_steps: int) -> torch.Tensor:
    """Mean text and diffusion loss of every step [steps, 2]."""
    results = [run.step(run.batch()) for _ in range(num_steps)]
    return torch.stack([(result.loss_sums / result.counts).float().cpu() for result in results])


def test_loss_curves_of_both_devices_agree(byte_tokenizer) -> None:
    """200 steps on the same rows: bfloat16, compilation and other kernels change the curve less than its own noise."""
    host, gpu = (curve(Run(device, byte_tokenizer), 200) for device in ("cpu", "cuda"))
    noise = (host[1:] - host[:-1]).std(dim=0)
    assert ((gpu - host).abs().mean(dim=0) < 0.5 * noise).all()
    assert (host[-20:].mean(dim=0) < 0.9 * host[:20].mean(dim=0)).all(), "nothing was learnt, so nothing was compared"
    torch.testing.assert_close(gpu[-20:].mean(dim=0), host[-20:].mean(dim=0), rtol=0.02, atol=0.0)


def test_a_step_neither_waits_for_the_device_nor_compiles_again(byte_tokenizer) -> None:
    run = Run("cuda", byte_tokenizer)
    for _ in range(5):
        run.step(run.batch())
    batches = [run.batch() for _ in range(200)]
    torch.cuda.synchronize()
    counters.clear()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch._dynamo.config.patch(error_on_recompile=True):
            for batch in batches:
                run.step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert counters["stats"]["unique_graphs"] == 0
