"""Runs that are killed repeatedly read the same rows as one that is not."""

import hashlib
import itertools
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import loader_of
from process_group import clean_process
from test_lanes import NUM_LANES, mixed_packer
from training_runs import load_all

from transfusion_mot.data.batch import Batch
from transfusion_mot.training.checkpoint import find_state
from transfusion_mot.training.state import StateWriter, load_progress

pytestmark = pytest.mark.slow

NUM_STEPS, NUM_KILLS = 400, 20


def row_hashes(batch: Batch) -> list[str]:
    return [
        hashlib.sha256(b"".join(value[row].numpy().tobytes() for value in batch.tensors().values())).hexdigest()[:16]
        for row in range(batch.num_rows)
    ]


def read_rows(run: Path, tokenizer, world_size: int, workers: int, num_steps: int) -> None:
    """Go on from the newest state, as train.py does: each step leaves its rows in a file, then its state."""
    folder = find_state(run, "auto")
    first = load_progress(folder)["step"] if folder is not None else 0
    states = load_all(folder)["lanes"] if folder is not None else None
    loaders = [
        loader_of(
            mixed_packer(tokenizer),
            num_steps,
            rank=rank,
            world_size=world_size,
            num_workers=workers,
            states=states,
            first_step=first,
        )
        for rank in range(world_size)
    ]
    with (run / "rows.txt").open("a") as file, StateWriter(run, 2, 0) as writer:
        for step, parts in enumerate(zip(*loaders, strict=True), first):
            batch = Batch.cat([batch for batch, _ in parts])
            file.write(f"{step} {' '.join(row_hashes(batch))}\n")
            file.flush()
            lanes = torch.cat([loader.states for loader in loaders])
            writer.save(step + 1, {"lanes": lanes}, {"step": step + 1})
            writer.wait()


def test_twenty_kills_at_random_moments_change_no_row(byte_tokenizer, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    read_rows(whole, byte_tokenizer, 1, 0, NUM_STEPS)
    expected = dict(line.split(" ", 1) for line in (whole / "rows.txt").read_text().splitlines())
    assert len(expected) == NUM_STEPS
    assert len({row for rows in expected.values() for row in rows.split()}) == NUM_STEPS * NUM_LANES

    draw = random.Random(0)
    rows = killed / "rows.txt"
    rows.touch()
    for _ in range(NUM_KILLS):
        # On another number of ranks and workers every time.
        arguments = (killed, byte_tokenizer, draw.choice([1, 2, 4]), draw.choice([0, 0, 2]), NUM_STEPS)
        process = clean_process(read_rows, *arguments)
        size, deadline = rows.stat().st_size, time.monotonic() + 60
        process.start()
        while rows.stat().st_size == size:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.04))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL, "it ended before it could be killed"
    # A very busy machine may not have come to a state at all.
    left = find_state(killed, "auto")
    assert left is None or load_progress(left)["step"] < NUM_STEPS
    read_rows(killed, byte_tokenizer, 2, 0, NUM_STEPS)

    lines = [line.split(" ", 1) for line in rows.read_text().splitlines()]
    assert dict(lines).keys() == expected.keys()
    assert [line for line in lines if expected[line[0]] != line[1]] == []
    # Every step follows the one before it, or is done again because its state was not saved.
    steps = [int(step) for step, _ in lines]
    assert all(after - before in (0, 1) for before, after in itertools.pairwise(steps))
