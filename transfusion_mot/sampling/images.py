"""Prompts => images: each prompt is read once, then its patches are denoised against the cached keys and values.

Shapes: B images, C latent channels, Y and X latent height and width, T text slots, P patches an image.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from transfusion_mot.data.tokenizer import TextTokenizer
from transfusion_mot.models.positions import PositionCounter
from transfusion_mot.models.transfusion import TransfusionMoT
from transfusion_mot.sampling.slots import new_cache, padded, padded_slots

Predict = Callable[[Tensor, Tensor], Tensor]


@torch.no_grad()
def read_prompts(
    model: TransfusionMoT,
    tokenizer: TextTokenizer,
    prompts: Sequence[str],
    guidance_scale: float,
    latent_size: int,
    device: torch.device,
) -> Predict:
    """Read the prompts into a cache => (noisy latents [B, C, Y, X], timestep []) -> prediction [B, C, Y, X].

    The prefix of an image is [BOS prompt BOI]; without its prompt, for classifier-free guidance (Ho & Salimans, arXiv
    2207.12598), it is [BOS BOI]. With a `guidance_scale` of 1 there are no rows without prompt. An empty prompt is the
    same as none. What is returned forwards the P patches of a row alone; it writes them over those of its last call.

    Args:
        prompts: One per image, of any lengths.
        guidance_scale: The prediction is uncond + scale * (cond - uncond), for all channels.
        latent_size: Height and width Y = X of the latents.
    """
    prefixes = [[tokenizer.bos_id, *tokenizer.encode(prompt), tokenizer.boi_id] for prompt in prompts]
    guided = guidance_scale != 1
    if guided:
        prefixes += [[tokenizer.bos_id, tokenizer.boi_id]] * len(prompts)
    counters = [PositionCounter(model.architecture.rope) for _ in prefixes]
    text = padded_slots(
        [counter.text(len(ids)) for counter, ids in zip(counters, prefixes, strict=True)], span_id=-1, device=device
    )
    side = latent_size // model.architecture.patch_size
    patches = padded_slots([counter.image(side, side) for counter in counters], span_id=0, device=device)

    text_ids = padded([np.array(ids) for ids in prefixes], tokenizer.pad_id, device)
    cache = new_cache(model, len(prefixes), text_ids.shape[1] + side**2, device)
    model(text_ids, None, None, **text._asdict(), cache=cache)
    cache.length = text_ids.shape[1]
    dtype = model.dtype

    @torch.no_grad()
    def predict(noisy_latents: Tensor, timestep: Tensor) -> Tensor:
        rows = torch.cat([noisy_latents, noisy_latents]) if guided else noisy_latents
        timesteps = timestep.expand(len(rows), 1)
        output = model(None, rows[:, None].to(dtype), timesteps, **patches._asdict(), cache=cache)
        prediction = output.prediction[:, 0].to(noisy_latents.dtype)
        if not guided:
            return prediction
        conditional, unconditional = prediction.chunk(2)
        return unconditional + guidance_scale * (conditional - unconditional)

    return predict
