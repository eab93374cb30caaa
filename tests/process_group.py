"""Processes of their own on this machine's CPU, and groups of them as accelerate's launcher would start them.

They are forked from a server that has imported the code and computed nothing. A fork of the test process itself would
have the locks and the memory of threads that are not there, and abort in PyTorch now and then; a new interpreter would
import for seconds, each time.
"""

import multiprocessing
import os
import runpy
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import patch_environment

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
HYBRID = FSDP2 | {
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2",
    "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2",
}
TESTS = Path(__file__).parent


@cache
def clean_context() -> ForkServerContext:
    """Makes processes and what they share; the server is started by the first call."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["conftest", "train"])
    # Python 3.11 does not tell the server where modules are.
    with patch_environment(PYTHONPATH=os.pathsep.join([str(TESTS.parent), str(TESTS)])):
        forkserver.ensure_running()
    return context


def clean_process(function: Callable[..., Any], *arguments: Any) -> multiprocessing.Process:
    """A process that will call a function of a module with arguments that can be pickled, in this environment."""
    here = dict(os.environ), list(sys.path), multiprocessing.get_start_method()
    return clean_context().Process(target=_call, args=(*here, function, arguments))


def _call(
    environment: dict[str, str], path: list[str], start_method: str, function: Callable[..., Any], arguments: Any
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:] = path
    # Of workers of its own; it would be the server.
    multiprocessing.set_start_method(start_method, force=True)
    torch.set_num_threads(1)
    function(*arguments)


def run_script(words: Sequence[str], folder: Path, environment: dict[str, str], log: Path) -> int:
    """`python WORDS` in a folder, without the seconds of its imports; what it prints goes to a file => its status."""
    with patch_environment(**environment):
        process = clean_process(_script, list(words), folder, log)
        process.start()
    try:
        process.join(300)
    finally:
        process.kill()
    assert process.exitcode is not None
    return process.exitcode


def _script(words: list[str], folder: Path, log: Path) -> None:
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(folder)
    sys.argv = words[1:] if words[0] == "-m" else words
    sys.path.insert(0, "" if words[0].startswith("-") else str(Path(words[0]).resolve().parent))
    if words[0] == "-m":
        # Which a new interpreter would not have imported.
        sys.modules.pop(words[1], None)
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        exec(words[1], {"__name__": "__main__"})
    else:
        runpy.run_path(words[0], run_name="__main__")


def start_processes(
    function: Callable[..., Any], world_size: int, environment: dict[str, str], folder: Path, *arguments: Any
) -> list[multiprocessing.Process]:
    """Call a function in every process of a new group, each of which leaves in the folder what it returned."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    processes = [
        clean_process(_in_group, function, rank, world_size, port, environment, folder, arguments)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    return processes


def run_processes(
    function: Callable[..., Any], world_size: int, environment: dict[str, str], folder: Path, *arguments: Any
) -> list[Any]:
    """Call a function in every process of a new group => what each returned; fails if any of them did."""
    processes = start_processes(function, world_size, environment, folder, *arguments)
    try:
        for process in processes:
            process.join(300)
    finally:
        for process in processes:
            process.kill()
    errors = [file.read_text() for file in sorted(folder.glob("*.error"))]
    assert not errors, "\n".join(errors)
    assert [process.exitcode for process in processes] == [0] * world_size
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def _in_group(
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    port: int,
    environment: dict[str, str],
    folder: Path,
    arguments: tuple[Any, ...],
) -> None:
    os.environ["ACCELERATE_USE_CPU"] = "true"
    if world_size > 1 or environment:
        os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)})
        os.environ.update({"LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    os.environ.update(environment)
    try:
        torch.save(function(*arguments), folder / f"{rank}.pt")
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except BaseException:
        (folder / f"{rank}.error").write_text(f"rank {rank}: {traceback.format_exc()}")
        os._exit(1)
    os._exit(0)
