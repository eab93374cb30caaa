"""Clean context: images are noised only for themselves; later items attend to copies without noise."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import (
    CHANNELS,
    DENSE,
    ArrayImages,
    data_config,
    documents_of,
    packer_of,
    sources_of,
    texts_of,
    tiny_config,
    tiny_model,
)
from test_packing import read_row, rows_of_lane
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask

from transfusion_mot.config import RunConfig, parse_config
from transfusion_mot.data.batch import Batch
from transfusion_mot.data.mixture import Source, counter
from transfusion_mot.data.packing import Packer
from transfusion_mot.data.tokenizer import TextTokenizer
from transfusion_mot.diffusion import Diffusion
from transfusion_mot.errors import UserError
from transfusion_mot.losses import IGNORE_INDEX
from transfusion_mot.models.attention import SlotIds, block_mask, dense_mask
from transfusion_mot.models.inputs import LatentInput, ModalityInput, Slots, TokenInput
from transfusion_mot.models.transfusion import TransfusionMoT
from transfusion_mot.reporting.flops import attending_pairs
from transfusion_mot.schedulers import make_scheduler
from transfusion_mot.training.log import loss_by_timestep
from transfusion_mot.training.step import loss_terms

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
    return Source(images, 1.0, {"image": images})


def make_packer(tokenizer: TextTokenizer, sources: list[Source], rope: str = "1d", **data) -> Packer:
    diffusion = Diffusion(make_scheduler("FlowMatchEulerDiscreteScheduler", {}))
    config = data_config(**{"text_slots": TEXT_SLOTS, "images_per_row": 5, "image_context": "clean"} | data)
    draw = diffusion.timesteps_from_uniform
    return packer_of(sources_of(*sources), tokenizer, config, rope=rope, timesteps_from_uniform=draw)


def mixed_rows(tokenizer: TextTokenizer, count: int = 4, rope: str = "1d", **data) -> list[Batch]:
    sources = [random_images(CAPTIONS), documents_of(DOCUMENTS), texts_of(["some text", "more of it"])]
    packer = make_packer(tokenizer, sources, rope, **data)
    return [batch for batch, _ in rows_of_lane(packer, 0, count)]


def filled(batch: Batch) -> Tensor:
    """Bool [B, K], True where a slot holds an image or the copy of one."""
    given = batch.latents("image")
    return given.mask | given.copies


# --- Rows. ---


def check_document(batch: Batch, document, tokenizer: TextTokenizer) -> tuple[list[int | str], int]:
    """The rules of a document => (what it shows to the last of its tokens: tokens and clean images; images noised)."""
    ids, labels = (tensor[0].tolist() for tensor in batch.tokens("text"))
    given = batch.latents("image")
    copies = given.copies[0].tolist()
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
            assert given.mask[0, span]
            assert given.timesteps[0, span] > 0
            assert before[0] is None
            assert ids[before[1][-1][0]] == tokenizer.begin_ids["image"]
            if behind[0] is None:
                # No copy: nothing is to be learnt behind it.
                assert place + 2 == len(segments)
                assert [ids[slot] for slot, _, _ in behind[1]] == [tokenizer.end_ids["image"]]
                assert labels[behind[1][0][0]] == IGNORE_INDEX
                stream.append("unseen")
        else:
            assert not given.mask[0, span]
            assert filled(batch)[0, span]
            assert given.timesteps[0, span] == 0
            assert before[0] == span - 1
            assert not copies[span - 1]
            assert torch.equal(given.latents[0, span], given.latents[0, span - 1])
            assert [position for *_, position in slots] == [position for *_, position in before[1]], "the same place"
            assert behind[0] is None
            assert ids[behind[1][0][0]] == tokenizer.end_ids["image"]
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
            source = packer.sources.names[int(batch.slots.source_ids[0, document[0][0]])]
            noised[source] += images
            copied[source] += stream.count("clean")
            if source == "documents":
                assert "unseen" not in stream, "what the model is to go on from is always seen"
            elif "unseen" in stream:
                assert stream[0] == byte_tokenizer.bos_id
                assert stream[-2:] == ["unseen", byte_tokenizer.end_ids["image"]]
        assert counts["image_items"] == found == batch.latents("image").mask.sum()
        assert counts["image_slots"] == PATCHES * filled(batch).sum()
        assert counts["pad_slots"] == (batch.slots.document_ids == -1).sum()
        assert batch.counts()[1] == found * batch.latents("image").latents[0, 0].numel()
    assert copied["documents"] == noised["documents"]


def test_a_copy_is_for_an_image_in_front_and_noise_has_no_limit(byte_tokenizer) -> None:
    packer = make_packer(byte_tokenizer, [random_images(CAPTIONS)], images_per_row=4)
    timesteps: dict[bool, list[float]] = {True: [], False: []}
    total = Counter()
    for batch, counts in rows_of_lane(packer, 0, 1200):
        total.update(counts)
        for document in read_row(batch, TEXT_SLOTS):
            span = next(span for _, span, _ in document if span is not None)
            is_first = (
                int(batch.tokens("text").ids[0, document[1][0]]) == byte_tokenizer.begin_ids["image"]
                and document[-2][1] is None
            )
            assert is_first == (span + 1 < 4 and bool(batch.latents("image").copies[0, span + 1]))
            timesteps[is_first].append(float(batch.latents("image").timesteps[0, span]))
    share = len(timesteps[True]) / total["image_items"]
    assert share == pytest.approx(0.2, abs=4.5 * (0.16 / total["image_items"]) ** 0.5)
    assert total[counter("images", "items")] == total["image_items"] == sum(map(len, timesteps.values()))
    for drawn in timesteps.values():
        assert np.mean(drawn) == pytest.approx(0.5, abs=4.5 * (1 / 12 / len(drawn)) ** 0.5)
        assert max(drawn) > 0.95


# --- Who attends to whom. ---


def loop_mask(batch: Batch) -> Tensor:
    """Bool [S, S], of a row."""
    ids, order, spans = (getattr(batch.slots, name)[0].tolist() for name in ("document_ids", "order", "span_ids"))
    copies = batch.latents("image").copies[0].tolist()
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
        copies = batch.latents("image").copies
        assert copies.any()
        slots = SlotIds.from_spans(batch.slots.document_ids, batch.slots.order, batch.slots.span_ids, copies)
        dense = dense_mask(slots, slots)
        assert torch.equal(dense[0], loop_mask(batch))
        length = batch.slots.order.shape[1]
        with torch.compiler.set_stance("force_eager"):
            rule = block_mask(slots).mask_mod
        of_kernel = create_mask(rule, 1, None, length, length, "cpu")
        assert torch.equal(of_kernel[:, 0], dense)
        used = batch.slots.document_ids[0] >= 0
        assert attending_pairs(batch, tiny_model(tiny_config())) == dense[0][used][:, used].sum()


def test_flops_of_a_row_of_padding_are_none(byte_tokenizer) -> None:
    assert attending_pairs(mixed_rows(byte_tokenizer, 1)[0].emptied(), tiny_model(tiny_config())) == 0


# --- The model, against documents read one part after the other. ---


def alone(model: TransfusionMoT, batch: Batch, slots: list[tuple], latents: Tensor, timesteps: Tensor):
    """A forward over slots of one document in reading order, as if everything in it were seen."""
    text = [slot for slot, span, _ in slots if span is None]
    patches = [slot for slot, span, _ in slots if span is not None]
    spans = list(dict.fromkeys(span for _, span, _ in slots if span is not None))
    chosen = text + patches
    place = {slot: index for index, (slot, _, _) in enumerate(slots)}
    span_ids = torch.tensor([[-1] * len(text) + [spans.index(int(batch.slots.span_ids[0, slot])) for slot in patches]])
    inputs: dict[str, ModalityInput] = {"text": TokenInput(batch.tokens("text").ids[:, text])}
    if spans:
        inputs["image"] = LatentInput(latents[None], timesteps[None])
    return model(
        inputs,
        Slots(
            torch.zeros(1, len(chosen), dtype=torch.long),
            torch.tensor([[place[slot] for slot in chosen]]),
            span_ids,
            batch.slots.rope_positions[:, chosen],
            batch.slots.source_ids[:, chosen],
        ),
    ).predictions


def sequential_losses(model: TransfusionMoT, batch: Batch) -> Tensor:
    """[2] text and diffusion loss of a row, with clean images before each image and the text."""
    text_loss, diffusion_loss = torch.zeros(2, dtype=torch.float64)
    given = batch.latents("image")
    for document in read_row(batch, TEXT_SLOTS):
        # Clean slots so far: tokens, and copies.
        context: list[tuple] = []
        for span, group in itertools.groupby(document, key=lambda slot: slot[1]):
            slots = list(group)
            if span is None or given.copies[0, span]:
                context += slots
                continue
            seen = list(dict.fromkeys(other for _, other, _ in context if other is not None))
            t = given.timesteps[0, span]
            noisy = (1 - t) * given.latents[0, span] + t * given.noise[0, span]
            latents = torch.stack([*given.latents[0, seen], noisy])
            timesteps = torch.cat([t.new_zeros(len(seen)), t[None]])
            prediction = alone(model, batch, context + slots, latents, timesteps)["image"][0, -1]
            target = given.noise[0, span] - given.latents[0, span]
            diffusion_loss = diffusion_loss + (prediction - target).square().sum()
        seen = list(dict.fromkeys(other for _, other, _ in context if other is not None))
        latents = given.latents[0, seen]
        logits = alone(model, batch, context, latents, latents.new_zeros(len(seen)))["text"][0]
        labels = batch.tokens("text").labels[0, [slot for slot, span, _ in context if span is None]]
        text_loss = text_loss + torch.nn.functional.cross_entropy(
            logits, labels, ignore_index=IGNORE_INDEX, reduction="sum"
        )
    return torch.stack([text_loss, diffusion_loss])


ARCHITECTURES = {
    "mot": {},
    "dense 3d": {**DENSE, "rope": "3d"},
    "grouped": {"num_heads": 4, "num_kv_heads": 2},
    # Two channels a group: of one alone, the norm takes the timestep out again.
    "unet": {"image": {"adapter": "unet", "unet_channels": [64, 64], "unet_num_layers": 1}},
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_losses_and_gradients_are_those_of_reading_documents_in_turn(byte_tokenizer, architecture) -> None:
    config = tiny_config(**ARCHITECTURES[architecture])
    model = tiny_model(config, {"text": byte_tokenizer.vocab_size, "image": CHANNELS})
    rows = mixed_rows(byte_tokenizer, 3, config.rope)
    images = [batch.latents("image") for batch in rows]
    assert sum(given.copies.sum() for given in images) > 3
    assert sum((given.mask & ~given.copies.roll(-1, 1)).sum() for given in images) > 1, "some have no copy"
    packed = Batch.cat(rows)
    given = packed.latents("image")
    latents = torch.randn(given.latents.shape, generator=torch.Generator().manual_seed(3)).double()
    packed.inputs["image"] = given._replace(
        latents=torch.where(given.copies[:, :, None, None, None], latents.roll(1, 1), latents),
        noise=given.noise.double(),
        # Timesteps in float32 lose digits in their sinusoids.
        timesteps=given.timesteps.double() / 64,
    )
    sums = torch.stack([term.loss for term in loss_terms(model, packed).values()])
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
    sizes = {"text": byte_tokenizer.vocab_size, "image": CHANNELS}
    model = tiny_model(tiny_config(), sizes, dtype=torch.float32)
    for batch in mixed_rows(byte_tokenizer, 3):
        given = batch.latents("image")
        before = loss_terms(model, batch)
        for slot in range(given.copies.shape[1]):
            noise = given.noise.clone()
            noise[0, slot] += 1
            changed_inputs = batch.inputs | {"image": given._replace(noise=noise)}
            after = loss_terms(model, Batch(changed_inputs, batch.slots))
            assert torch.equal(before["text"].losses, after["text"].losses)
            changed = (before["image"].losses != after["image"].losses)[0].tolist()
            assert changed == [other == slot and bool(given.mask[0, slot]) for other in range(len(changed))]


def test_copies_have_no_part_in_the_losses_of_the_log(byte_tokenizer) -> None:
    given = mixed_rows(byte_tokenizer, 1)[0].latents("image")
    of_images = given.mask.sum()
    assert given.copies.any()
    sums, counts = loss_by_timestep(torch.ones(given.copies.shape), given).sum(dim=0)
    assert (sums, counts) == (of_images, of_images * given.latents[0, 0].numel())


# --- Configuration. ---


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("data.slots.image=1", "data.slots.image is 1; with data.image_context=clean it must be at least 2"),
        ("model.modalities.image.attention=causal", "set it to bidirectional, or data.image_context=noised"),
    ],
)
def test_what_clean_context_cannot_be_combined_with_is_refused(given: str, message: str) -> None:
    parse_config(RunConfig, [given], "")
    with pytest.raises(UserError, match=message):
        parse_config(RunConfig, [given, "data.image_context=clean"], "")
