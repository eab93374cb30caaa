"""The averaged weights by hand, and the model that computes with them."""

import pytest
import torch
from conftest import make_rows, tiny_config, tiny_model

from transfusion_mot.training.ema import EMA


def test_average_moves_as_computed_by_hand() -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, 2.0)
    ema = EMA(model, 0.5)
    expected = 2.0
    for step, value in enumerate((10.0, -4.0, 6.0, 6.0, 6.0, 6.0, 6.0, 6.0, 6.0, 6.0, 6.0, 6.0)):
        torch.nn.init.constant_(model.weight, value)
        ema.update(model, step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
        assert ema.weights["weight"].item() == pytest.approx(expected, rel=1e-6)
        assert model.weight.item() == value, "the model itself does not move"
    assert not ema.weights["weight"].requires_grad
    # From the eighth step on (1 + 8) / (10 + 8) the asked-for decay is reached.
    assert decay == 0.5


@pytest.mark.parametrize("decay", [0.99, 0.999, 0.9999])
def test_seldom_updates_average_the_same_weights(decay: float) -> None:
    """Against an update after every step, over weights that drift and shake as those of a run."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.randn(20_000, 64, generator=generator)
    weights = steps.cumsum(0) + 10 * torch.randn(steps.shape, generator=generator)
    model = torch.nn.Linear(64, 1, bias=False)
    ema = EMA(model, decay)
    exact, updates = model.weight.detach()[0].clone(), 0
    for step, values in enumerate(weights):
        with torch.no_grad():
            model.weight.copy_(values)
        before = ema.weights["weight"].clone()
        ema.update(model, step)
        updates += int(not torch.equal(before, ema.weights["weight"]))
        exact.lerp_(values, 1 - min(decay, (1 + step) / (10 + step)))
    far = (weights[-1] - exact).norm()
    assert (ema.weights["weight"][0] - exact).norm() < 0.05 * far
    assert updates <= {0.99: 20_000, 0.999: 5_000, 0.9999: 4_500}[decay]


@pytest.mark.parametrize(("decay", "every"), [(0.99, 1), (0.998, 5), (0.999, 10), (0.9999, 16)])
def test_updates_come_as_often_as_documented(decay: float, every: int) -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    ema = EMA(model, decay)
    torch.nn.init.constant_(model.weight, 3.0)
    updated = []
    # Late enough for the whole decay.
    for step in range(100_000, 100_080):
        torch.nn.init.zeros_(ema.weights["weight"])
        ema.update(model, step)
        if ema.weights["weight"].item():
            updated.append(step + 1)
            assert ema.weights["weight"].item() == pytest.approx(3 * (1 - decay**every), rel=1e-4)
    assert updated == [step for step in range(100_001, 100_081) if step % every == 0]


def test_every_parameter_is_averaged() -> None:
    model = tiny_model(tiny_config())
    ema = EMA(model, 0.99)
    before = {name: weight.clone() for name, weight in ema.weights.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    ema.update(model, 10_000)
    assert before.keys() == dict(model.named_parameters()).keys()
    for name, weight in ema.weights.items():
        torch.testing.assert_close(weight, before[name] + 0.01, rtol=0, atol=1e-9)


def test_model_computes_with_the_averages_and_gets_its_weights_back() -> None:
    model, averaged = tiny_model(tiny_config()), tiny_model(tiny_config())
    ema = EMA(model, 0.9)
    with torch.no_grad():
        for parameter in averaged.parameters():
            parameter *= 0.5
        for name, weight in ema.weights.items():
            weight.copy_(averaged.get_parameter(name))
    rows = make_rows([[[3, "image", 2]]], {"text": 8, "image": 1})

    def logits(of: torch.nn.Module) -> torch.Tensor:
        return of(rows.inputs, rows.slots).predictions["text"]

    with torch.no_grad():
        own = logits(model)
        with ema.in_place_of(model):
            assert not model.training
            assert torch.equal(logits(model), logits(averaged))
        assert model.training
        assert torch.equal(logits(model), own)
    assert not torch.equal(own, logits(averaged))
    whole = ema.gathered(model, keep=True)
    assert all(torch.equal(whole[name], parameter) for name, parameter in averaged.named_parameters())
    assert ema.gathered(model, keep=False) == {}


def test_weights_come_back_after_an_error() -> None:
    model = tiny_model(tiny_config())
    ema = EMA(model, 0.9)
    before = [parameter.clone() for parameter in model.parameters()]
    torch._foreach_mul_(list(ema.weights.values()), 2)

    def fails() -> None:
        with ema.in_place_of(model):
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        fails()
    assert all(torch.equal(one, two) for one, two in zip(before, model.parameters(), strict=True))
