"""One optimizer step."""

from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from transfusion_mot.config import RunConfig
from transfusion_mot.data.batch import Batch
from transfusion_mot.models.modalities import Terms
from transfusion_mot.training.towers import grad_norms


class StepResult(NamedTuple):
    """Results of a step for the log. All tensors are on the device, so nothing waits for it.

    Attributes:
        losses: For each modality, the unweighted losses of this rank's slots, see `Terms`: [rows, T] or [rows, K].
        counts: [modalities], labelled tokens or elements of all ranks.
        grad_norm: [], before clipping. If it is not finite, no parameter has changed.
        tower_grad_norms: [] each, before clipping, for the trained towers.
    """

    losses: dict[str, Tensor]
    counts: Tensor
    grad_norm: Tensor
    tower_grad_norms: dict[str, Tensor]


def loss_terms(model: nn.Module, batch: Batch, z_loss_weight: float = 0.0) -> dict[str, Terms]:
    """Losses of a microbatch by modality."""
    return model(inputs=batch.inputs, slots=batch.slots, z_loss_weight=z_loss_weight).terms


def clipped_step(optimizer: Optimizer, grad_norm: Tensor, max_grad_norm: float) -> None:
    """Update with gradients clipped to a global norm; `grad_norm` is their norm before clipping.

    If it is not finite, the device changes nothing; the host does not wait for the result.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper passes no attributes on
    assert getattr(optimizer, "_step_supports_amp_scaling", False)
    # As with a gradient scaler: the optimizer divides gradients while it reads them, without a separate pass.
    vars(optimizer)["found_inf"] = (~grad_norm.isfinite()).float()
    vars(optimizer)["grad_scale"] = (grad_norm / max_grad_norm).clamp(min=1.0).float()
    optimizer.step()


def seed_step(seed: int, step: int, process_index: int) -> None:
    """Seed the random draws of a step (dropout masks) so that they depend only on seed, step and process.

    Only host generators are seeded. Each kernel takes its seed from them, and a CUDA graph does so at each replay.
    """
    torch.manual_seed(int(np.random.SeedSequence([seed, step, process_index]).generate_state(1, np.uint64)[0]))


def num_shapes(config: RunConfig, num_processes: int) -> int:
    """Upper bound on the number of input shapes that a compiled function sees in a run.

    Rows come in full microbatches, in a smaller last one, one by one in the guards, and in batches of validation;
    images come in the sizes of the buckets. Inputs have no gradient in validation and, with a frozen tower, in the
    first block.
    """
    own = config.training.num_rows // num_processes
    at_once = config.training.microbatch_rows or own
    rows = min(at_once, own)
    return 3 * len({at_once, rows, own % rows or rows, 1}) * len(config.data.image_sizes)


def train_step(
    model: nn.Module,
    batch: Batch,
    optimizer: Optimizer,
    accelerator: Accelerator,
    *,
    loss_weights: dict[str, float],
    microbatch_rows: int,
    max_grad_norm: float,
    z_loss_weight: float = 0.0,
) -> StepResult:
    """Forward, backward and update over this rank's rows of a step, in microbatches.

    Each loss is a sum divided by its count over the global batch. So the gradient does not depend on how rows are split
    into microbatches and ranks, unless there is dropout or 8-bit products.

    Args:
        loss_weights: Factor of the mean loss of each modality.
    """
    counts = accelerator.reduce(batch.counts(), reduction="sum")
    # Data parallelism averages gradients over ranks, but they must be summed.
    scales = dict(zip(batch.with_loss, (accelerator.num_processes / counts.clamp(min=1)).float().unbind(), strict=True))
    losses: dict[str, list[Tensor]] = {name: [] for name in batch.with_loss}
    microbatches = batch.split(microbatch_rows)
    for index, microbatch in enumerate(microbatches):
        is_last = index == len(microbatches) - 1
        with nullcontext() if is_last else accelerator.no_sync(model):
            # Autocast surrounds the whole forward, because FSDP's weights are already in bfloat16 at its start.
            with accelerator.autocast():
                terms = loss_terms(model, microbatch, z_loss_weight)
            total = sum(loss_weights[name] * term.loss * scales[name] for name, term in terms.items())
            accelerator.backward(total)
            for name, term in terms.items():
                losses[name].append(term.losses)
    grad_norm, tower_grad_norms = grad_norms(optimizer)
    clipped_step(optimizer, grad_norm, max_grad_norm)
    optimizer.zero_grad(set_to_none=True)
    return StepResult({name: torch.cat(parts) for name, parts in losses.items()}, counts, grad_norm, tower_grad_norms)
