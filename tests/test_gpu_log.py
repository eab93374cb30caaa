"""On the GPU: the log and the guards read results of a step without waiting for the device."""

import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import loader_of
from test_guards import Run, normal_latents

from transfusion_mot.config import RunConfig, TrainingConfig
from transfusion_mot.training.log import RunLog
from transfusion_mot.training.metrics import METRICS_FILE, read_metrics
from transfusion_mot.training.parallel import make_accelerator
from transfusion_mot.training.step import train_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
STEPS = 6


def train(tokenizer, folder: Path, bad: bool) -> None:
    """A few steps, logged at their end; after the first one a wait for the device is an error."""
    accelerator = make_accelerator(TrainingConfig(num_rows=4, mixed_precision="no", tracker=None), folder)
    latents = normal_latents()
    if bad:
        latents[3] = np.nan
    run = Run(tokenizer, accelerator, latents, on_non_finite="skip")
    guards = run.new_guards(range(4))
    config = RunConfig(training=TrainingConfig(num_rows=4, tracker=None))
    config.model = run.model.architecture
    log = RunLog(accelerator, folder, config, model=run.model, sources=run.packer.sources, first_step=0, seen={})
    optimizer = torch.optim.AdamW(run.model.parameters(), lr=1e-3, fused=True)
    before = [parameter.detach().clone() for parameter in run.model.parameters()]
    loader = loader_of(run.packer, STEPS, device=accelerator.device, encoder=run.encoder)
    loss_weights = {name: modality.loss_weight for name, modality in config.model.modalities.items()}
    for step, (batch, counts) in enumerate(loader, 1):
        result = train_step(
            run.model, batch, optimizer, accelerator, loss_weights=loss_weights, microbatch_rows=2, max_grad_norm=1.0
        )
        log.add(result, batch, counts, loader.seconds_waited)
        guards.add(step, batch, loader.states_before)
        torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")
    interval = log.collect()
    noticed = guards.check(interval.steps)
    log.write(interval, 1e-3, noticed)
    moved = any(not torch.equal(one, two) for one, two in zip(before, run.model.parameters(), strict=True))
    assert (noticed["skipped_steps"], moved) == ((STEPS, False) if bad else (0, True))


@pytest.mark.parametrize("bad", [False, True])
def test_steps_are_logged_without_waiting(byte_tokenizer, tmp_path: Path, bad: bool) -> None:
    process = multiprocessing.get_context("spawn").Process(target=train, args=(byte_tokenizer, tmp_path, bad))
    process.start()
    process.join(300)
    assert process.exitcode == 0
    (line,) = read_metrics(tmp_path / METRICS_FILE)
    assert line["skipped_steps"] == (STEPS if bad else 0)
    if not bad:
        assert line["text_loss"] == pytest.approx(5.5, abs=0.5)
        # Of a device whose peak is known.
        assert "mfu" not in line or 0 < line["mfu"] < 1
        assert line["peak_memory_gib"] > 0
