"""Batches for a rank: its lanes' rows of every step, prepared by worker processes, resumable at any step."""

import dataclasses
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from transfusion_mot.data.batch import Batch, PackedRows, Rows
from transfusion_mot.data.online import OnlineEncoder
from transfusion_mot.data.packing import Packer
from transfusion_mot.errors import UserError

# Limits of steps that are sent together: their bytes and their number.
_BYTES_AT_A_TIME = 2**22
_STEPS_AT_A_TIME = 8


@dataclass(frozen=True)
class _Chunk:
    """A worker's rows of consecutive steps.

    Attributes:
        rows: Rows of each step.
        states: States of the worker's lanes after each step.
        counts: Counters of each step.
        error: Message for the user if steps are missing; raised in the worker, it would be hidden in a traceback.
    """

    rows: PackedRows
    states: list[NDArray[np.int64]]
    counts: list[Counter[str]]
    error: str | None

    def pin_memory(self) -> Self:
        """Called by the data loader."""
        return dataclasses.replace(self, rows=self.rows.pin_memory())


class _LaneRows(IterableDataset[_Chunk]):
    """Each worker owns a block of the rank's lanes and yields their rows, step after step."""

    def __init__(self, packer: Packer, lanes: range, states: Tensor, first_step: int, num_steps: int) -> None:
        self.packer = packer
        self.lanes = lanes
        self.states = states
        self.first_step = first_step
        self.num_steps = num_steps

    def __iter__(self) -> Iterator[_Chunk]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        mine = slice(number * len(self.lanes) // workers, (number + 1) * len(self.lanes) // workers)
        lanes, states = self.lanes[mine], self.states[mine].numpy()
        most_lanes = -(-len(self.lanes) // workers)
        step, error = self.first_step, None
        while step < self.num_steps and error is None:
            rows: list[Rows] = []
            behind: list[NDArray[np.int64]] = []
            counts: list[Counter[str]] = []
            size = 0
            # Computed as if all workers had the same number of lanes, so that all send the same number of steps.
            while step < self.num_steps and size < _BYTES_AT_A_TIME and len(rows) < _STEPS_AT_A_TIME:
                try:
                    made, states, counted = self.packer.rows(lanes, step, states)
                except UserError as problem:
                    error = str(problem)
                    break
                rows.append(made)
                behind.append(states)
                counts.append(counted)
                size += made.nbytes // len(lanes) * most_lanes
                step += 1
            yield _Chunk(PackedRows.pack(rows), behind, counts, error)


class LaneLoader:
    """Iterates over the steps of one rank => (batch of its rows, counters).

    After a step, `states` [rows, n] are the states of this rank's lanes. Together with those of all ranks they resume
    the run, on any number of ranks and workers. `states_before` are the states before the step, from which its rows can
    be made again. `seconds_waited` is the time that the step waited for its rows.

    Args:
        packer: Builds rows.
        rank, world_size: This process and their number; ranks own consecutive blocks of lanes.
        num_workers: Maximum number of worker processes, each with one row or more.
        states: States of all lanes [num_lanes, n], or None for a new run.
        first_step: The first step.
        num_steps: The step after the last one.
        device: Device of the batches; the host does not wait for the copy.
        encoder: Encodes media on the device, unless their latents are cached.
    """

    def __init__(
        self,
        packer: Packer,
        *,
        rank: int,
        world_size: int,
        num_workers: int,
        states: Tensor | None,
        first_step: int,
        num_steps: int,
        device: torch.device,
        encoder: OnlineEncoder | None = None,
    ) -> None:
        self.device = device
        self.encoder = encoder
        rows = packer.num_lanes // world_size
        self.lanes = range(rank * rows, (rank + 1) * rows)
        if states is None:
            states = torch.from_numpy(packer.initial_state()).expand(packer.num_lanes, -1)
        self.states = self.states_before = states[self.lanes.start : self.lanes.stop].clone()
        self.seconds_waited = 0.0
        self.num_steps = num_steps
        self.first_step = first_step
        self.num_workers = min(num_workers, rows)
        self._loader = DataLoader(
            _LaneRows(packer, self.lanes, self.states, first_step, num_steps),
            batch_size=None,
            num_workers=self.num_workers,
            pin_memory=device.type == "cuda",
            prefetch_factor=4 if self.num_workers else None,
            worker_init_fn=_quiet_worker,
        )

    def __iter__(self) -> Generator[tuple[Batch, Counter[str]], None, None]:
        # The loader reads from its workers in turn, so consecutive chunks are the consecutive blocks of lanes of one
        # step.
        chunks = iter(self._loader)
        step = self.first_step
        try:
            while step < self.num_steps:
                asked = time.perf_counter()
                parts: list[_Chunk] = [next(chunks) for _ in range(max(1, self.num_workers))]
                self.seconds_waited = time.perf_counter() - asked
                rows_of_parts = [part.rows.to(self.device).rows() for part in parts]
                # All chunks have the same number of steps, except those with an error.
                together = min(len(rows) for rows in rows_of_parts)
                for index in range(together):
                    counts: Counter[str] = Counter()
                    for part in parts:
                        counts.update(part.counts[index])
                    self.states_before = self.states
                    self.states = torch.from_numpy(np.concatenate([part.states[index] for part in parts]))
                    # Joined on the device: a tensor joined on the host would not be pinned, and the host would wait for
                    # its copy.
                    rows = Rows.cat([steps[index] for steps in rows_of_parts])
                    yield self.encoder(rows) if self.encoder is not None else rows.batch, counts
                    self.seconds_waited = 0.0
                for part in parts:
                    if part.error is not None:
                        raise UserError(part.error)
                step += together
        finally:
            # Ends the workers, which a traceback would otherwise keep alive.
            del chunks


def _quiet_worker(worker: int) -> None:
    """No warning from the tokenizer's own threads after the fork; PyTorch already gives each worker one thread.

    Workers ignore signals to the process group, so that the training process can finish its step. They end when the
    training process ends or asks them to, and watch for this from threads. PyTorch's data loader only checks between
    two chunks whether the parent process has changed. That misses a busy worker and a worker that started after the
    change, and a worker that ends would wait until its data are read.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Blocked in all threads, also later ones: a blocked signal waits for the thread that requests it.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    for watch in (_end_after, _end_when_asked_by):
        threading.Thread(target=watch, args=(parent,), daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _end_after(parent: BaseProcess) -> None:
    """End this process when its parent has ended for any reason."""
    parent.join()
    os._exit(0)


def _end_when_asked_by(parent: BaseProcess) -> None:
    """End this process at a SIGTERM of its parent, which a process sends to its daemons before it waits for them."""
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent.pid:
        pass
    os._exit(0)
