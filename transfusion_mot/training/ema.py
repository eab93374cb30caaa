"""Averaged weights, sharded like the model, which validation, samples and snapshots use."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

# Maximum steps between two updates, and the same as a share of the 1 / (1 - decay) steps that the average spans.
_MOST_STEPS, _SHARE = 16, 0.01


class EMA:
    """The exponential moving average of a model's parameters.

    An update reads all weights, which takes 4 ms of a step of 300 ms with 1.5 billion parameters. So not every step has
    an update: with a decay of 0.999 every tenth step updates with 0.999 ** 10. The average spans the same steps.

    Args:
        model: The model; `self.weights` has a tensor for each trained parameter, by name. Parameters without a gradient
            do not change and have none.
        decay: Weight of the past after each step; early in a run it is (1 + step) / (10 + step), so that the random
            start is forgotten.
        on_cpu: Keep the averages in host memory. An update waits for the copy of the weights.
    """

    def __init__(self, model: nn.Module, decay: float, *, on_cpu: bool = False) -> None:
        self.weights = {
            name: parameter.detach().to("cpu", copy=True) if on_cpu else parameter.detach().clone()
            for name, parameter in _trained(model).items()
        }
        self.decay = decay
        self.on_cpu = on_cpu

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move the averages towards the parameters after optimizer step `step` (0, 1, ...), if an update is due."""
        if not self._is_due(step):
            return
        decay = self._decay_of(step)
        while step > 0 and not self._is_due(step - 1):
            step -= 1
            decay *= self._decay_of(step)
        averages, weights = _local(self.weights.values()), _local(_trained(model).values())
        if not self.on_cpu:
            torch._foreach_lerp_(averages, weights, 1 - decay)
            return
        for average, weight in zip(averages, weights, strict=True):
            average.lerp_(weight.to("cpu"), 1 - decay)

    def _decay_of(self, step: int) -> float:
        return min(self.decay, (1 + step) / (10 + step))

    def _is_due(self, step: int) -> bool:
        """Whether an update is due after a step. It depends on the step alone, so that a resumed run does the same."""
        forgotten = 1 - self._decay_of(step)
        # Rounded first, because 0.01 / (1 - 0.999) is a little less than 10.
        every = _MOST_STEPS if forgotten * _MOST_STEPS <= _SHARE else max(1, int(round(_SHARE / forgotten, 6)))
        return (1 + step) % every == 0

    @contextmanager
    def in_place_of(self, model: nn.Module) -> Iterator[None]:
        """Context in which the model computes with the averages, without training. Called by all ranks."""
        self._swap(model)
        model.eval()
        try:
            yield
        finally:
            model.train()
            self._swap(model)

    @torch.no_grad()
    def _swap(self, model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # FSDP's root module keeps its weights gathered after a forward without backward.
                module.reshard()
        # One tensor at a time, because a second copy of all might not fit.
        for average, weight in zip(_local(self.weights.values()), _local(_trained(model).values()), strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)

    def gathered(self, model: nn.Module, keep: bool, *, with_frozen: bool = True) -> dict[str, Tensor]:
        """The averages and the untrained parameters by name: whole, in float32, on the CPU.

        Called by all ranks; empty on ranks that do not keep them.
        """
        result = {}
        for name, parameter in model.named_parameters():
            if name not in self.weights and not with_frozen:
                continue
            tensor = self.weights.get(name, parameter.detach())
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if keep:
                result[name] = whole.to("cpu", torch.promote_types(whole.dtype, torch.float32), copy=True)
        return result


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that need a gradient, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This rank's shards; they share memory with the tensors."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
