"""The shuffled order, and the state of a lane: waiting documents, and runs that are interrupted anywhere."""

import io
import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import CHANNELS, data_config, documents_of, loader_of, numbered_images, packer_of, texts_of
from toy_media import MIXED_SLOTS, four_modality_tokenizer, mixed_sources, toy_packer

from transfusion_mot.data.batch import Batch
from transfusion_mot.data.lanes import LaneSizes, LaneState, Waiting
from transfusion_mot.data.mixture import Sources
from transfusion_mot.data.packing import Packer
from transfusion_mot.data.permutation import NUM_ROUNDS, permuted

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

KEYS = st.lists(st.integers(0, 2**64 - 1), min_size=NUM_ROUNDS, max_size=NUM_ROUNDS)


@given(st.integers(1, 3000), KEYS)
@settings(max_examples=60)
def test_shuffled_order_holds_every_item_once(length: int, keys: list[int]) -> None:
    assert sorted(permuted(position, length, keys) for position in range(length)) == list(range(length))


def test_shuffled_order_of_a_source_that_no_array_could_hold() -> None:
    keys = list(range(NUM_ROUNDS))
    items = [permuted(position, 10**15, keys) for position in range(1000)]
    assert len(set(items)) == 1000
    assert all(0 <= item < 10**15 for item in items)
    assert np.mean(items) == pytest.approx(5e14, abs=4.5 * 1e15 / 12**0.5 / 1000**0.5)


@pytest.mark.parametrize("length", [2, 3, 5, 16, 17])
def test_every_item_is_as_likely_at_every_position(length: int) -> None:
    rng = np.random.default_rng(0)
    draws = 4000
    counts = np.zeros((length, length))
    for keys in rng.integers(2**64, size=(draws, NUM_ROUNDS), dtype=np.uint64).tolist():
        for position in range(length):
            counts[position, permuted(position, length, keys)] += 1
    share = 1 / length
    assert np.abs(counts / draws - share).max() < 5 * (share * (1 - share) / draws) ** 0.5


def test_all_orders_of_three_items_come_up_alike() -> None:
    rng = np.random.default_rng(0)
    orders = Counter(
        tuple(permuted(position, 3, keys) for position in range(3))
        for keys in rng.integers(2**64, size=(6000, NUM_ROUNDS), dtype=np.uint64).tolist()
    )
    assert len(orders) == 6
    assert all(abs(count - 1000) < 5 * (1000 * 5 / 6) ** 0.5 for count in orders.values())


NUMBERS = st.integers(0, 2**62)
ENTRIES = st.builds(Waiting, NUMBERS, NUMBERS, NUMBERS)


@given(
    taken=st.lists(NUMBERS, min_size=1, max_size=5),
    begun=st.lists(st.none() | ENTRIES, min_size=1, max_size=3),
    waiting=st.lists(st.lists(ENTRIES, max_size=4), min_size=1, max_size=3),
    room=st.integers(0, 2),
)
def test_state_comes_back_from_its_vector(taken, begun, waiting, room: int) -> None:
    state = LaneState(taken, begun, waiting)
    lookahead = max(1, room + max(map(len, waiting)))
    sizes = LaneSizes(len(taken), len(begun), len(waiting), lookahead)
    array = state.to_array(sizes)
    assert array.shape == (len(taken) + 3 * (len(begun) + len(waiting) * lookahead),)
    assert LaneState.from_array(array, sizes) == state
    assert LaneState.initial(sizes).to_array(sizes).shape == array.shape


# --- Documents that wait. ---


def placed_and_waiting(packer: Packer, lane: int, steps: int) -> tuple[list[list[int]], list[LaneState]]:
    """Images of every row, and the state after it."""
    state, rows, states = packer.initial_state()[None], [], []
    for step in range(steps):
        row, state, _ = packer.rows([lane], step, state)
        given = row.batch.latents("image")
        rows.append([int(latents[0, 0, 0]) for latents in given.latents[given.mask]])
        states.append(LaneState.from_array(state[0], packer.lane_sizes))
    return rows, states


@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=12),
    text_slots=st.integers(8, 24),
    images_per_row=st.integers(1, 4),
    lookahead=st.integers(1, 6),
    lanes=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60)
def test_what_waits_is_neither_lost_nor_repeated_nor_left_waiting(
    byte_tokenizer, lengths, text_slots, images_per_row, lookahead, lanes, seed
) -> None:
    def packer(lookahead: int) -> Packer:
        sources = Sources([numbered_images(["x" * length for length in lengths])], {"image": [(CHANNELS, 4, 4)]})
        config = data_config(text_slots=text_slots, images_per_row=images_per_row, lookahead=lookahead)
        return packer_of(sources, byte_tokenizer, config, lanes=lanes, seed=seed)

    steps = 12
    for lane in range(lanes):
        rows, states = placed_and_waiting(packer(lookahead), lane, steps)
        # One at a time, documents come in the lane's order.
        in_order = list(itertools.chain(*placed_and_waiting(packer(1), lane, steps * (images_per_row + lookahead))[0]))
        for step, state in enumerate(states):
            placed = Counter(itertools.chain(*rows[: step + 1]))
            taken = Counter(in_order[: state.taken[0]])
            assert placed <= taken
            assert (taken - placed).total() == len(state.waiting[0]) <= lookahead
            if step and states[step - 1].waiting[0]:
                longest = min(states[step - 1].waiting[0], key=lambda entry: entry.number)
                assert longest not in state.waiting[0], "what has waited longest is in the next row"


def test_short_documents_go_past_a_long_one_that_waits(byte_tokenizer) -> None:
    """Rows of two long captions are impossible; with a buffer, a long one shares a row with short ones."""

    def pad_slots(lookahead: int) -> int:
        sources = Sources([numbered_images(["x" * 20] * 8 + ["y" * 2] * 24)], {"image": [(CHANNELS, 4, 4)]})
        config = data_config(text_slots=40, images_per_row=4, lookahead=lookahead, prompt_dropout_prob=0.0)
        packer = packer_of(sources, byte_tokenizer, config)
        state, total = packer.initial_state()[None], 0
        for step in range(100):
            _, state, counts = packer.rows([0], step, state)
            total += counts["pad_slots"]
        return total

    assert pad_slots(16) < 0.75 * pad_slots(1)


# --- Interruption, ranks, workers. ---

NUM_LANES, NUM_STEPS = 4, 7
WORDS = ["a", "an octopus in the sea", "the quick brown fox jumps over the lazy dog and is gone", "sun"]


def mixed_packer(tokenizer, image_context: str = "noised") -> Packer:
    """Captions in two buckets, interleaved documents longer than a row, texts longer than a row."""
    sources = Sources(
        [
            numbered_images([f"{word}\n{word[::-1]}" for word in WORDS * 5], buckets=[0, 1, 1, 0] * 5, weight=2.0),
            documents_of([[word, 0, word, 1, 2, word, 3] for word in WORDS] + [[4, 5, 6, 7, 0]]),
            texts_of(WORDS),
        ],
        {"image": [(CHANNELS, 4, 4), (CHANNELS, 4, 4)]},
    )
    config = data_config(text_slots=26, images_per_row=3, lookahead=3, random_flip=True, image_context=image_context)
    return packer_of(sources, tokenizer, config, rope="3d", lanes=NUM_LANES, seed=5)


def steps_of(make_packer, world_size: int, workers: int, states=None, first_step: int = 0):
    """(batch, states) of all ranks together, step by step; every rank has a separate packer."""
    ranks = []
    for rank in range(world_size):
        loader = loader_of(
            make_packer(),
            NUM_STEPS,
            rank=rank,
            world_size=world_size,
            num_workers=workers,
            states=states,
            first_step=first_step,
        )
        ranks.append([(batch, loader.states) for batch, _ in loader])
    return [
        (Batch.cat([batch for batch, _ in parts]), torch.cat([states for _, states in parts]))
        for parts in zip(*ranks, strict=True)
    ]


@pytest.fixture(scope="module", params=["noised", "clean", "four modalities"])
def uninterrupted(request, byte_tokenizer):
    """What makes packers, and what comes of them."""

    def packer() -> Packer:
        if request.param == "four modalities":
            settings = {"lanes": NUM_LANES, "seed": 5, "rope": "3d", "lookahead": 3}
            return toy_packer(mixed_sources(), four_modality_tokenizer(), MIXED_SLOTS, **settings)
        return mixed_packer(byte_tokenizer, request.param)

    return packer, steps_of(packer, 1, 0)


@given(stops=st.sets(st.integers(1, NUM_STEPS - 1)), data=st.data())
@settings(max_examples=25)
def test_stream_is_the_same_however_it_is_interrupted_and_shared(uninterrupted, stops, data) -> None:
    packer, whole = uninterrupted
    first, states = 0, None
    for stop in [*sorted(stops), NUM_STEPS]:
        world_size = data.draw(st.sampled_from([1, 2, 4]))
        steps = steps_of(packer, world_size, 0, states, first)[: stop - first]
        for (batch, after), (expected, expected_after) in zip(steps, whole[first:stop], strict=True):
            assert torch.equal(after, expected_after)
            for name, value in batch.tensors().items():
                assert torch.equal(value, expected.tensors()[name]), name
        # Through a file, as a checkpoint does it.
        file = io.BytesIO()
        torch.save(steps[-1][1], file)
        file.seek(0)
        first, states = stop, torch.load(file)


@pytest.mark.parametrize(("world_size", "workers"), [(1, 4), (2, 2)])
def test_workers_give_the_same_stream(uninterrupted, world_size: int, workers: int) -> None:
    packer, whole = uninterrupted
    for first in (0, 3):
        states = whole[first - 1][1] if first else None
        steps = steps_of(packer, world_size, workers, states, first)
        for (batch, after), (expected, expected_after) in zip(steps, whole[first:], strict=True):
            assert torch.equal(after, expected_after)
            assert all(torch.equal(value, expected.tensors()[name]) for name, value in batch.tensors().items())
