"""A thread that notices when a run stands still, and names the process that the others wait for."""

import json
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from transfusion_mot.files import written_whole

# A process whose file is older than this many periods has ended or is frozen.
_PERIODS_SILENT = 4


class Watchdog:
    """Every process writes its progress to its own file; the main process reads all of them if a run stands still.

    The training loop only sets a few attributes. The files are in the run folder, which all machines must share. Used
    as a context manager, it watches until the context ends.

    Args:
        folder: Folder of the files.
        rank, world_size: This process and the number of processes.
        minutes: Time without progress after which the late process is named, repeatedly; 0 is off.
    """

    def __init__(self, folder: Path, *, rank: int, world_size: int, minutes: float) -> None:
        self.folder = folder
        self.rank = rank
        self.world_size = world_size
        self.seconds = 60 * minutes
        self.period = min(15.0, self.seconds / 4)
        self._step, self._doing, self._since = 0, "starting", time.time()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        if self.seconds:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write()
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.seconds:
            self._stop.set()
            self._thread.join()
            self._path(self.rank).unlink(missing_ok=True)
            with suppress(OSError):  # The last one removes the folder.
                self.folder.rmdir()

    def at(self, step: int, doing: str) -> None:
        """Record what this process starts to do, and in which step."""
        self._step, self._doing, self._since = step, doing, time.time()

    def _path(self, rank: int) -> Path:
        return self.folder / f"rank-{rank:05d}.json"

    def _write(self) -> None:
        state = {
            "step": self._step,
            "doing": self._doing,
            "since": self._since,
            "written": time.time(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        with written_whole(self._path(self.rank)) as file:
            file.write_text(json.dumps(state))

    def _watch(self) -> None:
        told = self._since
        while not self._stop.wait(self.period):
            try:
                self._write()
                told = max(told, self._since)
                if self.rank == 0 and time.time() - told >= self.seconds:
                    told = time.time()
                    print(f"\nwarning: {self.report()}", file=sys.stderr, flush=True)
            except OSError as error:
                print(f"\nwarning: the watchdog cannot use {self.folder}: {error}", file=sys.stderr, flush=True)

    def report(self) -> str:
        """Progress of every process; late processes are named first."""
        now, states = time.time(), [self._read(rank) for rank in range(self.world_size)]
        missing = [rank for rank, state in enumerate(states) if state is None]
        known = {rank: state for rank, state in enumerate(states) if state is not None}
        silent = {
            rank: state for rank, state in known.items() if now - state["written"] > _PERIODS_SILENT * self.period
        }
        # The other processes wait for the late one, which started its work before all of them.
        moving = {rank: state for rank, state in known.items() if rank not in silent}
        first = min((state["step"], state["since"]) for state in moving.values()) if moving else None
        behind = {rank: s for rank, s in moving.items() if (s["step"], s["since"]) == first}
        lines = [f"no progress for {(now - self._since) / 60:.1f} minutes."]
        lines += [
            f"{self._name(rank, state)} has sent no sign for {(now - state['written']) / 60:.1f} minutes: it has ended "
            f"or hangs (last sign: {state['doing']} of step {state['step']})."
            for rank, state in silent.items()
        ]
        lines += [f"Rank {rank} has written nothing in {self.folder}." for rank in missing]
        if not silent and not missing:
            lines += [f"{self._name(rank, state)} is the furthest behind." for rank, state in behind.items()]
        groups: dict[str, list[int]] = {}
        for rank, state in known.items():
            groups.setdefault(f"{state['doing']} of step {state['step']}", []).append(rank)
        lines += [f"{doing}: rank {_ranges(ranks)}." for doing, ranks in groups.items()]
        return "\n  ".join(lines)

    def _name(self, rank: int, state: dict[str, Any]) -> str:
        return f"Rank {rank} (process {state['pid']} on {state['host']})"

    def _read(self, rank: int) -> dict[str, Any] | None:
        try:
            state: dict[str, Any] = json.loads(self._path(rank).read_text())
        except (OSError, json.JSONDecodeError):
            return None
        return state


def _ranges(ranks: list[int]) -> str:
    """For example "0-6, 8"."""
    parts: list[list[int]] = []
    for rank in ranks:
        if parts and rank == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], rank]
        else:
            parts.append([rank])
    return ", ".join(f"{part[0]}-{part[-1]}" if part[0] != part[-1] else str(part[0]) for part in parts)
