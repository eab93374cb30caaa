"""Learning-rate schedules at their ends, decay groups, and a step by hand."""

import itertools
import math

import pytest
import torch
from conftest import tiny_config, tiny_model

from transfusion_mot.config import OptimizerConfig
from transfusion_mot.training.optimizer import lr_factor, make_optimizer, set_lr


def factors(num_steps: int, **changes) -> list[float]:
    config = OptimizerConfig(**changes)
    return [lr_factor(step, num_steps, config) for step in range(num_steps)]


def test_warm_up_is_linear_and_never_zero() -> None:
    assert factors(100, warmup_steps=10)[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factors(5, warmup_steps=0, lr_schedule="constant") == [1.0] * 5


def test_cosine_goes_from_the_peak_to_the_smallest() -> None:
    values = factors(111, warmup_steps=10, min_lr_ratio=0.1)
    assert values[10] == pytest.approx(1.0)
    assert values[-1] == pytest.approx(0.1)
    assert values[60] == pytest.approx((1 + 0.1) / 2)
    expected = [0.1 + 0.9 * (1 + math.cos(math.pi * i / 100)) / 2 for i in range(101)]
    assert values[10:] == pytest.approx(expected)


def test_wsd_is_flat_and_then_falls_in_a_line() -> None:
    values = factors(100, warmup_steps=10, lr_schedule="wsd", decay_fraction=0.2, min_lr_ratio=0.0)
    assert values[9:80] == pytest.approx([1.0] * 71)
    assert values[80] == pytest.approx(1.0)
    assert values[-1] == pytest.approx(0.0)
    steps = [one - two for one, two in itertools.pairwise(values[80:])]
    assert steps == pytest.approx([1 / 19] * 19)


@pytest.mark.parametrize("lr_schedule", ["cosine", "constant", "wsd"])
@pytest.mark.parametrize(("num_steps", "warmup_steps"), [(1, 0), (1, 10), (5, 5), (5, 10), (2, 1), (30, 29)])
def test_runs_shorter_than_their_warm_up_are_usable(lr_schedule: str, num_steps: int, warmup_steps: int) -> None:
    values = factors(num_steps, warmup_steps=warmup_steps, lr_schedule=lr_schedule)
    assert all(0 < value <= 1 for value in values)


def test_schedule_sets_the_rate_of_each_step() -> None:
    config = OptimizerConfig(lr=0.5, warmup_steps=3, weight_decay=0.0)
    parameter = torch.nn.Linear(1, 1)
    optimizer = make_optimizer(parameter, config)
    for step in (0, 11, 5):
        lr = set_lr(optimizer, config, step, 12)
        assert lr == pytest.approx(0.5 * lr_factor(step, 12, config))
        assert [group["lr"] for group in optimizer.param_groups] == [lr, lr]


def test_matrices_decay_and_norms_biases_and_embeddings_do_not() -> None:
    model = tiny_model(tiny_config(image_adapter="unet", unet_channels=[32, 32], unet_num_layers=1))
    optimizer = make_optimizer(model, OptimizerConfig(weight_decay=0.3))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, others = ([names[id(p)] for p in group["params"]] for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    assert sorted(decayed + others) == sorted(names.values()), "each parameter once"
    assert "token_embedding.weight" in others
    assert all("norm" in name or name.endswith("bias") or name == "token_embedding.weight" for name in others)
    assert not any("norm" in name or name.endswith("bias") for name in decayed)
    assert {"text_head.weight", "image_adapter.conv_in.weight", "blocks.0.qkv.owned.image.linear.weight"} <= set(
        decayed
    )


def test_frozen_parameters_are_left_out() -> None:
    model = tiny_model(tiny_config())
    model.token_embedding.weight.requires_grad_(False)
    model.text_head.weight.requires_grad_(False)
    count = sum(len(group["params"]) for group in make_optimizer(model, OptimizerConfig()).param_groups)
    assert count == len(list(model.parameters())) - 2


def test_adamw_step_by_hand() -> None:
    model = torch.nn.Linear(2, 1, dtype=torch.float64)
    weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
    config = OptimizerConfig(lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.5)
    optimizer = make_optimizer(model, config)
    model(torch.tensor([1.0, -3.0], dtype=torch.float64)).sum().backward()
    optimizer.step()
    # In the first step the moments, without their bias, are the gradient and its square.
    torch.testing.assert_close(model.weight.detach(), weight * (1 - 0.1 * 0.5) - 0.1 * torch.tensor([[1.0, -1.0]]))
    torch.testing.assert_close(model.bias.detach(), bias - 0.1)
