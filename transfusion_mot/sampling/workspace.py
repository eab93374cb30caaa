"""What sampling keeps from one call to the next: the cache, and its steps as CUDA graphs."""

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
# Recorded at most for a cache: denoising with and without guidance, and writing, of all rows and of some.
_MOST_STEPS = 6
# What accelerate and diffusers leave at a module whose weights they bring from elsewhere.
_HOOKS = {"_hf_hook", "_diffusers_hook"}


class Step:
    """A function of tensors of fixed shapes that is called many times.

    It reads and writes the tensors in `state` and no others that change. On CUDA its kernels are recorded once and then
    started all together, which takes the host a few microseconds instead of milliseconds.

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
        # Its cache of cast weights is freed when autocast ends, and the graph would read them later.
        with torch.autocast("cuda", torch.get_autocast_dtype("cuda"), cache_enabled=False):
            return self.body(self.state)

    def _record(self) -> None:
        before = {name: tensor.clone() for name, tensor in self.state.items()}
        stream = _warm_up_stream(torch.cuda.current_device())
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # The first calls compile kernels, allocate workspaces and wait for the device, which a recording must not.
            for _ in range(2):
                self._run()
        torch.cuda.current_stream().wait_stream(stream)
        self.fill(**before)
        graph = torch.cuda.CUDAGraph()
        # Other threads, of a web page or a loader, may use the device meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            self._result = self._run()
        self._graph = graph


@functools.cache
def _warm_up_stream(device: int) -> torch.cuda.Stream:
    """Where steps run before they are recorded: one for all, as cuBLAS keeps memory for each stream it has seen."""
    return torch.cuda.Stream(device)


class Workspace:
    """The memory of a sampler, used again by calls of the same shape: many images take no more than the first.

    Only the last shape is kept. A pipeline has one; it must not be used by two threads at once.

    Attributes:
        records: Whether steps become CUDA graphs where they can. Turn it off where a model is sampled now and then, and
            the memory is needed for other things: then nothing is kept.
    """

    def __init__(self) -> None:
        self.records = True
        self.release()

    def release(self) -> None:
        """Give all memory back."""
        self._key: Hashable = None
        self._cache: KVCache | None = None
        self._steps: dict[Hashable, Step] = {}
        self._pool: Any = None

    def cache(self, model: TransfusionMoT, rows: int, capacity: int, device: torch.device) -> KVCache:
        """A cache of at least that capacity, with anything in it."""
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else model.dtype
        # One slot more, for the filler of shorter rows.
        capacity = (capacity // _GRANULARITY + 1) * _GRANULARITY
        records = self.records and can_record(model, device)
        # Graphs hold the addresses of the weights and the scales of adapters: other ones are another shape.
        weights = tuple(parameter.data_ptr() for parameter in model.parameters()) if records else ()
        key = (rows, capacity, device, dtype, autocast, records, weights, _compiled(model), adapter_state(model))
        if self._cache is None or key != self._key:
            self.release()
            config = model.architecture
            kv_heads = config.num_kv_heads or config.num_heads
            self._cache = KVCache(config.num_layers, rows, kv_heads, config.head_dim, capacity, device, dtype)
            self._pool = torch.cuda.graph_pool_handle() if records else None
            self._key = key
        return self._cache

    def end(self, used: int) -> int | None:
        """How much of each row a step has to read, where no row has more than `used` slots; None is all.

        A recorded step reads the same amount in every call.
        """
        return used if self._pool is None else None

    def step(self, key: Hashable, body: Callable[[dict[str, Tensor]], Tensor], state: dict[str, Tensor]) -> Step:
        """The step of that key, made of `body` and `state` if there is none yet: they must be the same for one key."""
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
    """Whether a forward is the same kernels each time: not where hooks or sharding bring weights from elsewhere."""
    # Asked in every call, of a thousand modules: one walk, without what each `hasattr` and `parameters()` would add.
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
