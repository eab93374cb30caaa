"""Stopping a run early: on a signal, or when its time is over."""

import signal
import time
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from transfusion_mot.training.parallel import host_group


class Stop:
    """Notices SIGTERM, SIGINT and the end of the time, and lets all ranks agree on the step after which they stop.

    Ranks agree by an all-reduce of one number between hosts, which is started in one step and read in the next, so that
    no step waits for a device. A second signal ends the process at once.

    Before the end of the first step, any signal ends the process at once: there is nothing to save, and the same signal
    may have ended compiler processes that the step would wait for.

    Args:
        started: `time.monotonic()` at the start of the time.
        max_minutes: Maximum minutes; 0 is no limit.
    """

    def __init__(self, started: float, max_minutes: float) -> None:
        self.reason: str | None = None
        self.deadline = started + 60 * max_minutes if max_minutes else float("inf")
        self.before: dict[int, Any] | None = None
        self.group = host_group()
        self.asked = torch.zeros((), dtype=torch.int32)
        self.sent: dist.Work | None = None

    def __enter__(self) -> "Stop":
        return self

    def __exit__(self, *_: object) -> None:
        self._let_go()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.reason = signal.Signals(number).name
        self._let_go()

    def _let_go(self) -> None:
        """Restore the previous signal handlers."""
        for number, handler in (self.before or {}).items():
            signal.signal(number, handler)

    def agreed(self) -> bool:
        """Whether to stop after this step; called by all ranks once in every step."""
        if self.before is None:
            self.before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        if self.reason is None and time.monotonic() > self.deadline:
            self.reason = "training.max_minutes"
        if self.group is None:
            return self.reason is not None
        if self.sent is not None:
            self.sent.wait()
        agreed = bool(self.asked)
        if agreed:
            self.reason = self.reason or "another process"
        else:
            self.asked.fill_(self.reason is not None)
            self.sent = dist.all_reduce(self.asked, dist.ReduceOp.MAX, self.group, async_op=True)
        return agreed
