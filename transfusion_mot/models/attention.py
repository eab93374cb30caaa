"""Joint attention: one rule for who attends to whom, two renderers of it, and the cache for sampling.

Shapes: B rows, S joint slots, N heads, M key/value heads, H head width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

AttentionMask = BlockMask | Tensor


@dataclass(frozen=True)
class SlotIds:
    """What the mask knows of each slot.

    Attributes:
        document_ids: [B, S], the document a slot belongs to; -1 is padding, which attends to padding alone.
        order: [B, S], reading order inside the document.
        span_ids: [B, S], the image a patch belongs to; -1 on text.
    """

    document_ids: Tensor
    order: Tensor
    span_ids: Tensor


def _may_attend(
    document_q: Tensor, order_q: Tensor, span_q: Tensor, document_k: Tensor, order_k: Tensor, span_k: Tensor
) -> Tensor:
    """Transfusion, section 3: causal within a document, and bidirectional within an image."""
    same_image = (span_q == span_k) & (span_q >= 0)
    return (document_q == document_k) & ((order_k <= order_q) | same_image)


def dense_mask(queries: SlotIds, keys: SlotIds) -> Tensor:
    """Bool [B, S_q, S_k], True = may attend."""
    return _may_attend(
        queries.document_ids[:, :, None],
        queries.order[:, :, None],
        queries.span_ids[:, :, None],
        keys.document_ids[:, None, :],
        keys.order[:, None, :],
        keys.span_ids[:, None, :],
    )


# Eager creation walks the full S x S mask in Python-launched kernels: 35 ms against 4 ms compiled.
_create_block_mask = torch.compile(create_block_mask, dynamic=False)
# Outside of a compiled block, eager flex attention would materialise all scores; inside, this is a no-op.
_flex_attention = torch.compile(flex_attention, dynamic=False)


def block_mask(slots: SlotIds) -> BlockMask:
    """FlexAttention's sparse form of the mask, the same for all heads; built once per batch."""
    document_ids, order, span_ids = slots.document_ids, slots.order, slots.span_ids

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return _may_attend(
            document_ids[b, q], order[b, q], span_ids[b, q], document_ids[b, k], order[b, k], span_ids[b, k]
        )

    rows, length = document_ids.shape
    return _create_block_mask(mask_mod, rows, None, length, length, device=document_ids.device)


# FlexAttention skips blocks of this many slots, so a shorter row gives it nothing to skip. Before PyTorch pull request
# 185349 it also fails there with grouped heads.
_BLOCK = 128


def training_mask(slots: SlotIds) -> AttentionMask:
    """The mask in the form that is fastest on the device (FlexAttention has no backward on the CPU)."""
    rows_have_blocks = slots.order.shape[1] >= _BLOCK
    return block_mask(slots) if slots.order.is_cuda and rows_have_blocks else dense_mask(slots, slots)


def joint_attention(q_BNSH: Tensor, k_BMSH: Tensor, v_BMSH: Tensor, mask: AttentionMask) -> Tensor:
    """One softmax over all slots that the mask allows => [B, N, S_q, H]. Key/value heads may be fewer (GQA)."""
    grouped = q_BNSH.shape[1] != k_BMSH.shape[1]
    if isinstance(mask, BlockMask):
        return _flex_attention(q_BNSH, k_BMSH, v_BMSH, block_mask=mask, enable_gqa=grouped)
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
        self.ids[:, :, self.length : end] = torch.stack([slots.document_ids, slots.order, slots.span_ids])
        return dense_mask(slots, SlotIds(*self.ids[:, :, :end]))

    def update(self, layer: int, k_BMSH: Tensor, v_BMSH: Tensor) -> tuple[Tensor, Tensor]:
        """Write a layer's new keys and values at `length` => (keys, values) of cached and new slots."""
        end = self.length + k_BMSH.shape[2]
        self.keys[layer, :, :, self.length : end] = k_BMSH
        self.values[layer, :, :, self.length : end] = v_BMSH
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]
