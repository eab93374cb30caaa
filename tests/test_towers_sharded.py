"""Towers and their optimizer where parameters are sharded over two processes, against one process with all of them."""

from pathlib import Path

import pytest
import torch
from conftest import tiny_config, tiny_model
from process_group import run_processes
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from transfusion_mot.config import OptimizerConfig
from transfusion_mot.errors import UserError
from transfusion_mot.models.transfusion import TransfusionMoT
from transfusion_mot.training.optimizer import make_optimizer
from transfusion_mot.training.step import clipped_step
from transfusion_mot.training.towers import freeze_towers, grad_norms

pytestmark = pytest.mark.slow

CONFIG = OptimizerConfig(lr=0.1, tower_lr_scale={"image": 0.5})


def draw_gradients(model: TransfusionMoT) -> None:
    for index, parameter in enumerate(model.parameters()):
        if not parameter.requires_grad:
            continue
        generator = torch.Generator().manual_seed(index)
        gradient = torch.randn(parameter.shape, generator=generator)
        if isinstance(parameter, DTensor):
            gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
        parameter.grad = gradient


def stepped(model: TransfusionMoT) -> list[torch.Tensor]:
    """Norms of gradients, then the parameters after a clipped step."""
    optimizer = make_optimizer(model, CONFIG)
    draw_gradients(model)
    total, norms = grad_norms(optimizer)
    clipped_step(optimizer, total, 0.5)
    parameters = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return [total, *norms.values(), *(parameter.detach().clone() for parameter in parameters)]


def compare() -> None:
    distributed.init_process_group("gloo")
    for frozen in ([], ["text"]):
        expected, sharded = (tiny_model(tiny_config(), dtype=torch.float32) for _ in range(2))
        for model in (expected, sharded):
            freeze_towers(model, frozen)
        for block in sharded.blocks:
            fully_shard(block)
        fully_shard(sharded)
        assert isinstance(sharded.modality("text").head.weight, DTensor)
        for one, two in zip(stepped(sharded), stepped(expected), strict=True):
            assert not isinstance(one, DTensor)
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
        with pytest.raises(UserError, match=r"optimizer\.name is muon"):
            make_optimizer(sharded, OptimizerConfig(name="muon"))


def test_norms_clipping_and_step_are_those_of_one_process(tmp_path: Path) -> None:
    run_processes(compare, 2, {}, tmp_path)
