"""dQ on Hopper, always the same bits: a block of rows stays, keys move past it.

    p   = exp2((q k^T - m) unit - log2 l)
    ds  = p (dropout(dout v^T) - delta) slope
    dq += ds k                                      times scale at the end

What the REDUCE form of backward.py saves, at the price of dq's order. A program owns 128 rows of one head,
each of two consumers 64 of them, and dq stays in registers. Keys are walked as in the forward, from the last,
and heads are in pieces as there (pieces.py): 96 columns are 64 and 32, 192 are 128 and 64.

    layout      s, dp (64, BLOCK_N), dq (64, DIM): wgmma's; ds is wgmma's operand in registers
    registers   dq DIM / 2, s and dp BLOCK_N / 2 each, ds as operand BLOCK_N / 4 words a thread, of 240
    shared      128 * (DIM + DIM_V), STAGES * BLOCK_N * (DIM + DIM_V) elements, 8 bytes a barrier

GUARD is backward.py's, with a flag for 64 rows. A configuration may change BLOCK_N, STAGES and registers; the
order of the sum follows BLOCK_N.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from anyflash.kernels.gluon.backward import probabilities
from anyflash.kernels.gluon.dropout import dropped
from anyflash.kernels.gluon.forward import first_run
from anyflash.kernels.gluon.hopper import barrier_init, barrier_wait, barriers, pin, wgmma_wait
from anyflash.kernels.gluon.keys import mark_odd, store_rows
from anyflash.kernels.gluon.mask import along, next_run
from anyflash.kernels.gluon.pieces import (
    await_last,
    buffers_for,
    fill,
    inner,
    load,
    operand,
    outer,
    sums,
    together,
)
from anyflash.kernels.gluon.pipeline import await_full, release, ring_of
from anyflash.kernels.gluon.sequences import box, sequence, work


@gluon.jit
def producer(
    shared, arrays, item, layout, tables, numbers, C: gl.constexpr, ME: gl.constexpr,
    SCORE: gl.constexpr, SLOPE: gl.constexpr, ALLOWED: gl.constexpr, TILE_CLASS: gl.constexpr,
):  # fmt: skip
    """One warp: q and dout of both consumers, then k and v tile by tile."""
    STAGES: gl.constexpr = C.stages
    q, k, v, dout, stats, delta, dq, odd = arrays
    BLOCK_M: gl.constexpr = 2 * q[0].block_type.shape[-2]
    BLOCK_N: gl.constexpr = k[0].block_type.shape[-2]
    q_tiles, dout_tiles, held, k_ring, v_ring = shared
    first_row, q_start, k_start, group, at = item
    batch, head, q_len, k_len = at
    kv_head = head // group
    kind, high, low = first_run(first_row, at, tables, TILE_CLASS, C.masked, C.wide, BLOCK_M, BLOCK_N)
    for i in gl.static_range(2):
        corner = box(batch, head, q_start, q_len, first_row + i * 64, C.packed)
        # (64, DIM), (64, DIM_V)
        load(q, corner, held.index(i), q_tiles, i)
        load(dout, corner, held.index(i), dout_tiles, i)
    n = first_row * 0
    while high >= 0:
        for j in range(high - low + 1):
            corner = box(batch, kv_head, k_start, k_len, (high - j) * BLOCK_N, C.packed)
            # (BLOCK_N, DIM), (BLOCK_N, DIM_V)
            fill(k_ring, n, k, corner, STAGES)
            fill(v_ring, n, v, corner, STAGES)
            n += 1
        if C.masked:
            kind, high, low = next_run(low - 1, first_row, at, tables, TILE_CLASS, C.wide, BLOCK_M, BLOCK_N)
        else:
            high = low - 1


@gluon.jit
def run_of_keys(
    dq, n, high, low, kind, shared, rows, boxes, first_row, at, tables, numbers,
    C: gl.constexpr, ME: gl.constexpr, SCORE: gl.constexpr, SLOPE: gl.constexpr, ALLOWED: gl.constexpr,
):  # fmt: skip
    """Add the tiles of one run, uses n and on of the rings, to this consumer's dQ."""
    STAGES: gl.constexpr = C.stages
    k_box, v_box = boxes
    BLOCK_N: gl.constexpr = k_box[0].block_type.shape[-2]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    q_tiles, dout_tiles, held, k_ring, v_ring = shared
    m, log_sum, delta = rows
    zero = gl.zeros([64, BLOCK_N], gl.float32, layout=S_LAYOUT)
    row = along(first_row, 64, 0, S_LAYOUT)
    for j in range(high - low + 1):
        # Without a mask only the first tile, which has the last keys, may have an edge.
        edge = kind == 1
        if not C.masked:
            edge = (high - j + 1) * BLOCK_N > at[3]
        key = along((high - j) * BLOCK_N, BLOCK_N, 1, S_LAYOUT)
        await_full(k_ring, n, STAGES)
        s = inner(q_tiles, ME, k_ring, n, zero, STAGES)
        await_full(v_ring, n, STAGES)
        dp = inner(dout_tiles, ME, v_ring, n, zero, STAGES)
        s = wgmma_wait(len(dout_tiles), deps=(s,))
        p, slope = probabilities(
            s, m, log_sum, row, key, edge, at, tables, numbers, SCORE, SLOPE, ALLOWED, C.identity, C.masked
        )
        if C.dropout:
            p = dropped(p, first_row, (high - j) * BLOCK_N, at, numbers[2], False, True)
        elif not C.identity:
            p = p * slope
        p = pin(p)
        # Its phase has ended; the basic block ends here, and with it what ptxas may move.
        await_full(v_ring, n, STAGES)
        dp = wgmma_wait(0, deps=(dp,))
        release(v_ring, n, STAGES)
        if C.dropout:
            dp = gl.where(p > 0.0, dp * numbers[2][3], 0.0)
            p = gl.abs(p) * slope
        ds = operand((p * (dp - delta)).to(k_box[0].dtype), dq)
        dq = await_last(outer(ds, dq, k_ring, n, STAGES))
        release(k_ring, n, STAGES)
        n += 1
    return dq, n


@gluon.jit
def consumer(
    shared, arrays, item, layout, tables, numbers, C: gl.constexpr, ME: gl.constexpr,
    SCORE: gl.constexpr, SLOPE: gl.constexpr, ALLOWED: gl.constexpr, TILE_CLASS: gl.constexpr,
):  # fmt: skip
    """One warpgroup: rows ME * 64 to ME * 64 + 63 of the block."""
    q, k, v, dout, stats, delta, dq_base, odd = arrays
    BLOCK_M: gl.constexpr = 2 * q[0].block_type.shape[-2]
    BLOCK_N: gl.constexpr = k[0].block_type.shape[-2]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    block_row, q_start, k_start, group, at = item
    plane, dq_step = layout
    batch, head, q_len, k_len = at
    first_row = block_row + ME * 64
    row = first_row + gl.arange(0, 64, layout=gl.SliceLayout(1, S_LAYOUT))
    there = row < q_len
    # (64,)
    m = gl.expand_dims(gl.load(stats + row, mask=there, other=0.0), 1)
    log_sum = gl.expand_dims(gl.load(stats + plane + row, mask=there, other=0.0), 1)
    taken = gl.expand_dims(gl.load(delta + row, mask=there, other=0.0), 1)
    dq = sums(k)
    kind, high, low = first_run(block_row, at, tables, TILE_CLASS, C.masked, C.wide, BLOCK_M, BLOCK_N)
    barrier_wait(shared[2].index(ME), 0)
    n = first_row * 0
    while high >= 0:
        dq, n = run_of_keys(
            dq, n, high, low, kind, shared, (m, log_sum, taken), (k, v), first_row, at, tables, numbers,
            C, ME, SCORE, SLOPE, ALLOWED,
        )  # fmt: skip
        if C.masked:
            kind, high, low = next_run(low - 1, block_row, at, tables, TILE_CLASS, C.wide, BLOCK_M, BLOCK_N)
        else:
            high = low - 1
    if C.guard:
        turned = 1 if C.packed else -1
        mark_odd(odd + first_row // 64 * turned, dq[0], first_row < q_len)
        if len(dq) > 1:
            mark_odd(odd + first_row // 64 * turned, dq[1], first_row < q_len)
    store_rows(dq_base, dq[0] * numbers[0], first_row, q_len, dq_step, C.dim)
    if len(dq) > 1:
        WIDE: gl.constexpr = k[0].block_type.shape[-1]
        store_rows(dq_base + WIDE, dq[1] * numbers[0], first_row, q_len, dq_step, C.dim - WIDE)


@gluon.jit(do_not_specialize=["seed_low", "seed_high", "threshold"])
def backward_dq(
    q, k, v, dout, q_rest, k_rest, v_rest, dout_rest,
    stats, delta, dq, odd, cu_seqlens_q, cu_seqlens_k, seqused_k, tables, dq_steps,
    blocks, entries, heads, group, seqlen_q, seqlen_k, row_steps, odd_blocks,
    scale, unit, seed_low, seed_high, threshold, keep_scale,
    SCORE: gl.constexpr, SLOPE: gl.constexpr, ALLOWED: gl.constexpr, TILE_CLASS: gl.constexpr,
    C: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """One program for each block of 128 rows, head and batch entry (packed: each block of all sequences).

    q, k, v, dout are descriptors, of boxes of 64 rows or BLOCK_N keys; *_rest of boxes with the columns
    behind, None for a head in one piece.
    """
    STAGES: gl.constexpr = C.stages
    q, k, v, dout = together(q, q_rest), together(k, k_rest), together(v, v_rest), together(dout, dout_rest)
    BLOCK_M: gl.constexpr = 2 * q[0].block_type.shape[-2]
    block, head, batch = work(
        gl.program_id(0), blocks, heads, heads * entries, 1, entries, cu_seqlens_q, C.packed, BLOCK_M
    )
    q_start, q_len, k_start, k_len = sequence(
        batch, cu_seqlens_q, cu_seqlens_k, seqused_k, seqlen_q, seqlen_k, C.packed, C.used
    )
    at = (batch, head, q_len, k_len)
    item = (block * BLOCK_M, q_start, k_start, group, at)
    place = batch * row_steps[0] + head * row_steps[1] + q_start
    delta_place = batch * row_steps[3] + head * row_steps[4] + q_start
    first_token, wide_head = batch.to(gl.int64), head.to(gl.int64)
    # Flags are numbered as programs of the careful launch, which have 64 rows and begin with the last.
    first_odd = (batch * heads + head) * odd_blocks + odd_blocks - 1
    if C.packed:
        first_token = q_start.to(gl.int64)
        first_odd = head * odd_blocks + q_start // 64 + batch
    dq += first_token * dq_steps[0] + wide_head * dq_steps[2]
    if C.guard:
        odd += first_odd
    q_tiles = buffers_for(q, 2)
    dout_tiles = buffers_for(dout, 2)
    held = barriers(2)
    # q and dout announce their bytes, each for itself.
    for i in gl.static_range(2):
        barrier_init(held.index(i), count=2)
    k_ring = ring_of(buffers_for(k, STAGES), STAGES, 2)
    v_ring = ring_of(buffers_for(v, STAGES), STAGES, 2)
    shared = (q_tiles, dout_tiles, held, k_ring, v_ring)
    arrays = (q, k, v, dout, stats + place, delta + delta_place, dq, odd)
    layout = (row_steps[2], dq_steps[1])
    numbers = (scale, unit, (seed_low, seed_high, threshold, keep_scale))
    gl.warp_specialize([
        (consumer, (shared, arrays, item, layout, tables, numbers, C, 0, SCORE, SLOPE, ALLOWED, TILE_CLASS)),
        (consumer, (shared, arrays, item, layout, tables, numbers, C, 1, SCORE, SLOPE, ALLOWED, TILE_CLASS)),
        (producer, (shared, arrays, item, layout, tables, numbers, C, 0, SCORE, SLOPE, ALLOWED, TILE_CLASS)),
    ], [4, 1], [C.consumer_registers, C.producer_registers])  # fmt: skip
