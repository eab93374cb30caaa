"""One optimizer step."""

from contextlib import nullcontext
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from transfusion_mot.data.batch import Batch
from transfusion_mot.diffusion import Diffusion
from transfusion_mot.losses import IGNORE_INDEX, diffusion_loss_sum
from transfusion_mot.training.towers import clip_grad_norm


class StepResult(NamedTuple):
    """What a step leaves for the log; all on the device, so that nothing waits for it.

    Attributes:
        loss_sums: [2], this rank's summed text and diffusion losses.
        counts: [2], labelled tokens and image elements of all ranks.
        grad_norm: [], before clipping.
        tower_grad_norms: [] each, likewise; of the towers that are trained.
    """

    loss_sums: Tensor
    counts: Tensor
    grad_norm: Tensor
    tower_grad_norms: dict[str, Tensor]


def loss_counts(batch: Batch) -> Tensor:
    """[2] float64: labelled tokens, and elements of real images."""
    tokens = (batch.text_labels != IGNORE_INDEX).sum()
    elements = batch.image_mask.sum() * batch.latents[0, 0].numel()
    return torch.stack([tokens, elements]).double()


def loss_sums(model: nn.Module, batch: Batch, diffusion: Diffusion, z_loss_weight: float = 0.0) -> Tensor:
    """[2]: summed text loss and summed diffusion loss of a microbatch."""
    noisy_latents = diffusion.add_noise(batch.latents, batch.noise, batch.timesteps)
    output = model(
        text_ids=batch.text_ids,
        noisy_latents=noisy_latents,
        timesteps=batch.timesteps,
        document_ids=batch.document_ids,
        order=batch.order,
        span_ids=batch.span_ids,
        rope_positions=batch.rope_positions,
        text_labels=batch.text_labels,
        z_loss_weight=z_loss_weight,
    )
    target = diffusion.target(batch.latents, batch.noise, batch.timesteps)
    return torch.stack([output.text_loss, diffusion_loss_sum(output.prediction, target, batch.image_mask)])


def train_step(
    model: nn.Module,
    batch: Batch,
    diffusion: Diffusion,
    optimizer: Optimizer,
    accelerator: Accelerator,
    microbatch_rows: int,
    diffusion_loss_weight: float,
    max_grad_norm: float,
    z_loss_weight: float = 0.0,
) -> StepResult:
    """Forward, backward and update over this rank's rows of a step, in microbatches.

    Each loss is a sum over its own count of the whole global batch, so that the gradient does not depend on how rows
    are spread over microbatches and ranks.
    """
    counts = accelerator.reduce(loss_counts(batch), reduction="sum")
    # Data parallelism averages over ranks what must be a sum.
    text_scale, diffusion_scale = (accelerator.num_processes / counts.clamp(min=1)).float().unbind()
    sums = torch.zeros(2, device=batch.text_ids.device)
    microbatches = batch.split(microbatch_rows)
    for index, microbatch in enumerate(microbatches):
        is_last = index == len(microbatches) - 1
        with nullcontext() if is_last else accelerator.no_sync(model):
            losses = loss_sums(model, microbatch, diffusion, z_loss_weight)
            accelerator.backward(losses[0] * text_scale + diffusion_loss_weight * losses[1] * diffusion_scale)
            sums += losses.detach()
    grad_norm, tower_grad_norms = clip_grad_norm(optimizer, max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepResult(sums, counts, grad_norm, tower_grad_norms)
