"""Training steps recorded as CUDA graphs: the host makes one launch a step instead of thousands."""

from collections import Counter
from collections.abc import Callable

import torch
from torch.optim import Optimizer

from transfusion_mot.data.batch import Batch
from transfusion_mot.training.step import StepResult

# Steps before recording: they compile the blocks and make the optimizer's state.
WARM_UP = 3


class GraphedStep:
    """A training step, replayed from a CUDA graph once it is recorded; one for each shape of batch.

    Everything that changes from step to step must be on the device: the batch, which is copied to where the graph reads
    it, and the learning rate, for which `make_capturable` prepares the optimizer. Each replay takes its seed from
    torch's generator, which `seed_step` sets before. The graphs keep the memory of a step allocated between steps.

    Args:
        step: Forward, backward and update, without waiting for the device.
    """

    def __init__(self, step: Callable[[Batch], StepResult]) -> None:
        self._step = step
        self._stream = torch.cuda.Stream()
        self._pool = torch.cuda.graph_pool_handle()
        self._warm_ups: Counter[tuple[torch.Size, ...]] = Counter()
        self._recorded: dict[tuple[torch.Size, ...], tuple[torch.cuda.CUDAGraph, Batch, StepResult]] = {}

    def __call__(self, batch: Batch) -> StepResult:
        """Take the step."""
        shapes = tuple(tensor.shape for tensor in batch.tensors().values())
        if self._warm_ups[shapes] < WARM_UP:
            self._warm_ups[shapes] += 1
            return self._on_own_stream(batch)
        if shapes not in self._recorded:
            self._recorded[shapes] = self._record(batch)
        graph, static, result = self._recorded[shapes]
        torch._foreach_copy_(list(static.tensors().values()), list(batch.tensors().values()))
        graph.replay()
        # A copy, because the next replay overwrites the graph's own result.
        return StepResult(
            {name: losses.clone() for name, losses in result.losses.items()},
            result.counts.clone(),
            result.grad_norm.clone(),
            {tower: norm.clone() for tower, norm in result.tower_grad_norms.items()},
        )

    def _on_own_stream(self, batch: Batch) -> StepResult:
        """Run a step on its own stream: a graph cannot be recorded from work of the default stream."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            result = self._step(batch)
        torch.cuda.current_stream().wait_stream(self._stream)
        return result

    def _record(self, batch: Batch) -> tuple[torch.cuda.CUDAGraph, Batch, StepResult]:
        """Record a graph without computing => the graph, the batch that it reads and the result that it writes."""
        static = batch.map(torch.clone)
        graph = torch.cuda.CUDAGraph()
        # The thread that pins batches also calls CUDA.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            result = self._step(static)
        return graph, static, result


def why_not_recorded(device_type: str, num_devices: int) -> str | None:
    """Why a run with `training.cuda_graph` records no step, in one line; None if it records steps."""
    if device_type == "cuda" and num_devices == 1:
        return None
    return f"training.cuda_graph works on one CUDA device: on {num_devices} x {device_type} steps are not recorded"


def make_capturable(optimizer: Optimizer) -> None:
    """Prepare an optimizer for recording: its learning rates become tensors, which `set_lr` fills."""
    for group in optimizer.param_groups:
        if "capturable" in group:
            group["capturable"] = True
        group["lr"] = torch.tensor(float(group["lr"]), device=group["params"][0].device)
