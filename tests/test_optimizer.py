"""Learning-rate schedules at their ends, decay groups, and the averaged weights by hand."""

import dataclasses
import itertools
import math
from pathlib import Path

import pytest
import torch
from conftest import DENSE, tiny_config, tiny_model

from transfusion_mot.config import OptimizerConfig, RunConfig, parse_config
from transfusion_mot.errors import UserError
from transfusion_mot.training.ema import EMA
from transfusion_mot.training.muon import StackedMuon
from transfusion_mot.training.optimizer import lr_factor, make_optimizer, set_lr
from transfusion_mot.training.state import StateWriter, load_tensors, state_tensors
from transfusion_mot.training.step import clipped_step
from transfusion_mot.training.tower_settings import check_towers
from transfusion_mot.training.towers import freeze_towers, grad_norms, tower_of


def saved(run: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Path:
    """The folder of a training state."""
    with StateWriter(run, keep_last=1, keep_every=0) as writer:
        lanes = torch.zeros(1, 1, dtype=torch.long)
        writer.save(1, state_tensors(model, EMA(model, 0.9), optimizer, lanes), {})
    return run / "state" / "step-0000001"


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


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_schedule_sets_the_rate_of_each_step_times_that_of_the_tower(name: str) -> None:
    config = OptimizerConfig(name=name, lr=0.5, warmup_steps=3, tower_lr_scale={"image": 0.25})
    optimizer = make_optimizer(tiny_model(tiny_config()), config)
    for step in (0, 11, 5):
        lr = set_lr(optimizer, config, step, 12)
        assert lr == pytest.approx(0.5 * lr_factor(step, 12, config))
        rates = {(group["tower"], group["lr"]) for group in optimizer.param_groups}
        assert rates == {("text", lr), ("image", lr / 4)}


def test_matrices_decay_and_norms_biases_and_embeddings_do_not() -> None:
    model = tiny_model(tiny_config(image={"adapter": "unet", "unet_channels": [32, 32], "unet_num_layers": 1}))
    optimizer = make_optimizer(model, OptimizerConfig(weight_decay=0.3))
    names: dict[float, list[str]] = {0.3: [], 0.0: []}
    for group in optimizer.param_groups:
        names[group["weight_decay"]] += group["param_names"]
    decayed, others = names.values()
    assert sorted(decayed + others) == sorted(name for name, _ in model.named_parameters()), "each parameter once"
    assert "modalities.text.embedding.weight" in others
    assert all("norm" in name or name.endswith("bias") or name == "modalities.text.embedding.weight" for name in others)
    assert not any("norm" in name or name.endswith("bias") for name in decayed)
    assert {
        "modalities.text.head.weight",
        "modalities.image.adapter.conv_in.weight",
        "blocks.0.qkv.owned.image.linear.weight",
    } <= set(decayed)


PARTLY_SHARED = {"untied": ["norm", "ffn"]}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"text": {"text.embedding", "text.head", "text"}, "image": {"image.adapter", "image"}}),
        (DENSE, {"shared": {"text.embedding", "text.head", "image.adapter", "shared"}}),
        (
            PARTLY_SHARED,
            {
                "text": {"text.embedding", "text.head", "text"},
                "image": {"image.adapter", "image"},
                "shared": {"shared"},
            },
        ),
    ],
)
def test_every_parameter_has_the_tower_that_owns_it(changes: dict, expected: dict[str, set[str]]) -> None:
    config = tiny_config(**changes)
    found: dict[str, set[str]] = {}
    for name, _ in tiny_model(config).named_parameters():
        part = name.split(".owned.")[1].split(".")[0] if ".owned." in name else ".".join(name.split(".")[1:3])
        found.setdefault(tower_of(name, config), set()).add(part)
    assert found == expected


def draw_gradients(model: torch.nn.Module) -> None:
    """Random ones; matrices have no singular value near zero, which Newton-Schulz would not lift to one."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            drawn = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            if drawn.ndim == 2:
                # Sixteen rows are queries, or keys and values.
                drawn = torch.cat([orthogonal(part) for part in drawn.split(16)])
                drawn *= torch.linspace(0.5, 1.5, drawn.shape[1], dtype=drawn.dtype)
            parameter.grad = drawn


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_frozen_tower_stays_and_leaves_nothing_in_the_optimizer(name: str) -> None:
    model = tiny_model(tiny_config())
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    freeze_towers(model, ["text"])
    optimizer = make_optimizer(model, OptimizerConfig(name=name, weight_decay=0.5))
    draw_gradients(model)
    optimizer.step()
    moved = {key for key, p in model.named_parameters() if not torch.equal(p, before[key])}
    assert moved == {key for key in before if tower_of(key, model.architecture) == "image"}
    assert len(optimizer.state_dict()["state"]) == len(moved)


def test_adamw_step_by_hand() -> None:
    model = tiny_model(tiny_config())
    weight, bias = model.modality("text").head.weight, model.modality("image").adapter.output.bias
    before = weight.detach().clone(), bias.detach().clone()
    optimizer = make_optimizer(model, OptimizerConfig(lr=0.1, weight_decay=0.5))
    weight.grad, bias.grad = torch.full_like(weight, -3.0), torch.full_like(bias, 2.0)
    optimizer.step()
    # In the first step the moments, without their bias, are the gradient and its square.
    torch.testing.assert_close(weight.detach(), before[0] * (1 - 0.1 * 0.5) + 0.1)
    torch.testing.assert_close(bias.detach(), before[1] - 0.1)


def orthogonal(gradient: torch.Tensor) -> torch.Tensor:
    """U V^T of a singular value decomposition."""
    left, _, right = torch.linalg.svd(gradient, full_matrices=False)
    return left @ right


def test_muon_makes_the_update_of_each_block_matrix_orthogonal() -> None:
    """Queries, keys and values apart; at the size of AdamW's. The rest is AdamW's."""
    config = tiny_config(num_kv_heads=1)
    model = tiny_model(config, dtype=torch.float32)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    draw_gradients(model)
    gradients = {key: p.grad.clone() for key, p in model.named_parameters()}
    make_optimizer(model, OptimizerConfig(name="muon", lr=0.1, weight_decay=0.5)).step()
    twin = tiny_model(config, dtype=torch.float32)
    draw_gradients(twin)
    make_optimizer(twin, OptimizerConfig(lr=0.1, weight_decay=0.5)).step()
    seen = 0
    for (key, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        if not (key.startswith("blocks.") and parameter.ndim == 2):
            assert torch.equal(parameter, other), key
            continue
        seen += 1
        update = (before[key] * (1 - 0.1 * 0.5) - parameter.detach()) / 0.1
        rows = [16, 8, 8] if ".qkv." in key else [len(update)]
        assert sum(rows) == len(update)
        for part, gradient in zip(update.split(rows), gradients[key].split(rows), strict=True):
            size = 0.2 * max(part.shape) ** 0.5
            # Newton-Schulz in bfloat16 takes singular values to about 0.7 to 1.2, not to 1.
            values = torch.linalg.svdvals(part / size)
            assert values.min() > 0.6, key
            assert values.max() < 1.3, key
            cosine = torch.nn.functional.cosine_similarity(part.flatten(), orthogonal(gradient).flatten(), dim=0)
            assert cosine > 0.95, key
    assert seen == 2 * 2 * 5


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_saved_optimizer_goes_on_as_if_it_had_never_stopped(name: str, tmp_path: Path) -> None:
    """Also where the learning rate of a tower, and with it the order of groups, is another one."""
    config = OptimizerConfig(name=name, lr=0.01, betas=(0.9, 0.95))
    whole, resumed = (tiny_model(tiny_config(), dtype=torch.float32) for _ in range(2))
    optimizer = make_optimizer(whole, config)
    draw_gradients(whole)
    optimizer.step()
    saved(tmp_path, whole, optimizer)
    resumed.load_state_dict(whole.state_dict())
    other = dataclasses.replace(config, weight_decay=0.3, betas=(0.8, 0.9), tower_lr_scale={"text": 0.5})
    again = make_optimizer(resumed, other)
    load_tensors(tmp_path / "state" / "step-0000001", resumed, EMA(resumed, 0.9), again)
    assert {group["weight_decay"] for group in again.param_groups} == {0.3, 0.0}
    assert next(group["betas"] for group in again.param_groups if "betas" in group) == (0.8, 0.9)
    again = make_optimizer(resumed, config)
    load_tensors(tmp_path / "state" / "step-0000001", resumed, EMA(resumed, 0.9), again)
    for _ in range(2):
        optimizer.step()
        draw_gradients(resumed)
        again.step()
    for one, two in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, two)


def test_tower_set_free_starts_without_moments_and_the_other_keeps_its_own(tmp_path) -> None:
    model = tiny_model(tiny_config())
    freeze_towers(model, ["text"])
    first = make_optimizer(model, OptimizerConfig())
    draw_gradients(model)
    first.step()
    freeze_towers(model, [])
    second = make_optimizer(model, OptimizerConfig())
    load_tensors(saved(tmp_path, model, first), model, EMA(model, 0.9), second)
    adapter = model.modality("image").adapter.input.weight
    assert torch.equal(second.state[adapter]["exp_avg"], first.state[adapter]["exp_avg"])
    assert model.modality("text").head.weight not in second.state
    second.step()


def test_gradient_norms_of_towers_and_of_the_whole() -> None:
    model = tiny_model(tiny_config())
    optimizer = make_optimizer(model, OptimizerConfig())
    draw_gradients(model)
    squares: dict[str, float] = {"text": 0.0, "image": 0.0}
    for name, parameter in model.named_parameters():
        squares[tower_of(name, model.architecture)] += float((parameter.grad**2).sum())
    total, norms = grad_norms(optimizer)
    assert {tower: float(norm) ** 2 for tower, norm in norms.items()} == pytest.approx(squares)
    assert float(total) ** 2 == pytest.approx(sum(squares.values()))


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_step_is_that_of_gradients_clipped_by_torch(name: str, max_norm: float) -> None:
    one, two = tiny_model(tiny_config(), dtype=torch.float32), tiny_model(tiny_config(), dtype=torch.float32)
    # Large, so that an update depends on the size of a gradient.
    config = OptimizerConfig(name=name, eps=0.1)
    for model in (one, two):
        draw_gradients(model)
    optimizer = make_optimizer(one, config)
    total, _ = grad_norms(optimizer)
    assert 0.5 < total < 1e6
    clipped_step(optimizer, total, max_norm)
    torch.nn.utils.clip_grad_norm_(two.parameters(), max_norm)
    make_optimizer(two, config).step()
    for ours, theirs in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["training.frozen_towers=[video]"], ["training.frozen_towers", "video", "text, image"]),
        (["optimizer.tower_lr_scale={vidoe: 0.5}"], ["optimizer.tower_lr_scale", "vidoe", "text, image"]),
        (["optimizer.tower_lr_scale={shared: 0.5}"], ["shared"]),
        (["training.frozen_towers=[image, text]"], ["training.frozen_towers", "whole model"]),
        (["optimizer.tower_lr_scale={image: 0}"], ["optimizer.tower_lr_scale", "above 0"]),
    ],
)
def test_towers_that_cannot_be_are_refused(arguments: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        check_towers(parse_config(RunConfig, arguments, ""))
    assert all(word in str(error.value) for word in words)


def test_shared_components_are_a_tower_of_their_own() -> None:
    check_towers(parse_config(RunConfig, ["model.untied=[ffn]", "training.frozen_towers=[text, shared]"], ""))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_muon_of_many_matrices_is_that_of_torch_one_by_one(weight_decay: float) -> None:
    """Tall, wide and square ones, some of one shape; a rate on the device gives the same as one on the host."""
    shapes = [(24, 16), (24, 16), (16, 24), (16, 16), (24, 16)]
    torch.manual_seed(0)
    first = [torch.randn(shape) for shape in shapes]
    runs = []
    for make, lr in ((torch.optim.Muon, 0.02), (StackedMuon, 0.02), (StackedMuon, torch.tensor(0.02))):
        parameters = [torch.nn.Parameter(tensor.clone()) for tensor in first]
        settings = {"adjust_lr_fn": "match_rms_adamw"} if make is torch.optim.Muon else {}
        groups = [{"params": parameters, "row_splits": [], "weight_decay": weight_decay}]
        optimizer = make(groups, lr=0.02, **settings)
        optimizer.param_groups[0]["lr"] = lr
        generator = torch.Generator().manual_seed(1)
        for _ in range(3):
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
        runs.append(parameters)
    for one, ours, on_device, before in zip(*runs, first, strict=True):
        # Products in bfloat16 are rounded in another order: 1 % of an update.
        assert (one - ours).norm() < 0.02 * (one - before).norm()
        torch.testing.assert_close(ours, on_device)
