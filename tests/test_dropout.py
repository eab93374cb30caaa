"""Dropout of a tower: what it drops, when, and that masks are the same when they are computed again."""

import json
from typing import Any

import pytest
import torch
from conftest import DENSE, make_rows, tiny_config, tiny_model
from test_pipeline import tiny_pipeline
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel

from transfusion_mot.config import RunConfig, TowerConfig, parse_config
from transfusion_mot.errors import UserError
from transfusion_mot.models.mot import Checkpointing
from transfusion_mot.models.transfusion import TransfusionMoT
from transfusion_mot.training.ema import EMA
from transfusion_mot.training.step import seed_step

pytestmark = pytest.mark.slow

# The second row is of text alone.
SPEC = [[[3, "image", 2], [2, "image", 4]], [[6]]]
ROWS = make_rows(SPEC, {"text": 12, "image": 2})


def model_with(text: float = 0.0, image: float = 0.0, **changes: Any) -> TransfusionMoT:
    towers = {"text": TowerConfig(16, 24, text), "image": TowerConfig(16, 24, image)}
    return tiny_model(tiny_config(towers=towers, **changes))


def outputs(model: TransfusionMoT, seed: int = 0) -> tuple[Tensor, Tensor]:
    seed_step(seed, 0, 0)
    output = model(ROWS.inputs, ROWS.slots)
    return output.predictions["text"], output.predictions["image"]


def same(one: tuple[Tensor, Tensor], two: tuple[Tensor, Tensor]) -> tuple[bool, bool]:
    return torch.equal(one[0], two[0]), torch.equal(one[1], two[1])


def test_elements_of_what_is_added_are_dropped_at_their_rate_and_the_mean_stays() -> None:
    """Seen from outside of the block: of what its modules return, what reaches the stream."""
    block = model_with(image=0.25).blocks[0]
    seen: dict[str, Tensor] = {}

    def record(name: str):
        return lambda _module, inputs, output: seen.update({f"{name} in": inputs[0], name: output})

    for tower in ("text", "image"):
        for component in ("output", "ffn_norm", "ffn"):
            getattr(block, component)[tower].register_forward_hook(record(f"{tower} {component}"))
    slots = {"text": 300, "image": 500}
    streams = {tower: torch.randn(4, count, 16, dtype=torch.float64) for tower, count in slots.items()}
    angles = torch.zeros(2, 4, 800, 1, 4)
    seed_step(0, 0, 0)
    result = block(streams, tuple(angles), torch.ones(4, 800, 800, dtype=torch.bool))
    dropped = []
    for tower, scale in (("text", 1.0), ("image", 1 / 0.75)):
        between = seen[f"{tower} ffn_norm in"]
        for reached, component in ((between - streams[tower], "output"), (result[tower] - between, "ffn")):
            zeros = reached == 0
            expected = (scale * seen[f"{tower} {component}"]).masked_fill(zeros, 0.0)
            torch.testing.assert_close(reached, expected, rtol=0, atol=1e-13)
            dropped.append(zeros)
    assert not (dropped[0] | dropped[1]).any(), "of text"
    for zeros in dropped[2:]:
        # 32,000 draws: six deviations.
        assert zeros.double().mean().item() == pytest.approx(0.25, abs=6 * (0.25 * 0.75 / 32000) ** 0.5)
    both = (dropped[2] & dropped[3]).double().mean().item()
    assert both == pytest.approx(0.0625, abs=0.01), "drawn independently"


def test_it_is_off_at_zero_and_outside_of_training() -> None:
    expected = outputs(model_with())
    assert same(outputs(model_with(), seed=1), expected) == (True, True)
    model = model_with(text=0.5, image=0.5)
    assert same(outputs(model), outputs(model)) == (True, True)
    assert same(outputs(model), outputs(model, seed=1)) == (False, False)
    assert same(outputs(model), expected) == (False, False)
    # As validation, samples and the gradients of a model that is not trained see it.
    with EMA(model, 0.9).in_place_of(model):
        assert same(outputs(model), expected) == (True, True)
    assert same(outputs(model), expected) == (False, False)
    assert same(outputs(model.eval()), expected) == (True, True)


def test_only_the_tower_that_has_it_drops() -> None:
    expected, found = outputs(model_with()), outputs(model_with(image=0.5))
    assert same(found, expected) == (False, False), "text reads images"
    assert torch.equal(found[0][1, :6], expected[0][1, :6]), "a document without images"
    assert not torch.equal(outputs(model_with(text=0.5))[0][1, :6], expected[0][1, :6])


def test_pipeline_of_a_model_in_training_mode_paints_without_it() -> None:
    pipeline = tiny_pipeline()
    expected = pipeline("a sun", generator=torch.Generator().manual_seed(0), output_type="np").images
    config = pipeline.transformer.config
    towers = {name: sizes | {"dropout": 0.5} for name, sizes in config.architecture["towers"].items()}
    model = TransfusionMoT(config.sizes, config.architecture | {"towers": towers}, config.diffusion)
    model.load_state_dict(pipeline.transformer.state_dict())
    found = tiny_pipeline(transformer=model.train())
    images = found("a sun", generator=torch.Generator().manual_seed(0), output_type="np").images
    assert (images == expected).all()


def test_saved_model_keeps_it_and_one_saved_without_has_none(tmp_path) -> None:
    model_with(image=0.5).float().save_pretrained(tmp_path)
    again = TransfusionMoT.from_pretrained(tmp_path)
    assert again.architecture.towers["image"].dropout == 0.5
    assert not again.training
    config = json.loads((tmp_path / "config.json").read_text())
    for sizes in config["architecture"]["towers"].values():
        del sizes["dropout"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert TransfusionMoT.from_pretrained(tmp_path).architecture.towers["image"].dropout == 0.0


# --- The same masks again. ---


def gradients(model: TransfusionMoT) -> list[Tensor]:
    model.zero_grad()
    logits, prediction = outputs(model)
    (logits.sin().mean() + prediction.sin().mean()).backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_what_is_computed_again_drops_the_same(checkpointing: Checkpointing) -> None:
    model = model_with(text=0.3, image=0.5, num_layers=3)
    expected = gradients(model)
    model.checkpoint_activations(checkpointing)
    assert all(torch.equal(one, two) for one, two in zip(gradients(model), expected, strict=True))


@sdpa_kernel(SDPBackend.MATH)  # torch 2.11 compiles no backward pass of the flash kernel in float64.
def test_compiled_blocks_drop_by_the_seed_and_have_the_gradient_of_what_they_return() -> None:
    """A compiled block draws other masks than an eager one; with them fixed, its gradient is the slope.

    With all of it computed again: without, a gradient is of fewer draws.
    """
    # One tower and no norm of heads: half of the kernels, each of which takes a second of the C++ compiler.
    tower = {"towers": {"shared": TowerConfig(16, 24, 0.5)}, "modalities": DENSE["modalities"]}
    model = tiny_model(tiny_config(**tower, qk_norm=False))
    direction = [torch.randn_like(parameter) for parameter in model.parameters()]
    model.checkpoint_activations("full")
    counters.clear()
    model.compile_blocks()
    found = gradients(model)
    assert counters["stats"]["unique_graphs"] <= 1, "one compilation serves all blocks"
    assert same(outputs(model), outputs(model)) == (True, True)
    assert same(outputs(model), outputs(model, seed=1)) == (False, False)
    values = []
    for distance in (1e-6, -2e-6):
        with torch.no_grad():
            torch._foreach_add_(list(model.parameters()), direction, alpha=distance)
        values.append(sum(part.sin().mean().item() for part in outputs(model)))
    slope = sum((gradient * d).sum().item() for gradient, d in zip(found, direction, strict=True))
    assert slope == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5)


def test_every_step_and_process_has_draws_of_its_own() -> None:
    def draw(*numbers: int) -> Tensor:
        seed_step(*numbers)
        return torch.rand(4)

    drawn = [draw(0, 0, 0), draw(0, 0, 1), draw(0, 1, 0), draw(1, 0, 0)]
    assert len({tuple(values.tolist()) for values in drawn}) == 4
    assert torch.equal(draw(0, 0, 1), drawn[1])


@pytest.mark.parametrize("value", ["1.0", "-0.1", ".nan"])
def test_rate_that_no_tower_can_have_is_refused(value: str) -> None:
    towers = f"{{text: {{dropout: 0.1}}, image: {{dropout: {value}}}}}"
    with pytest.raises(UserError, match=r"model\.towers\.image\.dropout is \S+; it must be at least 0 and below 1"):
        parse_config(RunConfig, [f"model.towers={towers}"], "")
