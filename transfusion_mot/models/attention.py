"""Joint attention: one rule for the mask, its three implementations, and the cache for sampling.

Shapes: B rows, S joint slots, N heads, M key/value heads, H head width.
"""

import importlib.util
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from transfusion_mot.config import ModelConfig
from transfusion_mot.errors import UserError
from transfusion_mot.models.inputs import LatentInput, ModalityInput, Slots

HAS_TRITON = importlib.util.find_spec("triton") is not None  # It comes with torch for CUDA only.
if HAS_TRITON:
    from transfusion_mot.models.interval_attention import (
        MAX_HEAD_DIM,
        MAX_SLOTS,
        has_hopper_kernels,
        interval_attention,
        interval_tiles,
        places,
        suits_hopper_kernels,
    )


class IntervalMask(NamedTuple):
    """The mask for the kernels of `interval_attention`, where its fields are described."""

    ids: Tensor
    counts: Tensor
    tiles: Tensor


AttentionMask = BlockMask | IntervalMask | Tensor

# A horizon beyond every order, in 32 bits.
_BEYOND = 2**31 - 1

# FlexAttention skips blocks of this many slots.
_BLOCK = 128
_Listed = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class SlotIds:
    """Ids of each slot that decide the mask.

    Attributes:
        document_ids: [B, S], the document of a slot. Each slot of padding is a separate document with a unique negative
            number: it attends only to itself, so that blocks of padding are skipped, too.
        order: [B, S], reading order inside the document.
        horizon: [B, S], the reading order up to which a slot sees its document: a token up to itself, a patch up to the
            last patch of its image.
        visible_until: [B, S], the last horizon from which a slot is seen. For a noised patch it is the horizon of its
            own image, so that nothing else sees it; for other slots it is above all horizons. None if all later slots
            see every slot.
    """

    document_ids: Tensor
    order: Tensor
    horizon: Tensor
    visible_until: Tensor | None

    @classmethod
    def from_spans(cls, document_ids: Tensor, order: Tensor, span_ids: Tensor, copies: Tensor | None = None) -> Self:
        """Find the horizons.

        Args:
            document_ids: [B, S], the document of a slot; -1 is padding.
            order: [B, S], reading order inside the document.
            span_ids: [B, S], the image a patch belongs to, counted from 0 in each row; -1 on text.
            copies: [B, K] bool, True for images that later slots see; the others are seen only by themselves. None if
                later slots see all images.
        """
        slots = torch.arange(order.shape[1], device=order.device)
        document_ids = torch.where(document_ids < 0, -1 - slots, document_ids)
        spans = span_ids + 1
        last = order.new_zeros(order.shape[0], order.shape[1] + 1).scatter_reduce(1, spans, order, "amax")
        horizon = torch.where(span_ids >= 0, last.gather(1, spans), order)
        if copies is None:
            return cls(document_ids, order, horizon, None)
        is_seen = F.pad(copies, (1, 0), value=True).gather(1, spans)
        return cls(document_ids, order, horizon, torch.where(is_seen, _BEYOND, horizon))


def slot_ids(config: ModelConfig, inputs: dict[str, ModalityInput], slots: Slots) -> SlotIds:
    """Ids of each slot of a batch; spans with causal attention do not count as spans."""
    latents = [given for given in inputs.values() if isinstance(given, LatentInput)]
    seen = [images for images in (given.seen_later for given in latents) if images is not None]
    # Spans are counted over all latents of a row.
    assert len(seen) in (0, len(latents)), "either all latents have clean copies, or none"
    spans = _bidirectional(config, inputs, slots)
    return SlotIds.from_spans(slots.document_ids, slots.order, spans, torch.cat(seen, 1) if seen else None)


def _bidirectional(config: ModelConfig, inputs: dict[str, ModalityInput], slots: Slots) -> Tensor:
    """Span ids [B, S], -1 also where the attention inside a span is causal."""
    if all(m.is_bidirectional for m in config.modalities.values() if m.objective != "next_token"):
        return slots.span_ids
    made_of = {name: config.modalities[name] for name in config.stream_order if name in inputs}
    lengths = [inputs[name].num_slots(modality.patch_size) for name, modality in made_of.items()]
    parts = [
        part if modality.is_bidirectional else torch.full_like(part, -1)
        for modality, part in zip(made_of.values(), slots.span_ids.split(lengths, dim=1), strict=True)
    ]
    return torch.cat(parts, dim=1)


def _may_attend(
    document_q: Tensor, horizon_q: Tensor, document_k: Tensor, order_k: Tensor, visible_until_k: Tensor | None
) -> Tensor:
    """Transfusion, section 3: causal within a document, and bidirectional within an image.

    Between a patch and its horizon there are only patches of its image, so one comparison covers both cases. A second
    comparison hides images that are seen only by themselves.
    """
    allowed = (document_q == document_k) & (order_k <= horizon_q)
    return allowed if visible_until_k is None else allowed & (horizon_q <= visible_until_k)


def dense_mask(queries: SlotIds, keys: SlotIds) -> Tensor:
    """Bool [B, S_q, S_k], True = may attend."""
    return _may_attend(
        queries.document_ids[:, :, None],
        queries.horizon[:, :, None],
        keys.document_ids[:, None],
        keys.order[:, None],
        None if keys.visible_until is None else keys.visible_until[:, None],
    )


def _listed(blocks: Tensor) -> _Listed:
    """Bool [..., n] => int32: the number of True [...], and the indices of these, then of the others [..., n].

    A stable sort gives the same, but PyTorch 2.11 unrolls it: for n = 32 its kernel alone compiles for half a minute.
    Comparing all indices is cheap relative to the pairs of slots, and unlike `cumsum` it compiles for any n.
    """
    places = torch.arange(blocks.shape[-1], device=blocks.device)
    count = blocks.sum(-1, keepdim=True)
    before = (blocks[..., None, :] & (places < places[:, None])).sum(-1)
    ranks = torch.where(blocks, before, count + places - before)
    listed = torch.zeros_like(ranks, dtype=torch.int32).scatter(-1, ranks, places.int().expand(ranks.shape))
    return count.squeeze(-1).int(), listed


def _attending_blocks(
    document_ids: Tensor, order: Tensor, horizon: Tensor, visible_until: Tensor | None
) -> tuple[_Listed, _Listed, _Listed, _Listed]:
    """The lists of a `BlockMask`, as `create_block_mask` makes them, but without its sort; see `_listed`.

    Args:
        document_ids, order, horizon, visible_until: [B, S], see `SlotIds`.

    Returns:
        Numbers [B, 1, n] and places [B, 1, n, n] of the blocks of keys that a block of queries sees in part, of those
        that all of it sees in full, and both again of the blocks of queries for a block of keys.
    """
    rows, length = document_ids.shape
    num_blocks = -(-length // _BLOCK)

    def in_blocks(ids: Tensor, filler: int = 0) -> Tensor:
        return F.pad(ids, (0, num_blocks * _BLOCK - length), value=filler).view(rows, num_blocks, _BLOCK)

    # Rows, blocks of queries, blocks of keys, queries of a block, keys of a block.
    def of_queries(ids: Tensor) -> Tensor:
        return ids[:, :, None, :, None]

    def of_keys(ids: Tensor) -> Tensor:
        return ids[:, None, :, None]

    # Beyond the end of a row nothing attends: queries and keys there get document ids that no slot has.
    allowed = _may_attend(
        of_queries(in_blocks(document_ids, -length - 1)),
        of_queries(in_blocks(horizon)),
        of_keys(in_blocks(document_ids, -length - 2)),
        of_keys(in_blocks(order)),
        None if visible_until is None else of_keys(in_blocks(visible_until)),
    )
    pairs = allowed.sum((-2, -1), dtype=torch.int32)[:, None]
    full = pairs == _BLOCK * _BLOCK
    partial = (pairs > 0) & ~full
    return _listed(partial), _listed(full), _listed(partial.mT), _listed(full.mT)


# One kernel counts the pairs of each block and stores none of them; eager, all pairs of slots would lie in memory.
# Whole or not at all, as beyond the shapes that `allow_shapes` allows they would run eagerly without a word.
_compiled_attending_blocks = torch.compile(_attending_blocks, dynamic=False, fullgraph=True)
# Outside of a compiled block, eager flex attention would materialise all scores; inside, this is a no-op.
_flex_attention = torch.compile(flex_attention, dynamic=False, fullgraph=True)


def block_mask(slots: SlotIds) -> BlockMask:
    """FlexAttention's sparse form of the mask for all heads; built once per batch, without waiting for the device."""
    # The kernel reads them for every pair of slots: 32 bits are half of the bytes and of the instructions.
    document_ids, order, horizon = slots.document_ids.int(), slots.order.int(), slots.horizon.int()
    visible_until = None if slots.visible_until is None else slots.visible_until.int()

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen_until = None if visible_until is None else visible_until[b, k]
        return _may_attend(document_ids[b, q], horizon[b, q], document_ids[b, k], order[b, k], seen_until)

    keys, full_keys, queries, full_queries = _compiled_attending_blocks(document_ids, order, horizon, visible_until)
    lengths, sizes = (order.shape[1], order.shape[1]), (_BLOCK, _BLOCK)
    return BlockMask(lengths, *keys, *full_keys, *queries, *full_queries, BLOCK_SIZE=sizes, mask_mod=mask_mod)


def interval_mask(slots: SlotIds) -> IntervalMask:
    """The mask as intervals and lists of tiles for all heads; built once per batch, without waiting for the device."""
    ids = places(slots.document_ids, slots.order, slots.horizon, slots.visible_until)
    return IntervalMask(ids, *interval_tiles(ids))


Kernel = Literal["interval", "flex", "sdpa"]
KernelChoice = Literal["auto", "interval", "flex", "sdpa"]


def runs_on_hopper(device: torch.device) -> bool:
    """Whether a device supports the kernels of `interval_hopper`."""
    return HAS_TRITON and has_hopper_kernels(device)


def attention_kernel(
    choice: KernelChoice, device_type: str, length: int, head_dim: int, dtype: torch.dtype, on_hopper: bool
) -> tuple[Kernel, str]:
    """The kernel for training => (its name, why).

    Args:
        choice: `training.attention`.
        device_type: Device type of the model.
        length: Slots of a row.
        head_dim: Width of a head.
        dtype: Number format of queries, keys and values.
        on_hopper: See `runs_on_hopper`.

    Raises:
        UserError: The chosen kernel cannot train here.
    """
    if choice == "sdpa":
        return "sdpa", "as training.attention says"
    if device_type != "cuda":
        if choice != "auto":
            raise UserError(
                f"training.attention is {choice}, which has no backward on the device '{device_type}'; use auto or sdpa"
            )
        return "sdpa", f"the other kernels have no backward on the device '{device_type}'"
    if choice == "interval":
        _check_interval(length, head_dim, dtype)
    if choice != "auto":
        return choice, "as training.attention says"
    # Rows shorter than one block: FlexAttention has nothing to skip. Before PyTorch pull request 185349 it also fails
    # there with grouped heads.
    if length < _BLOCK:
        return "sdpa", f"rows of {length} slots are shorter than a block of {_BLOCK}"
    if not on_hopper:
        return "flex", f"empty blocks of {_BLOCK} slots are skipped; interval was measured only on Hopper"
    if not suits_hopper_kernels(dtype, length, head_dim) or length > MAX_SLOTS:
        return "flex", (
            f"empty blocks of {_BLOCK} slots are skipped; interval is faster for heads of 64 or 128 in 16 "
            f"bits and rows of a multiple of 64 slots, not for heads of {head_dim} in {dtype} and rows of {length}"
        )
    return "interval", f"rows of {length} slots on Hopper: empty tiles of 64 slots are skipped"


def _check_interval(length: int, head_dim: int, dtype: torch.dtype) -> None:
    """Refuse heads and rows that the kernels of `interval_attention` do not support."""
    if not HAS_TRITON:
        raise UserError("training.attention is interval, which needs the package triton; install it, or use auto")
    widest = MAX_HEAD_DIM if dtype.itemsize == 2 else MAX_HEAD_DIM // 2
    if head_dim > widest:
        raise UserError(
            f"training.attention is interval, which takes heads of up to {widest} in {dtype}, but model.head_dim is "
            f"{head_dim}; use auto"
        )
    if length > MAX_SLOTS:
        raise UserError(
            f"training.attention is interval, which takes rows of up to {MAX_SLOTS:,} slots, but these have "
            f"{length:,}; use auto"
        )


def training_mask(slots: SlotIds, kernel: Kernel) -> AttentionMask:
    """The mask in the kernel's format."""
    if kernel == "interval":
        return interval_mask(slots)
    return block_mask(slots) if kernel == "flex" else dense_mask(slots, slots)


# Where the last block is cut, the compiler's default tile (128 x 128 for heads of 64) computes all of it: 600 slots
# take 0.53 ms with it on an H100 and 0.23 ms with this one.
_SMALL_TILE = {"fwd_BLOCK_M": 64, "fwd_BLOCK_N": 64, "fwd_num_stages": 3, "fwd_num_warps": 4}


def _kernel_options(q_BNSH: Tensor) -> Any:
    cut = q_BNSH.shape[2] % _BLOCK != 0
    return _SMALL_TILE if cut and q_BNSH.shape[3] <= 64 and q_BNSH.element_size() == 2 else None


def joint_attention(q_BNSH: Tensor, k_BMSH: Tensor, v_BMSH: Tensor, mask: AttentionMask) -> Tensor:
    """One softmax over all slots that the mask allows => [B, N, S_q, H]. Key/value heads may be fewer (GQA)."""
    if isinstance(mask, IntervalMask):
        q_BSNH, k_BSMH, v_BSMH = (heads.transpose(1, 2) for heads in (q_BNSH, k_BMSH, v_BMSH))
        return interval_attention(q_BSNH, k_BSMH, v_BSMH, *mask)[0].transpose(1, 2)
    grouped = q_BNSH.shape[1] != k_BMSH.shape[1]
    if isinstance(mask, BlockMask):
        options = _kernel_options(q_BNSH)
        return _flex_attention(q_BNSH, k_BMSH, v_BMSH, block_mask=mask, enable_gqa=grouped, kernel_options=options)
    return F.scaled_dot_product_attention(q_BNSH, k_BMSH, v_BMSH, attn_mask=mask[:, None], enable_gqa=grouped)


class NewSlots(NamedTuple):
    """New slots of one forward in a `KVCache`, the same for all layers: their places and what they see.

    Attributes:
        slots: [B * S], their indices among the slots of all rows.
        rows: [B], their rows of the cache; None for its first B.
        causal: Whether a new slot sees only earlier ones, as in text; else it sees all new ones of its row, as in an
            image.
        mask: [B, 1, 1 or S, end] bool, True = may attend; None if the kernel uses `bounds`.
        bounds: Int32, for that kernel: [B + 1] starts of each row's queries, [B + 1] starts of its keys, [B] numbers of
            its keys, including the new ones.
    """

    slots: Tensor
    rows: Tensor | None
    causal: bool
    mask: Tensor | None
    bounds: tuple[Tensor, Tensor, Tensor] | None


class LayerCache(NamedTuple):
    """Keys and values of one layer [rows, capacity, M, H], and the new slots of a forward."""

    keys: Tensor
    values: Tensor
    new: NewSlots


class CacheWindow(NamedTuple):
    """Keys and values of all layers [layers, rows, capacity, M, H], and the new slots of a forward."""

    keys: Tensor
    values: Tensor
    new: NewSlots

    def layer(self, index: int) -> LayerCache:
        """The part of one layer."""
        return LayerCache(self.keys[index], self.values[index], self.new)


class KVCache:
    """Pre-allocated keys and values of documents, one a row, in reading order: slot i of a row is token or patch i.

    The caller tells each forward how many slots of a row are in use. New slots are written after them. They are kept
    only if the next forward counts them as used: a denoising step overwrites the patches of the previous step.

    Args:
        num_layers, num_kv_heads, head_dim: Shape of the model.
        rows: Number of documents.
        capacity: Slots of a row; one more than needed if filler of shorter rows needs a place.
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
        self.keys = torch.zeros(num_layers, rows, capacity, num_kv_heads, head_dim, device=device, dtype=dtype)
        self.values = torch.zeros_like(self.keys)
        self.capacity = capacity
        # FlashAttention takes rows of any lengths without a mask; it needs Ampere.
        self.counts_slots = (
            device.type == "cuda"
            and dtype in (torch.bfloat16, torch.float16)
            and head_dim % 8 == 0
            and head_dim <= 256
            and torch.cuda.get_device_capability(device)[0] >= 8
        )

    def forget(self) -> None:
        """Zero all slots if attention uses a mask, because a mask does not hide values that are not finite."""
        if not self.counts_slots:
            self.keys.zero_()
            self.values.zero_()

    def window(
        self, lengths: Tensor, num_slots: int, causal: bool, rows: Tensor | None = None, end: int | None = None
    ) -> CacheWindow:
        """A window for new slots after the first `lengths` [B] slots of rows, without waiting for the device.

        Args:
            lengths: int64 [B], used slots. New slots beyond a row's capacity, the filler of shorter rows, go to its
                last slot.
            num_slots: New slots S of each row.
            causal: See `NewSlots`.
            rows: int64 [B]; None for the first B.
            end: Upper bound on the slots of any row after the addition; a smaller bound reads less.
        """
        device, count = lengths.device, lengths.shape[0]
        # Filler can end beyond the capacity.
        end = self.capacity if end is None else min(end, self.capacity)
        starts = (torch.arange(count, device=device) if rows is None else rows) * self.capacity
        places = (lengths[:, None] + torch.arange(num_slots, device=device)).clamp(max=self.capacity - 1)
        slots = (starts[:, None] + places).flatten()
        if not self.counts_slots:
            seen = places + 1 if causal else (lengths + num_slots)[:, None]
            mask = torch.arange(end, device=device) < seen[:, None, :, None]
            return CacheWindow(self.keys, self.values, NewSlots(slots, rows, causal, mask, None))
        queries = torch.arange(0, count * num_slots + 1, num_slots, device=device, dtype=torch.int32)
        used = (lengths + num_slots).clamp(max=self.capacity).int()
        bounds = (queries, F.pad(starts, (0, 1)).int(), used)
        return CacheWindow(self.keys, self.values, NewSlots(slots, rows, causal, None, bounds))


def cached_attention(q_BSNH: Tensor, k_BSMH: Tensor, v_BSMH: Tensor, cache: LayerCache) -> Tensor:
    """Write new keys and values into the cache, and attend to all slots of each row => [B, S, N, H]."""
    keys, values, new = cache
    for held, added in ((keys, k_BSMH), (values, v_BSMH)):
        _words(held.flatten(0, 1)).index_copy_(0, new.slots, _words(added.to(held.dtype).flatten(0, 1)))
    rows, num_slots, num_heads, _ = q_BSNH.shape
    if new.bounds is not None:
        queries_begin, keys_begin, used = new.bounds
        attended = torch.ops.aten._flash_attention_forward(
            q_BSNH.to(keys.dtype).flatten(0, 1),
            keys.flatten(0, 1),
            values.flatten(0, 1),
            queries_begin,
            keys_begin,
            num_slots,
            keys.shape[1],
            0.0,
            new.causal,
            False,
            seqused_k=used,
        )[0]
        return attended.unflatten(0, (rows, num_slots))
    assert new.mask is not None
    end = new.mask.shape[-1]
    k_BMSH, v_BMSH = (
        (held[:rows, :end] if new.rows is None else held[new.rows, :end]).transpose(1, 2) for held in (keys, values)
    )
    grouped = num_heads != keys.shape[2]
    q_BNSH = q_BSNH.transpose(1, 2)
    attended = F.scaled_dot_product_attention(q_BNSH, k_BMSH, v_BMSH, attn_mask=new.mask, enable_gqa=grouped)
    return attended.transpose(1, 2)


def _words(heads: Tensor) -> Tensor:
    """Heads [slots, M, H] => [slots, words]; a copy by index moves four short numbers as fast as one long word."""
    flat = heads.flatten(1)
    if torch.compiler.is_compiling() or flat.element_size() != 2 or flat.shape[1] % 4:
        return flat
    return flat.view(torch.int64)
