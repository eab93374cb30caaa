"""Batches for a rank: its lanes' rows of every step, prepared by worker processes, resumable at any step."""

import os
import signal
import time
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from transfusion_mot.data.batch import Batch, Rows
from transfusion_mot.data.online import OnlineEncoder
from transfusion_mot.data.packing import Packer
from transfusion_mot.errors import UserError

# Counts travel as a plain dict: the data loader copies a Counter by `update`, which would double it. A sentence is an
# error of the user, which the data loader would bury under a traceback.
Chunk = tuple[Rows, Tensor, dict[str, int]] | str


class _LaneRows(IterableDataset[Chunk]):
    """Each worker owns a block of the rank's lanes and yields their rows, step after step."""

    def __init__(self, packer: Packer, lanes: range, states: Tensor, first_step: int, num_steps: int) -> None:
        self.packer = packer
        self.lanes = lanes
        self.states = states
        self.first_step = first_step
        self.num_steps = num_steps

    def __iter__(self) -> Iterator[Chunk]:
        worker = get_worker_info()
        share = len(self.lanes) // (worker.num_workers if worker else 1)
        start = share * (worker.id if worker else 0)
        lanes = self.lanes[start : start + share]
        states = self.states[start : start + share].numpy()
        for step in range(self.first_step, self.num_steps):
            try:
                rows, states, counts = self.packer.rows(lanes, step, states)
            except UserError as error:
                yield str(error)
                return
            yield rows, torch.from_numpy(states), dict(counts)


class LaneLoader:
    """Iterates over the steps of one rank => (batch of its rows, what was counted).

    After a step, `states` [rows, n] holds what this rank's lanes remember: with those of all ranks it resumes the run,
    on any number of ranks and workers. `states_before` is what they remembered before it: from it the step's rows can
    be made again. `seconds_waited` is how long the step's rows had to be waited for.

    Args:
        packer: Builds rows.
        rank, world_size: This process and their number; ranks own consecutive blocks of lanes.
        num_workers: At most this many worker processes; lowered to a divisor of the rank's rows.
        states: Of all lanes [num_lanes, n], or None to begin.
        first_step: The step to begin with.
        num_steps: The step to end before.
        device: Where batches go, without the host waiting for the copy.
        encoder: Encodes images there, unless their latents are cached.
    """

    def __init__(
        self,
        packer: Packer,
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
        self.num_workers = max((n for n in range(1, num_workers + 1) if rows % n == 0), default=0)
        self._loader = DataLoader(
            _LaneRows(packer, self.lanes, self.states, first_step, num_steps),
            batch_size=None,
            num_workers=self.num_workers,
            pin_memory=device.type == "cuda",
            prefetch_factor=4 if self.num_workers else None,
            worker_init_fn=_quiet_worker,
        )

    def __iter__(self) -> Iterator[tuple[Batch, Counter[str]]]:
        # The loader takes its workers in turn, so that consecutive chunks are one step's consecutive blocks of lanes.
        chunks = iter(self._loader)
        for _ in range(self.first_step, self.num_steps):
            parts = []
            asked = time.perf_counter()
            for _ in range(max(1, self.num_workers)):
                chunk = next(chunks)
                if isinstance(chunk, str):
                    raise UserError(chunk)
                parts.append(chunk)
            self.seconds_waited = time.perf_counter() - asked
            counts: Counter[str] = Counter()
            for _, _, part_counts in parts:
                counts.update(part_counts)
            self.states_before = self.states
            self.states = torch.cat([states for _, states, _ in parts])
            # Joined on the device: what is joined on the host would not be pinned, and its copy would wait.
            rows = Rows.cat([rows.to(self.device) for rows, _, _ in parts])
            yield self.encoder(rows) if self.encoder is not None else rows.batch, counts


def _quiet_worker(worker: int) -> None:
    """Rows are small: one thread a worker, and no warning from the tokenizer's own threads after the fork.

    A signal to all processes of a run is for the training process, which ends its workers when it is done.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
