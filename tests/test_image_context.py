"""Clean context: images are noised for themselves alone, and what follows sees copies of them without noise."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import CHANNELS, DENSE, ArrayImages, documents_of, sources_of, texts_of, tiny_config, tiny_model
from test_packing import read_row, rows_of_lane
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask

from transfusion_mot.config import DataConfig, RunConfig, parse_config
from transfusion_mot.data.batch import Batch
from transfusion_mot.data.mixture import Source, counter
from transfusion_mot.data.packing import Packer
from transfusion_mot.data.tokenizer import TextTokenizer
from transfusion_mot.diffusion import Diffusion
from transfusion_mot.errors import UserError
from transfusion_mot.losses import IGNORE_INDEX
from transfusion_mot.models.attention import SlotIds, block_mask, dense_mask
from transfusion_mot.models.transfusion import TransfusionMoT
from transfusion_mot.schedulers import make_scheduler
from transfusion_mot.training.flops import attending_pairs
from transfusion_mot.training.log import loss_by_timestep
from transfusion_mot.training.step import StepResult, compute_losses, loss_counts

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

TEXT_SLOTS, PATCHES = 48, 4
CAPTIONS = ["red apple", "sun", "an octopus", "fox", "moon", "a car"]
# Image first, last, side by side, text alone.
DOCUMENTS: list[list[str | int]] = [["a", 0, "sun"], [1, "an octopus"], [2, 3, "x", 4], ["ab", 5], ["text"]]


def random_images(captions: list[str], seed: int = 0) -> Source:
    """Captioned images with latents, and with a posterior that has spread."""
    mean, std = np.random.default_rng(seed).random((2, len(captions), CHANNELS, 4, 4), dtype=np.float32)
    images = ArrayImages(captions, mean, std)
    return Source(images, 1.0, images)


def make_packer(tokenizer: TextTokenizer, sources: list[Source], rope: str = "1d", **data) -> Packer:
    diffusion = Diffusion(make_scheduler("FlowMatchEulerDiscreteScheduler", {}))
    config = DataConfig(**{"text_slots": TEXT_SLOTS, "images_per_row": 5, "image_context": "clean"} | data)
    return Packer(sources_of(*sources), tokenizer, config, rope, 2, 1, 0, diffusion.timesteps_from_uniform)


def mixed_rows(tokenizer: TextTokenizer, count: int = 4, rope: str = "1d", **data) -> list[Batch]:
    sources = [random_images(CAPTIONS), documents_of(DOCUMENTS), texts_of(["some text", "more of it"])]
    packer = make_packer(tokenizer, sources, rope, **data)
    return [batch for batch, _ in rows_of_lane(packer, 0, count)]


# --- Rows. ---


def check_document(batch: Batch, document, tokenizer: TextTokenizer) -> tuple[list[int | str], int]:
    """The rules of a document => (what it shows to the last of its tokens: tokens and clean images; images noised)."""
    ids, labels, copies = (getattr(batch, name)[0].tolist() for name in ("text_ids", "text_labels", "copies"))
    stream: list[int | str] = []
    noised = 0
    segments = [(span, list(slots)) for span, slots in itertools.groupby(document, key=lambda s: s[1])]
    for place, (span, slots) in enumerate(segments):
        if span is None:
            stream += [ids[slot] for slot, _, _ in slots]
            continue
        before, behind = segments[place - 1], segments[place + 1]
        if not copies[span]:
            noised += 1
            assert batch.image_mask[0, span]
            assert batch.timesteps[0, span] > 0
            assert before[0] is None
            assert ids[before[1][-1][0]] == tokenizer.boi_id
            if behind[0] is None:
                # No copy: nothing is to be learnt behind it.
                assert place + 2 == len(segments)
                assert [ids[slot] for slot, _, _ in behind[1]] == [tokenizer.eoi_id]
                assert labels[behind[1][0][0]] == IGNORE_INDEX
                stream.append("unseen")
        else:
            assert not batch.image_mask[0, span]
            assert batch.filled_images[0, span]
            assert batch.timesteps[0, span] == 0
            assert before[0] == span - 1
            assert not copies[span - 1]
            assert torch.equal(batch.latents[0, span], batch.latents[0, span - 1])
            assert [position for *_, position in slots] == [position for *_, position in before[1]], "the same place"
            assert behind[0] is None
            assert ids[behind[1][0][0]] == tokenizer.eoi_id
            assert labels[behind[1][0][0]] != IGNORE_INDEX, "what has no label needs no copy"
            stream.append("clean")
    return stream, noised


@given(
    shapes=st.lists(st.lists(st.one_of(st.integers(1, 30), st.none()), min_size=1, max_size=6), min_size=1, max_size=5),
    images_per_row=st.integers(2, 5),
    with_text=st.booleans(),
    rope=st.sampled_from(["1d", "3d"]),
)
@settings(max_examples=60)
def test_every_image_is_noised_once_and_copied_where_a_label_follows(
    byte_tokenizer, shapes, images_per_row, with_text, rope
) -> None:
    next_image = itertools.count()
    documents = [["x" * part if part else next(next_image) for part in shape] for shape in shapes]
    sources = [documents_of(documents), random_images(CAPTIONS), *([texts_of(["y" * 99])] if with_text else [])]
    packer = make_packer(byte_tokenizer, sources, rope, images_per_row=images_per_row, text_slots=32)
    noised, copied = Counter(), Counter()
    for batch, counts in rows_of_lane(packer, 0, 12):
        found = 0
        for document in read_row(batch, 32):
            stream, images = check_document(batch, document, byte_tokenizer)
            found += images
            source = packer.sources.names[int(batch.source_ids[0, document[0][0]])]
            noised[source] += images
            copied[source] += stream.count("clean")
            if source == "documents":
                assert "unseen" not in stream, "what the model is to go on from is always seen"
            elif "unseen" in stream:
                assert stream[0] == byte_tokenizer.bos_id
                assert stream[-2:] == ["unseen", byte_tokenizer.eoi_id]
        assert counts["images"] == found == batch.image_mask.sum()
        assert counts["image_tokens"] == PATCHES * batch.filled_images.sum()
        assert counts["pad_slots"] == (batch.document_ids == -1).sum()
        assert loss_counts(batch)[1] == found * batch.latents[0, 0].numel()
    assert copied["documents"] == noised["documents"]


def test_a_copy_is_for_an_image_in_front_and_noise_has_no_limit(byte_tokenizer) -> None:
    packer = make_packer(byte_tokenizer, [random_images(CAPTIONS)], images_per_row=4)
    timesteps: dict[bool, list[float]] = {True: [], False: []}
    total = Counter()
    for batch, counts in rows_of_lane(packer, 0, 1200):
        total.update(counts)
        for document in read_row(batch, TEXT_SLOTS):
            span = next(span for _, span, _ in document if span is not None)
            is_first = int(batch.text_ids[0, document[1][0]]) == byte_tokenizer.boi_id and document[-2][1] is None
            assert is_first == (span + 1 < 4 and bool(batch.copies[0, span + 1]))
            timesteps[is_first].append(float(batch.timesteps[0, span]))
    share = len(timesteps[True]) / total["images"]
    assert share == pytest.approx(0.2, abs=4.5 * (0.16 / total["images"]) ** 0.5)
    assert total[counter("images", "images")] == total["images"] == sum(map(len, timesteps.values()))
    for drawn in timesteps.values():
        assert np.mean(drawn) == pytest.approx(0.5, abs=4.5 * (1 / 12 / len(drawn)) ** 0.5)
        assert max(drawn) > 0.95


# --- Who attends to whom. ---


def loop_mask(batch: Batch) -> Tensor:
    """Bool [S, S], of a row."""
    ids, order, spans = (getattr(batch, name)[0].tolist() for name in ("document_ids", "order", "span_ids"))
    copies = batch.copies[0].tolist()
    slots = list(zip(ids, order, spans, strict=True))

    def attends(document, place, span, other, earlier, its_span) -> bool:
        if document != other:
            return False
        if span == its_span >= 0:
            return True
        is_hidden = its_span >= 0 and not copies[its_span]
        return earlier <= place and not is_hidden and not (is_copy_of(its_span, span))

    def is_copy_of(copied: int, span: int) -> bool:
        return span >= 0 and copied == span + 1 and copies[copied]

    return torch.tensor([[attends(*q, *k) for k in slots] for q in slots])


@pytest.mark.parametrize("rope", ["1d", "3d"])
def test_mask_is_that_of_a_double_loop_in_both_forms(byte_tokenizer, rope: str) -> None:
    for batch in mixed_rows(byte_tokenizer, 6, rope):
        assert batch.copies.any()
        slots = SlotIds.from_spans(batch.document_ids, batch.order, batch.span_ids, batch.copies)
        dense = dense_mask(slots, slots)
        assert torch.equal(dense[0], loop_mask(batch))
        length = batch.order.shape[1]
        with torch.compiler.set_stance("force_eager"):
            rule = block_mask(slots).mask_mod
        of_kernel = create_mask(rule, 1, None, length, length, "cpu")
        assert torch.equal(of_kernel[:, 0], dense)
        used = batch.document_ids[0] >= 0
        assert attending_pairs(batch, tiny_config()) == dense[0][used][:, used].sum()


def test_flops_of_a_row_of_padding_are_none(byte_tokenizer) -> None:
    assert attending_pairs(mixed_rows(byte_tokenizer, 1)[0].emptied(), tiny_config()) == 0


# --- The model, against documents read one part after the other. ---


def alone(model: TransfusionMoT, batch: Batch, slots: list[tuple], latents: Tensor, timesteps: Tensor):
    """A forward over slots of one document in reading order, as if everything in it were seen."""
    text = [slot for slot, span, _ in slots if span is None]
    patches = [slot for slot, span, _ in slots if span is not None]
    spans = list(dict.fromkeys(span for _, span, _ in slots if span is not None))
    chosen = text + patches
    place = {slot: index for index, (slot, _, _) in enumerate(slots)}
    return model(
        text_ids=batch.text_ids[:, text],
        noisy_latents=latents[None] if spans else None,
        timesteps=timesteps[None] if spans else None,
        document_ids=torch.zeros(1, len(chosen), dtype=torch.long),
        order=torch.tensor([[place[slot] for slot in chosen]]),
        span_ids=torch.tensor([[-1] * len(text) + [spans.index(int(batch.span_ids[0, slot])) for slot in patches]]),
        rope_positions=batch.rope_positions[:, chosen],
    )


def sequential_losses(model: TransfusionMoT, batch: Batch) -> Tensor:
    """[2]: text and diffusion loss of a row, each image and the text read behind clean images."""
    text_loss, diffusion_loss = torch.zeros(2, dtype=torch.float64)
    for document in read_row(batch, batch.text_ids.shape[1]):
        # Clean slots so far: tokens, and copies.
        context: list[tuple] = []
        for span, group in itertools.groupby(document, key=lambda slot: slot[1]):
            slots = list(group)
            if span is None or batch.copies[0, span]:
                context += slots
                continue
            seen = list(dict.fromkeys(other for _, other, _ in context if other is not None))
            t = batch.timesteps[0, span]
            noisy = (1 - t) * batch.latents[0, span] + t * batch.noise[0, span]
            latents = torch.stack([*batch.latents[0, seen], noisy])
            timesteps = torch.cat([t.new_zeros(len(seen)), t[None]])
            prediction = alone(model, batch, context + slots, latents, timesteps).prediction[0, -1]
            target = batch.noise[0, span] - batch.latents[0, span]
            diffusion_loss = diffusion_loss + (prediction - target).square().sum()
        seen = list(dict.fromkeys(other for _, other, _ in context if other is not None))
        latents = batch.latents[0, seen]
        logits = alone(model, batch, context, latents, latents.new_zeros(len(seen))).logits[0]
        labels = batch.text_labels[0, [slot for slot, span, _ in context if span is None]]
        text_loss = text_loss + torch.nn.functional.cross_entropy(
            logits, labels, ignore_index=IGNORE_INDEX, reduction="sum"
        )
    return torch.stack([text_loss, diffusion_loss])


ARCHITECTURES = {
    "mot": {},
    "dense 3d": {**DENSE, "rope": "3d"},
    "grouped": {"num_heads": 4, "num_kv_heads": 2},
    # Two channels a group: of one alone, the norm takes the timestep out again.
    "unet": {"image_adapter": "unet", "unet_channels": [64, 64], "unet_num_layers": 1},
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_losses_and_gradients_are_those_of_reading_documents_in_turn(byte_tokenizer, architecture) -> None:
    config = tiny_config(**ARCHITECTURES[architecture])
    model = tiny_model(config, byte_tokenizer.vocab_size)
    diffusion = Diffusion(make_scheduler("FlowMatchEulerDiscreteScheduler", {}))
    rows = mixed_rows(byte_tokenizer, 3, config.rope)
    assert sum(batch.copies.sum() for batch in rows) > 3
    assert sum((batch.image_mask & ~batch.copies.roll(-1, 1)).sum() for batch in rows) > 1, "some have no copy"
    packed = Batch.cat(rows)
    for name in ("latents", "noise", "timesteps"):
        # Timesteps in float32 lose digits in their sinusoids.
        setattr(packed, name, getattr(packed, name).double())
    packed.timesteps /= 64
    packed.latents = torch.randn(packed.latents.shape, generator=torch.Generator().manual_seed(3)).double()
    packed.latents = torch.where(packed.copies[:, :, None, None, None], packed.latents.roll(1, 1), packed.latents)
    sums = compute_losses(model, packed, diffusion).sums
    expected = sum(sequential_losses(model, row) for row in packed.split(1))
    torch.testing.assert_close(sums.double(), expected, rtol=1e-5, atol=0)
    parameters = dict(model.named_parameters())
    weights = torch.tensor([0.7, 1.3], dtype=torch.float64)
    ours = torch.autograd.grad((sums.double() * weights).sum(), list(parameters.values()), allow_unused=True)
    theirs = torch.autograd.grad((expected * weights).sum(), list(parameters.values()), allow_unused=True)
    for name, one, two in zip(parameters, ours, theirs, strict=True):
        assert two is not None, name
        scale = two.abs().max()
        assert scale > 0, name
        assert (one - two).abs().max() < 2e-5 * scale, name


@torch.no_grad()
def test_noise_of_an_image_reaches_its_own_prediction_alone(byte_tokenizer) -> None:
    model = tiny_model(tiny_config(), byte_tokenizer.vocab_size, dtype=torch.float32)
    diffusion = Diffusion(make_scheduler("FlowMatchEulerDiscreteScheduler", {}))
    for batch in mixed_rows(byte_tokenizer, 3):
        before = compute_losses(model, batch, diffusion)
        for slot in range(batch.copies.shape[1]):
            noise = batch.noise.clone()
            noise[0, slot] += 1
            after = compute_losses(model, Batch(**batch.tensors() | {"noise": noise}), diffusion)
            assert torch.equal(before.text, after.text)
            changed = (before.images != after.images)[0].tolist()
            assert changed == [other == slot and bool(batch.image_mask[0, slot]) for other in range(len(changed))]


def test_copies_have_no_part_in_the_losses_of_the_log(byte_tokenizer) -> None:
    batch = mixed_rows(byte_tokenizer, 1)[0]
    result = StepResult(torch.zeros(batch.text_ids.shape), torch.ones(batch.copies.shape), None, None, {})
    of_images = batch.image_mask.sum()
    assert batch.copies.any()
    sums, counts = loss_by_timestep(result, batch).sum(dim=0)
    assert (sums, counts) == (of_images, of_images * batch.latents[0, 0].numel())


# --- Configuration. ---


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("data.images_per_row=1", "data.images_per_row is 1; with data.image_context=clean it must be at least 2"),
        ("model.image_attention=causal", "set model.image_attention=bidirectional or data.image_context=noised"),
    ],
)
def test_what_clean_context_cannot_be_combined_with_is_refused(given: str, message: str) -> None:
    parse_config(RunConfig, [given], "")
    with pytest.raises(UserError, match=message):
        parse_config(RunConfig, [given, "data.image_context=clean"], "")
