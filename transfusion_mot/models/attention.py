"""Joint attention: one rule for who attends to whom, two renderers of it, and the cache for sampling.

Shapes: B rows, S joint slots, N heads, M key/value heads, H head width.
"""

from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from transfusion_mot.errors import UserError

AttentionMask = BlockMask | Tensor


@dataclass(frozen=True)
class SlotIds:
    """What the mask knows of each slot.

    Attributes:
        document_ids: [B, S], the document a slot belongs to; -1 is padding, which attends to padding alone.
        order: [B, S], reading order inside the document.
        horizon: [B, S], the reading order up to which a slot sees its document: a token to itself, a patch to the last
            patch of its image.
    """

    document_ids: Tensor
    order: Tensor
    horizon: Tensor

    @classmethod
    def from_spans(cls, document_ids: Tensor, order: Tensor, span_ids: Tensor) -> Self:
        """Find the horizons.

        Args:
            document_ids, order: [B, S].
            span_ids: [B, S], the image a patch belongs to, counted from 0 in each row; -1 on text.
        """
        spans = span_ids + 1
        last = order.new_zeros(order.shape[0], order.shape[1] + 1).scatter_reduce(1, spans, order, "amax")
        return cls(document_ids, order, torch.where(span_ids >= 0, last.gather(1, spans), order))


def _may_attend(document_q: Tensor, horizon_q: Tensor, document_k: Tensor, order_k: Tensor) -> Tensor:
    """Transfusion, section 3: causal within a document, and bidirectional within an image.

    Between a patch and its horizon lies nothing but its image, so that one comparison says both.
    """
    return (document_q == document_k) & (order_k <= horizon_q)


def dense_mask(queries: SlotIds, keys: SlotIds) -> Tensor:
    """Bool [B, S_q, S_k], True = may attend."""
    return _may_attend(
        queries.document_ids[:, :, None], queries.horizon[:, :, None], keys.document_ids[:, None], keys.order[:, None]
    )


# Eager creation walks the full S x S mask in Python-launched kernels: 35 ms against 4 ms compiled.
_create_block_mask = torch.compile(create_block_mask, dynamic=False)
# Outside of a compiled block, eager flex attention would materialise all scores; inside, this is a no-op.
_flex_attention = torch.compile(flex_attention, dynamic=False)


def block_mask(slots: SlotIds) -> BlockMask:
    """FlexAttention's sparse form of the mask, the same for all heads; built once per batch."""
    # The kernel reads them for every pair of slots: 32 bits are half of the bytes and of the instructions.
    document_ids, order, horizon = slots.document_ids.int(), slots.order.int(), slots.horizon.int()

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return _may_attend(document_ids[b, q], horizon[b, q], document_ids[b, k], order[b, k])

    rows, length = document_ids.shape
    return _create_block_mask(mask_mod, rows, None, length, length, device=document_ids.device)


Kernel = Literal["flex", "sdpa"]
KernelChoice = Literal["auto", "flex", "sdpa"]

# FlexAttention skips blocks of this many slots, so a shorter row gives it nothing to skip. Before PyTorch pull request
# 185349 it also fails there with grouped heads.
_BLOCK = 128


def attention_kernel(choice: KernelChoice, device_type: str, length: int) -> tuple[Kernel, str]:
    """The kernel for rows of `length` slots in training => (its name, why).

    Raises:
        UserError: `flex` was asked for where it cannot train.
    """
    if choice == "sdpa":
        return "sdpa", "as training.attention says"
    if device_type != "cuda":
        if choice == "flex":
            raise UserError(
                f"training.attention is flex, which has no backward on the device '{device_type}'; use auto or sdpa"
            )
        return "sdpa", f"FlexAttention has no backward on the device '{device_type}'"
    if choice == "flex":
        return "flex", "as training.attention says"
    if length < _BLOCK:
        return "sdpa", f"rows of {length} slots are shorter than a block of {_BLOCK}"
    return "flex", f"rows of {length} slots on CUDA: blocks of {_BLOCK} in which nobody attends are skipped"


def training_mask(slots: SlotIds, kernel: Kernel) -> AttentionMask:
    """The mask in the form that the kernel takes."""
    return block_mask(slots) if kernel == "flex" else dense_mask(slots, slots)


# Where the last block is cut, the compiler's default tile (128 x 128 for heads of 64) computes all of it: 600 slots
# take 0.53 ms with it on an H100 and 0.23 ms with this one.
_SMALL_TILE = {"fwd_BLOCK_M": 64, "fwd_BLOCK_N": 64, "fwd_num_stages": 3, "fwd_num_warps": 4}


def _kernel_options(q_BNSH: Tensor) -> Any:
    cut = q_BNSH.shape[2] % _BLOCK != 0
    return _SMALL_TILE if cut and q_BNSH.shape[3] <= 64 and q_BNSH.element_size() == 2 else None


def joint_attention(q_BNSH: Tensor, k_BMSH: Tensor, v_BMSH: Tensor, mask: AttentionMask) -> Tensor:
    """One softmax over all slots that the mask allows => [B, N, S_q, H]. Key/value heads may be fewer (GQA)."""
    grouped = q_BNSH.shape[1] != k_BMSH.shape[1]
    if isinstance(mask, BlockMask):
        options = _kernel_options(q_BNSH)
        return _flex_attention(q_BNSH, k_BMSH, v_BMSH, block_mask=mask, enable_gqa=grouped, kernel_options=options)
    return F.scaled_dot_product_attention(q_BNSH, k_BMSH, v_BMSH, attn_mask=mask[:, None], enable_gqa=grouped)


class KVCache:
    """Pre-allocated keys and values of everything sampled so far, with the ids that the mask reads.

    A forward writes its slots at `length` and attends to all before and to itself. They stay only when `length` is
    advanced: a denoising step overwrites the patches of the step before in place.

    Args:
        num_layers, rows, num_kv_heads, head_dim: Shape of the model and the batch.
        capacity: Slots allocated.
    """

    def __init__(
        self,
        num_layers: int,
        rows: int,
        num_kv_heads: int,
        head_dim: int,
        capacity: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.keys = torch.zeros(num_layers, rows, num_kv_heads, capacity, head_dim, device=device, dtype=dtype)
        self.values = torch.zeros_like(self.keys)
        self.ids = torch.full((3, rows, capacity), -1, device=device)
        self.length = 0

    def mask(self, slots: SlotIds) -> Tensor:
        """Record the ids of new slots [B, S_new] and return their mask over cached and new slots."""
        end = self.length + slots.order.shape[1]
        if end > self.ids.shape[2]:
            raise ValueError(f"the cache has {self.ids.shape[2]} slots and {end} are needed")
        self.ids[:, :, self.length : end] = torch.stack([slots.document_ids, slots.order, slots.horizon])
        return dense_mask(slots, SlotIds(*self.ids[:, :, :end]))

    def update(self, layer: int, k_BMSH: Tensor, v_BMSH: Tensor) -> tuple[Tensor, Tensor]:
        """Write a layer's new keys and values at `length` => (keys, values) of cached and new slots."""
        end = self.length + k_BMSH.shape[2]
        self.keys[layer, :, :, self.length : end] = k_BMSH
        self.values[layer, :, :, self.length : end] = v_BMSH
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]
