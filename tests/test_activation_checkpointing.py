"""Activation checkpointing: the same gradients from fewer kept tensors, in eager mode and compiled."""

import copy
import functools

import pytest
import torch
from conftest import DENSE, Rows, make_rows, tiny_config, tiny_model
from torch import Tensor
from torch._dynamo.utils import counters

from transfusion_mot.models.mot import Checkpointing

pytestmark = pytest.mark.slow

SPEC = [[[3, "image", 2], [2, "image", 4]], [[6]]]
COUNTS = {"text": 12, "image": 2}


def gradients(model: torch.nn.Module, rows: Rows) -> tuple[list[Tensor], int]:
    """Gradients of a random functional of both outputs, and elements that the blocks kept for them."""
    kept: dict[int, int] = {}
    parameters = {parameter.data_ptr() for parameter in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in parameters:
            kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        predictions = model(rows.inputs, rows.slots).predictions
    sum(prediction.sin().sum() for prediction in predictions.values()).backward()
    return [parameter.grad.clone() for parameter in model.parameters()], sum(kept.values())


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
@pytest.mark.parametrize("changes", [{}, DENSE, {"untied": ["ffn"], "num_kv_heads": 1}], ids=["mot", "dense", "partly"])
def test_gradients_are_bitwise_those_without(changes: dict, checkpointing: Checkpointing) -> None:
    model = tiny_model(tiny_config(num_layers=3, **changes))
    rows = make_rows(SPEC, COUNTS)
    expected, _ = gradients(model, rows)
    model.checkpoint_activations(checkpointing)
    found, _ = gradients(model, rows)
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))


def test_less_is_kept_the_more_is_computed_again() -> None:
    """Not counting what selective checkpointing keeps aside, which the hooks do not see: that has its own test."""
    model = tiny_model(tiny_config(num_layers=3))
    rows = make_rows(SPEC, COUNTS)
    everything = gradients(model, rows)[1]
    model.checkpoint_activations("full")
    assert gradients(model, rows)[1] < everything / 3


class MatrixProducts(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts matrix products and attentions."""

    def __init__(self) -> None:
        super().__init__()
        self.products, self.attentions = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.products += func is torch.ops.aten.mm.default
        self.attentions += "scaled_dot_product" in func.name() and "backward" not in func.name()
        return func(*args, **(kwargs or {}))


def test_selective_computes_no_product_and_no_attention_twice() -> None:
    counts = {}
    for checkpointing in ("none", "selective", "full"):
        model = tiny_model(tiny_config(num_layers=3), dtype=torch.float32)
        model.checkpoint_activations(checkpointing)
        with MatrixProducts() as counted:
            gradients(model, make_rows(SPEC, COUNTS, dtype=torch.float32))
        counts[checkpointing] = counted.products, counted.attentions
    assert counts["selective"] == counts["none"]
    # Three blocks, two towers, five products; nothing needs what the last one returns, so that it is left out.
    assert counts["full"][0] - counts["none"][0] == 3 * (2 * 5 - 1)
    assert counts["full"][1] - counts["none"][1] == 3


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_compiled_blocks_have_the_same_gradients(checkpointing: Checkpointing, monkeypatch: pytest.MonkeyPatch) -> None:
    # What is kept is decided before any code is made, which takes a minute: this backend makes none.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager_decomp_partition"))
    model = tiny_model(tiny_config(num_layers=3))
    rows = make_rows(SPEC, COUNTS)
    expected, _ = gradients(model, rows)
    compiled = copy.deepcopy(model)
    compiled.checkpoint_activations(checkpointing)
    counters.clear()
    compiled.compile_blocks()
    for one, two in zip(gradients(compiled, rows)[0], expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-11)
    assert counters["stats"]["unique_graphs"] <= 1, "one compilation serves all blocks"


def test_nothing_is_checkpointed_without_gradients() -> None:
    model = tiny_model(tiny_config())
    rows = make_rows(SPEC, COUNTS)
    with torch.no_grad():
        expected = model(rows.inputs, rows.slots).predictions["text"]
        model.checkpoint_activations("full")
        assert torch.equal(model(rows.inputs, rows.slots).predictions["text"], expected)
