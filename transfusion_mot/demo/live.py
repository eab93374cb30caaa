"""Intermediate pictures during painting."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from PIL import Image

from transfusion_mot.pipeline import TransfusionPipeline

NUM_PREVIEWS = 8
# Name of the painting thread.
PAINTING = "painting"

# Pictures, a line about them, and whether they are finished.
Update = tuple[list[Image.Image], str, bool]


class _Stopped(Exception):
    """The caller no longer reads the pictures."""


def painted_live(paint: Callable[[Callable[..., dict[str, Any]]], list[Image.Image]]) -> Iterator[Update]:
    """Paint => intermediate pictures with a line about them, then the finished ones.

    Args:
        paint: Takes a `callback_on_step_end` of a pipeline and returns the pictures. It runs in a separate thread. If
            the caller stops reading updates, painting stops at the next step.
    """
    updates: queue.Queue[Update | BaseException | None] = queue.Queue()
    stop = threading.Event()
    start = time.perf_counter()

    def on_step_end(pipeline: TransfusionPipeline, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if stop.is_set():
            raise _Stopped
        total = len(pipeline.scheduler.timesteps)
        if step % max(1, total // NUM_PREVIEWS) == 0 and step + 1 < total:
            updates.put((pipeline.decode_latents(tensors["clean"]), f"Step {step + 1} of {total}", False))
        return {}

    def work() -> None:
        try:
            images = paint(on_step_end)
            updates.put((images, f"{time.perf_counter() - start:.1f} s", True))
            updates.put(None)
        # Any error is raised again in the caller, which can show it.
        except BaseException as error:
            updates.put(error)

    thread = threading.Thread(target=work, name=PAINTING, daemon=True)
    thread.start()
    try:
        while (update := updates.get()) is not None:
            if isinstance(update, BaseException):
                raise update
            yield update
    finally:
        stop.set()
        thread.join()
