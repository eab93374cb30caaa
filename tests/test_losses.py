"""Loss sums against loops, and a step that does not depend on how its batch is split."""

import copy
import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from conftest import DENSE, SIZES, VOCAB_SIZE, Segment, make_rows, tiny_config, tiny_model
from torch import Tensor

from transfusion_mot import losses
from transfusion_mot.config import ModelConfig
from transfusion_mot.data.batch import Batch
from transfusion_mot.losses import IGNORE_INDEX, diffusion_losses, next_token_loss
from transfusion_mot.models.inputs import LatentInput, ModalityInput, TokenInput
from transfusion_mot.models.transfusion import TransfusionMoT
from transfusion_mot.training.step import loss_terms, train_step

# Rows that differ in everything: labels, images, padding.
SPEC = [
    [[3, "image", 2], [2, "image", 4]],
    [[2, "image", 2]],
    [[12]],
    [[1, "image"]],
    [],
    [["image", 9]],
    [["image"], ["image"]],
    [[5, "image", 1], [3]],
]


def make_batch(
    spec: Sequence[Sequence[Sequence[Segment]]] = SPEC,
    counts: dict[str, int] | None = None,
    config: ModelConfig | None = None,
    *,
    sizes: dict[str, int] = SIZES,
    dtype: torch.dtype = torch.float64,
) -> Batch:
    """Rows to train on, see `make_rows`. A token's label is the next token; that of the last code is `end`."""
    config = config or tiny_config()
    rows = make_rows(spec, counts or {"text": 12, "image": 2}, config, sizes=sizes, dtype=dtype)
    inputs: dict[str, ModalityInput] = {}
    for name, given in rows.inputs.items():
        if isinstance(given, TokenInput):
            labels = torch.full_like(given.ids, IGNORE_INDEX)
            for token, following in (pair for tokens in rows.documents for pair in itertools.pairwise([*tokens, None])):
                if token.modality != name:
                    continue
                if following is not None and following.modality == name:
                    labels[token.row, token.place] = given.ids[token.row, following.place]
                elif name != "text":
                    labels[token.row, token.place] = sizes[name] - 1
            inputs[name] = TokenInput(given.ids, labels)
        else:
            seed = 3 + 2 * len(inputs)
            mask = torch.zeros(given.timesteps.shape, dtype=torch.bool)
            for token in (token for tokens in rows.documents for token in tokens if token.modality == name):
                mask[token.row, token.item] = True
            noise = torch.randn(given.latents.shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
            generator = torch.Generator().manual_seed(seed + 1)
            timesteps = torch.rand(given.timesteps.shape, generator=generator, dtype=dtype)
            inputs[name] = LatentInput(given.latents, timesteps, noise, mask)
    # Every document is of the source of its number in the row.
    return Batch(inputs, rows.slots._replace(source_ids=rows.slots.document_ids.to(torch.int16)))


LABELS = torch.tensor([[1, 2, IGNORE_INDEX, 6, 0], [IGNORE_INDEX] * 5, [3, 3, 3, IGNORE_INDEX, 5]])


def drawn_hidden_and_weight(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in ((3, 5, 4), (7, 4))]


def test_next_token_loss_is_the_sum_over_labelled_tokens() -> None:
    hidden, weight = drawn_hidden_and_weight()
    expected = 0.0
    for row in range(3):
        for slot in range(5):
            if LABELS[row, slot] != IGNORE_INDEX:
                values = [math.exp(float(hidden[row, slot] @ vector)) for vector in weight]
                expected -= math.log(values[int(LABELS[row, slot])] / sum(values))
    assert next_token_loss(hidden, weight, LABELS)[0].item() == pytest.approx(expected, rel=1e-9)
    assert next_token_loss(hidden.bfloat16(), weight, LABELS)[0].dtype == torch.float32
    assert next_token_loss(hidden, weight, torch.full_like(LABELS, IGNORE_INDEX))[0] == 0


@pytest.mark.parametrize("logits_at_once", [2**28, 30, 7, 1])
def test_next_token_loss_in_chunks_has_the_gradients_of_cross_entropy(
    monkeypatch: pytest.MonkeyPatch, logits_at_once: int
) -> None:
    """Also where the labels of a whole chunk are missing, and with a factor before the loss."""
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", logits_at_once)
    hidden, weight = (tensor.requires_grad_() for tensor in drawn_hidden_and_weight())
    expected = torch.nn.functional.cross_entropy(
        (hidden @ weight.T).flatten(0, 1), LABELS.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )
    loss, terms = next_token_loss(hidden, weight, LABELS)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    expected_terms = torch.nn.functional.cross_entropy(
        (hidden @ weight.T).flatten(0, 1), LABELS.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
    ).view(3, 5)
    torch.testing.assert_close(terms, expected_terms.detach(), rtol=1e-12, atol=0)
    assert not terms.requires_grad
    with torch.no_grad():
        for one, two in zip(next_token_loss(hidden, weight, LABELS), (expected, expected_terms), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-12, atol=0)
    for one, two in zip(
        torch.autograd.grad(0.3 * loss, (hidden, weight)),
        torch.autograd.grad(0.3 * expected, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)


def test_next_token_loss_of_narrow_hidden_states_sums_the_weight_gradient_in_float32() -> None:
    hidden, weight = drawn_hidden_and_weight(torch.float32)
    weight.requires_grad_()
    (gradient,) = torch.autograd.grad(next_token_loss(hidden.bfloat16(), weight, LABELS)[0], weight)
    (exact,) = torch.autograd.grad(next_token_loss(hidden, weight, LABELS)[0], weight)
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(gradient, exact, rtol=0.02, atol=0.05)


def test_gradient_of_a_bfloat16_head_is_summed_in_float32_over_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As FSDP gathers it: 64 chunks lose no more digits than one, which rounds the gradient once."""
    generator = torch.Generator().manual_seed(0)
    slots, vocab_size = 4096, 64
    hidden, weight = (torch.randn(count, 32, generator=generator).bfloat16() for count in (slots, vocab_size))
    labels = torch.randint(vocab_size, (1, slots), generator=generator)

    def gradient(chunks: int, dtype: torch.dtype) -> torch.Tensor:
        monkeypatch.setattr(losses, "LOGITS_AT_ONCE", slots // chunks * vocab_size)
        leaf = weight.to(dtype).requires_grad_()
        loss, _ = next_token_loss(hidden[None].to(dtype), leaf, labels)
        (found,) = torch.autograd.grad(0.3 * loss, leaf)
        assert found.dtype == dtype
        return found.double()

    exact = gradient(1, torch.float64)
    error = {n: ((gradient(n, torch.bfloat16) - exact).norm() / exact.norm()).item() for n in (1, 64)}
    assert error[1] < 4e-3
    assert error[64] < 1.05 * error[1]


@pytest.mark.parametrize("logits_at_once", [2**28, 7])
def test_z_loss_is_in_the_gradient_and_not_in_the_value(monkeypatch: pytest.MonkeyPatch, logits_at_once: int) -> None:
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", logits_at_once)
    hidden, weight = (tensor.requires_grad_() for tensor in drawn_hidden_and_weight())
    logits = (hidden @ weight.T).flatten(0, 1)[LABELS.flatten() != IGNORE_INDEX]
    plain = torch.nn.functional.cross_entropy(logits, LABELS[LABELS != IGNORE_INDEX], reduction="sum")
    expected = plain + 0.07 * (logits.exp().sum(dim=-1).log() ** 2).sum()
    loss, _ = next_token_loss(hidden, weight, LABELS, z_loss_weight=0.07)
    torch.testing.assert_close(loss, plain, rtol=1e-12, atol=0)
    for one, two in zip(
        torch.autograd.grad(0.3 * loss, (hidden, weight)),
        torch.autograd.grad(0.3 * expected, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)


def test_frozen_head_gets_no_gradient_and_passes_one_on() -> None:
    hidden, weight = drawn_hidden_and_weight()
    with_both, _ = next_token_loss(hidden.requires_grad_(), weight.requires_grad_(), LABELS)
    (expected,) = torch.autograd.grad(with_both, hidden)
    loss, _ = next_token_loss(hidden, weight.detach(), LABELS)
    assert [s.shape for s in loss.grad_fn.saved_tensors if s is not None] == [(15, 4)], "no [V, D] is kept"
    torch.testing.assert_close(torch.autograd.grad(loss, hidden)[0], expected, rtol=0, atol=0)


def test_diffusion_loss_is_the_sum_over_elements_of_real_images() -> None:
    prediction, target = torch.randn(2, 2, 3, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[True, False, True], [False, False, True]])
    expected = {
        (b, k): sum(
            float(prediction[b, k, c, y, x] - target[b, k, c, y, x]) ** 2
            for c in range(2)
            for y in range(2)
            for x in range(2)
        )
        for b, k in ((0, 0), (0, 2), (1, 2))
    }
    losses = diffusion_losses(prediction, target, mask)
    for b in range(2):
        assert losses[b].tolist() == pytest.approx([expected.get((b, k), 0.0) for k in range(3)], rel=1e-5)


def test_unused_image_slots_give_no_loss_and_no_gradient_whatever_they_hold() -> None:
    prediction = torch.randn(1, 2, 1, 2, 2, requires_grad=True)
    target = torch.randn(1, 2, 1, 2, 2)
    target[0, 1] = 1e30
    loss = diffusion_losses(prediction, target, torch.tensor([[True, False]])).sum()
    loss.backward()
    assert loss.isfinite()
    assert prediction.grad.isfinite().all()
    assert (prediction.grad[0, 1] == 0).all()


def test_counts_are_labelled_tokens_and_elements_of_real_images() -> None:
    batch = make_batch()
    # By hand from SPEC: a run of n tokens has n - 1 labels; 8 images of 3 x 4 x 4.
    labels = (2 + 1) + (1 + 3) + (1 + 1) + 11 + 0 + 0 + 8 + 0 + (4 + 0) + 2
    assert batch.counts().tolist() == [labels, 8 * 48]


def stepped(
    model: TransfusionMoT, batch: Batch, accelerator, microbatch_rows: int, max_grad_norm: float = 1e9
) -> tuple[Tensor, list[Tensor], Tensor]:
    """One step of plain gradient descent with rate one => (losses, gradients, gradient norm)."""
    model = copy.deepcopy(model)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD([{"params": list(model.parameters()), "tower": "all"}], lr=1.0, fused=True)
    weights = {name: modality.loss_weight for name, modality in model.architecture.modalities.items()}
    result = train_step(
        model,
        batch,
        optimizer,
        accelerator,
        loss_weights=weights,
        microbatch_rows=microbatch_rows,
        max_grad_norm=max_grad_norm,
    )
    gradients = [a - b.detach() for a, b in zip(before, model.parameters(), strict=True)]
    assert all(p.grad is None for p in model.parameters())
    sums = torch.stack([losses.sum() for losses in result.losses.values()])
    return sums / result.counts, gradients, result.grad_norm


@pytest.mark.parametrize("changes", [{}, DENSE], ids=["mot", "dense"])
@pytest.mark.parametrize("microbatch_rows", [1, 2, 3, 4])
def test_step_does_not_depend_on_the_split(accelerator, microbatch_rows: int, changes: dict) -> None:
    model, batch = tiny_model(tiny_config(**changes)), make_batch()
    losses, gradients, norm = stepped(model, batch, accelerator, 8)
    split_losses, split_gradients, split_norm = stepped(model, batch, accelerator, microbatch_rows)
    torch.testing.assert_close(split_losses, losses, rtol=1e-6, atol=0)
    torch.testing.assert_close(split_norm, norm, rtol=1e-6, atol=0)
    for one, two in zip(split_gradients, gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_gradient_is_that_of_the_two_means(accelerator) -> None:
    """total = mean of cross-entropy over labelled tokens + 5 * mean of squared error over elements of images."""
    model, batch = tiny_model(tiny_config()), make_batch()
    losses, gradients, norm = stepped(model, batch, accelerator, 3)
    given, labels = batch.latents("image"), batch.tokens("text").labels
    t = given.timesteps[..., None, None, None]
    noisy = LatentInput((1 - t) * given.latents + t * given.noise, given.timesteps)
    predictions = model({"text": TokenInput(batch.tokens("text").ids), "image": noisy}, batch.slots).predictions
    text = torch.nn.functional.cross_entropy(predictions["text"].reshape(-1, VOCAB_SIZE), labels.flatten())
    errors = [
        (predictions["image"][row, image] - (given.noise - given.latents)[row, image]) ** 2
        for row in range(8)
        for image in range(sum(segment == "image" for document in SPEC[row] for segment in document))
    ]
    image = torch.stack(errors).mean()
    expected = torch.autograd.grad(text + 5 * image, list(model.parameters()))
    assert losses.tolist() == pytest.approx([text.item(), image.item()], rel=1e-5)
    assert norm.item() == pytest.approx(sum(g.square().sum().item() for g in expected) ** 0.5, rel=1e-5)
    for one, two in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_clipping_is_by_the_global_norm(accelerator) -> None:
    model, batch = tiny_model(tiny_config()), make_batch()
    _, gradients, norm = stepped(model, batch, accelerator, 8)
    _, clipped, reported = stepped(model, batch, accelerator, 2, max_grad_norm=0.5)
    assert reported.item() == pytest.approx(norm.item(), rel=1e-6), "the log shows the norm before clipping"
    assert norm > 0.5
    for one, two in zip(clipped, gradients, strict=True):
        torch.testing.assert_close(one, two * 0.5 / norm, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("spec_row", [2, 6, 4])
def test_batch_without_a_modality_or_anything_steps(accelerator, spec_row: int) -> None:
    """Only text, only images without a label, only padding: losses are finite, and unused weights do not change."""
    model, batch = tiny_model(tiny_config()), make_batch().split(1)[spec_row]
    losses, gradients, norm = stepped(model, batch, accelerator, 1)
    assert losses.nan_to_num(0).isfinite().all()
    assert norm.isfinite()
    for (name, _), gradient in zip(model.named_parameters(), gradients, strict=True):
        assert gradient.isfinite().all()
        if spec_row == 4 or (spec_row == 2 and ("image" in name)) or (spec_row == 6 and "text" in name):
            assert (gradient == 0).all(), name


def test_loss_sums_reach_the_model_by_forward_alone() -> None:
    """A wrapper such as DistributedDataParallel has nothing else."""
    model, batch = tiny_model(tiny_config()), make_batch()
    seen = []

    class Wrapper(torch.nn.Module):
        def forward(self, **inputs):
            seen.append(sorted(inputs))
            return model(**inputs)

    expected = loss_terms(model, batch)
    for name, terms in loss_terms(Wrapper(), batch).items():
        assert torch.equal(terms.loss, expected[name].loss)
        assert torch.equal(terms.losses, expected[name].losses)
    assert len(seen) == 1


def test_splitting_and_joining_a_batch_loses_nothing() -> None:
    batch = make_batch()
    parts = batch.split(3)
    assert [part.num_rows for part in parts] == [3, 3, 2]
    again = Batch.cat(parts).tensors()
    assert again.keys() == batch.tensors().keys()
    assert all(torch.equal(again[name], value) for name, value in batch.tensors().items())
    assert batch.latents("image").mask.sum() == 8
