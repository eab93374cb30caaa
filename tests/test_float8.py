"""8-bit matrix products: what is converted, how near it is, whole runs with it, and where it is refused.

torch multiplies 8-bit numbers on the CPU, too; it is asked for on GPUs alone, where it is fast.
"""

import copy
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import DENSE, Rows, make_rows, tiny_config, tiny_model
from process_group import FSDP2, run_processes
from safetensors.torch import load_file
from test_gpu_training import Run, curve
from test_guards import CAPTIONS, normal_latents
from test_guards import Run as GuardedRun
from test_train import interrupt_after
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._functorch.partitioners import min_cut_rematerialization_partition
from training_runs import final_state

import train
from transfusion_mot.config import RunConfig, TowerConfig, TrainingConfig
from transfusion_mot.errors import NotFiniteError, UserError
from transfusion_mot.models.mot import Checkpointing
from transfusion_mot.models.transfusion import TransfusionMoT
from transfusion_mot.pipeline import TransfusionPipeline
from transfusion_mot.run import data as run_data
from transfusion_mot.training import float8
from transfusion_mot.training.float8 import check_float8, convert_to_float8
from transfusion_mot.training.metrics import read_metrics

pytestmark = pytest.mark.slow

needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")

SPEC = [[[3, "image", 2], [2, "image", 4]], [[6]]]
COUNTS = {"text": 12, "image": 2}
WIDE = {"towers": {name: TowerConfig(64, 128) for name in ("text", "image")}, "head_dim": 32}


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def converted_layers(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if type(module).__name__ == "Float8Linear"}


@needs_torchao
@pytest.mark.parametrize(
    "changes", [{}, DENSE, {"untied": ["ffn"]}, {"image": {"adapter": "unet", "unet_channels": [32, 32]}}],
    ids=["mot", "dense", "partly", "unet"],
)  # fmt: skip
def test_exactly_the_linear_layers_of_the_blocks_are_converted(changes: dict) -> None:
    model = tiny_model(tiny_config(**changes))
    linears = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    parameters, names = dict(model.named_parameters()), list(model.state_dict())
    convert_to_float8(model)
    assert converted_layers(model) == {name for name in linears if name.startswith("blocks.")}
    assert "modalities.text.head" in linears - converted_layers(model)
    assert list(model.state_dict()) == names
    after = dict(model.named_parameters())
    assert list(after) == list(parameters)
    assert all(after[name] is parameter for name, parameter in parameters.items())


def predicted(model: TransfusionMoT, rows: Rows) -> dict[str, torch.Tensor]:
    return model(rows.inputs, rows.slots).predictions


def relative_error(expected: torch.Tensor, found: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def rounded(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """To 8 bits and back, with the scale that makes the largest of a tensor the largest of its format."""
    scale = torch.finfo(dtype).max / tensor.abs().max()
    return (tensor * scale).to(dtype).float() / scale


@needs_torchao
def test_layer_multiplies_what_is_rounded_by_hand() -> None:
    model = tiny_model(tiny_config(**WIDE), dtype=torch.float32)
    convert_to_float8(model)
    layer = model.get_submodule("blocks.0.ffn.owned.text.up")
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(2, 16, 64, generator=generator).requires_grad_()
    output_gradient = torch.randn(2, 16, 128, generator=generator)
    output = layer(hidden)
    output.backward(output_gradient)
    x, weight = (rounded(tensor.detach(), torch.float8_e4m3fn) for tensor in (hidden, layer.weight))
    gradient = rounded(output_gradient, torch.float8_e5m2)
    assert relative_error(x @ weight.T, output) < 1e-4
    assert relative_error(gradient @ weight, hidden.grad) < 1e-4
    assert relative_error(gradient.flatten(0, 1).T @ x.flatten(0, 1), layer.weight.grad) < 1e-4
    # A few percent of what float32 gives.
    assert 0.01 < relative_error(hidden @ layer.weight.T, output) < 0.06


@needs_torchao
@pytest.mark.parametrize("changes", [WIDE, {**WIDE, "untied": ["ffn"]}], ids=["mot", "partly"])
def test_outputs_and_gradients_are_near_the_plain_ones(changes: dict) -> None:
    """With weights that are all random, which amplify errors more than those of a new or trained model."""
    plain = tiny_model(tiny_config(**changes), dtype=torch.float32)
    model = copy.deepcopy(plain)
    convert_to_float8(model)
    rows = make_rows(SPEC, COUNTS, dtype=torch.float32)
    outputs = [predicted(one, rows) for one in (plain, model)]
    for output in outputs:
        sum(prediction.sin().sum() for prediction in output.values()).backward()
    assert outputs[0].keys() == outputs[1].keys() == COUNTS.keys()
    assert all(0.005 < relative_error(outputs[0][name], outputs[1][name]) < 0.15 for name in COUNTS)
    gradients = [torch.cat([weight.grad.flatten() for weight in one.parameters()]) for one in (plain, model)]
    assert relative_error(*gradients) < 0.2
    # Of one weight alone: large terms cancel in the norms of queries, so that an activation which another processor
    # rounds to the next 8-bit number shows there. A gradient that is missing has an error of 1.
    for (name, one), two in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert relative_error(one.grad, two.grad) < 0.6, name
    # As validation and samples compute.
    with torch.no_grad():
        assert torch.equal(predicted(model, rows)["text"], outputs[1]["text"])


@needs_torchao
def test_it_learns_as_the_plain_model_does(byte_tokenizer) -> None:
    config = tiny_config(**WIDE, rope="3d")
    plain, eight = (
        curve(Run("cpu", byte_tokenizer, config=config, float8=is_on, lr=1e-3), 30) for is_on in (False, True)
    )
    assert (eight[-5:].mean(dim=0) < 0.9 * eight[:5].mean(dim=0)).all(), "nothing was learnt"
    torch.testing.assert_close(eight[-5:].mean(dim=0), plain[-5:].mean(dim=0), rtol=0.03, atol=0)
    assert not torch.equal(eight, plain)


@needs_torchao
@pytest.mark.parametrize("first", [False, True], ids=["off then on", "on then off"])
def test_run_is_resumed_with_it_and_without(arguments, tmp_path: Path, monkeypatch, first: bool) -> None:
    """Whole runs, with previews, validation and the snapshot at their end, on the CPU, where they are refused."""
    monkeypatch.setattr(run_data, "check_float8", lambda *_: None)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            train.main(arguments("run", training={"float8": first, "save_every": 2}))
    train.main(arguments("run", training={"float8": not first}))
    train.main(arguments("plain"))
    found, expected = final_state(tmp_path / "run"), final_state(tmp_path / "plain")
    assert found.keys() == expected.keys()
    lines, plain_lines = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("run", "plain"))
    assert [line["step"] for line in lines] == [line["step"] for line in plain_lines]
    # It goes on from the state of step 2; the last line is the validation.
    pairs = list(zip(text_losses(lines), text_losses(plain_lines), strict=True))
    assert [one == two for one, two in pairs] == [not first] * 2 + [False] * 4
    assert all(one == pytest.approx(two, rel=0.01) for one, two in pairs)
    key = "validation/text_loss"
    assert lines[-1][key] == pytest.approx(plain_lines[-1][key], rel=0.01)
    assert sorted((tmp_path / "run" / "samples").glob("*.png"))
    # What is saved is a plain model with the averaged weights.
    weights = [
        load_file(tmp_path / run / "snapshots" / "step-0000006" / "transformer" / "diffusion_pytorch_model.safetensors")
        for run in ("run", "plain")
    ]
    assert weights[0].keys() == weights[1].keys()
    transformer = TransfusionPipeline.from_pretrained(tmp_path / "run" / "snapshots" / "step-0000006").transformer
    assert converted_layers(transformer) == set()
    for name, weight in transformer.state_dict().items():
        assert torch.equal(weight, found[f"ema/{name}"]), name


def text_losses(lines: list[dict]) -> list[float]:
    return [line["text_loss"] for line in lines if "text_loss" in line]


@needs_torchao
def test_document_that_is_not_finite_is_named_though_it_spoils_its_microbatch(byte_tokenizer, accelerator) -> None:
    latents = normal_latents()
    latents[CAPTIONS.index("an octopus")] = np.nan
    run = GuardedRun(byte_tokenizer, accelerator, latents, float8=True)
    assert isinstance(run.model, TransfusionMoT)
    convert_to_float8(run.model)
    with pytest.raises(NotFiniteError, match="pictures 'an octopus") as stop:
        run.steps(3)
    assert "every row" not in str(stop.value)


@needs_torchao
def test_selective_checkpointing_of_compiled_blocks_computes_no_8_bit_product_twice() -> None:
    """Counted in the backward graph that torch's partitioner makes; one compilation serves all blocks.

    What is kept is named `aten.mm` there, too: the policy is asked before torchao makes 8-bit products of it.
    """
    counts: dict[Checkpointing, int] = {}

    def count(graph: torch.fx.GraphModule, _inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        counts[checkpointing] = sum(node.target is torch.ops.aten._scaled_mm.default for node in graph.graph.nodes)
        return graph

    backend = aot_autograd(
        fw_compiler=lambda graph, _: graph, bw_compiler=count, partition_fn=min_cut_rematerialization_partition
    )
    rows = make_rows(SPEC, COUNTS, dtype=torch.float32)
    kinds: list[Checkpointing] = ["none", "selective", "full"]
    for checkpointing in kinds:
        model = tiny_model(tiny_config(num_layers=3), dtype=torch.float32)
        convert_to_float8(model)
        model.checkpoint_activations(checkpointing)
        counters.clear()
        for block in model.blocks:
            block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False, backend=backend)
        sum(prediction.sin().sum() for prediction in predicted(model, rows).values()).backward()
        assert counters["stats"]["unique_graphs"] == 1
    # Two towers, five products, and for each the gradients of its input and its weight.
    assert counts["none"] == counts["selective"] == 2 * 5 * 2
    assert counts["full"] > counts["selective"]


def refused(arguments: list[str]) -> str:
    with pytest.raises(UserError) as error:
        train.main(arguments)
    return str(error.value)


@needs_torchao
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, ["compute capability 8.9", "on cpu"]),
        ({"training": {"compile": False}}, ["without training.compile", "set training.compile to true"]),
        (
            {"model": {"towers": {"text": {"hidden_size": 16, "intermediate_size": 40}, "image": {"hidden_size": 24}}}},
            ["model.towers.text.intermediate_size is 40", "model.towers.image.hidden_size is 24", "multiples of 16"],
        ),
        ({"model": {"num_heads": 3}}, ["model.num_heads * model.head_dim is 24"]),
        ({"model": {"num_heads": 4, "num_kv_heads": 1, "head_dim": 4}}, ["num_kv_heads * model.head_dim is 8"]),
        ({"data": {"slots": {"text": 40, "image": 2}}}, ["data.slots.text is 40"]),
        (
            {"data": {"buckets": [[32, 32], [24, 40]], "slots": {"text": 32, "image": 1}}},
            ["data.slots.image * 15 patches is 15"],
        ),
    ],
    ids=["device", "compile", "towers", "heads", "kv heads", "text slots", "patches"],
)  # fmt: skip
def test_where_it_cannot_run_it_is_refused(arguments, changes: dict, words: list[str]) -> None:
    training = {"float8": True} | changes.get("training", {})
    sentence = refused(arguments("run", **changes | {"training": training}))
    assert "training.float8" in sentence
    assert all(word in sentence for word in words), sentence


@needs_torchao
def test_sharded_parameters_are_refused(arguments, tmp_path: Path) -> None:
    words = arguments("run", training={"float8": True})
    (sentence,) = run_processes(refused, 1, FSDP2, tmp_path / "group", words)
    assert "training.float8 has not been tried with FSDP2" in sentence


def test_missing_package_is_refused(arguments, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    assert 'pip install "transfusion-mot[float8]"' in refused(arguments("run", training={"float8": True}))


@needs_torchao
@pytest.mark.parametrize(("capability", "fits"), [((8, 0), False), ((8, 9), True), ((9, 0), True)])
def test_first_gpus_that_multiply_8_bit_numbers(monkeypatch, capability: tuple[int, int], fits: bool) -> None:
    monkeypatch.setattr(float8.torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(float8.torch.cuda, "get_device_name", lambda _: "an A100")
    device = SimpleNamespace(device=torch.device("cuda"), is_fsdp2=False)
    codecs = {"image": SimpleNamespace(medium="image", downsampling=4)}
    if fits:
        check_float8(RunConfig(), device, codecs)
    else:
        with pytest.raises(UserError, match=r"this run is on an A100; set training\.float8 to false"):
            check_float8(RunConfig(), device, codecs)


@needs_torchao
def test_single_precision_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(float8.torch.cuda, "get_device_capability", lambda _: (9, 0))
    device = SimpleNamespace(device=torch.device("cuda"), is_fsdp2=False)
    config = RunConfig(training=TrainingConfig(mixed_precision="no"))
    with pytest.raises(UserError, match=r"training\.mixed_precision is no; set that to bf16"):
        check_float8(config, device, {"image": SimpleNamespace(medium="image", downsampling=4)})
