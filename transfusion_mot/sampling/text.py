"""Text, token by token against a cache: captions of images, and continuations of text.

Shapes: B rows, V vocabulary, C latent channels, Y and X latent height and width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from transfusion_mot.data.tokenizer import TextTokenizer
from transfusion_mot.errors import UserError
from transfusion_mot.models.attention import KVCache
from transfusion_mot.models.positions import PositionCounter
from transfusion_mot.models.transfusion import TransfusionMoT
from transfusion_mot.sampling.slots import Slots, joined, new_cache, padded, padded_slots, random_rows


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: Most tokens written, the end of the text included.
        temperature: Divides the logits; 0 takes the most probable token.
        top_p: Tokens are drawn from the fewest whose probabilities sum to at least this, in (0, 1] (nucleus sampling,
            arXiv 1904.09751).

    Raises:
        UserError: A value is out of its range.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(
                f"temperature is {self.temperature}; it must be 0 (the most probable token) or a positive number"
            )
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it must be above 0 and at most 1")


@torch.no_grad()
def caption_latents(
    model: TransfusionMoT,
    tokenizer: TextTokenizer,
    latents: Tensor,
    decoding: Decoding,
    generators: Sequence[torch.Generator | None],
) -> list[str]:
    """Write a caption for each image: [BOS BOI] [image] [EOI caption EOS], the image clean.

    Args:
        latents: Clean, normalised, [B, C, Y, X].
        generators: One per image; not used at temperature 0.
    """
    rows, _, height, width = latents.shape
    patch_size = model.architecture.patch_size
    counter = PositionCounter(model.architecture.rope)
    # The model takes all text of a call before its patches; order and positions say where each slot really stands.
    before = padded_slots([counter.text(2)] * rows, span_id=-1, device=latents.device)
    grid = counter.image(height // patch_size, width // patch_size)
    image = padded_slots([grid] * rows, span_id=0, device=latents.device)
    after = padded_slots([counter.text(1)] * rows, span_id=-1, device=latents.device)
    following = padded_slots([counter.text(decoding.max_new_tokens)] * rows, span_id=-1, device=latents.device)

    slots = joined(before, after, image)
    cache = new_cache(model, rows, slots.order.shape[1] + decoding.max_new_tokens, latents.device)
    text_ids = torch.tensor([[tokenizer.bos_id, tokenizer.boi_id, tokenizer.eoi_id]] * rows, device=latents.device)
    timesteps = torch.zeros(rows, 1, device=latents.device)
    output = model(text_ids, latents[:, None].to(model.dtype), timesteps, **slots._asdict(), cache=cache)
    cache.length = slots.order.shape[1]
    return _decode(model, tokenizer, cache, output.logits[:, -1], following, decoding, generators)


@torch.no_grad()
def complete(
    model: TransfusionMoT,
    tokenizer: TextTokenizer,
    texts: Sequence[str],
    decoding: Decoding,
    generators: Sequence[torch.Generator | None],
    device: torch.device,
) -> list[str]:
    """Go on with each text until its end: [BOS text ... EOS] => what was written, without `texts`.

    Args:
        texts: Of any lengths.
        generators: One per text; not used at temperature 0.
    """
    prefixes = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in texts]
    counters = [PositionCounter(model.architecture.rope) for _ in prefixes]
    lengths = [len(ids) for ids in prefixes]
    text = padded_slots(
        [counter.text(length) for counter, length in zip(counters, lengths, strict=True)], span_id=-1, device=device
    )
    following = padded_slots([counter.text(decoding.max_new_tokens) for counter in counters], span_id=-1, device=device)
    cache = new_cache(model, len(prefixes), max(lengths) + decoding.max_new_tokens, device)
    text_ids = padded([np.array(ids) for ids in prefixes], tokenizer.pad_id, device)
    logits = model(text_ids, None, None, **text._asdict(), cache=cache).logits
    cache.length = max(lengths)
    last = logits[torch.arange(len(prefixes)), torch.tensor(lengths) - 1]
    return _decode(model, tokenizer, cache, last, following, decoding, generators)


def choose_tokens(logits: Tensor, decoding: Decoding, uniform: Tensor) -> Tensor:
    """Logits [B, V], numbers in [0, 1) [B] => token ids [B], the inverse of the distribution function."""
    if decoding.temperature == 0:
        return logits.argmax(dim=-1)
    probabilities, ids = (logits.float() / decoding.temperature).softmax(dim=-1).sort(dim=-1, descending=True)
    below = probabilities.cumsum(dim=-1) - probabilities
    kept = torch.where(below < decoding.top_p, probabilities, 0.0)
    cumulative = kept.cumsum(dim=-1)
    drawn = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:])
    return ids.gather(1, drawn)[:, 0]


def _decode(
    model: TransfusionMoT,
    tokenizer: TextTokenizer,
    cache: KVCache,
    logits: Tensor,
    following: Slots,
    decoding: Decoding,
    generators: Sequence[torch.Generator | None],
) -> list[str]:
    """Write tokens into the slots `following` [B, max_new_tokens] until every row has ended; cut each at its end.

    Of the special tokens only EOS can be written: nothing else can follow in a text.
    """
    special = {number for number, token in tokenizer.hf.added_tokens_decoder.items() if token.special}
    forbidden = torch.tensor(sorted(special - {tokenizer.eos_id}), device=logits.device)
    # All at once, so that a row's numbers do not depend on when other rows end.
    uniform = random_rows(torch.rand, (decoding.max_new_tokens,), generators).to(logits.device)
    tokens = torch.full_like(following.order, tokenizer.eos_id)
    ended = torch.zeros(len(tokens), dtype=torch.bool, device=logits.device)
    for step in range(decoding.max_new_tokens):
        allowed = logits.index_fill(1, forbidden, -math.inf)
        chosen = choose_tokens(allowed, decoding, uniform[:, step])
        tokens[:, step] = chosen
        ended |= chosen == tokenizer.eos_id
        if step + 1 == decoding.max_new_tokens or ended.all():
            break
        slots = following.between(step, step + 1)
        logits = model(tokens[:, step : step + 1], None, None, **slots._asdict(), cache=cache).logits[:, -1]
        cache.length += 1
    return [tokenizer.decode(_until(row, tokenizer.eos_id)) for row in tokens.tolist()]


def _until(ids: list[int], end: int) -> list[int]:
    """The ids before the first `end`."""
    return ids[: ids.index(end)] if end in ids else ids
