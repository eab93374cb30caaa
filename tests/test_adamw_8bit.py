"""AdamW with 8-bit moments, against the update of torchao."""

import importlib.util
from pathlib import Path

import pytest
import torch
from conftest import tiny_config, tiny_model
from test_losses import make_batch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor

from transfusion_mot.config import OptimizerConfig
from transfusion_mot.errors import UserError
from transfusion_mot.reporting.memory import bytes_of_moments
from transfusion_mot.training.adamw_8bit import AdamW8bit, has_codes
from transfusion_mot.training.checkpoint import find_state
from transfusion_mot.training.ema import EMA
from transfusion_mot.training.optimizer import make_optimizer, set_lr
from transfusion_mot.training.state import StateWriter, load_tensors, state_tensors
from transfusion_mot.training.step import clipped_step, loss_terms
from transfusion_mot.training.towers import grad_norms

needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")
# Two have codes; one is too small for them, one is no multiple of 256, one both.
SHAPES = ((64, 128), (16, 256), (7,), (100, 33), (4, 64))
BETAS, EPS, DECAY = (0.9, 0.95), 1e-8, 0.1


def optimizer_of(parameters: list[nn.Parameter]) -> AdamW8bit:
    named = [(str(number), parameter) for number, parameter in enumerate(parameters)]
    return AdamW8bit([{"params": named, "weight_decay": DECAY}], 1e-2, BETAS, EPS)


@needs_torchao
def test_steps_are_those_of_torchao_bit_for_bit() -> None:
    """Divided gradients, changed learning rates and a skipped step included."""
    from torchao.optim.adam import single_param_adam
    from torchao.optim.subclass_8bit import OptimState8bit

    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    assert [has_codes(parameter) for parameter in ours] == [True, True, False, False, False]
    theirs = [parameter.detach().clone() for parameter in ours]
    states = [
        [OptimState8bit.zeros(p.shape, signed) if has_codes(p) else torch.zeros_like(p) for signed in (True, False)]
        for p in theirs
    ]
    optimizer = optimizer_of(ours)
    for step in range(12):
        lr, scale = 0.01 / (1 + step), 1.0 + step % 3
        for own, other, moments in zip(ours, theirs, states, strict=True):
            grad = torch.randn_like(own) * 10 ** (step % 4)
            own.grad = grad * scale
            count = torch.tensor(1.0 + step)
            settings = (torch.tensor(lr), *BETAS, DECAY, EPS, True, False)
            single_param_adam(other, own.grad / scale, count, *moments, None, *settings)
        if step == 6:
            before = [own.detach().clone() for own in ours]
            kept = [grad.grad for grad in ours]
            optimizer.found_inf = torch.tensor(1.0)
            for own in ours:
                own.grad = torch.full_like(own, float("nan"))
            optimizer.step()
            assert all(torch.equal(own, value) for own, value in zip(ours, before, strict=True))
            for own, grad in zip(ours, kept, strict=True):
                own.grad = grad
        optimizer.found_inf, optimizer.grad_scale = torch.tensor(0.0), torch.tensor(scale)
        optimizer.param_groups[0]["lr"].fill_(lr)
        optimizer.step()
        assert all(torch.equal(own, other) for own, other in zip(ours, theirs, strict=True)), step
    for own, (average, square) in zip(ours[:2], states, strict=False):
        state = optimizer.state[own]
        assert torch.equal(state["exp_avg"], average.codes)
        assert torch.equal(state["exp_avg_sq_scale"], square.scale)
        size = sum(value.nbytes for key, value in state.items() if key != "step")
        assert size == bytes_of_moments(own, "adamw_8bit", in_block=True) < own.nbytes / 1.9


@needs_torchao
def test_it_is_about_adamw_and_goes_on_exactly(tmp_path: Path) -> None:
    """Losses of a tiny model compared with AdamW: three steps, a saved state, and three more steps."""
    batch, towers = make_batch(dtype=torch.float32), {"hidden_size": 64, "intermediate_size": 128}

    def trained(name: str, steps: range, state: Path | None = None, save: Path | None = None) -> list[Tensor]:
        config = tiny_config()
        for tower in config.towers.values():
            vars(tower).update(towers)
        model = tiny_model(config, dtype=torch.float32)
        settings = OptimizerConfig(name, lr=1e-3, warmup_steps=0)
        optimizer, ema = make_optimizer(model, settings), EMA(model, 0.9)
        if state is not None:
            load_tensors(find_state(state, "auto"), model, ema, optimizer)
        losses = []
        for step in steps:
            set_lr(optimizer, settings, step, 20)
            total = sum(term.loss for term in loss_terms(model, batch).values())
            total.backward()
            clipped_step(optimizer, grad_norms(optimizer)[0], 1.0)
            optimizer.zero_grad()
            losses.append(total.detach())
        if save is not None:
            with StateWriter(save, 1, 0) as writer:
                writer.save(steps.stop, state_tensors(model, ema, optimizer, torch.arange(2)), {"step": steps.stop})
        return losses

    whole = trained("adamw_8bit", range(6))
    parts = trained("adamw_8bit", range(3), save=tmp_path) + trained("adamw_8bit", range(3, 6), state=tmp_path)
    assert torch.equal(torch.stack(whole), torch.stack(parts))
    expected = torch.stack(trained("adamw", range(6)))
    assert expected[-1] < 0.99 * expected[0]
    torch.testing.assert_close(torch.stack(whole), expected, rtol=2e-3, atol=0)


def test_a_missing_package_and_sharded_parameters_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    parameter = nn.Parameter(torch.zeros(4, 4))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"adamw_8bit, which needs the package torchao: pip install"):
        optimizer_of([parameter])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        sharded = nn.Parameter(distribute_tensor(torch.zeros(4, 4), init_device_mesh("cpu", (1,))))
        with pytest.raises(UserError, match="use adamw with FSDP, or adamw_8bit with DDP"):
            optimizer_of([sharded])
    finally:
        torch.distributed.destroy_process_group()
