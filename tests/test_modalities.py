"""More modalities than text and images: codes with a tower of their own and a second one of latents.

Nothing outside of tests has them: they are entries of a configuration.
"""

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CHANNELS, VOCAB_SIZE, Rows, Segment, make_rows, randomise, tiny_config, tiny_model
from process_group import FSDP2, run_processes
from test_losses import make_batch, stepped
from test_model import check_reach, compare_with_naive
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from transfusion_mot.config import (
    DiffusionConfig,
    ModalityConfig,
    ModelConfig,
    OptimizerConfig,
    TowerConfig,
    TrainingConfig,
)
from transfusion_mot.data.batch import Batch
from transfusion_mot.models.inputs import LatentInput, TokenInput
from transfusion_mot.models.transfusion import TransfusionMoT
from transfusion_mot.training.optimizer import make_optimizer
from transfusion_mot.training.parallel import make_accelerator, place, wrap
from transfusion_mot.training.step import loss_terms, train_step
from transfusion_mot.training.towers import tower_of

SIZES = {"text": VOCAB_SIZE, "image": CHANNELS, "speech": 13, "depth": 1}
COUNTS = {"text": 10, "image": 2, "speech": 8, "depth": 2}
# Every modality beside every other one, twice in a document, absent from documents and rows; rows with padding.
SPEC: list[list[list[Segment]]] = [
    [[2, "image", ("speech", 3), 1, "depth", 2], [("speech", 2)]],
    [["depth", 1, ("speech", 2), "image", 1, ("speech", 3), "depth"], [3, "image"]],
    [[4], [("speech", 5), 2]],
    [["image", "depth", 1]],
]


def modalities(**towers: str) -> dict[str, ModalityConfig]:
    """Four of them on the given towers."""
    return {
        "text": ModalityConfig(towers["text"]),
        "image": ModalityConfig(towers["image"], "diffusion", loss_weight=5.0),
        "speech": ModalityConfig(towers["speech"], loss_weight=0.5),
        "depth": ModalityConfig(towers["depth"], "diffusion", loss_weight=2.0, patch_size=1),
    }


OWN = modalities(text="text", image="image", speech="speech", depth="depth")
SAME = {name: TowerConfig(16, 24) for name in OWN}
MOT: dict[str, Any] = {
    "towers": {**SAME, "speech": TowerConfig(24, 40), "depth": TowerConfig(8, 16)},
    "modalities": OWN,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "mot": MOT,
    "mot 3d grouped": {**MOT, "rope": "3d", "num_kv_heads": 1},
    "dense": {"towers": {"all": TowerConfig(16, 24)}, "modalities": modalities(**dict.fromkeys(OWN, "all"))},
    "untied ffn": {"towers": SAME, "modalities": OWN, "untied": ["ffn"]},
    "untied attention": {"towers": SAME, "modalities": OWN, "untied": ["qkv", "output"]},
    # Streams in another order than names: text and speech, then depth and image.
    "two towers": {
        "towers": {"words": TowerConfig(16, 24), "pictures": TowerConfig(24, 24)},
        "modalities": modalities(text="words", speech="words", image="pictures", depth="pictures"),
    },
    "causal depth": {
        **MOT,
        "modalities": OWN | {"depth": ModalityConfig("depth", "diffusion", attention="causal", patch_size=1)},
    },
    "unet image": {
        **MOT,
        "image": {"adapter": "unet", "unet_channels": [32, 32], "unet_num_layers": 1},
    },
    "three": {
        "towers": {name: SAME[name] for name in ("text", "image", "speech")},
        "modalities": {name: OWN[name] for name in ("text", "image", "speech")},
    },
    "codes alone": {
        "towers": {name: SAME[name] for name in ("text", "speech")},
        "modalities": {name: OWN[name] for name in ("text", "speech")},
    },
}


def spec_for(config: ModelConfig, spec: list[list[list[Segment]]] = SPEC) -> list[list[list[Segment]]]:
    """Without what the model does not know."""

    def is_known(segment: Segment) -> bool:
        return isinstance(segment, int) or (segment if isinstance(segment, str) else segment[0]) in config.modalities

    return [[list(filter(is_known, document)) for document in row] for row in spec]


def rows_for(config: ModelConfig, spec: list[list[list[Segment]]] = SPEC) -> Rows:
    return make_rows(spec_for(config, spec), COUNTS, config, sizes=SIZES)


def batch_for(config: ModelConfig, spec: list[list[list[Segment]]] = SPEC, dtype: torch.dtype = torch.float64) -> Batch:
    return make_batch(spec_for(config, spec), COUNTS, config, sizes=SIZES, dtype=dtype)


@pytest.mark.parametrize("variant", VARIANTS)
def test_streams_equal_a_naive_model(variant: str) -> None:
    config = tiny_config(**VARIANTS[variant])
    rows = rows_for(config)
    items = {(t.modality, t.row, t.place if t.item is None else t.item) for tokens in rows.documents for t in tokens}
    assert compare_with_naive(tiny_model(config, SIZES), rows) == len(items)
    assert {modality for modality, _, _ in items} == set(config.modalities)


def test_order_of_streams_is_that_of_towers() -> None:
    assert tiny_config(**MOT).stream_order == ["text", "depth", "image", "speech"]
    assert tiny_config(**VARIANTS["two towers"]).stream_order == ["text", "speech", "depth", "image"]


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["mot", "dense", "causal depth", "two towers"])
def test_a_change_reaches_exactly_what_may_see_it(variant: str) -> None:
    config = tiny_config(**VARIANTS[variant])
    check_reach(tiny_model(config, SIZES), rows_for(config, SPEC[:2]))


def test_clean_copies_hide_what_is_noised_of_every_modality() -> None:
    """An item with a copy after it is only visible to itself."""
    config = tiny_config(**MOT)
    model = tiny_model(config, SIZES)
    rows = rows_for(config, [[[1, "image", "image", 1, "depth", "depth", ("speech", 2), 1]]])
    copies = torch.tensor([[False, True]])
    inputs = {
        name: given._replace(copies=copies) if isinstance(given, LatentInput) else given
        for name, given in rows.inputs.items()
    }
    before = model(inputs, rows.slots).predictions
    for name in ("image", "depth"):
        latents = inputs[name].latents.clone()
        latents[0, 0] += 1
        after = model({**inputs, name: inputs[name]._replace(latents=latents)}, rows.slots).predictions
        for other, prediction in before.items():
            differs = (after[other] != prediction).flatten(2).any(-1)[0]
            assert differs.tolist() == [other == name and place == 0 for place in range(len(differs))], (name, other)


def gradients(model: TransfusionMoT, batch: Batch) -> dict[str, Tensor | None]:
    model.zero_grad()
    sum(terms.loss for terms in loss_terms(model, batch).values()).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("absent", ["image", "speech", "depth"])
@pytest.mark.parametrize("with_slots", [True, False])
def test_a_modality_that_is_absent_gets_exactly_zero_gradient(absent: str, with_slots: bool) -> None:
    config = tiny_config(**MOT)
    model = tiny_model(config, SIZES)
    spec = [
        [[s for s in document if s != absent and not (isinstance(s, tuple) and s[0] == absent)] for document in row]
        for row in SPEC
    ]
    batch = batch_for(config, spec)
    if not with_slots:
        lengths = {name: model.num_slots(name, given) for name, given in batch.inputs.items()}
        parts = [dict(zip(lengths, ids.split(list(lengths.values()), 1), strict=True)) for ids in batch.slots]
        slots = type(batch.slots)(*(torch.cat([p for n, p in of.items() if n != absent], 1) for of in parts))
        batch = Batch({name: given for name, given in batch.inputs.items() if name != absent}, slots)
    for name, gradient in gradients(model, batch).items():
        if tower_of(name, config) == absent:
            assert gradient is None or (gradient == 0).all(), name
        else:
            assert (gradient != 0).any(), name


def test_loss_of_a_modality_does_not_change_with_padding_or_others_behind_it() -> None:
    """Text at the beginning has the same loss for any following items."""
    config = tiny_config(**MOT)
    model = tiny_model(config, SIZES)
    alone, followed = batch_for(config, [[[4]]]), batch_for(config, [[[4, "image", ("speech", 3), "depth"]]])
    assert torch.equal(alone.tokens("text").ids, followed.tokens("text").ids)
    losses = [loss_terms(model, batch)["text"].losses for batch in (alone, followed)]
    torch.testing.assert_close(*losses, rtol=1e-10, atol=1e-12)


def test_labels_and_counts_are_those_of_each_modality() -> None:
    batch = batch_for(tiny_config(**MOT))
    # Text 1 + 0 + 1, then 0 + 0 + 2, 3 + 1 and 0; depth 2, 2, 0, 1 and images 1, 2, 0, 1 of their elements; every code.
    counts = dict(zip(batch.inputs, batch.counts().tolist(), strict=True))
    assert counts == {"text": 8, "speech": 3 + 2 + 2 + 3 + 5, "depth": 4 * 4, "image": 4 * CHANNELS * 16}


@pytest.mark.parametrize("variant", ["mot", "dense", "untied ffn"])
@pytest.mark.parametrize("microbatch_rows", [1, 2, 3])
def test_step_does_not_depend_on_the_split(accelerator, microbatch_rows: int, variant: str) -> None:
    config = tiny_config(**VARIANTS[variant])
    model, batch = tiny_model(config, SIZES), batch_for(config)
    losses, whole, norm = stepped(model, batch, accelerator, 4)
    split_losses, split, split_norm = stepped(model, batch, accelerator, microbatch_rows)
    torch.testing.assert_close(split_losses, losses, rtol=1e-6, atol=0)
    torch.testing.assert_close(split_norm, norm, rtol=1e-6, atol=0)
    for one, two in zip(split, whole, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_gradient_is_that_of_the_weighted_means(accelerator) -> None:
    config = tiny_config(**MOT)
    model, batch = tiny_model(config, SIZES), batch_for(config)
    _, found, _ = stepped(model, batch, accelerator, 3)
    inputs = {}
    for name, given in batch.inputs.items():
        if isinstance(given, TokenInput):
            inputs[name] = TokenInput(given.ids)
        else:
            t = given.timesteps[..., None, None, None]
            inputs[name] = LatentInput((1 - t) * given.latents + t * given.noise, given.timesteps)
    total = 0.0
    for name, prediction in model(inputs, batch.slots).predictions.items():
        given = batch.inputs[name]
        if isinstance(given, TokenInput):
            mean = torch.nn.functional.cross_entropy(prediction.flatten(0, 1), given.labels.flatten())
        else:
            mean = (prediction - (given.noise - given.latents))[given.mask].square().mean()
        total = total + config.modalities[name].loss_weight * mean
    for one, two in zip(found, torch.autograd.grad(total, list(model.parameters())), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_z_loss_is_for_every_modality_of_tokens() -> None:
    config = tiny_config(**MOT)
    model, batch = tiny_model(config, SIZES), batch_for(config)
    for name in ("text", "speech"):
        head = model.modality(name).head.weight
        plain, weighted = (
            torch.autograd.grad(loss_terms(model, batch, z_loss_weight=weight)[name].loss, head)[0]
            for weight in (0.0, 0.1)
        )
        given = batch.tokens(name)
        logits = model(
            {n: g._replace(labels=None) if n == name else g for n, g in batch.inputs.items()}, batch.slots
        ).predictions[name][given.labels >= 0]
        (expected,) = torch.autograd.grad(0.1 * logits.logsumexp(-1).square().sum(), head)
        torch.testing.assert_close(weighted - plain, expected, rtol=1e-8, atol=1e-10)


# --- Several processes. ---


def four_modalities(microbatch_rows: int, compiled: bool) -> dict[str, dict[str, Tensor]]:
    """Two clipped steps => gradients and weights, whole, and the losses of this process."""
    accelerator = make_accelerator(TrainingConfig(mixed_precision="no", num_rows=4, tracker=None), Path())
    config = tiny_config(**MOT)
    with torch.device("meta"):
        model = TransfusionMoT.from_sections(SIZES, config, DiffusionConfig())
    place(model, accelerator, 0)
    reference = TransfusionMoT.from_sections(SIZES, config, DiffusionConfig())
    randomise(reference)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = reference.get_parameter(name).detach()
            if isinstance(parameter, DTensor):
                value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
            parameter.copy_(value)
    optimizer = make_optimizer(model, OptimizerConfig(lr=0.01))
    if compiled:
        # What the compiler sees is the same with any backend; this one takes no time.
        torch.compile = functools.partial(torch.compile, backend="eager")
        model.compile_blocks()
    wrapped = wrap(model, accelerator)
    batch = batch_for(config, dtype=torch.float32).split(4 // accelerator.num_processes)[accelerator.process_index]
    found: dict[str, dict[str, Tensor]] = {}

    def whole(tensor: Tensor) -> Tensor:
        return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()

    def note(*_: object) -> None:
        found.setdefault("gradients", {n: whole(p.grad) for n, p in model.named_parameters()})

    optimizer.register_step_pre_hook(note)
    for _ in range(2):
        result = train_step(
            wrapped,
            batch,
            optimizer,
            accelerator,
            loss_weights={name: modality.loss_weight for name, modality in config.modalities.items()},
            microbatch_rows=microbatch_rows,
            max_grad_norm=0.5,
        )
    assert not compiled or torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, "one code for all blocks"
    counts = dict(zip(batch.inputs, result.counts, strict=True))
    return found | {"weights": {n: whole(p) for n, p in model.named_parameters()}, "counts": counts}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    """One process, all rows at once."""
    return run_processes(four_modalities, 1, {}, tmp_path_factory.mktemp("alone"), 4, False)[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "environment", "microbatch_rows", "compiled"),
    [(2, {}, 1, False), (4, {}, 1, True), (2, FSDP2, 1, False), (4, FSDP2, 1, True)],
    ids=["ddp2", "ddp4 compiled", "fsdp2", "fsdp4 compiled"],
)
def test_steps_are_equal_however_rows_and_weights_are_split(
    tmp_path: Path, alone, world_size: int, environment: dict[str, str], microbatch_rows: int, compiled: bool
) -> None:
    """Processes whose rows lack a modality, too: rows differ in what they have."""
    for result in run_processes(four_modalities, world_size, environment, tmp_path, microbatch_rows, compiled):
        for kind, values in alone.items():
            assert values.keys() == result[kind].keys()
            for name, value in values.items():
                torch.testing.assert_close(result[kind][name], value, rtol=1e-4, atol=1e-6, msg=f"{kind} {name}")


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2])
def test_weights_of_a_seed_are_the_same_sharded_or_not(tmp_path: Path, world_size: int) -> None:
    model = TransfusionMoT.from_sections(SIZES, tiny_config(**MOT), DiffusionConfig())
    model.initialise(5)
    expected = dict(model.named_parameters())
    for found in run_processes(drawn_weights, world_size, FSDP2, tmp_path):
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        assert found.keys() == expected.keys()


def drawn_weights() -> dict[str, Tensor]:
    accelerator = make_accelerator(TrainingConfig(mixed_precision="no", num_rows=4, tracker=None), Path())
    with torch.device("meta"):
        model = TransfusionMoT.from_sections(SIZES, tiny_config(**MOT), DiffusionConfig())
    place(model, accelerator, 5)
    return {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in model.named_parameters()}


# --- A model of them is saved and copied like any other. ---


def test_saved_model_comes_back(tmp_path: Path) -> None:
    config = tiny_config(**VARIANTS["two towers"])
    model = tiny_model(config, SIZES, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    again = TransfusionMoT.from_pretrained(tmp_path)
    # Its keys are sorted in JSON; the order of streams does not depend on theirs.
    assert again.architecture.stream_order == config.stream_order
    rows = make_rows(SPEC, COUNTS, config, sizes=SIZES, dtype=torch.float32)
    expected = model(rows.inputs, rows.slots).predictions
    for other in (again, copy.deepcopy(model)):
        for name, prediction in other(rows.inputs, rows.slots).predictions.items():
            assert torch.equal(prediction, expected[name])
