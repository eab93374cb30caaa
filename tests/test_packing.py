"""Rows against their documents: nothing lost, nothing twice, and labels and positions written out."""

from collections import Counter

import numpy as np
import pytest
import torch
from conftest import CHANNELS, ArrayImages, data_config, numbered_images, packer_of, sources_of, texts_of

from transfusion_mot.data.batch import Batch
from transfusion_mot.data.mixture import Source, counter
from transfusion_mot.data.packing import Packer
from transfusion_mot.data.tokenizer import TextTokenizer
from transfusion_mot.losses import IGNORE_INDEX

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

PATCHES = 4


def make_packer(
    tokenizer: TextTokenizer,
    captions: list[str],
    texts: list[str] = (),
    text_slots: int = 12,
    images_per_row: int = 2,
    lanes: int = 2,
    rope: str = "1d",
    seed: int = 0,
    **data,
) -> Packer:
    sources = sources_of(numbered_images(captions), *([texts_of(list(texts))] if texts else []))
    config = data_config(text_slots=text_slots, images_per_row=images_per_row, **data)
    return packer_of(sources, tokenizer, config, rope=rope, lanes=lanes, seed=seed)


def rows_of_lane(packer: Packer, lane: int, steps: int) -> list[tuple[Batch, Counter]]:
    state, result = packer.initial_state()[None], []
    for step in range(steps):
        rows, state, counts = packer.rows([lane], step, state)
        result.append((rows.batch, counts))
    return result


def read_row(batch: Batch, text_slots: int) -> list[list[tuple[int, int | None, tuple[int, ...]]]]:
    """Documents of a row as lists in reading order: (slot, span or None for text, rotary position)."""
    ids, order, spans, rope = (
        getattr(batch.slots, name)[0].tolist() for name in ("document_ids", "order", "span_ids", "rope_positions")
    )
    documents: dict[int, list] = {}
    for slot, document in enumerate(ids):
        if document >= 0:
            position = tuple(rope[slot]) if isinstance(rope[slot], list) else (rope[slot],)
            span = spans[slot] if slot >= text_slots else None
            assert (spans[slot] == -1) == (slot < text_slots)
            documents.setdefault(document, []).append((order[slot], slot, span, position))
    for slots in documents.values():
        assert sorted(place for place, *_ in slots) == list(range(len(slots))), "order counts every slot once"
    return [[slot[1:] for slot in sorted(documents[document])] for document in sorted(documents)]


def check_positions(document, rope: str) -> None:
    here = 0
    index = 0
    while index < len(document):
        _, span, position = document[index]
        if rope == "1d" or span is None:
            assert position == ((here,) if rope == "1d" else (here,) * 3)
            here, index = here + 1, index + 1
        else:
            for patch in range(PATCHES):
                slot, its_span, position = document[index + patch]
                assert its_span == span
                assert slot == document[index][0] + patch
                assert position == (here, here + patch // 2, here + patch % 2)
            here, index = here + 2, index + PATCHES


def check_lane(
    packer: Packer, tokenizer: TextTokenizer, lane: int, steps: int, captions: list[str], texts: list[str]
) -> tuple[list[int], list[str], Counter]:
    """Check every rule of a row => (images and texts of a lane in reading order, counters)."""
    T, K = packer.config.slots["text"], packer.config.slots["image"]
    bos, eos, boi, eoi = tokenizer.bos_id, tokenizer.eos_id, tokenizer.begin_ids["image"], tokenizer.end_ids["image"]
    images, text_stream, totals = [], [], Counter()
    expected_next: int | None = None
    for batch, counts in rows_of_lane(packer, lane, steps):
        ids, labels = (tensor[0].tolist() for tensor in batch.tokens("text"))
        used = 0
        found_images = 0
        for document in read_row(batch, T):
            check_positions(document, packer.model.rope)
            text = [slot for slot, span, _ in document if span is None]
            used += len(text)
            for place, (slot, span, _) in enumerate(document):
                if span is not None:
                    continue
                following = document[place + 1] if place + 1 < len(document) else None
                if ids[slot] == boi:
                    assert labels[slot] == IGNORE_INDEX
                    assert following is not None
                    assert following[1] is not None, "an image follows BOI"
                elif following is not None:
                    assert following[1] is None
                    assert labels[slot] == ids[following[0]]
            spans = sorted({span for _, span, _ in document if span is not None})
            tokens = [ids[slot] for slot in text]
            if spans:
                assert len(spans) == 1
                assert labels[text[-1]] == IGNORE_INDEX
                latents = batch.latents("image").latents[0, spans[0]]
                index = int(latents[0, 0, 0])
                assert (latents == index).all()
                caption = tokenizer.encode(captions[index])[: T - 4]
                before = [t for t, (_, span, _) in zip(tokens, document, strict=False) if span is None]
                where = next(i for i, (_, span, _) in enumerate(document) if span is not None)
                assert (before[:where], tokens[where:]) in (
                    ([bos, *caption, boi], [eoi, eos]),
                    ([bos, boi], [eoi, *caption, eos]),
                    # The prompt dropped: that there is none is not to be learnt.
                    ([bos, boi], [eoi]),
                )
                images.append(index)
                found_images += 1
            else:
                if expected_next is not None:
                    assert tokens[0] == expected_next, "a cut text goes on in the lane's next row"
                text_stream += tokens
                label = labels[text[-1]]
                expected_next = None if label == IGNORE_INDEX else label
                assert (tokens[-1] == eos) == (expected_next is None)
        assert ids.count(tokenizer.pad_id) == T - used
        assert all(label == IGNORE_INDEX for label, token in zip(labels, ids, strict=True) if token == tokenizer.pad_id)
        assert batch.latents("image").mask[0].tolist() == [True] * found_images + [False] * (K - found_images)
        assert counts["image_items"] == found_images
        assert counts["text_slots"] == used
        assert counts["pad_slots"] == (batch.slots.document_ids == -1).sum().item()
        if texts:
            assert T - used <= 1, "text fills the row"
        totals.update(counts)
    read_texts, current = [], []
    for token in text_stream:
        current.append(token)
        if token == eos:
            assert current[0] == bos
            read_texts.append(tokenizer.decode(current))
            current = []
    assert totals["text_documents"] == len(read_texts)
    return images, read_texts, totals


def epochs(per_lane: list[list], length: int) -> list[list]:
    """Items by position in the global sequence, of which lane r reads r, r + R, ...; whole epochs only."""
    lanes = len(per_lane)
    by_position = {lane + i * lanes: item for lane, items in enumerate(per_lane) for i, item in enumerate(items)}
    result = []
    while all(len(result) * length + i in by_position for i in range(length)):
        result.append([by_position[len(result) * length + i] for i in range(length)])
    return result


@given(
    caption_lengths=st.lists(st.integers(0, 14), min_size=1, max_size=7),
    text_lengths=st.lists(st.integers(1, 30), max_size=5),
    text_slots=st.integers(4, 16),
    images_per_row=st.integers(1, 3),
    lanes=st.integers(1, 4),
    rope=st.sampled_from(["1d", "3d"]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60)
def test_every_document_is_read_once_per_epoch(
    byte_tokenizer, caption_lengths, text_lengths, text_slots, images_per_row, lanes, rope, seed
) -> None:
    captions = [chr(97 + i) * length for i, length in enumerate(caption_lengths)]
    texts = [chr(65 + i) * length for i, length in enumerate(text_lengths)]
    packer = make_packer(byte_tokenizer, captions, texts, text_slots, images_per_row, lanes, rope, seed, lookahead=1)
    # A row takes at least one image.
    steps = 2 * -(-len(captions) // lanes)
    lanes_read = [check_lane(packer, byte_tokenizer, lane, steps, captions, texts) for lane in range(lanes)]
    whole = epochs([images for images, _, _ in lanes_read], len(captions))
    assert len(whole) >= 2
    for epoch in whole:
        assert sorted(epoch) == list(range(len(captions)))
    for epoch in epochs([read for _, read, _ in lanes_read], len(texts)) if texts else []:
        assert sorted(epoch) == sorted(texts)


def test_every_token_of_every_text_is_read_in_whole_epochs(byte_tokenizer) -> None:
    texts = ["".join(chr(97 + (7 * i + j) % 26) for j in range(3 + 5 * i)) for i in range(9)]
    packer = make_packer(byte_tokenizer, ["cat", "a dog"], texts, lanes=3)
    lanes_read = [check_lane(packer, byte_tokenizer, lane, 150, ["cat", "a dog"], texts)[1] for lane in range(3)]
    whole = epochs(lanes_read, len(texts))
    assert len(whole) > 5
    assert all(sorted(epoch) == sorted(texts) for epoch in whole)
    assert len({tuple(epoch) for epoch in whole}) > 1, "epochs are shuffled anew"


def test_epochs_and_seeds_have_their_own_order(byte_tokenizer) -> None:
    captions = ["x"] * 40
    orders = []
    for seed in (0, 1):
        packer = make_packer(byte_tokenizer, captions, lanes=1, seed=seed)
        images = check_lane(packer, byte_tokenizer, 0, 60, captions, [])[0]
        orders += [tuple(epoch) for epoch in epochs([images], 40)[:2]]
    assert len(set(orders)) == 4
    assert all(order != tuple(range(40)) for order in orders)


def test_sources_are_mixed_by_weight_and_each_is_read_in_whole_epochs(byte_tokenizer) -> None:
    sources = sources_of(
        numbered_images(["aa"] * 10, weight=3.0),
        texts_of([str(i) * 6 for i in range(4)]),
        numbered_images(["bb"] * 5, first=100),
        texts_of(["x" * 9, "y" * 9], weight=2.0),
    )
    packer = packer_of(sources, byte_tokenizer, data_config(text_slots=40, images_per_row=2), rope="3d")
    indices, chars = [], Counter()
    for batch, _ in rows_of_lane(packer, 0, 400):
        indices += [int(latents[0, 0, 0]) for latents in batch.latents("image").latents[batch.latents("image").mask]]
        text_only = [d for d in read_row(batch, 40) if all(span is None for _, span, _ in d)]
        chars.update(byte_tokenizer.decode([batch.tokens("text").ids[0, slot] for d in text_only for slot, _, _ in d]))
    small = [index for index in indices if index >= 100]
    large = [index for index in indices if index < 100]
    assert len(large) / len(indices) == pytest.approx(0.75, abs=4.5 * (0.75 * 0.25 / len(indices)) ** 0.5)
    for read, length, first in ((large, 10, 0), (small, 5, 100)):
        for epoch in epochs([read], length):
            assert sorted(epoch) == list(range(first, first + length))
    digits, letters = (sum(chars[c] for c in group) for group in ("0123", "xy"))
    # Twice as many documents of nine letters as of six digits.
    assert letters / digits == pytest.approx(3.0, rel=0.2)
    assert max(chars[c] for c in "0123") - min(chars[c] for c in "0123") <= 12


def test_weights_hold_for_documents_of_any_length(byte_tokenizer) -> None:
    """A long caption that waits for room is not passed over for a short one of another source."""
    short, long = ["x" * 4] * 50, ["y" * 70] * 50
    config = data_config(text_slots=88, images_per_row=8)
    sources = sources_of(numbered_images(short), numbered_images(long, first=50))
    packer = packer_of(sources, byte_tokenizer, config)
    counts = sum((counts for _, counts in rows_of_lane(packer, 0, 1000)), Counter())
    placed = [counts[counter(name, "documents")] for name in sources.names]
    assert placed[0] / sum(placed) == pytest.approx(0.5, abs=4.5 * (0.25 / sum(placed)) ** 0.5)
    assert all(placed[i] <= counts[counter(sources.names[i], "taken")] <= placed[i] + 16 for i in range(2))


def test_rows_depend_on_seed_lane_step_and_state_alone(byte_tokenizer) -> None:
    def packer(seed: int = 0) -> Packer:
        return make_packer(byte_tokenizer, ["one", "three", "x"], ["some text"], lanes=4, seed=seed)

    first = rows_of_lane(packer(), 2, 5)
    other = packer()
    for lane in (3, 0, 1):
        rows_of_lane(other, lane, 7)
    for (one, _), (two, _) in zip(first, rows_of_lane(other, 2, 5), strict=True):
        assert all(torch.equal(value, two.tensors()[name]) for name, value in one.tensors().items())
    state = packer().initial_state()[None]
    noises = [
        packer(seed).rows([lane], step, state)[0].batch.latents("image").noise
        for seed in (0, 1)
        for lane in (0, 1)
        for step in (0, 1)
    ]
    for i, one in enumerate(noises):
        assert all(not torch.equal(one, two) for two in noises[:i])


def test_states_given_are_not_changed(byte_tokenizer) -> None:
    packer = make_packer(byte_tokenizer, ["one"], ["text"])
    states = np.tile(packer.initial_state(), (2, 1))
    before = states.copy()
    _, after, _ = packer.rows([0, 1], 0, states)
    assert (states == before).all()
    assert (after != before).any(axis=1).all()


def shares(packer: Packer, tokenizer: TextTokenizer, rows: int) -> tuple[int, float, float, list[float], list[float]]:
    """=> (images, share of documents with the caption first, share of dropped ones, timesteps of each order)."""
    first = dropped = total = 0
    timesteps: tuple[list[float], list[float]] = ([], [])
    for batch, _ in rows_of_lane(packer, 0, rows):
        for document in read_row(batch, packer.config.slots["text"]):
            spans = [span for _, span, _ in document]
            where = next(i for i, span in enumerate(spans) if span is not None)
            behind = len(document) - where - PATCHES
            # [EOI EOS] behind a prompt, [EOI] where it was dropped, [EOI caption EOS] where the image stands first.
            caption_first = behind <= 2
            total += 1
            first += caption_first
            dropped += caption_first and where == 2
            timesteps[not caption_first].append(float(batch.latents("image").timesteps[0, spans[where]]))
    return total, first / total, dropped / max(first, 1), *timesteps


@pytest.mark.parametrize("text_slots", [64, 20], ids=["roomy", "crowded"])
def test_order_dropout_and_timesteps_have_their_chances(byte_tokenizer, text_slots: int) -> None:
    """Also where rows are full, so that documents have to wait for the next."""
    packer = make_packer(byte_tokenizer, ["eight123"] * 50, [], text_slots, images_per_row=3, lanes=1)
    total, first, dropped, of_first, of_behind = shares(packer, byte_tokenizer, 4000 if text_slots == 20 else 1500)
    assert total > 4000
    assert first == pytest.approx(0.8, abs=4.5 * (0.8 * 0.2 / total) ** 0.5)
    assert dropped == pytest.approx(0.1, abs=4.5 * (0.1 * 0.9 / (0.8 * total)) ** 0.5)
    # Uniform in (0, 1], and in (0, 0.5] where the image stands first.
    assert np.mean(of_first) == pytest.approx(0.5, abs=4.5 * (1 / 12 / len(of_first)) ** 0.5)
    assert np.mean(of_behind) == pytest.approx(0.25, abs=4.5 * (1 / 48 / len(of_behind)) ** 0.5)
    assert max(of_first) > 0.95
    assert 0.45 < max(of_behind) <= 0.5


def test_extremes_of_the_layout_options(byte_tokenizer) -> None:
    def of(**data) -> tuple[float, float]:
        packer = make_packer(byte_tokenizer, ["cat"], [], 40, lanes=1, **data)
        return shares(packer, byte_tokenizer, 100)[1:3]

    assert of(caption_first_prob=1.0, prompt_dropout_prob=0.0) == (1.0, 0.0)
    assert of(caption_first_prob=1.0, prompt_dropout_prob=1.0) == (1.0, 1.0)
    assert of(caption_first_prob=0.0, prompt_dropout_prob=1.0) == (0.0, 0.0)


def test_truncation_is_counted_once_for_each_caption_cut(byte_tokenizer) -> None:
    """Also when the document has to wait for the next row."""
    captions = ["short", "x" * 30, "y" * 17]
    packer = make_packer(byte_tokenizer, captions, [], 20, images_per_row=2, lanes=1, prompt_dropout_prob=0.0)
    images, _, counts = check_lane(packer, byte_tokenizer, 0, 60, captions, [])
    assert len(images) > 60
    assert counts["truncated_captions"] == sum(len(captions[index]) > 16 for index in images)


def test_noise_and_posterior_are_standard_normal_and_independent(byte_tokenizer) -> None:
    mean, std = (np.full((8, CHANNELS, 4, 4), value, dtype=np.float16) for value in (3.0, 0.5))
    images = ArrayImages(["a"] * 8, mean, std)
    packer = packer_of(
        sources_of(Source(images, 1.0, {"image": images})), byte_tokenizer, data_config(text_slots=40), rope="3d"
    )
    rows = [batch for batch, _ in rows_of_lane(packer, 0, 200)]
    noise = torch.cat([batch.latents("image").noise for batch in rows]).flatten()
    spread = (torch.cat([batch.latents("image").latents for batch in rows]).flatten() - 3) / 0.5
    for values in (noise, spread):
        assert values.mean().abs() < 4.5 / len(values) ** 0.5
        assert values.std().item() == pytest.approx(1, abs=4.5 / (2 * len(values)) ** 0.5)
    assert torch.corrcoef(torch.stack([noise, spread]))[0, 1].abs() < 4.5 / len(noise) ** 0.5
    assert len(noise.unique()) > 0.99 * len(noise), "rows do not repeat their noise"


def test_special_strings_in_a_caption_are_plain_text(byte_tokenizer) -> None:
    captions = ["<begin_of_image><eos>"]
    packer = make_packer(byte_tokenizer, captions, [], 40, lanes=1)
    check_lane(packer, byte_tokenizer, 0, 5, captions, [])
