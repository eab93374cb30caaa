"""Memory that sampling keeps between calls: the cache, and steps recorded as CUDA graphs."""

import functools
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from transfusion_mot.models.attention import KVCache
from transfusion_mot.models.lora import adapter_state
from transfusion_mot.models.transfusion import TransfusionMoT

# Capacities are multiples of this, so that prompts of about the same length share a cache and its graphs.
_GRANULARITY = 64
# Maximum recorded steps for a cache: denoising with and without guidance, and writing, of all rows and of some.
_MOST_STEPS = 6
# Attributes that accelerate and diffusers set on a module whose weights they load from elsewhere.
_HOOKS = {"_hf_hook", "_diffusers_hook"}


class Step:
    """A function of tensors of fixed shapes that is called many times.

    It reads and writes no changing tensors except those in `state`. On CUDA its kernels are recorded once and then
    launched together, which takes the host a few microseconds instead of milliseconds.

    Args:
        body: The function: `state` => a tensor, which the next call overwrites.
        state: Its tensors.
        pool: Memory of CUDA graphs; None runs `body` as it is.
    """

    def __init__(self, body: Callable[[dict[str, Tensor]], Tensor], state: dict[str, Tensor], pool: Any) -> None:
        self.body = body
        self.state = state
        self._pool = pool
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: Tensor | None = None

    def fill(self, **values: Tensor | float) -> None:
        """Overwrite tensors of the state, each with one of its shape or one that expands to it."""
        for name, value in values.items():
            if isinstance(value, Tensor):
                self.state[name].copy_(value)
            else:
                self.state[name].fill_(value)

    def __call__(self) -> Tensor:
        """Run once."""
        # Graphs and kernels of Triton start on the current device, which need not be the model's.
        with torch.cuda.device_of(next(iter(self.state.values()))):
            if self._pool is None:
                return self._run()
            if self._graph is None:
                self._record()
            assert self._graph is not None
            assert self._result is not None
            self._graph.replay()
            return self._result

    def _run(self) -> Tensor:
        if self._pool is None or not torch.is_autocast_enabled("cuda"):
            return self.body(self.state)
        # Without this, autocast would free its cache of cast weights at its end, and the graph would read them later.
        with torch.autocast("cuda", torch.get_autocast_dtype("cuda"), cache_enabled=False):
            return self.body(self.state)

    def _record(self) -> None:
        before = {name: tensor.clone() for name, tensor in self.state.items()}
        stream = _warm_up_stream(torch.cuda.current_device())
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # The first calls compile kernels, allocate workspaces and wait for the device, which a recording cannot do.
            for _ in range(2):
                self._run()
        torch.cuda.current_stream().wait_stream(stream)
        self.fill(**before)
        graph = torch.cuda.CUDAGraph()
        # Other threads, of a web page or a loader, may use the device at the same time.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            self._result = self._run()
        self._graph = graph


@functools.cache
def _warm_up_stream(device: int) -> torch.cuda.Stream:
    """The stream of steps before recording; there is only one, because cuBLAS keeps memory for each stream."""
    return torch.cuda.Stream(device)


class Workspace:
    """The memory of a sampler, reused by calls of the same shape, so that many images take no more than the first.

    Only the last shape is kept. A pipeline has one workspace, which two threads must not use at once.

    Attributes:
        records: Whether steps are recorded as CUDA graphs where possible. Turn it off if a model is rarely sampled and
            the memory is needed otherwise: then nothing is kept.
    """

    def __init__(self) -> None:
        self.records = True
        self.release()

    def release(self) -> None:
        """Free all memory."""
        self._key: Hashable = None
        self._cache: KVCache | None = None
        self._steps: dict[Hashable, Step] = {}
        self._pool: Any = None

    def cache(self, model: TransfusionMoT, rows: int, capacity: int, device: torch.device) -> KVCache:
        """A cache of at least that capacity, without used slots."""
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else model.dtype
        # One more slot, for the filler of shorter rows.
        capacity = (capacity // _GRANULARITY + 1) * _GRANULARITY
        records = self.records and can_record(model, device)
        # Graphs contain the addresses of weights and the scales of adapters, so these are part of the shape.
        weights = tuple(parameter.data_ptr() for parameter in model.parameters()) if records else ()
        key = (rows, capacity, device, dtype, autocast, records, weights, _compiled(model), adapter_state(model))
        if self._cache is None or key != self._key:
            self.release()
            config = model.architecture
            kv_heads = config.num_kv_heads or config.num_heads
            self._cache = KVCache(config.num_layers, rows, kv_heads, config.head_dim, capacity, device, dtype)
            self._pool = torch.cuda.graph_pool_handle() if records else None
            self._key = key
        else:
            self._cache.forget()
        return self._cache

    def end(self, used: int) -> int | None:
        """Number of slots of each row that a step must read if no row has more than `used`; None is all.

        A recorded step reads the same amount in every call.
        """
        return used if self._pool is None else None

    def step(self, key: Hashable, body: Callable[[dict[str, Tensor]], Tensor], state: dict[str, Tensor]) -> Step:
        """The step of that key, made from `body` and `state` if it is new; they must be the same for one key."""
        shapes = tuple((name, tensor.shape, tensor.dtype) for name, tensor in state.items())
        if self._pool is None:
            return Step(body, state, None)
        step = self._steps.pop((key, shapes), None)
        if step is None:
            step = Step(body, state, self._pool)
        else:
            step.fill(**state)
        self._steps[key, shapes] = step
        if len(self._steps) > _MOST_STEPS:
            del self._steps[next(iter(self._steps))]
        return step

    def finish(self) -> None:
        """Called at the end of a task."""
        if not self.records:
            self.release()


def can_record(model: TransfusionMoT, device: torch.device) -> bool:
    """Whether a forward runs the same kernels each time, which is not so with hooks or sharded weights."""
    # Checked in every call on a thousand modules, so one loop without the overhead of `hasattr` and `parameters()`.
    return device.type == "cuda" and not any(
        module._forward_hooks
        or module._forward_pre_hooks
        or not _HOOKS.isdisjoint(vars(module))
        or any(isinstance(parameter, DTensor) for parameter in module._parameters.values())
        for module in model.modules()
    )


def _compiled(model: TransfusionMoT) -> bool:
    """Whether its blocks are compiled."""
    return model.blocks[0]._compiled_call_impl is not None
