"""The backward on Hopper: a block of keys stays, rows move past it.

    p^T  = exp2((k q^T - m) unit - log2 l)          m and l apart, as the forward saved them
    dv  += dropout(p^T) dout                        times dropout's scale at the end
    ds^T = p^T (dropout(v dout^T) - delta) slope
    dk  += ds^T q                                   times scale at the end
    dq  += ds k                                     times scale at the end; only with REDUCE

A program owns BLOCK_N = 128 keys of one key head and walks the rows of all query heads that share it, so a
group is summed in registers, in one order. Each of two consumers owns 64 keys. Scores are transposed, (keys,
rows): p^T and ds^T are then left factors of dV and dK as they are, in registers. The producer loads k and v
once, and for every tile of BLOCK_M rows q with m, log2 l and delta, and dout.

With REDUCE ds^T also goes through shared memory, where both consumers read all of it, each for half of the
columns of dq; a TMA adds these to float32 in global memory. That is five products, and the last bits of dq
depend on the order in which blocks of keys come by. Without it dq is left to backward_dq.py: seven products
in both, and always the same bits.

    layout      s, dp (64, BLOCK_M), dk (64, DIM), dv (64, DIM_V), dq (BLOCK_M, DIM / 2): wgmma's
    registers   dk DIM / 2, dv DIM_V / 2, s and dp BLOCK_M / 2 each, both as operands BLOCK_M / 4 each, with
                REDUCE dq BLOCK_M * DIM / 256 words a thread, of 240: at 128 and 64 rows 14 are left for all
                that is not a tile. So dp begins at -delta instead of meeting it, columns and the places of k
                and v are worked out in every tile, and tiles of a score program, which keeps its slope, have
                32 rows. A second copy of the loop's body, for full tiles, would spill: the mask is a branch
    shared      k and v BLOCK_N * (DIM + DIM_V), STAGES * BLOCK_M * (DIM + DIM_V) and 3 words a row of them,
                with REDUCE ds BLOCK_N * BLOCK_M and BLOCK_M * DIM words of dq

A pair that is hidden has p = 0 and adds 0 * (dp - delta). Where dp is not finite that is NaN, and so is the
sum: GUARD marks the 64 keys, for the careful launch of kernels/triton/backward.py to do again.

A configuration may change BLOCK_M, STAGES, REDUCE and registers; the order of a sum follows BLOCK_M.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from anyflash.kernels.gluon.dropout import dropped
from anyflash.kernels.gluon.hopper import (
    barrier_arrive,
    barrier_wait,
    fence,
    pin,
    shared_layout,
    tma_add,
    tma_store_wait,
    wgmma,
    wgmma_wait,
)
from anyflash.kernels.gluon.keys import block_of_keys, producer, rings, store_sums
from anyflash.kernels.gluon.mask import along
from anyflash.kernels.gluon.rows import run_up
from anyflash.kernels.gluon.sequences import box, unknown_zero


@gluon.jit
def probabilities(
    s, m, log_sum, row, key, edge, at, tables, numbers,
    SCORE: gl.constexpr, SLOPE: gl.constexpr, ALLOWED: gl.constexpr, IDENTITY: gl.constexpr,
    MASK: gl.constexpr,
):  # fmt: skip
    """p, 0 where no pair is, and the slope, from products k . q. Works in both orientations.

    In a tile that is not at an edge every pair is one.
    """
    batch, head, q_len, k_len = at
    scale, unit = numbers[0], numbers[1]
    position = row + (k_len - q_len)
    slope = 1.0
    if not IDENTITY:
        raw = s * scale
        s = SCORE(raw, batch, head, row, position, key, q_len, k_len, tables)
        slope = SLOPE(raw, batch, head, row, position, key, q_len, k_len, tables)
    p = gl.exp2((s - m) * unit - log_sum)
    if edge:
        seen = (row < q_len) & (key < k_len)
        if MASK:
            seen = seen & ALLOWED(batch, head, row, position, key, q_len, k_len, tables)
        p = gl.where(seen, p, 0.0)
    return p, slope


@gluon.jit
def weights(
    s, m, log_sum, row, key, first_row, first_k, edge, at, tables, numbers, C: gl.constexpr,
    SCORE: gl.constexpr, SLOPE: gl.constexpr, ALLOWED: gl.constexpr,
):  # fmt: skip
    """Of a tile of transposed scores: p, negative where a pair is dropped; the slope; weight = p slope, and p
    without what is dropped. Pinned: they are computed before dp is waited for."""
    p, slope = probabilities(
        s, m, log_sum, row, key, edge, at, tables, numbers, SCORE, SLOPE, ALLOWED, C.identity, C.masked
    )
    if C.dropout:
        p = dropped(p, first_row, first_k, at, numbers[2], True, True)
    p = pin(p)
    weight, kept = p, p
    if C.dropout:
        kept = gl.where(p < 0.0, 0.0, p)
    elif not C.identity:
        weight = pin(p * slope)
    return p, slope, weight, kept


@gluon.jit
def of_scores(dp, p, weight, slope, delta, numbers, DROPOUT: gl.constexpr):
    """ds of transposed scores, from dp - delta and weight = p slope.

    With DROPOUT from dp, delta in shared memory, p and slope: p is negative where a pair is dropped.
    """
    if DROPOUT:
        ROW: gl.constexpr = gl.SliceLayout(0, dp.type.layout)
        dp = gl.where(p > 0.0, dp * numbers[2][3], 0.0) - gl.expand_dims(delta.load(ROW), 0)
        weight = gl.abs(p) * slope
    return weight * dp


@gluon.jit
def run_of_rows(
    sums, n, first_tile, end_tile, edge, shared, boxes, q_start, first_k, at, tables, numbers,
    C: gl.constexpr, ME: gl.constexpr, SCORE: gl.constexpr, SLOPE: gl.constexpr, ALLOWED: gl.constexpr,
):  # fmt: skip
    """Add the tiles of one run, uses n and on of the rings, to this consumer's dK and dV, and to dQ."""
    STAGES: gl.constexpr = C.stages
    q_box, k_box, v_box, dq = boxes
    BLOCK_M: gl.constexpr = q_box.block_type.shape[-2]
    BLOCK_N: gl.constexpr = k_box.block_type.shape[-2]
    WIDTH: gl.constexpr = k_box.block_type.shape[-1]
    WIDTH_V: gl.constexpr = v_box.block_type.shape[-1]
    HALF: gl.constexpr = WIDTH // 2
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    DQ_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    DK_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    DV_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH_V, 16])
    DS_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, DK_LAYOUT, 2)
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, DV_LAYOUT, 2)
    ROW: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    k_tile, v_tile, held, q_ring, dout_ring, ds_tile, dq_tiles, exchange = shared
    q_tiles, m_rows, log_rows, delta_rows, q_full, q_empty = q_ring
    dout_tiles, dout_full, dout_empty = dout_ring
    batch, head, q_len, k_len = at
    dk, dv = sums
    s_zero = gl.zeros([64, BLOCK_M], gl.float32, layout=S_LAYOUT)
    dq_zero = gl.zeros([BLOCK_M, HALF], gl.float32, layout=DQ_LAYOUT)
    key = gl.expand_dims(first_k + ME * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, S_LAYOUT)), 1)
    for tile in range(first_tile, end_tile):
        stage = n % STAGES
        phase = (n // STAGES) & 1
        # Were these places known, what describes each 16 columns of k and v would be kept, in two registers.
        late = unknown_zero(n)
        keys = k_tile.index(late).reshape([BLOCK_N, WIDTH])
        k = keys.slice(ME * 64, 64, dim=0)
        v = v_tile.index(late).reshape([BLOCK_N, WIDTH_V]).slice(ME * 64, 64, dim=0)
        q = q_tiles.index(stage).reshape([BLOCK_M, WIDTH])
        dout = dout_tiles.index(stage).reshape([BLOCK_M, WIDTH_V])
        row = along(tile * BLOCK_M, BLOCK_M, 1, S_LAYOUT)
        barrier_wait(q_full.index(stage), phase)
        # dp - delta is one sum, that begins before any product is in flight, where there are registers.
        less = s_zero
        if not C.dropout:
            less = pin(s_zero - gl.expand_dims(delta_rows.index(stage).load(ROW), 0))
        s = wgmma(k, q.permute((1, 0)), s_zero, use_acc=False, is_async=True)
        barrier_wait(dout_full.index(stage), phase)
        dp = wgmma(v, dout.permute((1, 0)), less, use_acc=not C.dropout, is_async=True)
        s = wgmma_wait(1, deps=(s,))
        m = gl.expand_dims(m_rows.index(stage).load(ROW), 0)
        log_sum = gl.expand_dims(log_rows.index(stage).load(ROW), 0)
        p, slope, weight, kept = weights(
            s, m, log_sum, row, key, tile * BLOCK_M, first_k + ME * 64, edge, at, tables, numbers, C,
            SCORE, SLOPE, ALLOWED,
        )  # fmt: skip
        p_low = gl.convert_layout(kept.to(q.dtype), P_LAYOUT)
        # Its phase has ended; the basic block ends here, and with it what ptxas may move.
        barrier_wait(dout_full.index(stage), phase)
        dp = wgmma_wait(0, deps=(dp,))
        dv = wgmma(p_low, dout, dv, is_async=True)
        ds = of_scores(dp, p, weight, slope, delta_rows.index(stage), numbers, C.dropout).to(q.dtype)
        if C.reduce:
            # The tile before this has been read by both.
            barrier_wait(exchange.index(1), (n & 1) ^ 1)
            ds_tile.index(late).slice(ME * 64, 64, dim=0).store(ds)
            fence()
            barrier_arrive(exchange.index(0), count=1)
        dk = wgmma(gl.convert_layout(ds, DS_LAYOUT), q, dk, is_async=True)
        dv = wgmma_wait(1, deps=(dv,))
        barrier_arrive(dout_empty.index(stage), count=1)
        if C.reduce:
            barrier_wait(exchange.index(0), n & 1)
        dk = wgmma_wait(0, deps=(dk,))
        barrier_arrive(q_empty.index(stage), count=1)
        if C.reduce:
            columns = keys.slice(ME * HALF, HALF, dim=1)
            ds_turned = ds_tile.index(late).permute((1, 0))
            part = wgmma(ds_turned, columns, dq_zero, use_acc=False, is_async=True)
            tma_store_wait(0)
            part = wgmma_wait(0, deps=(part,))
            barrier_arrive(exchange.index(1), count=1)
            dq_tiles.index(ME).reshape([BLOCK_M, HALF]).store(part)
            fence()
            corner = box(batch, head, q_start, q_len, tile * BLOCK_M, C.packed)
            tma_add(dq, corner[:-1] + (ME * HALF,), dq_tiles.index(ME))
        n += 1
    return dk, dv, n


@gluon.jit
def consumer(
    shared, arrays, item, layout, tables, numbers, C: gl.constexpr, ME: gl.constexpr,
    SCORE: gl.constexpr, SLOPE: gl.constexpr, ALLOWED: gl.constexpr, TILE_CLASS: gl.constexpr,
):  # fmt: skip
    """One warpgroup: keys ME * 64 to ME * 64 + 63 of the block, over all rows of the group."""
    q, k, v, dout, stats, delta, dq, dk_base, dv_base, odd = arrays
    k_tile, v_tile, held, q_ring, dout_ring, ds_tile, dq_tiles, exchange = shared
    batch, kv_head, members, group, q_start, q_len, k_start, k_len, first_k = item
    row_steps, dk_steps, dv_steps, first_odd = layout
    BLOCK_M: gl.constexpr = q.block_type.shape[-2]
    BLOCK_N: gl.constexpr = k.block_type.shape[-2]
    WIDTH: gl.constexpr = k.block_type.shape[-1]
    WIDTH_V: gl.constexpr = v.block_type.shape[-1]
    DK_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    DV_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH_V, 16])
    dk = gl.zeros([64, WIDTH], gl.float32, layout=DK_LAYOUT)
    dv = gl.zeros([64, WIDTH_V], gl.float32, layout=DV_LAYOUT)
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
                    (dk, dv), n, tile, end, kind == 1, shared, (q, k, v, dq), q_start, first_k, at, tables,
                    numbers, C, ME, SCORE, SLOPE, ALLOWED,
                )  # fmt: skip
            tile = end
    if C.reduce:
        tma_store_wait(0)
    store_sums((dk, dv), arrays, item, layout, numbers, first_k + ME * 64, C, 0, 0)


@gluon.jit(do_not_specialize=["seed_low", "seed_high", "threshold"])
def backward(
    q, k, v, dout, stats, delta, dq, dk, dv, odd, cu_seqlens_q, cu_seqlens_k, seqused_k, tables,
    dk_steps, dv_steps, blocks, entries, heads, group, seqlen_q, seqlen_k, row_steps, odd_blocks,
    scale, unit, seed_low, seed_high, threshold, keep_scale,
    SCORE: gl.constexpr, SLOPE: gl.constexpr, ALLOWED: gl.constexpr, TILE_CLASS: gl.constexpr,
    C: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """One program for each block of keys, key head and batch entry (packed: each block of all sequences).

    q, k, v, dout are descriptors of boxes; stats and delta of BLOCK_M elements of flat arrays; dq, with
    REDUCE, of a box of half the columns in a float32 array of zeros. Steps are in elements, (first, token,
    head), where first is a batch entry or, packed, a token. row_steps: of stats (batch entry, head, plane),
    of delta (batch entry, head); delta is 0 behind the rows of a sequence. `odd`, with GUARD, is zeros.
    """
    BLOCK_M: gl.constexpr = q.block_type.shape[-2]
    BLOCK_N: gl.constexpr = k.block_type.shape[-2]
    item, first_odd = block_of_keys(
        blocks, entries, heads, group, seqlen_q, seqlen_k, odd_blocks, cu_seqlens_q, cu_seqlens_k, seqused_k,
        C, BLOCK_N,
    )  # fmt: skip
    layout = (row_steps, dk_steps, dv_steps, first_odd)
    k_tile = gl.allocate_shared_memory(k.dtype, [1] + k.block_type.shape, k.layout)
    v_tile = gl.allocate_shared_memory(v.dtype, [1] + v.block_type.shape, v.layout)
    ds_tile, dq_tiles = k_tile, k_tile
    if C.reduce:
        ds_tile = gl.allocate_shared_memory(
            k.dtype, [1, BLOCK_N, BLOCK_M], shared_layout([BLOCK_N, BLOCK_M], k.dtype)
        )
        dq_tiles = gl.allocate_shared_memory(gl.float32, [2] + dq.block_type.shape, dq.layout)
    held, exchange, q_ring, dout_ring = rings(q, dout, stats, delta, C.stages)
    shared = (k_tile, v_tile, held, q_ring, dout_ring, ds_tile, dq_tiles, exchange)
    arrays = (q, k, v, dout, stats, delta, dq, dk, dv, odd)
    numbers = (scale, unit, (seed_low, seed_high, threshold, keep_scale))
    gl.warp_specialize([
        (consumer, (shared, arrays, item, layout, tables, numbers, C, 0, SCORE, SLOPE, ALLOWED, TILE_CLASS)),
        (consumer, (shared, arrays, item, layout, tables, numbers, C, 1, SCORE, SLOPE, ALLOWED, TILE_CLASS)),
        (producer, (shared, arrays, item, layout, tables, numbers, C, 0, SCORE, SLOPE, ALLOWED, TILE_CLASS)),
    ], [4, 1], [C.consumer_registers, C.producer_registers])  # fmt: skip
