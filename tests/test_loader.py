"""The same rows for any number of ranks and workers, and from any step on."""

from collections import Counter

import pytest
import torch
from conftest import numbered_images, sources_of, texts_of

from transfusion_mot.config import DataConfig
from transfusion_mot.data.batch import Batch
from transfusion_mot.data.loader import LaneLoader
from transfusion_mot.data.packing import Packer

NUM_LANES, NUM_STEPS = 4, 6
CPU = torch.device("cpu")


@pytest.fixture
def packer(byte_tokenizer) -> Packer:
    captions = ["apple", "a", "an octopus", "sun"]
    texts = ["the quick brown fox jumps over it", "a", "lazy dogs"]
    sources = sources_of(numbered_images(captions), texts_of(texts))
    config = DataConfig(text_slots=18, images_per_row=2)
    return Packer(sources, byte_tokenizer, config, "3d", 2, NUM_LANES, 3, lambda uniform: uniform)


def steps_of(
    packer: Packer, world_size: int, workers: int, states: torch.Tensor | None = None, first_step: int = 0
) -> tuple[list[Batch], list[torch.Tensor], list[Counter]]:
    """Batches, states and counts of all ranks together, step after step."""
    ranks = []
    for rank in range(world_size):
        loader = LaneLoader(packer, rank, world_size, workers, states, first_step, NUM_STEPS, CPU)
        ranks.append([(batch, loader.states, counts) for batch, counts in loader])
    batches, all_states, all_counts = [], [], []
    for parts in zip(*ranks, strict=True):
        batches.append(Batch.cat([batch for batch, _, _ in parts]))
        all_states.append(torch.cat([part for _, part, _ in parts]))
        all_counts.append(sum((counts for _, _, counts in parts), Counter()))
    return batches, all_states, all_counts


def assert_equal(one: Batch, two: Batch) -> None:
    for name, value in one.tensors().items():
        assert torch.equal(value, getattr(two, name)), name


@pytest.mark.parametrize(("world_size", "workers"), [(1, 1), (1, 2), (1, 3), (2, 0), (2, 2), (4, 0)])
def test_rows_are_the_same_on_any_number_of_ranks_and_workers(packer, world_size: int, workers: int) -> None:
    alone, alone_states, alone_counts = steps_of(packer, 1, 0)
    batches, states, counts = steps_of(packer, world_size, workers)
    assert len(batches) == NUM_STEPS
    for step in range(NUM_STEPS):
        assert_equal(batches[step], alone[step])
        assert torch.equal(states[step], alone_states[step])
        assert counts[step] == alone_counts[step]
    assert alone[0].text_ids.shape == (NUM_LANES, 18)


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (1, 2), (2, 0)])
def test_rows_go_on_from_saved_states_at_any_step(packer, world_size: int, workers: int) -> None:
    alone, saved, _ = steps_of(packer, 1, 0)
    for step in range(1, NUM_STEPS) if workers == 0 else (4,):
        batches, states, _ = steps_of(packer, world_size, workers, saved[step - 1], step)
        assert len(batches) == NUM_STEPS - step
        for one, two in zip(batches, alone[step:], strict=True):
            assert_equal(one, two)
        assert torch.equal(states[-1], saved[-1])


def test_states_are_those_of_the_step_just_taken_not_of_what_was_prepared(packer) -> None:
    """Workers run ahead; a state saved after step n must not skip what they prepared."""
    _, saved, _ = steps_of(packer, 1, 0)
    loader = LaneLoader(packer, 0, 1, 2, None, 0, NUM_STEPS, CPU)
    for step, _ in enumerate(loader):
        assert torch.equal(loader.states, saved[step])


@pytest.mark.parametrize(("world_size", "asked", "used"), [(1, 3, 2), (1, 8, 4), (2, 3, 2), (4, 2, 1), (1, 0, 0)])
def test_workers_divide_the_rows(packer, world_size: int, asked: int, used: int) -> None:
    assert LaneLoader(packer, 0, world_size, asked, None, 0, 1, CPU).num_workers == used


def test_nothing_is_left_to_do_after_the_last_step(packer) -> None:
    assert list(LaneLoader(packer, 0, 1, 0, None, NUM_STEPS, NUM_STEPS, CPU)) == []
