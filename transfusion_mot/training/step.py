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
from transfusion_mot.diffusion import Diffusion
from transfusion_mot.losses import IGNORE_INDEX, diffusion_losses
from transfusion_mot.training.towers import grad_norms


class Losses(NamedTuple):
    """Losses of some rows.

    Attributes:
        sums: [2], summed text and diffusion losses, weighted for training.
        text: [B, T], cross-entropy of each text slot, without gradient.
        images: [B, K], summed squared error of each image, without gradient.
    """

    sums: Tensor
    text: Tensor
    images: Tensor


class StepResult(NamedTuple):
    """What a step leaves for the log; all on the device, so that nothing waits for it.

    Attributes:
        text_losses: [rows, T], cross-entropy of each text slot of this rank.
        image_losses: [rows, K], summed squared error of each image of this rank.
        counts: [2], labelled tokens and image elements of all ranks.
        grad_norm: [], before clipping. Where it is not finite, no parameter has changed.
        tower_grad_norms: [] each, likewise; of the towers that are trained.
    """

    text_losses: Tensor
    image_losses: Tensor
    counts: Tensor
    grad_norm: Tensor
    tower_grad_norms: dict[str, Tensor]

    @property
    def loss_sums(self) -> Tensor:
        """[2], this rank's summed text and diffusion losses."""
        return torch.stack([self.text_losses.sum(), self.image_losses.sum()])


def loss_counts(batch: Batch) -> Tensor:
    """[2] float64: labelled tokens, and elements of real images (not of copies)."""
    tokens = (batch.text_labels != IGNORE_INDEX).sum()
    elements = batch.image_mask.sum() * batch.latents[0, 0].numel()
    return torch.stack([tokens, elements]).double()


def compute_losses(model: nn.Module, batch: Batch, diffusion: Diffusion, z_loss_weight: float = 0.0) -> Losses:
    """Losses of a microbatch."""
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
        copies=batch.copies,
    )
    target = diffusion.target(batch.latents, batch.noise, batch.timesteps)
    images = diffusion_losses(output.prediction, target, batch.image_mask)
    weight = diffusion.loss_weight(batch.timesteps)
    weighted = images if weight is None else weight * images
    return Losses(torch.stack([output.text_loss, weighted.sum()]), output.text_losses, images.detach())


def clipped_step(optimizer: Optimizer, grad_norm: Tensor, max_grad_norm: float) -> None:
    """Update with gradients clipped to a global norm, which is `grad_norm` before.

    If it is not finite nothing changes; the host does not wait to know.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper passes no attributes on
    assert getattr(optimizer, "_step_supports_amp_scaling", False)
    # What a gradient scaler would say: gradients are divided where they are read anyway, not in a pass of its own.
    vars(optimizer)["found_inf"] = (~grad_norm.isfinite()).float()
    vars(optimizer)["grad_scale"] = (grad_norm / max_grad_norm).clamp(min=1.0).float()
    optimizer.step()


def seed_step(seed: int, step: int, process_index: int) -> None:
    """Let all that a step draws at random, the masks of dropout, follow from the step and the process alone.

    Only generators on the host are set, from which each kernel takes its seed; a CUDA graph does so at each replay.
    """
    torch.manual_seed(int(np.random.SeedSequence([seed, step, process_index]).generate_state(1, np.uint64)[0]))


def num_shapes(config: RunConfig, num_processes: int) -> int:
    """At least as many as the forms of input that a function which is compiled by shape meets in a run.

    Rows come in microbatches, of which the last may be smaller, alone where the guards look for one, and as many at a
    time as validation takes; images in the sizes of the buckets. Inputs of a function have no gradient in validation,
    or, where a tower is frozen, in the first block alone.
    """
    own = config.training.num_rows // num_processes
    at_once = config.training.microbatch_rows or own
    rows = min(at_once, own)
    return 3 * len({at_once, rows, own % rows or rows, 1}) * len(config.data.image_sizes)


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
    are spread over microbatches and ranks, unless a tower has dropout or products have 8 bits.
    """
    counts = accelerator.reduce(loss_counts(batch), reduction="sum")
    # Data parallelism averages over ranks what must be a sum.
    text_scale, diffusion_scale = (accelerator.num_processes / counts.clamp(min=1)).float().unbind()
    text_losses, image_losses = [], []
    microbatches = batch.split(microbatch_rows)
    for index, microbatch in enumerate(microbatches):
        is_last = index == len(microbatches) - 1
        with nullcontext() if is_last else accelerator.no_sync(model):
            # Around everything: FSDP's weights are in bfloat16 already where the forward begins.
            with accelerator.autocast():
                losses = compute_losses(model, microbatch, diffusion, z_loss_weight)
            text_sum, diffusion_sum = losses.sums
            accelerator.backward(text_sum * text_scale + diffusion_loss_weight * diffusion_sum * diffusion_scale)
            text_losses.append(losses.text)
            image_losses.append(losses.images)
    grad_norm, tower_grad_norms = grad_norms(optimizer)
    clipped_step(optimizer, grad_norm, max_grad_norm)
    optimizer.zero_grad(set_to_none=True)
    return StepResult(torch.cat(text_losses), torch.cat(image_losses), counts, grad_norm, tower_grad_norms)
