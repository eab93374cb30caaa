"""Low-rank adapters: against separate layers of peft, trained parameters, and messages for misuse."""

from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from conftest import SIZES, tiny_config, tiny_model
from test_losses import make_batch
from torch import nn

from transfusion_mot.config import DiffusionConfig, LoraConfig, OptimizerConfig, RunConfig, TrainingConfig
from transfusion_mot.errors import UserError
from transfusion_mot.models.layers import QKVProjection
from transfusion_mot.models.lora import add_adapter, base_parameters, digests, file_name, fingerprint
from transfusion_mot.models.transfusion import TransfusionMoT, is_of_adapter
from transfusion_mot.training.checkpoint import find_state
from transfusion_mot.training.ema import EMA
from transfusion_mot.training.lora import choose_trained
from transfusion_mot.training.optimizer import make_optimizer
from transfusion_mot.training.state import StateWriter, load_tensors, state_tensors
from transfusion_mot.training.step import loss_terms
from transfusion_mot.training.tower_settings import check_lora, trainable_parts
from transfusion_mot.training.towers import freeze_towers

RANK, ALPHA = 3, 5.0


def adapted_model(lora: LoraConfig, **config: object) -> TransfusionMoT:
    """With adapters that change something."""
    model = tiny_model(tiny_config(**config))
    add_adapter(model, lora)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_of_adapter(name):
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


@pytest.mark.parametrize("modules", [["q", "k", "v"], ["q", "v"], ["k"]])
def test_queries_keys_and_values_have_the_adapters_of_three_layers_of_peft(modules: list[str]) -> None:
    model = adapted_model(LoraConfig(RANK, ALPHA, ["text"], modules), num_heads=4, num_kv_heads=2)
    projection: QKVProjection = model.blocks[1].qkv["text"]
    fused, hidden = projection.linear, torch.randn(2, 5, projection.linear.in_features, dtype=torch.float64)
    rows = [heads * projection.head_dim for heads in projection.heads]
    apart = nn.ModuleDict(
        {part: nn.Linear(fused.in_features, count, bias=False) for part, count in zip("qkv", rows, strict=True)}
    )
    apart = apart.to(torch.float64)
    for part, weight in zip("qkv", fused.base_layer.weight.split(rows), strict=True):
        apart[part].weight.data = weight.detach().clone()
    peft.inject_adapter_in_model(peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=modules), apart)
    up_rows = [count for part, count in zip("qkv", rows, strict=True) if part in modules]
    downs = fused.lora_A["default"].weight.chunk(len(modules))
    ups = fused.lora_B["default"].weight.split(up_rows)
    for part, down, up in zip(modules, downs, ups, strict=True):
        apart[part].lora_A["default"].weight.data = down.detach().clone()
        apart[part].lora_B["default"].weight.data = up.detach().clone()
    expected = torch.cat([apart[part](hidden) for part in "qkv"], dim=-1)
    found = fused(hidden)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(found, fused.base_layer(hidden))

    weights = torch.randn(found.shape, dtype=torch.float64)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    for key in ("lora_A", "lora_B"):
        grads = torch.cat([getattr(apart[part], key)["default"].weight.grad for part in modules])
        torch.testing.assert_close(getattr(fused, key)["default"].weight.grad, grads, rtol=1e-12, atol=1e-12)

    fused.merge()
    for part, weight in zip("qkv", fused.base_layer.weight.split(rows), strict=True):
        if part in modules:
            apart[part].merge()
        merged = apart[part].get_base_layer() if part in modules else apart[part]
        torch.testing.assert_close(weight, merged.weight, rtol=1e-12, atol=1e-12)


def test_every_matrix_has_the_adapter_of_peft() -> None:
    """The whole model, against one whose adapters outside of attention are peft's own layers."""
    modules = ["output", "gate", "up", "down"]
    ours, theirs = adapted_model(LoraConfig(RANK, ALPHA, None, modules)), tiny_model(tiny_config())
    # A last part of the name, or the name of the tower, for what stands in a dictionary of towers.
    targets = r"blocks\.\d+\.(output\.owned\.\w+|ffn\.owned\.\w+\.(gate|up|down))"
    peft.inject_adapter_in_model(peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets), theirs)
    values = dict(ours.named_parameters())
    assert {name for name, _ in theirs.named_parameters()} == set(values)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(values[name])
    batch = make_batch()
    for model in (ours, theirs):
        sum(term.loss for term in loss_terms(model, batch).values()).backward()
    for name, parameter in theirs.named_parameters():
        if is_of_adapter(name):
            torch.testing.assert_close(values[name].grad, parameter.grad, rtol=1e-9, atol=1e-12)


def run_of(lora: LoraConfig | None, mixed_precision: str = "no", **training: object) -> RunConfig:
    config = TrainingConfig(mixed_precision=mixed_precision, **training)
    return RunConfig(model=tiny_config(), lora=lora, training=config)


def placed_model(config: RunConfig) -> TransfusionMoT:
    with torch.device("meta"):
        model = TransfusionMoT.from_sections(SIZES, config.model, DiffusionConfig())
        choose_trained(model, config)
    model.to_empty(device="cpu")
    model.initialise(7)
    return model


def test_a_new_adapter_changes_nothing_and_is_all_that_is_kept_twice() -> None:
    lora = LoraConfig(2, also_train=["image.adapter.timestep", "text.norm"])
    model, plain = placed_model(run_of(lora)), placed_model(run_of(None))
    assert all(torch.equal(base_parameters(model)[name], value) for name, value in plain.named_parameters())
    batch = make_batch(dtype=torch.float32)
    for name, term in loss_terms(model, batch).items():
        assert torch.equal(term.losses, loss_terms(plain, batch)[name].losses)
    downs = [value for name, value in model.named_parameters() if ".lora_A." in name]
    assert all(value.std() > 0 for value in downs)
    assert not torch.equal(downs[0], downs[1])

    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    also = {
        name
        for name in dict(plain.named_parameters())
        if name.startswith("modalities.image.adapter.timestep") or ("norm" in name and ".owned.text." in name)
    }
    assert {name for name in trained if not is_of_adapter(name)} == also
    optimizer, ema = make_optimizer(model, OptimizerConfig()), EMA(model, 0.9)
    assert {name for group in optimizer.param_groups for name in group["param_names"]} == trained
    assert set(ema.weights) == trained
    # Whole models are still gathered, in float32.
    assert {file_name(name) for name in ema.gathered(model, keep=True)} >= set(dict(plain.named_parameters()))
    assert set(ema.gathered(model, keep=True, with_frozen=False)) == trained


@pytest.mark.parametrize("lora", [None, LoraConfig(2, also_train=["image.adapter"])])
def test_frozen_matrices_in_bfloat16_give_the_same_losses_and_gradients(lora: LoraConfig | None) -> None:
    """Bit-identical to the same model with frozen matrices in float32."""
    frozen = {} if lora else {"frozen_towers": ["text"]}
    narrow = placed_model(run_of(lora, "bf16", **frozen))
    wide = placed_model(run_of(lora, "no", **frozen))
    formats = {value.dtype for value in narrow.parameters() if not value.requires_grad and value.ndim > 1}
    assert formats == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in narrow.parameters() if p.requires_grad or p.ndim == 1)
    assert digests(narrow) == digests(wide)
    batch = make_batch(dtype=torch.float32)
    results = []
    for model in (narrow, wide):
        for name, parameter in model.named_parameters():
            if ".lora_B." in name or "adapter.output" in name:
                nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(3))
        with torch.autocast("cpu", torch.bfloat16):
            total = sum(term.loss for term in loss_terms(model, batch).values())
        total.backward()
        results.append([total.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))
    assert all(value.abs().sum() > 0 for value in results[0])


def test_averages_on_the_cpu_are_the_averages() -> None:
    model = tiny_model(tiny_config(), dtype=torch.float32)
    averages = [EMA(model, 0.9), EMA(model, 0.9, on_cpu=True)]
    with torch.no_grad():
        for step in range(40):
            torch._foreach_mul_(list(model.parameters()), 1.01)
            for ema in averages:
                ema.update(model, step)
    for one, two in zip(*(list(ema.weights.values()) for ema in averages), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-8)


def test_states_with_and_without_averages_of_frozen_towers_are_read(tmp_path: Path) -> None:
    """Those of earlier versions have some; a tower that is trained later begins with its weights."""

    def state(frozen: list[str], of_version_before: bool = False) -> tuple[TransfusionMoT, EMA, Path]:
        model = placed_model(run_of(None))
        ema = EMA(model, 0.9)
        torch._foreach_mul_(list(ema.weights.values()), 2)
        freeze_towers(model, frozen)
        if not of_version_before:
            ema.weights = {name: value for name, value in ema.weights.items() if ".text." not in name}
        folder = tmp_path / f"{of_version_before}"
        with StateWriter(folder, 1, 0) as writer:
            optimizer = make_optimizer(model, OptimizerConfig())
            writer.save(1, state_tensors(model, ema, optimizer, torch.arange(2)), {"step": 1})
        return model, ema, find_state(folder, "auto")

    for of_version_before, frozen in ((True, ["text"]), (False, [])):
        saved, averages, folder = state(["text"], of_version_before)
        model = placed_model(run_of(None, frozen_towers=frozen))
        with torch.no_grad():
            torch._foreach_zero_(list(model.parameters()))
        ema = EMA(model, 0.9)
        load_tensors(folder, model, ema, make_optimizer(model, OptimizerConfig()))
        weights = dict(saved.named_parameters())
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, weights[name])
            if parameter.requires_grad:
                assert torch.equal(ema.weights[name], averages.weights.get(name, weights[name])), name
        assert any(".text." in name for name in ema.weights) == (not frozen)


def test_a_fingerprint_knows_weights_and_no_number_format() -> None:
    model = tiny_model(tiny_config(), dtype=torch.float32)
    first = digests(model)
    assert digests(tiny_model(tiny_config(), dtype=torch.bfloat16)) == first
    add_adapter(model, LoraConfig(2))
    assert digests(model) == first
    name = "modalities.image.adapter.input.weight"
    with torch.no_grad():
        base_parameters(model)[name].mul_(1.1)
    assert fingerprint(digests(model), set()) != fingerprint(first, set())
    assert fingerprint(digests(model), {name}) == fingerprint(first, {name})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"rank": 0}, "lora.rank is 0; it must be at least 1"),
        ({"alpha": 0.0}, "lora.alpha is 0.0; it must be above 0"),
        ({"towers": ["speech"]}, "lora.towers names speech; known: text, image"),
        ({"modules": ["qkv"]}, "lora.modules names qkv; known: q, k, v, output, gate, up, down"),
        ({"modules": []}, "lora.modules is empty"),
        ({"also_train": ["adapter"]}, "lora.also_train names adapter; known: text, text.norm"),
        (
            {"towers": ["text"], "also_train": ["text.ffn"]},
            "lora.also_train names text.ffn, whose matrices have adapters",
        ),
        ({"also_train": ["image"]}, "lora.also_train names image, whose matrices have adapters"),
    ],
)
def test_misuse_is_one_sentence(changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        check_lora(run_of(replace(LoraConfig(), **changes)))
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value)


def test_settings_that_do_not_go_with_adapters_are_named() -> None:
    config = run_of(LoraConfig(towers=["text"], also_train=["image"]))
    check_lora(config)
    for sentence, changed in (
        (r"training\.frozen_towers is", run_of(LoraConfig(), frozen_towers=["text"])),
        (r"optimizer\.name is muon", replace(config, optimizer=OptimizerConfig("muon"))),
        (r"training\.float8 has not been tried with lora", run_of(LoraConfig(), float8=True)),
    ):
        with pytest.raises(UserError, match=sentence):
            check_lora(changed)


def test_every_parameter_is_of_a_part_that_can_be_named() -> None:
    """All of them together are the model, of one with shared components, too."""
    for config in (tiny_config(), tiny_config(untied=["norm", "qkv"])):
        run = RunConfig(model=config, lora=LoraConfig(modules=["q"], also_train=trainable_parts(config)))
        with torch.device("meta"):
            model = TransfusionMoT.from_sections(SIZES, config, DiffusionConfig())
            choose_trained(model, run)
        assert all(parameter.requires_grad for parameter in model.parameters())
