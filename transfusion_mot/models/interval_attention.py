"""Attention with a mask of intervals, for CUDA devices: each key has an interval of places that attend to it.

All slots of a row are placed on one line, document by document in reading order. A query has one place: the last place
that it attends to. A key has an interval: places from its own up to the last one from which it is not hidden attend to
it. So the mask is two comparisons of three numbers, for any modalities and any order of slots, without special cases
for copies, causal images and padding.

A row is cut into tiles of 64 slots. For each tile of queries the tiles of keys that it attends to are listed, with a
flag for partly masked ones. The lists are made once for a batch and used by all layers. Two sets of kernels read them:
those of `interval_hopper` on Hopper, those of `interval_triton` elsewhere. The forward keeps the logarithms of the
sums. The backward recomputes scores, once for the gradients of queries and once for those of keys and values. Nothing
is summed across programs, so it is deterministic.

Shapes: B rows, S slots, n tiles a row, N query heads, M key/value heads, H head width.
"""

import functools
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from transfusion_mot.models import interval_triton
from transfusion_mot.models.interval_triton import TILE

# Larger than every place.
_FAR = 2**31 - 1
# Versions of Triton. The kernels for Hopper use Gluon, which is experimental: they were run with 3.6 (torch 2.11), and
# they compile with the other two.
_GLUON_VERSIONS = ("3.6", "3.7", "3.8")
# Places are document numbers times the slots of a row, and have 32 bits.
MAX_SLOTS = 46_340
MAX_HEAD_DIM = 256


def has_hopper_kernels(device: torch.device) -> bool:
    """Whether the kernels of `interval_hopper` run on a device with this version of Triton."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device)[0] == 9
        and triton.__version__.rpartition(".")[0] in _GLUON_VERSIONS
    )


def suits_hopper_kernels(dtype: torch.dtype, num_slots: int, head_dim: int) -> bool:
    """Whether the kernels of `interval_hopper` support these heads."""
    return dtype in (torch.bfloat16, torch.float16) and num_slots % TILE == 0 and head_dim in (64, 128)


def places(document_ids: Tensor, order: Tensor, horizon: Tensor, visible_until: Tensor | None) -> Tensor:
    """Places of queries and keys on the line of a row; see `SlotIds` for the arguments.

    Returns:
        int32 [3, B, n * 64]: places of queries, and the first and last place that attend to each key. Slots after the
        end of a row attend to nothing.
    """
    length = order.shape[1]
    begin = document_ids * length
    last = begin + (length - 1 if visible_until is None else visible_until.clamp(max=length - 1))
    behind = (0, -length % TILE)
    rows = (
        F.pad(begin + horizon, behind, value=_FAR),
        F.pad(begin + order, behind, value=_FAR),
        F.pad(last, behind, value=-_FAR),
    )
    return torch.stack(rows).int()


@torch.library.custom_op("transfusion_mot::interval_tiles", mutates_args=())
def interval_tiles(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Lists of the tiles that each tile attends to, built without waiting for the device.

    Args:
        ids: int32 [3, B, n * 64], see `places`.

    Returns:
        counts: int32 [2, B, n], number of key tiles for each query tile, and of query tiles for each key tile.
        tiles: int32 [2, B, n, n + 1], sorted tile numbers times two, plus one if some pairs are masked; zeros after the
            last.
    """
    counts, tiles = _new_lists(ids)
    # Here and below: Triton launches kernels on the current device, which can be another than the tensors' device.
    with torch.cuda.device_of(ids):
        interval_triton.list_tiles(ids, counts, tiles)
    return counts, tiles


def _new_lists(ids: Tensor) -> tuple[Tensor, Tensor]:
    rows, num_tiles = ids.shape[1], ids.shape[2] // TILE
    # Kernels read one entry ahead, so there is one after the last, and it must be a valid tile number.
    return ids.new_empty(2, rows, num_tiles), ids.new_zeros(2, rows, num_tiles, num_tiles + 1)


@interval_tiles.register_fake
def _(ids):
    return _new_lists(ids)


@torch.library.custom_op("transfusion_mot::interval_attention", mutates_args=())
def interval_attention(
    q: Tensor, k: Tensor, v: Tensor, ids: Tensor, counts: Tensor, tiles: Tensor
) -> tuple[Tensor, Tensor]:
    """One softmax over all keys that a query attends to.

    Args:
        q: [B, S, N, H].
        k, v: [B, S, M, H].
        ids: See `places`.
        counts, tiles: See `interval_tiles`.

    Returns:
        attended: [B, S, N, H].
        log_sums: float32 [B, N, n * 64], base-2 logarithms of the softmax sums, for the backward.
    """
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    attended, log_sums = _empty_results(q, ids)
    with torch.cuda.device_of(q):
        _kernels(q).forward(q, k, v, attended, log_sums, ids, counts[0], tiles[0])
    return attended, log_sums


def _empty_results(q: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    rows, _, num_heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(rows, num_heads, ids.shape[2], dtype=torch.float32)


@interval_attention.register_fake
def _(q, k, v, ids, counts, tiles):
    return _empty_results(q, ids)


@torch.library.custom_op("transfusion_mot::interval_attention_backward", mutates_args=())
def _backward(
    upstream: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attended: Tensor,
    log_sums: Tensor,
    ids: Tensor,
    counts: Tensor,
    tiles: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    upstream, q, k, v = upstream.contiguous(), q.contiguous(), k.contiguous(), v.contiguous()
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    # Sums of upstream * attended for each query, written by the first kernel and read by the second.
    deltas = torch.empty_like(log_sums)
    kernels = _kernels(q)
    with torch.cuda.device_of(q):
        kernels.backward_queries(q, k, v, attended, upstream, dq, log_sums, deltas, ids, counts[0], tiles[0])
        kernels.backward_keys(q, k, v, upstream, dk, dv, log_sums, deltas, ids, counts[1], tiles[1])
    return dq, dk, dv


@_backward.register_fake
def _(upstream, q, k, v, attended, log_sums, ids, counts, tiles):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ids, counts, tiles = inputs
    ctx.save_for_backward(q, k, v, *output, ids, counts, tiles)


def _gradients(ctx: Any, upstream: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return (*_backward(upstream, *ctx.saved_tensors), None, None, None)


interval_attention.register_autograd(_gradients, setup_context=_setup_context)


def _kernels(q: Tensor) -> ModuleType:
    if has_hopper_kernels(q.device) and suits_hopper_kernels(q.dtype, q.shape[1], q.shape[3]):
        return _hopper_kernels()
    return interval_triton


@functools.cache
def _hopper_kernels() -> ModuleType:
    from transfusion_mot.models import interval_hopper

    return interval_hopper
