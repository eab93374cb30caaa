"""Averaged weights, sharded like the model, which validation, samples and snapshots use."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

# Most steps between two updates, and most as a share of the 1 / (1 - decay) steps that the averages reach back.
_MOST_STEPS, _SHARE = 16, 0.01


class EMA:
    """The exponential moving average of a model's parameters.

    An update reads all weights, 4 of 300 ms of a step with 1.5 billion. So it is not made in every step: for a decay of
    0.999 in every tenth, with 0.999 ** 10. The averages are then of every tenth step's weights, over as many steps.

    Args:
        model: The model; `self.weights` has a tensor beside each of its parameters, by name.
        decay: Weight of the past after each step; early in a run it is (1 + step) / (10 + step), so that the random
            start is forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move the averages towards the parameters after optimizer step `step` (0, 1, ...), if it is time for it."""
        if not self._is_due(step):
            return
        decay = self._decay_of(step)
        while step > 0 and not self._is_due(step - 1):
            step -= 1
            decay *= self._decay_of(step)
        torch._foreach_lerp_(_local(self.weights.values()), _local(model.parameters()), 1 - decay)

    def _decay_of(self, step: int) -> float:
        return min(self.decay, (1 + step) / (10 + step))

    def _is_due(self, step: int) -> bool:
        """Whether there is an update after a step: a function of the step, so that a resumed run does the same."""
        forgotten = 1 - self._decay_of(step)
        every = _MOST_STEPS if forgotten * _MOST_STEPS <= _SHARE else max(1, int(_SHARE / forgotten))
        return (1 + step) % every == 0

    @contextmanager
    def in_place_of(self, model: nn.Module) -> Iterator[None]:
        """Inside, the model computes with the averages; nothing is trained there. Called by all ranks."""
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
                # Its root keeps its weights gathered after a forward without backward.
                module.reshard()
        # One at a time: there is no room for another copy of all.
        for average, weight in zip(_local(self.weights.values()), _local(model.parameters()), strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)

    def gathered(self, keep: bool) -> dict[str, Tensor]:
        """The averages, whole and on the CPU; called by all ranks, empty on those that do not keep them."""
        result = {}
        for name, tensor in self.weights.items():
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if keep:
                result[name] = whole.to("cpu", copy=True)
        return result


def _local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This rank's shards, which share their memory with the tensors."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
