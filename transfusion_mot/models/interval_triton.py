"""The kernels of `interval_attention` in Triton: for any CUDA device, any head width and rows of any length.

A program handles a tile of queries or keys of one head, and loops over the listed tiles of the other side. Slots after
the end of a row read its last slot; the result is not used.

Shapes: B rows, S slots, n tiles a row, N query heads, M key/value heads, H head width.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Slots in a tile.
TILE = 64


@triton.jit
def _interval_lists(ids, counts, tiles, slots, num_tiles, TILE: tl.constexpr):
    """List the tiles of tile x in row y: key tiles of a query tile if z is 0, else query tiles of a key tile."""
    tile, row, by_keys = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    side = tl.num_programs(1) * slots
    ids += row * slots
    # A query also has an interval: only its place. Then a query attends to a key if their intervals overlap.
    mine, theirs = by_keys * side, (1 - by_keys) * side
    offsets = tile * TILE + tl.arange(0, TILE)
    low, high = tl.load(ids + mine + offsets)[:, None], tl.load(ids + 2 * mine + offsets)[:, None]
    item = (by_keys * tl.num_programs(1) + row) * num_tiles + tile
    listed = tiles + item.to(tl.int64) * (num_tiles + 1)
    count = 0
    for other in range(num_tiles):
        offsets = other * TILE + tl.arange(0, TILE)
        first, last = tl.load(ids + theirs + offsets)[None], tl.load(ids + 2 * theirs + offsets)[None]
        pairs = tl.sum(tl.sum(((low <= last) & (first <= high)).to(tl.int32), 1), 0)
        if pairs > 0:
            tl.store(listed + count, 2 * other + (pairs < TILE * TILE).to(tl.int32))
            count += 1
    tl.store(counts + item, count)


@triton.jit
def _rows(source, first, stride, slots, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, TILE: tl.constexpr):
    """A tile of one head, [TILE, H], from slot `first`; `stride` is the distance between slots."""
    slot = tl.minimum(first + tl.arange(0, TILE), slots - 1)
    width = tl.arange(0, BLOCK_WIDTH)
    addresses = source + slot[:, None] * stride + width[None]
    if WIDTH == BLOCK_WIDTH:
        return tl.load(addresses)
    return tl.load(addresses, (width < WIDTH)[None], other=0.0)


@triton.jit
def _store_rows(
    target, value, first, stride, slots, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, TILE: tl.constexpr
):
    slot, width = first + tl.arange(0, TILE), tl.arange(0, BLOCK_WIDTH)
    mask = (slot < slots)[:, None] & (width < WIDTH)[None]
    tl.store(target + slot[:, None] * stride + width[None], value.to(target.dtype.element_ty), mask)


@triton.jit
def _interval_forward(
    q,
    k,
    v,
    attended,
    log_sums,
    ids,
    counts,
    tiles,
    rows,
    slots,
    num_tiles,
    scale,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of queries of a head."""
    item, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    row, first = item // num_tiles, (item % num_tiles) * TILE
    q_stride: tl.constexpr = HEADS * WIDTH
    k_stride: tl.constexpr = HEADS // GROUP * WIDTH
    begin = row.to(tl.int64) * slots
    q += begin * q_stride + head * WIDTH
    k += begin * k_stride + head // GROUP * WIDTH
    v += begin * k_stride + head // GROUP * WIDTH
    padded = num_tiles * TILE
    side = rows * padded
    ids += row * padded
    listed = tiles + item.to(tl.int64) * (num_tiles + 1)
    offsets = first + tl.arange(0, TILE)
    place = tl.load(ids + offsets)[:, None]
    queries = _rows(q, first, q_stride, slots, WIDTH, BLOCK_WIDTH, TILE)
    result = tl.zeros([TILE, BLOCK_WIDTH], tl.float32)
    largest = tl.full([TILE], -1.0e30, tl.float32)
    total = tl.zeros([TILE], tl.float32)
    # The next entry is always loaded ahead.
    entry = tl.load(listed)
    for step in tl.range(tl.load(counts + item)):
        start, is_cut = (entry // 2) * TILE, entry % 2
        entry = tl.load(listed + step + 1)
        keys = _rows(k, start, k_stride, slots, WIDTH, BLOCK_WIDTH, TILE)
        scores = tl.dot(queries, keys.T, input_precision=PRECISION)
        if is_cut:
            key = ids + side + start + tl.arange(0, TILE)
            seen = (tl.load(key)[None] <= place) & (place <= tl.load(key + side)[None])
            scores = tl.where(seen, scores, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, 1) * scale)
        weights = tl.math.exp2(scores * scale - larger[:, None])
        shrunk = tl.math.exp2(largest - larger)
        largest, total = larger, total * shrunk + tl.sum(weights, 1)
        values = _rows(v, start, k_stride, slots, WIDTH, BLOCK_WIDTH, TILE)
        result = tl.dot(weights.to(values.dtype), values, result * shrunk[:, None], input_precision=PRECISION)
    # All slots attend to themselves, except those after the end of the row.
    is_used = total > 0
    total = tl.where(is_used, total, 1.0)
    attended += begin * q_stride + head * WIDTH
    _store_rows(attended, result / total[:, None], first, q_stride, slots, WIDTH, BLOCK_WIDTH, TILE)
    log_sum = tl.where(is_used, largest + tl.math.log2(total), 0.0)
    tl.store(log_sums + (row * HEADS + head).to(tl.int64) * padded + offsets, log_sum)


@triton.jit
def _interval_backward_queries(
    q,
    k,
    v,
    attended,
    upstream,
    dq,
    log_sums,
    deltas,
    ids,
    counts,
    tiles,
    rows,
    slots,
    num_tiles,
    scale,
    log_scale,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradient of a tile of queries of a head, and their deltas."""
    item, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    row, first = item // num_tiles, (item % num_tiles) * TILE
    q_stride: tl.constexpr = HEADS * WIDTH
    k_stride: tl.constexpr = HEADS // GROUP * WIDTH
    begin = row.to(tl.int64) * slots
    of_queries = begin * q_stride + head * WIDTH
    k += begin * k_stride + head // GROUP * WIDTH
    v += begin * k_stride + head // GROUP * WIDTH
    padded = num_tiles * TILE
    side = rows * padded
    ids += row * padded
    listed = tiles + item.to(tl.int64) * (num_tiles + 1)
    offsets = first + tl.arange(0, TILE)
    place = tl.load(ids + offsets)[:, None]
    statistics = (row * HEADS + head).to(tl.int64) * padded + offsets
    log_sum = tl.load(log_sums + statistics)[:, None]
    above = _rows(upstream + of_queries, first, q_stride, slots, WIDTH, BLOCK_WIDTH, TILE)
    own = _rows(attended + of_queries, first, q_stride, slots, WIDTH, BLOCK_WIDTH, TILE)
    delta = tl.sum(own.to(tl.float32) * above.to(tl.float32), 1)
    tl.store(deltas + statistics, delta)
    queries = _rows(q + of_queries, first, q_stride, slots, WIDTH, BLOCK_WIDTH, TILE)
    result = tl.zeros([TILE, BLOCK_WIDTH], tl.float32)
    entry = tl.load(listed)
    for step in tl.range(tl.load(counts + item)):
        start, is_cut = (entry // 2) * TILE, entry % 2
        entry = tl.load(listed + step + 1)
        keys = _rows(k, start, k_stride, slots, WIDTH, BLOCK_WIDTH, TILE)
        scores = tl.dot(queries, keys.T, input_precision=PRECISION)
        values = _rows(v, start, k_stride, slots, WIDTH, BLOCK_WIDTH, TILE)
        by_weight = tl.dot(above, values.T, input_precision=PRECISION)
        if is_cut:
            key = ids + side + start + tl.arange(0, TILE)
            seen = (tl.load(key)[None] <= place) & (place <= tl.load(key + side)[None])
            scores = tl.where(seen, scores, float("-inf"))
        weights = tl.math.exp2(scores * log_scale - log_sum)
        by_score = weights * (by_weight - delta[:, None])
        result = tl.dot(by_score.to(keys.dtype), keys, result, input_precision=PRECISION)
    _store_rows(dq + of_queries, result * scale, first, q_stride, slots, WIDTH, BLOCK_WIDTH, TILE)


@triton.jit
def _interval_backward_keys(
    q,
    k,
    v,
    upstream,
    dk,
    dv,
    log_sums,
    deltas,
    ids,
    counts,
    tiles,
    rows,
    slots,
    num_tiles,
    scale,
    log_scale,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradients of a tile of keys and values of a head, summed over the query heads of its group."""
    kv_heads: tl.constexpr = HEADS // GROUP
    item, kv_head = tl.program_id(0) // kv_heads, tl.program_id(0) % kv_heads
    row, first = item // num_tiles, (item % num_tiles) * TILE
    q_stride: tl.constexpr = HEADS * WIDTH
    k_stride: tl.constexpr = kv_heads * WIDTH
    begin = row.to(tl.int64) * slots
    of_keys = begin * k_stride + kv_head * WIDTH
    padded = num_tiles * TILE
    side = rows * padded
    ids += row * padded
    listed = tiles + item.to(tl.int64) * (num_tiles + 1)
    offsets = first + tl.arange(0, TILE)
    low = tl.load(ids + side + offsets)[:, None]
    high = tl.load(ids + 2 * side + offsets)[:, None]
    keys = _rows(k + of_keys, first, k_stride, slots, WIDTH, BLOCK_WIDTH, TILE)
    values = _rows(v + of_keys, first, k_stride, slots, WIDTH, BLOCK_WIDTH, TILE)
    by_keys = tl.zeros([TILE, BLOCK_WIDTH], tl.float32)
    by_values = tl.zeros([TILE, BLOCK_WIDTH], tl.float32)
    count = tl.load(counts + item)
    entry = tl.load(listed)
    for step in tl.range(count * GROUP):
        if GROUP == 1:
            head = kv_head
            following = step + 1
        else:
            head = kv_head * GROUP + step // count
            following = (step + 1) % count
        start, is_cut = (entry // 2) * TILE, entry % 2
        entry = tl.load(listed + following)
        statistics = (row * HEADS + head).to(tl.int64) * padded + start + tl.arange(0, TILE)
        of_queries = begin * q_stride + head * WIDTH
        queries = _rows(q + of_queries, start, q_stride, slots, WIDTH, BLOCK_WIDTH, TILE)
        scores = tl.dot(keys, queries.T, input_precision=PRECISION)
        log_sum = tl.load(log_sums + statistics)[None]
        if is_cut:
            place = tl.load(ids + start + tl.arange(0, TILE))[None]
            scores = tl.where((low <= place) & (place <= high), scores, float("-inf"))
        weights = tl.math.exp2(scores * log_scale - log_sum)
        above = _rows(upstream + of_queries, start, q_stride, slots, WIDTH, BLOCK_WIDTH, TILE)
        by_values = tl.dot(weights.to(above.dtype), above, by_values, input_precision=PRECISION)
        by_weight = tl.dot(values, above.T, input_precision=PRECISION)
        by_score = weights * (by_weight - tl.load(deltas + statistics)[None])
        by_keys = tl.dot(by_score.to(queries.dtype), queries, by_keys, input_precision=PRECISION)
    _store_rows(dk + of_keys, by_keys * scale, first, k_stride, slots, WIDTH, BLOCK_WIDTH, TILE)
    _store_rows(dv + of_keys, by_values, first, k_stride, slots, WIDTH, BLOCK_WIDTH, TILE)


def list_tiles(ids: Tensor, counts: Tensor, tiles: Tensor) -> None:
    """Fill the lists of `interval_attention.interval_tiles`."""
    _, rows, num_tiles = counts.shape
    _interval_lists[(num_tiles, rows, 2)](ids, counts, tiles, ids.shape[2], num_tiles, TILE, num_warps=4)


def forward(
    q: Tensor, k: Tensor, v: Tensor, attended: Tensor, log_sums: Tensor, ids: Tensor, counts: Tensor, tiles: Tensor
) -> None:
    """Fill `attended` and `log_sums`; arguments of all three as in `interval_attention`, contiguous."""
    rows, num_tiles = counts.shape
    scale = math.log2(math.e) / q.shape[3] ** 0.5
    grid = (rows * num_tiles * q.shape[2],)
    _interval_forward[grid](
        q, k, v, attended, log_sums, ids, counts, tiles, rows, q.shape[1], num_tiles, scale, **_constants(q, k)
    )


def backward_queries(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attended: Tensor,
    upstream: Tensor,
    dq: Tensor,
    log_sums: Tensor,
    deltas: Tensor,
    ids: Tensor,
    counts: Tensor,
    tiles: Tensor,
) -> None:
    """Fill `dq` and `deltas`."""
    rows, num_tiles = counts.shape
    scale = q.shape[3] ** -0.5
    grid = (rows * num_tiles * q.shape[2],)
    lists = (ids, counts, tiles, rows, q.shape[1], num_tiles, scale, scale * math.log2(math.e))
    _interval_backward_queries[grid](q, k, v, attended, upstream, dq, log_sums, deltas, *lists, **_constants(q, k))


def backward_keys(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    upstream: Tensor,
    dk: Tensor,
    dv: Tensor,
    log_sums: Tensor,
    deltas: Tensor,
    ids: Tensor,
    counts: Tensor,
    tiles: Tensor,
) -> None:
    """Fill `dk` and `dv`."""
    rows, num_tiles = counts.shape
    scale = q.shape[3] ** -0.5
    grid = (rows * num_tiles * k.shape[2],)
    lists = (ids, counts, tiles, rows, q.shape[1], num_tiles, scale, scale * math.log2(math.e))
    _interval_backward_keys[grid](q, k, v, upstream, dk, dv, log_sums, deltas, *lists, **_constants(q, k))


def _constants(q: Tensor, k: Tensor) -> dict[str, Any]:
    heads, width = q.shape[2:]
    is_float32 = q.dtype == torch.float32
    names = {"HEADS": heads, "GROUP": heads // k.shape[2], "WIDTH": width, "TILE": TILE}
    names["BLOCK_WIDTH"] = max(16, triton.next_power_of_2(width))
    # Two stages of wider tiles do not fit into the shared memory of a multiprocessor.
    is_wide = is_float32 or width > 128
    stages = {"num_warps": 8 if is_wide else 4, "num_stages": 1 if is_wide else 2}
    return {**names, "PRECISION": "ieee" if is_float32 else "tf32", **stages}
