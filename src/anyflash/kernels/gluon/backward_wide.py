"""dK and dV of head dims above 128 on Hopper: backward.py's sums, with the columns shared out.

    p^T  = exp2((k q^T - m) unit - log2 l)
    dv  += dropout(p^T) dout                        times dropout's scale at the end
    ds^T = p^T (dropout(v dout^T) - delta) slope
    dk  += ds^T q                                   times scale at the end

A thread has no registers for 64 keys' dk and dv of 256 columns, twice 128 words. So a program owns BLOCK_N =
64 keys, and each of two consumers half of the columns of both. Of the scores of a tile each computes those of
half of its rows, once, and both come to the other's half through shared memory, in 16 bits: no product is
done twice. Its own half it multiplies from registers meanwhile; so the two halves of the columns add up a
tile's rows in two orders, each always the same.

    layout      s, dp (64, BLOCK_M / 2), dk (64, DIM / 2), dv (64, DIM_V / 2): wgmma's
    registers   dk DIM / 4, dv DIM_V / 4, s and dp BLOCK_M / 4 each, both as operands BLOCK_M / 8 each, of 240
    shared      k and v 64 * (DIM + DIM_V), STAGES * BLOCK_M * (DIM + DIM_V) and 3 words a row of them, p and
                ds 64 * BLOCK_M each: with 64 rows in two stages 213 KB, of 227

A width is 128 or 256 here, that half of it be a box's line. GUARD is backward.py's; dq is backward_dq.py's. A
configuration may change BLOCK_M, STAGES and registers; the order of a sum follows BLOCK_M.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from anyflash.kernels.gluon.backward import of_scores, weights
from anyflash.kernels.gluon.hopper import (
    barrier_arrive,
    barrier_wait,
    fence,
    pin,
    shared_layout,
    wgmma,
    wgmma_wait,
)
from anyflash.kernels.gluon.keys import block_of_keys, producer, rings, store_sums
from anyflash.kernels.gluon.mask import along
from anyflash.kernels.gluon.rows import run_up
from anyflash.kernels.gluon.sequences import unknown_zero


@gluon.jit
def run_of_rows(
    sums, n, first_tile, end_tile, edge, shared, boxes, first_k, at, tables, numbers,
    C: gl.constexpr, ME: gl.constexpr, SCORE: gl.constexpr, SLOPE: gl.constexpr, ALLOWED: gl.constexpr,
):  # fmt: skip
    """Add the tiles of one run, uses n and on of the rings, to this consumer's columns of dK and dV."""
    STAGES: gl.constexpr = C.stages
    q_box, k_box, v_box = boxes
    BLOCK_M: gl.constexpr = q_box.block_type.shape[-2]
    BLOCK_N: gl.constexpr = k_box.block_type.shape[-2]
    WIDTH: gl.constexpr = k_box.block_type.shape[-1]
    WIDTH_V: gl.constexpr = v_box.block_type.shape[-1]
    ROWS: gl.constexpr = BLOCK_M // 2
    HALF: gl.constexpr = WIDTH // 2
    HALF_V: gl.constexpr = WIDTH_V // 2
    MINE: gl.constexpr = ME * ROWS
    OTHER: gl.constexpr = (1 - ME) * ROWS
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    DK_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    DV_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF_V, 16])
    DS_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, DK_LAYOUT, 2)
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, DV_LAYOUT, 2)
    ROW: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    k_tile, v_tile, held, q_ring, dout_ring, ds_tiles, p_tiles, exchange = shared
    q_tiles, m_rows, log_rows, delta_rows, q_full, q_empty = q_ring
    dout_tiles, dout_full, dout_empty = dout_ring
    dk, dv = sums
    zero = gl.zeros([BLOCK_N, ROWS], gl.float32, layout=S_LAYOUT)
    key = gl.expand_dims(first_k + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, S_LAYOUT)), 1)
    for tile in range(first_tile, end_tile):
        stage = n % STAGES
        phase = (n // STAGES) & 1
        # Not places that are known: see backward.py.
        k = k_tile.index(unknown_zero(n)).reshape([BLOCK_N, WIDTH])
        v = v_tile.index(unknown_zero(n)).reshape([BLOCK_N, WIDTH_V])
        q = q_tiles.index(stage).reshape([BLOCK_M, WIDTH])
        dout = dout_tiles.index(stage).reshape([BLOCK_M, WIDTH_V])
        row = along(tile * BLOCK_M + MINE, ROWS, 1, S_LAYOUT)
        barrier_wait(q_full.index(stage), phase)
        less = zero
        if not C.dropout:
            less = pin(zero - gl.expand_dims(delta_rows.index(stage).slice(MINE, ROWS).load(ROW), 0))
        s = wgmma(k, q.slice(MINE, ROWS).permute((1, 0)), zero, use_acc=False, is_async=True)
        barrier_wait(dout_full.index(stage), phase)
        dp = wgmma(v, dout.slice(MINE, ROWS).permute((1, 0)), less, use_acc=not C.dropout, is_async=True)
        s = wgmma_wait(1, deps=(s,))
        m = gl.expand_dims(m_rows.index(stage).slice(MINE, ROWS).load(ROW), 0)
        log_sum = gl.expand_dims(log_rows.index(stage).slice(MINE, ROWS).load(ROW), 0)
        p, slope, weight, kept = weights(
            s, m, log_sum, row, key, tile * BLOCK_M + MINE, first_k, edge, at, tables, numbers, C,
            SCORE, SLOPE, ALLOWED,
        )  # fmt: skip
        # The other has read the tile before this. The basic block ends here, and with it what ptxas may move.
        barrier_wait(exchange.index(1), (n & 1) ^ 1)
        p_mine = kept.to(q.dtype)
        p_tiles.index(ME).store(p_mine)
        dp = wgmma_wait(0, deps=(dp,))
        columns = q.slice(ME * HALF, HALF, dim=1)
        columns_v = dout.slice(ME * HALF_V, HALF_V, dim=1)
        mine = columns_v.slice(MINE, ROWS)
        dv = wgmma(gl.convert_layout(p_mine, P_LAYOUT), mine, dv, is_async=True)
        ds = of_scores(dp, p, weight, slope, delta_rows.index(stage).slice(MINE, ROWS), numbers, C.dropout)
        ds = ds.to(q.dtype)
        ds_tiles.index(ME).store(ds)
        fence()
        barrier_arrive(exchange.index(0), count=1)
        mine = columns.slice(MINE, ROWS)
        dk = wgmma(gl.convert_layout(ds, DS_LAYOUT), mine, dk, is_async=True)
        barrier_wait(exchange.index(0), n & 1)
        dv = wgmma(p_tiles.index(1 - ME), columns_v.slice(OTHER, ROWS), dv, is_async=True)
        dk = wgmma(ds_tiles.index(1 - ME), columns.slice(OTHER, ROWS), dk, is_async=True)
        dv = wgmma_wait(1, deps=(dv,))
        barrier_arrive(dout_empty.index(stage), count=1)
        dk = wgmma_wait(0, deps=(dk,))
        barrier_arrive(q_empty.index(stage), count=1)
        barrier_arrive(exchange.index(1), count=1)
        n += 1
    return dk, dv, n


@gluon.jit
def consumer(
    shared, arrays, item, layout, tables, numbers, C: gl.constexpr, ME: gl.constexpr,
    SCORE: gl.constexpr, SLOPE: gl.constexpr, ALLOWED: gl.constexpr, TILE_CLASS: gl.constexpr,
):  # fmt: skip
    """One warpgroup: half ME of the columns of the block's dK and dV, over all rows of the group."""
    q, k, v, dout, stats, delta, dq, dk_base, dv_base, odd = arrays
    k_tile, v_tile, held, q_ring, dout_ring, ds_tiles, p_tiles, exchange = shared
    batch, kv_head, members, group, q_start, q_len, k_start, k_len, first_k = item
    BLOCK_M: gl.constexpr = q.block_type.shape[-2]
    BLOCK_N: gl.constexpr = k.block_type.shape[-2]
    HALF: gl.constexpr = k.block_type.shape[-1] // 2
    HALF_V: gl.constexpr = v.block_type.shape[-1] // 2
    DK_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    DV_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF_V, 16])
    dk = gl.zeros([BLOCK_N, HALF], gl.float32, layout=DK_LAYOUT)
    dv = gl.zeros([BLOCK_N, HALF_V], gl.float32, layout=DV_LAYOUT)
    barrier_wait(held.index(0), 0)
    tiles = gl.cdiv(q_len, BLOCK_M)
    n = tiles * 0
    for member in range(members):
        at = (batch, kv_head * group + member, q_len, k_len)
        tile = tiles * 0
        while tile < tiles:
            kind, end = run_up(
                tile, tiles, first_k, at, tables, TILE_CLASS, C.masked, C.wide, BLOCK_M, BLOCK_N
            )
            if kind != 0:
                dk, dv, n = run_of_rows(
                    (dk, dv), n, tile, end, kind == 1, shared, (q, k, v), first_k, at, tables, numbers,
                    C, ME, SCORE, SLOPE, ALLOWED,
                )  # fmt: skip
            tile = end
    store_sums((dk, dv), arrays, item, layout, numbers, first_k, C, ME * HALF, ME * HALF_V)


@gluon.jit(do_not_specialize=["seed_low", "seed_high", "threshold"])
def backward_wide(
    q, k, v, dout, stats, delta, dq, dk, dv, odd, cu_seqlens_q, cu_seqlens_k, seqused_k, tables,
    dk_steps, dv_steps, blocks, entries, heads, group, seqlen_q, seqlen_k, row_steps, odd_blocks,
    scale, unit, seed_low, seed_high, threshold, keep_scale,
    SCORE: gl.constexpr, SLOPE: gl.constexpr, ALLOWED: gl.constexpr, TILE_CLASS: gl.constexpr,
    C: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """One program for each block of 64 keys, key head and batch entry; arguments as backward.py's."""
    BLOCK_M: gl.constexpr = q.block_type.shape[-2]
    BLOCK_N: gl.constexpr = k.block_type.shape[-2]
    PART: gl.constexpr = [BLOCK_N, BLOCK_M // 2]
    item, first_odd = block_of_keys(
        blocks, entries, heads, group, seqlen_q, seqlen_k, odd_blocks, cu_seqlens_q, cu_seqlens_k, seqused_k,
        C, BLOCK_N,
    )  # fmt: skip
    layout = (row_steps, dk_steps, dv_steps, first_odd)
    k_tile = gl.allocate_shared_memory(k.dtype, [1] + k.block_type.shape, k.layout)
    v_tile = gl.allocate_shared_memory(v.dtype, [1] + v.block_type.shape, v.layout)
    ds_tiles = gl.allocate_shared_memory(k.dtype, [2] + PART, shared_layout(PART, k.dtype))
    p_tiles = gl.allocate_shared_memory(k.dtype, [2] + PART, shared_layout(PART, k.dtype))
    held, exchange, q_ring, dout_ring = rings(q, dout, stats, delta, C.stages)
    shared = (k_tile, v_tile, held, q_ring, dout_ring, ds_tiles, p_tiles, exchange)
    arrays = (q, k, v, dout, stats, delta, dq, dk, dv, odd)
    numbers = (scale, unit, (seed_low, seed_high, threshold, keep_scale))
    gl.warp_specialize([
        (consumer, (shared, arrays, item, layout, tables, numbers, C, 0, SCORE, SLOPE, ALLOWED, TILE_CLASS)),
        (consumer, (shared, arrays, item, layout, tables, numbers, C, 1, SCORE, SLOPE, ALLOWED, TILE_CLASS)),
        (producer, (shared, arrays, item, layout, tables, numbers, C, 0, SCORE, SLOPE, ALLOWED, TILE_CLASS)),
    ], [4, 1], [C.consumer_registers, C.producer_registers])  # fmt: skip
