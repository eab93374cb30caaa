"""The contenders of the benchmark compute the right results; otherwise their speed would mean nothing."""

import dataclasses
import itertools

import pytest
import torch
from conftest import DENSE, SIZES, Rows, make_rows, tiny_config, tiny_model

from benchmarks.gather_scatter import GatherScatterMoT, reading_order
from transfusion_mot.config import DataConfig, ModalityConfig, ModelConfig, RunConfig, TowerConfig
from transfusion_mot.errors import UserError
from transfusion_mot.losses import IGNORE_INDEX
from transfusion_mot.models.inputs import ModalityInput, TokenInput
from transfusion_mot.models.transfusion import TransfusionMoT

pytestmark = pytest.mark.slow

# Images first, last, between and beside each other; two documents in a row; text alone; padding of both modalities.
SPEC = [
    [[3, "image", 2], [2, "image", 4]],
    [["image", 1, "image", "image", 2], [3]],
    [[1, "image"]],
]
COUNTS = {"text": 12, "image": 4}

VARIANTS = {
    "plain": {},
    "three axes": {"rope": "3d"},
    "grouped heads": {"num_kv_heads": 1, "qk_norm": False},
    "causal images": {"image": {"attention": "causal"}},
    "untied feed-forward": {"untied": ["ffn"]},
    "other feed-forward widths": {"towers": {"text": TowerConfig(16, 24), "image": TowerConfig(16, 40)}},
    "dense": DENSE,
}


def outputs_and_gradients(caller: torch.nn.Module, model: TransfusionMoT, rows: Rows) -> list[torch.Tensor]:
    """Outputs, and the gradients of a sum in which every element has another weight."""
    model.zero_grad()
    terms, predictions = caller(rows.inputs, rows.slots)
    outputs = [*itertools.chain(*terms.values()), *predictions.values()]
    loss = sum((part * (1 + torch.arange(part.numel())).view(part.shape).sin()).sum() for part in outputs)
    loss.backward()
    return [*outputs, *(parameter.grad for parameter in model.parameters())]


def with_losses(rows: Rows) -> Rows:
    """Tokens with a label each, where a document is; latents with noise, of which every other one has a loss."""
    inputs: dict[str, ModalityInput] = {}
    start = 0
    for name, given in rows.inputs.items():
        if isinstance(given, TokenInput):
            is_padding = rows.slots.document_ids[:, start : start + given.ids.shape[1]] < 0
            inputs[name] = TokenInput(given.ids, torch.where(is_padding, IGNORE_INDEX, given.ids))
            start += given.ids.shape[1]
        else:
            mask = torch.arange(given.timesteps.numel()).view(given.timesteps.shape) % 2 == 0
            inputs[name] = given._replace(noise=given.latents.cos(), mask=mask)
    return dataclasses.replace(rows, inputs=inputs)


@pytest.mark.parametrize("with_loss", [False, True], ids=["predictions", "losses"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gather_and_scatter_compute_what_streams_do(variant: str, with_loss: bool) -> None:
    config = tiny_config(**VARIANTS[variant])
    check_equal(config, make_rows(SPEC, COUNTS, config, grid=(2, 3)), with_loss, SIZES)


@pytest.mark.parametrize("with_loss", [False, True], ids=["predictions", "losses"])
def test_gather_and_scatter_know_any_modalities(with_loss: bool) -> None:
    """Codes that share a tower with text, and latents."""
    modalities = {
        "text": ModalityConfig("text"),
        "image": ModalityConfig("image", "diffusion"),
        "speech": ModalityConfig("text"),
    }
    config, sizes = tiny_config(modalities=modalities), SIZES | {"speech": 11}
    spec = [[[3, ("speech", 4), 1], [2, "image", ("speech", 3)]], [[2, ("speech", 5), 2]]]
    rows = make_rows(spec, {"text": 8, "image": 2, "speech": 8}, config, sizes=sizes)
    check_equal(config, rows, with_loss, sizes)


def check_equal(config: ModelConfig, rows: Rows, with_loss: bool, sizes: dict[str, int]) -> None:
    model = tiny_model(config, sizes)
    rows = with_losses(rows) if with_loss else rows
    streams = outputs_and_gradients(model, model, rows)
    packed = outputs_and_gradients(GatherScatterMoT(model), model, rows)

    # With a loss there are its terms, too.
    assert len(packed) == (1 + with_loss) * len(sizes) + len(list(model.parameters()))
    for ours, theirs in zip(streams, packed, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-10, atol=1e-12)


def test_gather_and_scatter_under_autocast() -> None:
    model = tiny_model(tiny_config(), dtype=torch.float32)
    rows = make_rows(SPEC, COUNTS, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        streams, packed = (caller(rows.inputs, rows.slots).predictions for caller in (model, GatherScatterMoT(model)))

    assert packed.keys() == streams.keys() == SIZES.keys()
    for name, ours in streams.items():
        assert packed[name].dtype == ours.dtype
        torch.testing.assert_close(packed[name], ours, rtol=0.05, atol=0.05)


def test_packed_tokens_stand_in_reading_order() -> None:
    rows = make_rows(SPEC, COUNTS)
    slots, places = reading_order(rows.slots.document_ids, rows.slots.order)

    documents = iter(rows.documents)
    for row, row_spec in enumerate(SPEC):
        read = [token.slot for _ in row_spec for token in next(documents)]
        assert slots[row, : len(read)].tolist() == read
        assert sorted(slots[row].tolist()) == list(range(slots.shape[1]))
    taken = slots + torch.arange(len(slots))[:, None] * slots.shape[1]
    assert torch.equal(places.flatten()[taken.flatten()], torch.arange(slots.numel()))


def test_gather_and_scatter_refuse_towers_of_different_widths() -> None:
    towers = {"text": TowerConfig(16, 24), "image": TowerConfig(24, 24)}
    model = tiny_model(dataclasses.replace(tiny_config(), towers=towers))

    with pytest.raises(UserError, match="hidden_size"):
        GatherScatterMoT(model)


def test_transfusion_pytorch_trains_on_the_slots_that_are_counted() -> None:
    pytest.importorskip("transfusion_pytorch")  # Only for the benchmark, so not among the dependencies.
    from benchmarks.transfusion_pytorch_rival import Shape, TransfusionPytorch

    torch.manual_seed(0)
    shape = Shape(32, 2, 2, 16, 48, 256, text_slots=24, patches=100, patch_elements=8)
    contender = TransfusionPytorch(shape, torch.device("cpu"), rows=2)
    slots = []
    contender.model.transformer.register_forward_pre_hook(lambda _, args: slots.append(args[0].shape[:2].numel()))
    for group in contender.optimizer.param_groups:
        group["lr"] = 3e-3
    documents = contender.documents()  # The same in all steps, so that there is something to learn.
    losses = [contender.step(documents).item() for _ in range(40)]

    assert set(slots) == {contender.tokens_per_step} == {2 * 124}
    assert contender.model.to_text_logits.out_features == 256
    assert contender.model.transformer.layers[0][2].fn.net[-1].in_features == 48
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert contender.biggest_batch(9) == 8
    assert contender.tokens_per_step == 8 * 124


def test_transfusion_pytorch_learns_paints_and_captions() -> None:
    pytest.importorskip("transfusion_pytorch")
    from benchmarks.transfusion_pytorch_quality import Captioned, Peer

    torch.manual_seed(0)
    # Two pictures with captions of their own, of which one token is the whole difference.
    mean = torch.stack([torch.full((4, 4, 4), value) for value in (-1.0, 1.0)])
    captions = [[torch.tensor([10, 20])], [torch.tensor([10, 30])]]
    data = Captioned(mean, torch.full_like(mean, 0.01), captions)
    config = RunConfig(data=DataConfig(caption_first_prob=0.5))
    peer = Peer(config, 40, mean.shape[1:], 64, 2, 3e-3, torch.device("cpu"))
    latents = torch.randn(3, 4, 4, 4)
    assert peer.patches(latents).shape == (3, 2, 2, 16)
    assert torch.equal(peer.latents(peer.patches(latents)), latents)
    kinds = [torch.is_floating_point(document[0]) for document in peer.documents(data, 200)]
    assert 60 < sum(kinds) < 140

    peer.averaged.beta, peer.averaged.update_after_step, peer.averaged.update_every = 0.9, 0, 1
    assert peer.train(data, 0.25, 16) > 20
    painted = peer.paint([captions[0][0], captions[1][0]], 4, 1.0)
    assert painted.shape == (2, 4, 4, 4)
    assert painted[0].mean() < painted[1].mean()
    assert peer.caption(mean, 5) == [[10, 20], [10, 30]]
