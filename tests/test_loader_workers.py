"""Worker processes end when the training process ends in any way, and in no other case."""

import functools
import multiprocessing
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from conftest import data_config, loader_of, numbered_images, packer_of, sources_of, texts_of
from process_group import clean_process

from transfusion_mot.data import loader
from transfusion_mot.data.packing import Packer
from transfusion_mot.data.tokenizer import TextTokenizer

pytestmark = pytest.mark.slow

NUM_LANES, NUM_WORKERS = 4, 2
# What a process may take to end on a busy machine: to take PyTorch apart, seconds on an idle one.
SECONDS = 60


def make_packer(tokenizer: TextTokenizer) -> Packer:
    sources = sources_of(numbered_images(["apple", "a", "an octopus", "sun"]), texts_of(["some words", "a"]))
    config = data_config(text_slots=18, images_per_row=2)
    return packer_of(sources, tokenizer, config, rope="3d", lanes=NUM_LANES, seed=3)


def print_workers(file: int) -> None:
    os.write(file, " ".join(str(child.pid) for child in multiprocessing.active_children()).encode() + b"\n")


def take_two_steps(tokenizer: TextTokenizer, file: int) -> None:
    """Take two steps, print the workers' numbers to a file, and leave them at work on later steps."""
    global steps
    packer = make_packer(tokenizer)
    plain = packer.rows

    def rows(lanes, step, states):  # type: ignore[no-untyped-def]
        if step >= 10:
            time.sleep(100)
        return plain(lanes, step, states)

    packer.rows = rows  # type: ignore[method-assign]
    # Of the module, as a frame in a traceback would keep it.
    steps = iter(loader_of(packer, 1000, num_workers=NUM_WORKERS))
    next(steps)
    next(steps)
    print_workers(file)


def is_killed_before_workers_begin(tokenizer: TextTokenizer, file: int) -> None:
    """Be killed while the workers are there, but have not yet set themselves up."""
    here, plain = os.getpid(), loader._quiet_worker

    def late(worker: int) -> None:
        while os.getppid() == here:
            time.sleep(0.01)
        plain(worker)

    def kill() -> None:
        while len(multiprocessing.active_children()) < NUM_WORKERS:
            time.sleep(0.01)
        print_workers(file)
        os.kill(here, signal.SIGKILL)

    loader._quiet_worker = late
    threading.Thread(target=kill, daemon=True).start()
    take_two_steps(tokenizer, file)


def take_two_steps_and(end: Callable[[], None], tokenizer: TextTokenizer, file: int) -> None:
    take_two_steps(tokenizer, file)
    end()


def and_then(end: Callable[..., None], *arguments: int) -> Callable[[TextTokenizer, int], None]:
    return functools.partial(take_two_steps_and, functools.partial(end, *arguments))


def fail() -> None:
    raise ValueError("an error after two steps")


def assert_all_end(file: int) -> None:
    """Read the workers' numbers, and then to the end, which comes when the last process that can write has ended."""
    numbers = os.read(file, 100).split()
    try:
        assert len(numbers) == NUM_WORKERS
        assert select.select([file], [], [], SECONDS)[0], "a process is left"
        assert os.read(file, 1) == b""
    except AssertionError:
        for number in map(int, numbers):
            os.kill(number, signal.SIGKILL)
        raise
    finally:
        os.close(file)


def call_with_file(read: Callable[[TextTokenizer, int], None], tokenizer: TextTokenizer, file: Connection) -> None:
    read(tokenizer, file.fileno())


@pytest.mark.parametrize(
    ("read", "status"),
    [
        (take_two_steps, 0),
        (and_then(fail), 1),
        (and_then(os._exit, 3), 3),
        (and_then(signal.raise_signal, signal.SIGTERM), -signal.SIGTERM),
        (and_then(signal.raise_signal, signal.SIGKILL), -signal.SIGKILL),
        (is_killed_before_workers_begin, -signal.SIGKILL),
    ],
    ids=["return", "error", "exit", "SIGTERM", "SIGKILL", "early SIGKILL"],
)
def test_workers_end_with_their_process(byte_tokenizer, read: Callable[..., None], status: int) -> None:
    output, file = multiprocessing.Pipe(duplex=False)
    process = clean_process(call_with_file, read, byte_tokenizer, file)
    process.start()
    file.close()
    try:
        assert_all_end(os.dup(output.fileno()))
    finally:
        process.join()
    assert process.exitcode == status


def test_workers_end_with_the_interpreter() -> None:
    """At its exit it ends and joins all daemons, with an iterator that is still alive."""
    program = (
        "from test_loader_workers import take_two_steps\n"
        "from transfusion_mot.data.tokenizer import train_tokenizer\n"
        "take_two_steps(train_tokenizer(['a'], 261, ['text', 'image']), 1)"
    )
    root = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": f"{root}:{root / 'tests'}"}
    output, file = os.pipe()
    process = subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=file)
    os.close(file)
    try:
        assert_all_end(output)
        assert process.wait(SECONDS) == 0
    finally:
        process.kill()
        process.wait()


def test_signals_of_others_do_not_end_workers(byte_tokenizer) -> None:
    """As a launcher sends them to every process of a run: the one that reads decides when it has finished."""
    packer = make_packer(byte_tokenizer)
    alone = [batch for batch, _ in loader_of(packer, 100)]
    before = set(multiprocessing.active_children())
    given = []
    for batch, _ in loader_of(packer, 100, num_workers=NUM_WORKERS):
        given.append(batch)
        if len(given) == 2:
            workers = set(multiprocessing.active_children()) - before
            assert len(workers) == NUM_WORKERS
            for name in ("TERM", "INT", "TERM"):
                subprocess.run(["kill", f"-{name}", *(str(worker.pid) for worker in workers)], check=True)
    assert len(given) == 100
    for one, two in zip(given, alone, strict=True):
        assert all(torch.equal(value, two.tensors()[name]) for name, value in one.tensors().items())
    assert [worker.exitcode for worker in workers] == [0] * NUM_WORKERS
