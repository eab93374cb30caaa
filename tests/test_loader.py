"""The same rows for any number of ranks and workers, and from any first step."""

import multiprocessing
from collections import Counter

import pytest
import torch
from conftest import data_config, loader_of, numbered_images, packer_of, sources_of, texts_of

from transfusion_mot.data import loader
from transfusion_mot.data.batch import Batch, PackedRows, Rows
from transfusion_mot.data.packing import Packer
from transfusion_mot.errors import UserError
from transfusion_mot.models.inputs import LatentInput, Slots, TokenInput

# More steps than travel together, so that some do not come with the first.
NUM_LANES, NUM_STEPS = 4, 20


@pytest.fixture
def packer(byte_tokenizer) -> Packer:
    captions = ["apple", "a", "an octopus", "sun"]
    texts = ["the quick brown fox jumps over it", "a", "lazy dogs"]
    sources = sources_of(numbered_images(captions), texts_of(texts))
    config = data_config(text_slots=18, images_per_row=2)
    return packer_of(sources, byte_tokenizer, config, rope="3d", lanes=NUM_LANES, seed=3)


def steps_of(
    packer: Packer, world_size: int, workers: int, states: torch.Tensor | None = None, first_step: int = 0
) -> tuple[list[Batch], list[torch.Tensor], list[Counter]]:
    """Batches, states and counts of all ranks together, step after step."""
    ranks = []
    for rank in range(world_size):
        loader = loader_of(
            packer,
            NUM_STEPS,
            rank=rank,
            world_size=world_size,
            num_workers=workers,
            states=states,
            first_step=first_step,
        )
        ranks.append([(batch, loader.states, counts) for batch, counts in loader])
    batches, all_states, all_counts = [], [], []
    for parts in zip(*ranks, strict=True):
        batches.append(Batch.cat([batch for batch, _, _ in parts]))
        all_states.append(torch.cat([part for _, part, _ in parts]))
        all_counts.append(sum((counts for _, _, counts in parts), Counter()))
    return batches, all_states, all_counts


def assert_equal(one: Batch, two: Batch) -> None:
    assert one.tensors().keys() == two.tensors().keys()
    for name, value in one.tensors().items():
        assert torch.equal(value, two.tensors()[name]), name


@pytest.mark.parametrize(("world_size", "workers"), [(1, 1), (1, 2), (1, 3), (2, 0), (2, 2), (4, 0)])
def test_rows_are_the_same_on_any_number_of_ranks_and_workers(packer, world_size: int, workers: int) -> None:
    alone, alone_states, alone_counts = steps_of(packer, 1, 0)
    batches, states, counts = steps_of(packer, world_size, workers)
    assert len(batches) == NUM_STEPS
    for step in range(NUM_STEPS):
        assert_equal(batches[step], alone[step])
        assert torch.equal(states[step], alone_states[step])
        assert counts[step] == alone_counts[step]
    assert alone[0].tokens("text").ids.shape == (NUM_LANES, 18)


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
    loader = loader_of(packer, NUM_STEPS, num_workers=2)
    for step, _ in enumerate(loader):
        assert torch.equal(loader.states, saved[step])


@pytest.mark.parametrize(("world_size", "asked", "used"), [(1, 3, 3), (1, 8, 4), (2, 3, 2), (4, 2, 1), (1, 0, 0)])
def test_every_worker_has_a_row(packer, world_size: int, asked: int, used: int) -> None:
    assert loader_of(packer, 1, world_size=world_size, num_workers=asked).num_workers == used


def test_workers_with_more_rows_than_others_stay_in_step(packer, monkeypatch) -> None:
    """Three workers for four rows, which by themselves would send a different number of steps at a time."""
    alone, alone_states, _ = steps_of(packer, 1, 0)
    row = packer.rows([0], 0, packer.initial_state()[None])[0].nbytes
    # As many bytes as a step of two rows, and more than one of one row.
    monkeypatch.setattr(loader, "_BYTES_AT_A_TIME", 2 * row)
    batches, states, _ = steps_of(packer, 1, 3)
    assert len(batches) == NUM_STEPS
    for step in range(NUM_STEPS):
        assert_equal(batches[step], alone[step])
        assert torch.equal(states[step], alone_states[step])


def test_what_the_loader_gives_is_what_was_packed(packer) -> None:
    states = packer.initial_state()[None].repeat(NUM_LANES, axis=0)
    for step, (batch, counts) in enumerate(loader_of(packer, NUM_STEPS, num_workers=2)):
        rows, states, counted = packer.rows(range(NUM_LANES), step, states)
        assert_equal(rows.batch, batch)
        assert counts == counted


def test_rows_of_several_steps_are_one_tensor() -> None:
    """Of any types and shapes, with and without media and copies."""
    steps = []
    for rows in (1, 3):
        slots = {name: torch.randint(99, (rows, 5)) for name in Slots._fields}
        slots["source_ids"] = slots["source_ids"].to(torch.int16)
        inputs = {name: TokenInput(*torch.randint(99, (2, rows, 3))) for name in ("text", "speech")}
        copies = torch.rand(rows, 2) > 0.5 if rows == 3 else None
        latents, noise = torch.randn(2, rows, 2, 3, 1, 1)
        inputs["image"] = LatentInput(latents, torch.rand(rows, 2), noise, torch.rand(rows, 2) > 0.5, copies)
        media = {"image": torch.randint(256, (rows, 7), dtype=torch.uint8)} if rows == 3 else {}
        steps.append(Rows(Batch(inputs, Slots(**slots)), media))
    packed = PackedRows.pack(steps)
    for one, two in zip(packed.rows(), steps, strict=True):
        assert_equal(one.batch, two.batch)
        assert list(one.tensors()) == list(two.tensors())
        assert one.media.keys() == two.media.keys()
        assert all(torch.equal(one.media[name], two.media[name]) for name in one.media)
        assert list(one.batch.inputs) == list(two.batch.inputs)
        for tensor in one.batch.tensors().values():
            assert tensor.untyped_storage().data_ptr() == packed.content.data_ptr()
            assert (tensor.data_ptr() - packed.content.data_ptr()) % 16 == 0
    assert [rows.nbytes for rows in packed.rows()] == [rows.nbytes for rows in steps]


def test_steps_before_an_unreadable_one_are_still_given(byte_tokenizer) -> None:
    """The files of a source are removed while it is read: earlier rows are used, then a message gives the reason."""
    images = numbered_images(["apple", "sun"])
    sources = sources_of(images)
    config = data_config(text_slots=18, images_per_row=2)
    packer = packer_of(sources, byte_tokenizer, config, rope="3d", lanes=NUM_LANES, seed=3)
    whole = [batch for batch, _ in loader_of(packer, 3, num_workers=0)]
    plain = packer.rows

    def rows(lanes, step, states):  # type: ignore[no-untyped-def]
        if step == 3 and 2 in lanes:
            raise UserError("its folder is gone")
        return plain(lanes, step, states)

    packer.rows = rows  # type: ignore[method-assign]
    for workers in (0, 2):
        given: list[Batch] = []
        with pytest.raises(UserError, match="its folder is gone"):
            given.extend(batch for batch, _ in loader_of(packer, NUM_STEPS, num_workers=workers))
        assert len(given) == 3
        assert multiprocessing.active_children() == []
        for one, two in zip(given, whole, strict=True):
            assert_equal(one, two)


def test_nothing_is_left_to_do_after_the_last_step(packer) -> None:
    assert list(loader_of(packer, NUM_STEPS, first_step=NUM_STEPS)) == []
