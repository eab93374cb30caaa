"""The kernels of `decode_step`, for CUDA: products of a few vectors with matrices, and attention of one slot a row.

A decoding step mostly reads weights. So each kernel is one pass over some of them and includes the operations around
the product: a norm, the gate, the sum with the residual stream. With `early` a kernel starts before the previous one
has ended (programmatic dependent launch, from Hopper on) and already loads its weights, or its keys and values. It
reads or overwrites results of other kernels only after the wait.

Shapes: B rows, D inputs, N query heads, M key/value heads, H head width.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# A program takes matrix rows of about this many bytes, or fewer if a multiprocessor would have too few programs to hide
# the latency of memory: 4 on each of the 132 of an H100. On an H200 a token of 760m takes 592 us, and 692 us with half
# of these two numbers.
_BYTES = 16384
_PROGRAMS = 528
# Inputs of each matrix row that a thread reads: four loads of 16 bytes in bfloat16.
_INPUTS = 32
# Keys that a program reads at once, and programs that share a head.
_KEYS = 16
_SPLITS = 32
_WARPS = 1


@triton.jit
def _decode_products(
    vectors,
    norm,
    matrix,
    up,
    out,
    rows,
    outputs,
    eps,
    INPUTS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    ADDED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """`BLOCK` of the outputs, each from one row of the matrix, for all vectors."""
    first = tl.program_id(0) * BLOCK
    output, i = first + tl.arange(0, BLOCK), tl.arange(0, BLOCK_INPUTS)
    inside = i < INPUTS
    mask = (output < outputs)[:, None] & inside[None]
    offsets = first.to(tl.int64) * INPUTS + tl.arange(0, BLOCK)[:, None] * INPUTS + i[None]
    w = tl.load(matrix + offsets, mask, other=0.0)
    if GATED:
        w_up = tl.load(up + offsets, mask, other=0.0)
    if NORM:
        w_norm = tl.load(norm + i, inside, other=0.0).to(tl.float32)
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    next_x = tl.load(vectors + i, inside, other=0.0)
    for row in tl.static_range(ROWS):
        x = next_x.to(tl.float32)
        if row + 1 < ROWS:  # Loaded before the sums, for which the threads wait for each other.
            next_x = tl.load(vectors + (row + 1) * INPUTS + i, i < tl.where(rows > row + 1, INPUTS, 0), other=0.0)
        scale = 1.0
        if NORM:
            # The norm is one factor for all inputs, so the product need not wait for it.
            scale = tl.rsqrt(tl.sum(x * x, 0) / INPUTS + eps)
            x *= w_norm
        result = tl.sum(w.to(tl.float32) * x[None], 1) * scale
        if GATED:
            result *= tl.sigmoid(result) * (tl.sum(w_up.to(tl.float32) * x[None], 1) * scale)
        target = out + row * outputs + output
        present = output < tl.where(rows > row, outputs, 0)
        if ADDED:
            result += tl.load(target, present, other=0.0).to(tl.float32)
        tl.store(target, result.to(out.dtype.element_ty), present)


@triton.jit
def _halves(vector, half, HALF: tl.constexpr):
    """A head [H] in memory => its two halves, which rotary positions rotate together."""
    first = tl.load(vector + half, half < HALF, other=0.0).to(tl.float32)
    return first, tl.load(vector + HALF + half, half < HALF, other=0.0).to(tl.float32)


@triton.jit
def _normed_and_turned(first, second, w1, w2, c, s, eps, HALF: tl.constexpr, NORM: tl.constexpr):
    if NORM:
        scale = tl.rsqrt(tl.sum(first * first + second * second, 0) / (2 * HALF) + eps)
        first, second = first * scale * w1, second * scale * w2
    return first * c - second * s, second * c + first * s


@triton.jit
def _decode_attention(
    qkv,
    q_weight,
    k_weight,
    cos,
    sin,
    lengths,
    step,
    index,
    keys,
    values,
    partial,
    arrived,
    attended,
    steps,
    capacity,
    eps,
    scale,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    NORM: tl.constexpr,
    INDEXED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Attend to every `SPLITS`th block of the keys of a head; the last program to finish sums all parts.

    Scores are in powers of two. The new slot belongs to the first split, which writes it into the cache.
    """
    split, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    width: tl.constexpr = 2 * HALF
    group: tl.constexpr = HEADS // KV_HEADS
    stride: tl.constexpr = KV_HEADS * width
    half = tl.arange(0, BLOCK_HALF)
    inside = half < HALF
    done = tl.load(step)
    place = tl.minimum(tl.load(lengths + row) + done, capacity - 1).to(tl.int32)
    held = tl.load(index + row) if INDEXED else row
    kv_head = head // group
    begin = held.to(tl.int64) * capacity * stride + kv_head * width
    keys += begin
    values += begin
    slot = split * BLOCK + tl.arange(0, BLOCK)
    offsets = slot[:, None] * stride + half[None]
    mask = (slot < place)[:, None] & inside[None]
    k1, k2 = tl.load(keys + offsets, mask, other=0.0), tl.load(keys + offsets + HALF, mask, other=0.0)
    v1, v2 = tl.load(values + offsets, mask, other=0.0), tl.load(values + offsets + HALF, mask, other=0.0)
    angles = (row * steps + done) * HALF + half
    c, s = tl.load(cos + angles, inside, other=0.0), tl.load(sin + angles, inside, other=0.0)
    q_w1, q_w2 = _halves(q_weight, half, HALF) if NORM else (c, c)
    k_w1, k_w2 = _halves(k_weight, half, HALF) if NORM else (c, c)
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()

    qkv += row * (HEADS + 2 * KV_HEADS) * width
    q1, q2 = _halves(qkv + head * width, half, HALF)
    new_k1, new_k2 = _halves(qkv + (HEADS + kv_head) * width, half, HALF)
    new_v1, new_v2 = _halves(qkv + (HEADS + KV_HEADS + kv_head) * width, half, HALF)
    q1, q2 = _normed_and_turned(q1, q2, q_w1, q_w2, c, s, eps, HALF, NORM)
    q1, q2 = q1 * scale, q2 * scale
    new_k1, new_k2 = _normed_and_turned(new_k1, new_k2, k_w1, k_w2, c, s, eps, HALF, NORM)
    # Rounded as in the cache.
    held_k1, held_k2 = new_k1.to(keys.dtype.element_ty), new_k2.to(keys.dtype.element_ty)
    writes = half < tl.where((split == 0) & (head % group == 0), HALF, 0)
    new = place.to(tl.int64) * stride + half
    tl.store(keys + new, held_k1, writes)
    tl.store(keys + new + HALF, held_k2, writes)
    tl.store(values + new, new_v1.to(values.dtype.element_ty), writes)
    tl.store(values + new + HALF, new_v2.to(values.dtype.element_ty), writes)

    new_score = tl.sum(q1 * held_k1.to(tl.float32) + q2 * held_k2.to(tl.float32), 0)
    largest = tl.where(split == 0, new_score, float("-inf"))
    total = tl.where(split == 0, 1.0, 0.0)
    sum1, sum2 = new_v1 * total, new_v2 * total
    for _ in range(split * BLOCK, place, SPLITS * BLOCK):
        scores = tl.sum(k1.to(tl.float32) * q1[None] + k2.to(tl.float32) * q2[None], 1)
        scores = tl.where(slot < place, scores, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, 0))
        shrunk, weights = tl.exp2(largest - larger), tl.exp2(scores - larger)
        total = total * shrunk + tl.sum(weights, 0)
        sum1 = sum1 * shrunk + tl.sum(v1.to(tl.float32) * weights[:, None], 0)
        sum2 = sum2 * shrunk + tl.sum(v2.to(tl.float32) * weights[:, None], 0)
        largest = larger
        slot += SPLITS * BLOCK
        offsets += SPLITS * BLOCK * stride
        mask = (slot < place)[:, None] & inside[None]
        k1, k2 = tl.load(keys + offsets, mask, other=0.0), tl.load(keys + offsets + HALF, mask, other=0.0)
        v1, v2 = tl.load(values + offsets, mask, other=0.0), tl.load(values + offsets + HALF, mask, other=0.0)

    # For each split: the sums [H], the total and the largest score.
    query = row * HEADS + head
    share = partial + (query * SPLITS + split) * (width + 2)
    tl.store(share + half, sum1, inside)
    tl.store(share + HALF + half, sum2, inside)
    tl.store(share + width, total)
    tl.store(share + width + 1, largest)
    tl.debug_barrier()  # One thread reports the arrival after all threads have stored.
    if tl.atomic_add(arrived + query, 1, sem="acq_rel") == SPLITS - 1:
        shares = partial + (query * SPLITS + tl.arange(0, SPLITS)) * (width + 2)
        each = shares[:, None] + half[None]
        # Bypass the multiprocessor's cache, which does not see stores of other multiprocessors.
        of_all = tl.load(shares + width + 1, cache_modifier=".cg")
        parts = tl.exp2(of_all - tl.max(of_all, 0))
        parts /= tl.sum(tl.load(shares + width, cache_modifier=".cg") * parts, 0)
        all1 = tl.load(each, inside[None], other=0.0, cache_modifier=".cg")
        all2 = tl.load(each + HALF, inside[None], other=0.0, cache_modifier=".cg")
        target = attended + query * width + half
        tl.store(target, tl.sum(all1 * parts[:, None], 0).to(attended.dtype.element_ty), inside)
        tl.store(target + HALF, tl.sum(all2 * parts[:, None], 0).to(attended.dtype.element_ty), inside)
        tl.store(arrived + query, 0)


def products(
    vectors: Tensor,
    matrix: Tensor,
    *,
    up: Tensor | None = None,
    norm: tuple[Tensor, float] | None = None,
    add_to: Tensor | None = None,
    early: bool = False,
) -> Tensor:
    """Vectors [B, D] => their products with a matrix [outputs, D], as [B, outputs].

    Args:
        vectors, matrix: Contiguous.
        up: [outputs, D]; the result is then SiLU(product with `matrix`) * product with `up`.
        norm: Weight [D] and epsilon of an RMSNorm that is applied to the vectors first.
        add_to: [B, outputs], to which the products are added, in place.
        early: Start before the previous kernel has ended; see above.
    """
    rows, inputs = vectors.shape
    outputs = matrix.shape[0]
    block_inputs = triton.next_power_of_2(inputs)
    block = max(1, _BYTES // (inputs * matrix.element_size() * (1 if up is None else 2)))
    block = min(block, max(1, outputs // _PROGRAMS))
    block = 2 ** int(math.log2(block))
    out = vectors.new_empty(rows, outputs) if add_to is None else add_to
    norm_weight, eps = norm or (vectors, 0.0)
    _decode_products[(triton.cdiv(outputs, block),)](
        vectors,
        norm_weight,
        matrix,
        matrix if up is None else up,
        out,
        rows,
        outputs,
        eps,
        INPUTS=inputs,
        BLOCK_INPUTS=block_inputs,
        BLOCK=block,
        ROWS=triton.next_power_of_2(rows),
        NORM=norm is not None,
        GATED=up is not None,
        ADDED=add_to is not None,
        num_warps=min(32, max(1, block_inputs // (32 * _INPUTS))),
        **_launch(early),
    )
    return out


def attention(
    qkv: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    keys: Tensor,
    values: Tensor,
    state: dict[str, Tensor],
    early: bool = False,
) -> Tensor:
    """Norm and rotate queries and keys, write keys and values into the cache, attend => [B, N * H].

    Args:
        qkv: [B, (N + 2M) * H], the projections of one new slot of each row, contiguous.
        norms: Weights [H] of the norms of queries and of keys.
        eps: Epsilon of these norms.
        keys, values: Cache of a layer [rows, capacity, M, H]; a slot beyond the capacity is written to the last slot.
        state: `step` int64 [1]; `lengths` int64 [B], slots that the rows held before step 0, to which each step added
            one; `cos` and `sin` of all steps, float32 [B, steps, 1, H/2]; `arrived` int32 [B * N], zeros, which they
            are again afterwards; `rows` int64 [B] of the cache, where they are not its first B.
        early: Start before the previous kernel has ended; see above.
    """
    _, capacity, kv_heads, head_dim = keys.shape
    count = qkv.shape[0]
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    cos, lengths, rows = state["cos"], state["lengths"], state.get("rows")
    half = head_dim // 2
    partial = torch.empty(count * heads * _SPLITS * (head_dim + 2), device=qkv.device, dtype=torch.float32)
    attended = qkv.new_empty(count, heads * head_dim)
    _decode_attention[(_SPLITS, heads, count)](
        qkv,
        *((qkv, qkv) if norms is None else norms),
        cos,
        state["sin"],
        lengths,
        state["step"],
        lengths if rows is None else rows,
        keys,
        values,
        partial,
        state["arrived"],
        attended,
        cos.shape[1],
        capacity,
        eps,
        1 / (math.sqrt(head_dim) * math.log(2)),
        HEADS=heads,
        KV_HEADS=kv_heads,
        HALF=half,
        BLOCK_HALF=triton.next_power_of_2(half),
        BLOCK=_KEYS,
        SPLITS=_SPLITS,
        NORM=norms is not None,
        INDEXED=rows is not None,
        num_warps=_WARPS,
        **_launch(early),
    )
    return attended


def _launch(early: bool) -> dict[str, Any]:
    return {"EARLY": True, "launch_pdl": True} if early else {"EARLY": False}
