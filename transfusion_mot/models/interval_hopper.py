"""The kernels of `interval_attention` for Hopper, in Gluon: the copy engine loads tiles into shared memory while the
tensor cores multiply the previous ones.

A program has four warps, which issue one asynchronous product of 64 rows at a time. It handles a tile of queries or
keys of one head. The operands of a product must not change until it has finished, and its result is only available
then: each wait gives the number of products that may still run, and the tensors that are used afterwards. Barriers of
copies alternate between two phases, because their buffers are reused.

The kernels take heads of width 64 or 128 in 16 bits, and rows of whole tiles. `interval_triton` has the same algorithm
in general form.

Shapes: B rows, S slots, n tiles a row, N query heads, M key/value heads, H head width.
"""

import math

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from transfusion_mot.models.interval_triton import TILE

_WARPS = gl.constexpr(4)


@gluon.jit
def _copy(source, slot, column, barrier, buffer):
    mbarrier.expect(barrier, source.block_type.nbytes)
    tma.async_copy_global_to_shared(source, [slot, column], barrier, buffer)


@gluon.jit
def _copy_two(first, second, slot, column, barrier, first_buffer, second_buffer):
    mbarrier.expect(barrier, first.block_type.nbytes + second.block_type.nbytes)
    tma.async_copy_global_to_shared(first, [slot, column], barrier, first_buffer)
    tma.async_copy_global_to_shared(second, [slot, column], barrier, second_buffer)


@gluon.jit
def _copy_queries(
    q, upstream, slot, column, log_sums, deltas, place, barrier, q_buffer, upstream_buffer, log_buffer, delta_buffer
):
    statistics: gl.constexpr = log_sums.block_type.nbytes + deltas.block_type.nbytes
    mbarrier.expect(barrier, q.block_type.nbytes + upstream.block_type.nbytes + statistics)
    tma.async_copy_global_to_shared(q, [slot, column], barrier, q_buffer)
    tma.async_copy_global_to_shared(upstream, [slot, column], barrier, upstream_buffer)
    tma.async_copy_global_to_shared(log_sums, [place], barrier, log_buffer)
    tma.async_copy_global_to_shared(deltas, [place], barrier, delta_buffer)


@gluon.jit
def _hide(scores, place, keys, side):
    """Scores of queries with their places [TILE], with masked keys removed; `keys` are the addresses of the keys' first
    places, and their last places are `side` further on."""
    first, last = gl.load(keys)[None, :], gl.load(keys + side)[None, :]
    return gl.where((first <= place[:, None]) & (place[:, None] <= last), scores, float("-inf"))


@gluon.jit
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
    HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    WIDTH: gl.constexpr,
    TILE: gl.constexpr,
):
    """A tile of queries of a head. Three programs on a multiprocessor are faster than two with a second buffer."""
    of_scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [_WARPS, 1], [16, TILE, 16])
    of_result: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [_WARPS, 1], [16, WIDTH, 16])
    of_factor: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=of_result, k_width=2)
    item = gl.program_id(0) // HEADS
    head = gl.program_id(0) % HEADS
    row = item // num_tiles
    begin = row * slots
    first = begin + (item % num_tiles) * TILE
    q_column = head * WIDTH
    k_column = head // GROUP * WIDTH
    q_buffer = gl.allocate_shared_memory(q.dtype, [TILE, WIDTH], q.layout)
    k_buffer = gl.allocate_shared_memory(k.dtype, [TILE, WIDTH], k.layout)
    v_buffer = gl.allocate_shared_memory(v.dtype, [TILE, WIDTH], v.layout)
    barriers = gl.allocate_shared_memory(gl.int64, [3, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(3):
        mbarrier.init(barriers.index(i), count=1)
    q_there, k_there, v_there = barriers.index(0), barriers.index(1), barriers.index(2)
    _copy(q, first, q_column, q_there, q_buffer)
    count = gl.load(counts + item)
    listed = tiles + item * (num_tiles + 1)
    entry = gl.load(listed)
    following = gl.load(listed + 1)
    start = begin + (entry // 2) * TILE
    _copy(k, start, k_column, k_there, k_buffer)
    _copy(v, start, k_column, v_there, v_buffer)
    side = rows * slots
    offsets = first + gl.arange(0, TILE, gl.SliceLayout(1, of_scores))
    columns = gl.arange(0, TILE, gl.SliceLayout(0, of_scores))
    place = gl.load(ids + offsets)
    zeros = gl.zeros([TILE, TILE], gl.float32, of_scores)
    mbarrier.wait(q_there, 0)
    mbarrier.wait(k_there, 0)
    scores = warpgroup_mma(q_buffer, k_buffer.permute((1, 0)), zeros, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=(scores,))
    if count > 1:
        _copy(k, begin + (following // 2) * TILE, k_column, k_there, k_buffer)
    if entry % 2 == 1:
        scores = _hide(scores, place, ids + side + start + columns, side)
    largest = gl.maximum(gl.max(scores, 1) * scale, -1.0e30)
    weights = gl.exp2(scores * scale - largest[:, None])
    total = gl.sum(weights, 1)
    factor = gl.convert_layout(weights.to(q.dtype), of_factor)
    result = gl.zeros([TILE, WIDTH], gl.float32, of_result)
    for step in range(1, count):
        entry = following
        following = gl.load(listed + step + 1)
        start = begin + (entry // 2) * TILE
        mbarrier.wait(k_there, step & 1)
        pending_scores = warpgroup_mma(q_buffer, k_buffer.permute((1, 0)), zeros, use_acc=False, is_async=True)
        mbarrier.wait(v_there, (step - 1) & 1)
        pending_result = warpgroup_mma(factor, v_buffer, result, is_async=True)
        scores = warpgroup_mma_wait(1, deps=(pending_scores,))
        if step + 1 < count:
            _copy(k, begin + (following // 2) * TILE, k_column, k_there, k_buffer)
        if entry % 2 == 1:
            scores = _hide(scores, place, ids + side + start + columns, side)
        larger = gl.maximum(largest, gl.max(scores, 1) * scale)
        weights = gl.exp2(scores * scale - larger[:, None])
        shrunk = gl.exp2(largest - larger)
        total = total * shrunk + gl.sum(weights, 1)
        largest = larger
        result, factor = warpgroup_mma_wait(0, deps=(pending_result, factor))
        _copy(v, start, k_column, v_there, v_buffer)
        result = result * gl.convert_layout(shrunk, gl.SliceLayout(1, of_result))[:, None]
        factor = gl.convert_layout(weights.to(q.dtype), of_factor)
    mbarrier.wait(v_there, (count - 1) & 1)
    result = warpgroup_mma_wait(0, deps=(warpgroup_mma(factor, v_buffer, result, is_async=True),))
    result = result / gl.convert_layout(total, gl.SliceLayout(1, of_result))[:, None]
    q_buffer.store(result.to(attended.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(attended, [first, q_column], q_buffer)
    gl.store(log_sums + (row * HEADS + head) * slots + (offsets - begin), largest + gl.log2(total))
    tma.store_wait(0)
    for i in gl.static_range(3):
        mbarrier.invalidate(barriers.index(i))


@gluon.jit
def _interval_backward_queries(
    q,
    k,
    v,
    upstream,
    dq,
    attended_at,
    upstream_at,
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
    HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    WIDTH: gl.constexpr,
    TILE: gl.constexpr,
):
    """The gradient of a tile of queries of a head, and their deltas."""
    of_scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [_WARPS, 1], [16, TILE, 16])
    of_result: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [_WARPS, 1], [16, WIDTH, 16])
    of_factor: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=of_result, k_width=2)
    of_memory: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [_WARPS, 1], [1, 0])
    item = gl.program_id(0) // HEADS
    head = gl.program_id(0) % HEADS
    row = item // num_tiles
    begin = row * slots
    first = begin + (item % num_tiles) * TILE
    q_column = head * WIDTH
    k_column = head // GROUP * WIDTH
    q_buffer = gl.allocate_shared_memory(q.dtype, [TILE, WIDTH], q.layout)
    upstream_buffer = gl.allocate_shared_memory(q.dtype, [TILE, WIDTH], q.layout)
    k_buffers = gl.allocate_shared_memory(k.dtype, [2, TILE, WIDTH], k.layout)
    v_buffers = gl.allocate_shared_memory(v.dtype, [2, TILE, WIDTH], v.layout)
    barriers = gl.allocate_shared_memory(gl.int64, [3, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(3):
        mbarrier.init(barriers.index(i), count=1)
    _copy_two(q, upstream, first, q_column, barriers.index(2), q_buffer, upstream_buffer)
    count = gl.load(counts + item)
    listed = tiles + item * (num_tiles + 1)
    following = gl.load(listed)
    start = begin + (following // 2) * TILE
    _copy_two(k, v, start, k_column, barriers.index(0), k_buffers.index(0), v_buffers.index(0))
    # Meanwhile.
    slot = first + gl.arange(0, TILE, gl.SliceLayout(1, of_memory))
    column = q_column + gl.arange(0, WIDTH, gl.SliceLayout(0, of_memory))
    address = slot.to(gl.int64)[:, None] * (HEADS * WIDTH) + column[None, :]
    product = gl.load(attended_at + address).to(gl.float32) * gl.load(upstream_at + address).to(gl.float32)
    delta_in_memory = gl.sum(product, 1)
    statistics = (row * HEADS + head) * slots - begin
    gl.store(deltas + statistics + slot, delta_in_memory)
    delta = gl.convert_layout(delta_in_memory, gl.SliceLayout(1, of_scores))
    side = rows * slots
    offsets = first + gl.arange(0, TILE, gl.SliceLayout(1, of_scores))
    columns = gl.arange(0, TILE, gl.SliceLayout(0, of_scores))
    log_sum = gl.load(log_sums + statistics + offsets)
    place = gl.load(ids + offsets)
    zeros = gl.zeros([TILE, TILE], gl.float32, of_scores)
    factor = gl.zeros([TILE, TILE], q.dtype, of_factor)
    pending_result = warpgroup_mma_init(gl.zeros([TILE, WIDTH], gl.float32, of_result))
    mbarrier.wait(barriers.index(2), 0)
    for step in range(0, count):
        this = step % 2
        entry = following
        following = gl.load(listed + step + 1)
        start = begin + (entry // 2) * TILE
        mbarrier.wait(barriers.index(this), (step // 2) & 1)
        keys = k_buffers.index(this)
        pending_scores = warpgroup_mma(q_buffer, keys.permute((1, 0)), zeros, use_acc=False, is_async=True)
        pending_weights = warpgroup_mma(
            upstream_buffer, v_buffers.index(this).permute((1, 0)), zeros, use_acc=False, is_async=True
        )
        scores, result, factor = warpgroup_mma_wait(1, deps=(pending_scores, pending_result, factor))
        if step + 1 < count:
            start_next = begin + (following // 2) * TILE
            other = 1 - this
            _copy_two(k, v, start_next, k_column, barriers.index(other), k_buffers.index(other), v_buffers.index(other))
        if entry % 2 == 1:
            scores = _hide(scores, place, ids + side + start + columns, side)
        weights = gl.exp2(scores * log_scale - log_sum[:, None])
        by_weight = warpgroup_mma_wait(0, deps=(pending_weights,))
        factor = gl.convert_layout((weights * (by_weight - delta[:, None])).to(q.dtype), of_factor)
        pending_result = warpgroup_mma(factor, keys, result, is_async=True)
    result, factor = warpgroup_mma_wait(0, deps=(pending_result, factor))
    q_buffer.store((result * scale).to(dq.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(dq, [first, q_column], q_buffer)
    tma.store_wait(0)
    for i in gl.static_range(3):
        mbarrier.invalidate(barriers.index(i))


@gluon.jit
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
    HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    WIDTH: gl.constexpr,
    TILE: gl.constexpr,
):
    """The gradients of a tile of keys and values of a head, summed over the query heads of its group. Rows of scores
    are keys here."""
    of_scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [_WARPS, 1], [16, TILE, 16])
    of_result: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [_WARPS, 1], [16, WIDTH, 16])
    of_factor: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=of_result, k_width=2)
    along_queries: gl.constexpr = gl.SliceLayout(0, of_scores)
    item = gl.program_id(0) // (HEADS // GROUP)
    kv_head = gl.program_id(0) % (HEADS // GROUP)
    row = item // num_tiles
    begin = row * slots
    first = begin + (item % num_tiles) * TILE
    k_column = kv_head * WIDTH
    k_buffer = gl.allocate_shared_memory(k.dtype, [TILE, WIDTH], k.layout)
    v_buffer = gl.allocate_shared_memory(k.dtype, [TILE, WIDTH], k.layout)
    q_buffers = gl.allocate_shared_memory(q.dtype, [2, TILE, WIDTH], q.layout)
    upstream_buffers = gl.allocate_shared_memory(q.dtype, [2, TILE, WIDTH], q.layout)
    log_buffers = gl.allocate_shared_memory(gl.float32, [2, TILE], log_sums.layout)
    delta_buffers = gl.allocate_shared_memory(gl.float32, [2, TILE], deltas.layout)
    barriers = gl.allocate_shared_memory(gl.int64, [3, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(3):
        mbarrier.init(barriers.index(i), count=1)
    _copy_two(k, v, first, k_column, barriers.index(2), k_buffer, v_buffer)
    count = gl.load(counts + item)
    listed = tiles + item * (num_tiles + 1)
    following = gl.load(listed)
    head = kv_head * GROUP
    start = (following // 2) * TILE
    _copy_queries(
        q,
        upstream,
        begin + start,
        head * WIDTH,
        log_sums,
        deltas,
        (row * HEADS + head) * slots + start,
        barriers.index(0),
        q_buffers.index(0),
        upstream_buffers.index(0),
        log_buffers.index(0),
        delta_buffers.index(0),
    )
    side = rows * slots
    offsets = first + gl.arange(0, TILE, gl.SliceLayout(1, of_scores))
    low = gl.load(ids + side + offsets)
    high = gl.load(ids + 2 * side + offsets)
    columns = gl.arange(0, TILE, along_queries)
    zeros = gl.zeros([TILE, TILE], gl.float32, of_scores)
    score_factor = gl.zeros([TILE, TILE], q.dtype, of_factor)
    weight_factor = gl.zeros([TILE, TILE], q.dtype, of_factor)
    pending_dk = warpgroup_mma_init(gl.zeros([TILE, WIDTH], gl.float32, of_result))
    pending_dv = warpgroup_mma_init(gl.zeros([TILE, WIDTH], gl.float32, of_result))
    mbarrier.wait(barriers.index(2), 0)
    for step in range(0, count * GROUP):
        this = step % 2
        entry = following
        if GROUP == 1:
            following = gl.load(listed + step + 1)
        else:
            head = kv_head * GROUP + (step + 1) // count
            following = gl.load(listed + (step + 1) % count)
        mbarrier.wait(barriers.index(this), (step // 2) & 1)
        queries = q_buffers.index(this)
        above = upstream_buffers.index(this)
        pending_scores = warpgroup_mma(k_buffer, queries.permute((1, 0)), zeros, use_acc=False, is_async=True)
        pending_weights = warpgroup_mma(v_buffer, above.permute((1, 0)), zeros, use_acc=False, is_async=True)
        scores, by_keys, by_values, score_factor, weight_factor = warpgroup_mma_wait(
            1, deps=(pending_scores, pending_dk, pending_dv, score_factor, weight_factor)
        )
        if step + 1 < count * GROUP:
            start = (following // 2) * TILE
            other = 1 - this
            _copy_queries(
                q,
                upstream,
                begin + start,
                head * WIDTH,
                log_sums,
                deltas,
                (row * HEADS + head) * slots + start,
                barriers.index(other),
                q_buffers.index(other),
                upstream_buffers.index(other),
                log_buffers.index(other),
                delta_buffers.index(other),
            )
        if entry % 2 == 1:
            place = gl.load(ids + begin + (entry // 2) * TILE + columns)[None, :]
            scores = gl.where((low[:, None] <= place) & (place <= high[:, None]), scores, float("-inf"))
        weights = gl.exp2(scores * log_scale - log_buffers.index(this).load(along_queries)[None, :])
        weight_factor = gl.convert_layout(weights.to(q.dtype), of_factor)
        by_weight = warpgroup_mma_wait(0, deps=(pending_weights,))
        pending_dv = warpgroup_mma(weight_factor, above, by_values, is_async=True)
        by_score = weights * (by_weight - delta_buffers.index(this).load(along_queries)[None, :])
        score_factor = gl.convert_layout(by_score.to(q.dtype), of_factor)
        pending_dk = warpgroup_mma(score_factor, queries, by_keys, is_async=True)
    by_keys, by_values, score_factor, weight_factor = warpgroup_mma_wait(
        0, deps=(pending_dk, pending_dv, score_factor, weight_factor)
    )
    k_buffer.store((by_keys * scale).to(dk.dtype))
    v_buffer.store(by_values.to(dv.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(dk, [first, k_column], k_buffer)
    tma.async_copy_shared_to_global(dv, [first, k_column], v_buffer)
    tma.store_wait(0)
    for i in gl.static_range(3):
        mbarrier.invalidate(barriers.index(i))


def forward(
    q: Tensor, k: Tensor, v: Tensor, attended: Tensor, log_sums: Tensor, ids: Tensor, counts: Tensor, tiles: Tensor
) -> None:
    """Fill `attended` and `log_sums`; arguments of all three as in `interval_attention`, contiguous."""
    rows, num_tiles = counts.shape
    sizes = (ids, counts, tiles, rows, q.shape[1], num_tiles, math.log2(math.e) / q.shape[3] ** 0.5)
    heads = (_heads(q), _heads(k), _heads(v), _heads(attended))
    grid = (rows * num_tiles * q.shape[2],)
    # 168 registers let three programs share a multiprocessor.
    _interval_forward[grid](*heads, log_sums, *sizes, *_constants(q, k), num_warps=_WARPS.value, maxnreg=168)


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
    sizes = (ids, counts, tiles, rows, q.shape[1], num_tiles, scale, scale * math.log2(math.e))
    heads = (_heads(q), _heads(k), _heads(v), _heads(upstream), _heads(dq))
    grid = (rows * num_tiles * q.shape[2],)
    _interval_backward_queries[grid](
        *heads, attended, upstream, log_sums, deltas, *sizes, *_constants(q, k), num_warps=_WARPS.value
    )


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
    sizes = (ids, counts, tiles, rows, q.shape[1], num_tiles, scale, scale * math.log2(math.e))
    heads = (_heads(q), _heads(k), _heads(v), _heads(upstream), _heads(dk), _heads(dv))
    grid = (rows * num_tiles * k.shape[2],)
    statistics = (_numbers(log_sums), _numbers(deltas))
    _interval_backward_keys[grid](*heads, *statistics, *sizes, *_constants(q, k), num_warps=_WARPS.value)


def _constants(q: Tensor, k: Tensor) -> tuple[int, int, int, int]:
    return q.shape[2], q.shape[2] // k.shape[2], q.shape[3], TILE


def _heads(tensor: Tensor) -> TensorDescriptor:
    """[B, S, heads, H] for the copy engine, as a matrix from which it loads tiles of one head."""
    rows, slots, heads, width = tensor.shape
    dtype = gl.bfloat16 if tensor.dtype == torch.bfloat16 else gl.float16
    layout = gl.NVMMASharedLayout.get_default_for([TILE, width], dtype)
    return TensorDescriptor(tensor, [rows * slots, heads * width], [heads * width, 1], [TILE, width], layout)


def _numbers(tensor: Tensor) -> TensorDescriptor:
    """Float32 numbers, from which the copy engine loads a tile."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
    return TensorDescriptor(tensor, [tensor.numel()], [1], [TILE], layout)
