"""The training loop of all codecs."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from tqdm import tqdm

from transfusion_mot.codec_training.bottlenecks import Bottleneck
from transfusion_mot.codec_training.losses import Objective
from transfusion_mot.config import AutoencoderTrainingConfig
from transfusion_mot.errors import UserError

_LOG_EVERY = 100
_MAX_GRAD_NORM = 1.0


@dataclass
class Parts:
    """A codec in training, from its input to the reconstruction.

    The discriminator's term needs additional gradients at the last layer, so the backward passes through it twice.
    A compiled graph does not permit that, so the last layer is not compiled.

    Attributes:
        encode: A batch => the encoder's output.
        bottleneck: The encoder's output => the decoder's input.
        before_last: The decoder's input => the input of the last layer.
        last: The last layer, a convolution.
    """

    encode: Callable[[Tensor], Tensor]
    bottleneck: Bottleneck
    before_last: Callable[[Tensor], Tensor]
    last: nn.Conv1d | nn.Conv2d


def optimise(
    model: nn.Module,
    parts: Parts,
    objective: Objective,
    draw: Callable[[torch.Generator], Tensor],
    config: AutoencoderTrainingConfig,
) -> list[dict[str, float]]:
    """Train `model` in place; at the end it has the averaged weights. Returns one entry every `_LOG_EVERY` steps.

    Args:
        model: The model to train.
        parts: Parts of the model.
        draw: A generator => a batch, on its device.

    Raises:
        UserError: The loss is not finite.
    """
    device = parts.last.weight.device
    if config.compile and device.type == "cuda":
        parts.encode, parts.before_last = torch.compile(parts.encode), torch.compile(parts.before_last)
    # The codebook is not trained by gradients.
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=config.lr, betas=(0.9, 0.99), fused=device.type == "cuda")
    schedule = get_cosine_schedule_with_warmup(optimizer, config.warmup_steps, config.num_steps)
    ema = EMAModel(weights, decay=config.ema_decay, foreach=True)
    generator = torch.Generator(device).manual_seed(config.seed)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.mixed_precision == "bf16")

    log = []
    model.train()
    progress = tqdm(range(config.num_steps), desc="training the codec", unit="step", mininterval=1.0)
    for step in progress:
        batch = draw(generator)
        with autocast:
            hidden = parts.encode(batch)
        latents, penalty = parts.bottleneck(hidden.float(), generator)
        with autocast:
            reconstruction = parts.last(parts.before_last(latents))
        losses = objective(batch, reconstruction.float(), penalty, last_layer=parts.last.weight, step=step)
        optimizer.zero_grad()
        losses.total.backward()
        nn.utils.clip_grad_norm_(weights, _MAX_GRAD_NORM)
        optimizer.step()
        schedule.step()
        ema.step(weights)

        if (step + 1) % _LOG_EVERY == 0 or step + 1 == config.num_steps:
            entry = {"loss": losses.total.item(), "l1": losses.l1.item(), **parts.bottleneck.report()}
            if not np.isfinite(entry["loss"]):
                raise UserError(f"the loss is not finite at step {step + 1}; lower lr (now {config.lr})")
            log.append({"step": step + 1, **entry})
            progress.set_postfix(entry)
    ema.copy_to(weights)
    return log
