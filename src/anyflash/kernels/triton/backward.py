"""The backward in two deterministic passes: dK and dV of a block of keys, then dQ of a block of rows.

    p   = exp2((s - m) unit - log2 l)          s, m and l as in the forward
    dv  = sum_rows dropout(p) dout
    dp  = dropout(dout . v)
    ds  = p (dp - delta) slope                 slope = d program / d score, 1 without a program
    dk  = scale sum_rows ds q,   dq = scale sum_k ds k

The first pass owns a block of keys of one key head and walks the rows of every query head that shares it,
so a group is summed in the kernel, in one order. There scores are kept transposed, (keys, rows): p and ds
are then left factors of their products as they are. The second pass is the forward's walk. Nothing is added
by atomics.

Registers, in words a thread: two sums of BLOCK_N * DIM / threads in the first pass, one of BLOCK_M * DIM in
the second, and two tiles of BLOCK_M * BLOCK_N in both. What a configuration may change: BLOCK_M, BLOCK_N
(multiples of 16), warps, stages; a sum's order follows BLOCK_M in the first pass and BLOCK_N in the second.
"""

from __future__ import annotations

import triton
import triton.language as tl

from anyflash.kernels.triton.dropout import kept
from anyflash.kernels.triton.elementary import whole
from anyflash.kernels.triton.sequences import run_over_keys, run_over_rows, sequence, which
from anyflash.kernels.triton.tiles import add_product, any_odd, pieces, scores, store_pieces


@triton.jit
def probabilities(
    s, m, log_sum, seen, row, key, at, tables, numbers,
    SCORE: tl.constexpr, SLOPE: tl.constexpr, ALLOWED: tl.constexpr, IDENTITY: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """p, the factor of ds, and what is seen, from products q . k. Works in both orientations."""
    batch, head, q_len, k_len = at
    scale, unit = numbers[0], numbers[1]
    position = row + (k_len - q_len)
    slope = 1.0
    if not IDENTITY:
        raw = s * scale
        s = SCORE(raw, batch, head, row, position, key, q_len, k_len, tables)
        slope = SLOPE(raw, batch, head, row, position, key, q_len, k_len, tables)
    if MASKED:
        seen = seen & ALLOWED(batch, head, row, position, key, q_len, k_len, tables)
        s = tl.where(seen, s, float("-inf"))
    seen = seen & (s != float("-inf"))
    # A row that sees no key has m = -inf.
    p = tl.where(seen, tl.exp2((s - m) * unit - log_sum), 0.0)
    return p, slope, seen


@triton.jit
def change(p, dp, delta, slope, seen):
    """ds. What is not seen has none, whatever dp and slope are there."""
    return tl.where(seen, p * (dp - delta) * slope, 0.0)


@triton.jit
def rows_of_block(
    sums, keys, first_tile, end_tile, q, dout, stats, delta, q_steps, dout_steps, row_steps, tables,
    first_k, at,
    numbers,
    SCORE: tl.constexpr, SLOPE: tl.constexpr, ALLOWED: tl.constexpr, IDENTITY: tl.constexpr,
    MASKED: tl.constexpr, DROPOUT: tl.constexpr, CAREFUL: tl.constexpr, PRECISION: tl.constexpr,
    DIM: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr,
    DIM_V: tl.constexpr, WIDE_V: tl.constexpr, REST_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add the tiles of one run of rows to dK and dV, each in two pieces."""
    dk_wide, dk_rest, dv_wide, dv_rest = sums
    k_wide, k_rest, v_wide, v_rest = keys
    batch, head, q_len, k_len = at
    _, _, seed, threshold, keep_scale = numbers
    stats_step, plane, delta_step = row_steps
    key = (first_k + tl.arange(0, BLOCK_N))[:, None]
    for tile in range(first_tile, end_tile):
        first_row = tile * BLOCK_M
        # (BLOCK_M, DIM), (BLOCK_M, DIM_V)
        q_wide, q_rest = pieces(q, first_row, q_len, q_steps[1], q_steps[3], MASKED, DIM, WIDE, REST, BLOCK_M)
        d_wide, d_rest = pieces(
            dout, first_row, q_len, dout_steps[1], dout_steps[3], MASKED, DIM_V, WIDE_V, REST_V, BLOCK_M
        )
        rows = first_row + tl.arange(0, BLOCK_M)
        row = rows[None, :]
        place = rows.to(tl.int64) * stats_step
        m = tl.load(stats + place, mask=rows < q_len, other=0.0)[None, :]
        log_sum = tl.load(stats + plane + place, mask=rows < q_len, other=0.0)[None, :]
        taken = tl.load(delta + rows.to(tl.int64) * delta_step, mask=rows < q_len, other=0.0)[None, :]
        # (BLOCK_N, BLOCK_M)
        s = scores(k_wide, k_rest, q_wide, q_rest, REST, PRECISION)
        seen = (row < q_len) & (key < k_len)
        p, slope, seen = probabilities(
            s, m, log_sum, seen, row, key, at, tables, numbers, SCORE, SLOPE, ALLOWED, IDENTITY, MASKED
        )
        dp = scores(v_wide, v_rest, d_wide, d_rest, REST_V, PRECISION)
        weight = p
        if DROPOUT:
            stays = tl.trans(kept(seed, batch, head, rows, first_k, threshold, BLOCK_M, BLOCK_N))
            weight = tl.where(stays, p * keep_scale, 0.0)
            dp = tl.where(stays, dp * keep_scale, 0.0)
        dv_wide = add_product(dv_wide, weight, d_wide, seen, PRECISION, CAREFUL)
        ds = change(p, dp, taken, slope, seen)
        dk_wide = add_product(dk_wide, ds, q_wide, seen, PRECISION, CAREFUL)
        if REST_V > 0:
            dv_rest = add_product(dv_rest, weight, d_rest, seen, PRECISION, CAREFUL)
        else:
            dv_rest = dv_wide
        if REST > 0:
            dk_rest = add_product(dk_rest, ds, q_rest, seen, PRECISION, CAREFUL)
        else:
            dk_rest = dk_wide
    return dk_wide, dk_rest, dv_wide, dv_rest


@triton.jit
def over_rows(
    keys, q, dout, stats, delta, q_steps, dout_steps, stats_steps, delta_steps, tables, first_k, batch,
    kv_head,
    group, q_start, q_len, k_len, numbers,
    SCORE: tl.constexpr, SLOPE: tl.constexpr, ALLOWED: tl.constexpr, TILE_CLASS: tl.constexpr,
    IDENTITY: tl.constexpr, MASK: tl.constexpr, DROPOUT: tl.constexpr, CAREFUL: tl.constexpr,
    PRECISION: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr,
    DIM_V: tl.constexpr, WIDE_V: tl.constexpr, REST_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dK and dV of one block of keys over all rows of its group."""
    dk_wide = tl.zeros([BLOCK_N, WIDE], tl.float32)
    dv_wide = tl.zeros([BLOCK_N, WIDE_V], tl.float32)
    dk_rest, dv_rest = dk_wide, dv_wide
    if REST > 0:
        dk_rest = tl.zeros([BLOCK_N, REST], tl.float32)
    if REST_V > 0:
        dv_rest = tl.zeros([BLOCK_N, REST_V], tl.float32)
    tiles = tl.cdiv(q_len, BLOCK_M)
    entry = whole(batch)
    for member in range(group):
        head = kv_head * group + member
        wide_head = whole(head)
        at = (batch, head, q_len, k_len)
        q_base = q + entry * q_steps[0] + q_start * q_steps[1] + wide_head * q_steps[2]
        dout_base = dout + entry * dout_steps[0] + q_start * dout_steps[1] + wide_head * dout_steps[2]
        stats_base = stats + entry * stats_steps[1] + wide_head * stats_steps[2] + q_start * stats_steps[3]
        delta_base = delta + entry * delta_steps[0] + wide_head * delta_steps[1] + q_start * delta_steps[2]
        row_steps = (stats_steps[3], stats_steps[0], delta_steps[2])
        tile = tiles * 0
        while tile < tiles:
            kind, end = run_over_rows(tile, tiles, first_k, at, tables, TILE_CLASS, MASK, BLOCK_M, BLOCK_N)
            if CAREFUL:
                kind = tl.minimum(kind, 1)
            if kind == 1:
                dk_wide, dk_rest, dv_wide, dv_rest = rows_of_block(
                    (dk_wide, dk_rest, dv_wide, dv_rest), keys, tile, end, q_base, dout_base, stats_base,
                    delta_base, q_steps, dout_steps, row_steps, tables, first_k, at, numbers,
                    SCORE, SLOPE, ALLOWED, IDENTITY, True, DROPOUT, CAREFUL, PRECISION,
                    DIM, WIDE, REST, DIM_V, WIDE_V, REST_V, BLOCK_M, BLOCK_N,
                )  # fmt: skip
            if not CAREFUL:
                if kind == 2:
                    dk_wide, dk_rest, dv_wide, dv_rest = rows_of_block(
                        (dk_wide, dk_rest, dv_wide, dv_rest), keys, tile, end, q_base, dout_base, stats_base,
                        delta_base, q_steps, dout_steps, row_steps, tables, first_k, at, numbers,
                        SCORE, SLOPE, ALLOWED, IDENTITY, False, DROPOUT, False, PRECISION,
                        DIM, WIDE, REST, DIM_V, WIDE_V, REST_V, BLOCK_M, BLOCK_N,
                    )  # fmt: skip
            tile = end
    return dk_wide, dk_rest, dv_wide, dv_rest


@triton.jit
def backward_dkv(
    q, k, v, dout, stats, delta, dk, dv, odd, cu_seqlens_q, cu_seqlens_k, seqused_k, tables,
    q_steps, k_steps, v_steps, dout_steps, stats_steps, delta_steps, dk_steps, dv_steps,
    blocks, entries, heads, group, seqlen_q, seqlen_k, scale, unit, seed: tl.int64, threshold: tl.int64,
    keep_scale,
    SCORE: tl.constexpr, SLOPE: tl.constexpr, ALLOWED: tl.constexpr, TILE_CLASS: tl.constexpr,
    IDENTITY: tl.constexpr, MASK: tl.constexpr, DROPOUT: tl.constexpr,
    PACKED: tl.constexpr, USED: tl.constexpr, CAREFUL: tl.constexpr, PRECISION: tl.constexpr,
    DIM: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr,
    DIM_V: tl.constexpr, WIDE_V: tl.constexpr, REST_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program for each block of keys, key head and batch entry. `odd` as in the forward."""
    block, kv_head, batch = which(blocks, heads // group, entries, cu_seqlens_k, PACKED, BLOCK_N)
    first_k = block * BLOCK_N
    q_start, q_len, k_start, k_len = sequence(
        batch, cu_seqlens_q, cu_seqlens_k, seqused_k, seqlen_q, seqlen_k, PACKED, USED
    )
    wanted = True
    if CAREFUL:
        wanted = tl.load(odd + tl.program_id(0)) != 0
    if (first_k < k_len) & wanted:
        entry, wide_head = whole(batch), whole(kv_head)
        k += entry * k_steps[0] + k_start * k_steps[1] + wide_head * k_steps[2]
        v += entry * v_steps[0] + k_start * v_steps[1] + wide_head * v_steps[2]
        dk += entry * dk_steps[0] + k_start * dk_steps[1] + wide_head * dk_steps[2]
        dv += entry * dv_steps[0] + k_start * dv_steps[1] + wide_head * dv_steps[2]
        numbers = (scale, unit, seed, threshold, keep_scale)
        # (BLOCK_N, DIM), (BLOCK_N, DIM_V)
        k_wide, k_rest = pieces(k, first_k, k_len, k_steps[1], k_steps[3], True, DIM, WIDE, REST, BLOCK_N)
        v_wide, v_rest = pieces(
            v, first_k, k_len, v_steps[1], v_steps[3], True, DIM_V, WIDE_V, REST_V, BLOCK_N
        )
        keys = (k_wide, k_rest, v_wide, v_rest)
        dk_wide, dk_rest, dv_wide, dv_rest = over_rows(
            keys, q, dout, stats, delta, q_steps, dout_steps, stats_steps, delta_steps, tables, first_k,
            batch,
            kv_head, group, q_start, q_len, k_len, numbers,
            SCORE, SLOPE, ALLOWED, TILE_CLASS, IDENTITY, MASK, DROPOUT, CAREFUL, PRECISION,
            DIM, WIDE, REST, DIM_V, WIDE_V, REST_V, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        if not CAREFUL:
            found = any_odd(dk_wide, dk_rest, REST) | any_odd(dv_wide, dv_rest, REST_V)
            tl.store(odd + tl.program_id(0), found)
        store_pieces(
            dk, dk_wide * scale, dk_rest * scale, first_k, k_len, dk_steps[1], dk_steps[3],
            DIM, WIDE, REST, BLOCK_N,
        )  # fmt: skip
        store_pieces(
            dv, dv_wide, dv_rest, first_k, k_len, dv_steps[1], dv_steps[3], DIM_V, WIDE_V, REST_V, BLOCK_N
        )


@triton.jit
def keys_of_block(
    sums, queries, first_tile, end_tile, k, v, k_steps, v_steps, tables, first_row, at, numbers,
    SCORE: tl.constexpr, SLOPE: tl.constexpr, ALLOWED: tl.constexpr, IDENTITY: tl.constexpr,
    MASKED: tl.constexpr, DROPOUT: tl.constexpr, CAREFUL: tl.constexpr, PRECISION: tl.constexpr,
    DIM: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr,
    DIM_V: tl.constexpr, WIDE_V: tl.constexpr, REST_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add the tiles of one run of keys to dQ, in two pieces."""
    dq_wide, dq_rest = sums
    q_wide, q_rest, d_wide, d_rest, m, log_sum, taken = queries
    batch, head, q_len, k_len = at
    _, _, seed, threshold, keep_scale = numbers
    rows = first_row + tl.arange(0, BLOCK_M)
    row = rows[:, None]
    for tile in range(first_tile, end_tile):
        first_k = tile * BLOCK_N
        # (BLOCK_N, DIM), (BLOCK_N, DIM_V)
        k_wide, k_rest = pieces(k, first_k, k_len, k_steps[1], k_steps[3], MASKED, DIM, WIDE, REST, BLOCK_N)
        v_wide, v_rest = pieces(
            v, first_k, k_len, v_steps[1], v_steps[3], MASKED, DIM_V, WIDE_V, REST_V, BLOCK_N
        )
        key = (first_k + tl.arange(0, BLOCK_N))[None, :]
        # (BLOCK_M, BLOCK_N)
        s = scores(q_wide, q_rest, k_wide, k_rest, REST, PRECISION)
        seen = (row < q_len) & (key < k_len)
        p, slope, seen = probabilities(
            s, m[:, None], log_sum[:, None], seen, row, key, at, tables, numbers,
            SCORE, SLOPE, ALLOWED, IDENTITY, MASKED,
        )  # fmt: skip
        dp = scores(d_wide, d_rest, v_wide, v_rest, REST_V, PRECISION)
        if DROPOUT:
            stays = kept(seed, batch, head, rows, first_k, threshold, BLOCK_M, BLOCK_N)
            dp = tl.where(stays, dp * keep_scale, 0.0)
        ds = change(p, dp, taken[:, None], slope, seen)
        dq_wide = add_product(dq_wide, ds, k_wide, seen, PRECISION, CAREFUL)
        if REST > 0:
            dq_rest = add_product(dq_rest, ds, k_rest, seen, PRECISION, CAREFUL)
        else:
            dq_rest = dq_wide
    return dq_wide, dq_rest


@triton.jit
def over_keys(
    queries, k, v, k_steps, v_steps, tables, first_row, at, numbers,
    SCORE: tl.constexpr, SLOPE: tl.constexpr, ALLOWED: tl.constexpr, TILE_CLASS: tl.constexpr,
    IDENTITY: tl.constexpr, MASK: tl.constexpr, DROPOUT: tl.constexpr, CAREFUL: tl.constexpr,
    PRECISION: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr,
    DIM_V: tl.constexpr, WIDE_V: tl.constexpr, REST_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dQ of one block of rows over all keys."""
    dq_wide = tl.zeros([BLOCK_M, WIDE], tl.float32)
    dq_rest = dq_wide
    if REST > 0:
        dq_rest = tl.zeros([BLOCK_M, REST], tl.float32)
    tiles = tl.cdiv(at[3], BLOCK_N)
    tile = tiles * 0
    while tile < tiles:
        kind, end = run_over_keys(tile, tiles, first_row, at, tables, TILE_CLASS, MASK, BLOCK_M, BLOCK_N)
        if CAREFUL:
            kind = tl.minimum(kind, 1)
        if kind == 1:
            dq_wide, dq_rest = keys_of_block(
                (dq_wide, dq_rest), queries, tile, end, k, v, k_steps, v_steps, tables, first_row, at,
                numbers,
                SCORE, SLOPE, ALLOWED, IDENTITY, True, DROPOUT, CAREFUL, PRECISION,
                DIM, WIDE, REST, DIM_V, WIDE_V, REST_V, BLOCK_M, BLOCK_N,
            )  # fmt: skip
        if not CAREFUL:
            if kind == 2:
                dq_wide, dq_rest = keys_of_block(
                    (dq_wide, dq_rest), queries, tile, end, k, v, k_steps, v_steps, tables, first_row, at,
                    numbers, SCORE, SLOPE, ALLOWED, IDENTITY, False, DROPOUT, False, PRECISION,
                    DIM, WIDE, REST, DIM_V, WIDE_V, REST_V, BLOCK_M, BLOCK_N,
                )  # fmt: skip
        tile = end
    return dq_wide, dq_rest


@triton.jit
def backward_dq(
    q, k, v, dout, stats, delta, dq, odd, cu_seqlens_q, cu_seqlens_k, seqused_k, tables,
    q_steps, k_steps, v_steps, dout_steps, stats_steps, delta_steps, dq_steps,
    blocks, entries, heads, group, seqlen_q, seqlen_k, scale, unit, seed: tl.int64, threshold: tl.int64,
    keep_scale,
    SCORE: tl.constexpr, SLOPE: tl.constexpr, ALLOWED: tl.constexpr, TILE_CLASS: tl.constexpr,
    IDENTITY: tl.constexpr, MASK: tl.constexpr, DROPOUT: tl.constexpr,
    PACKED: tl.constexpr, USED: tl.constexpr, CAREFUL: tl.constexpr, PRECISION: tl.constexpr,
    DIM: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr,
    DIM_V: tl.constexpr, WIDE_V: tl.constexpr, REST_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program for each block of rows, head and batch entry. `odd` as in the forward."""
    block, head, batch = which(blocks, heads, entries, cu_seqlens_q, PACKED, BLOCK_M)
    if not PACKED:
        block = blocks - 1 - block
    first_row = block * BLOCK_M
    q_start, q_len, k_start, k_len = sequence(
        batch, cu_seqlens_q, cu_seqlens_k, seqused_k, seqlen_q, seqlen_k, PACKED, USED
    )
    wanted = True
    if CAREFUL:
        wanted = tl.load(odd + tl.program_id(0)) != 0
    if (first_row < q_len) & wanted:
        entry, wide_head, kv_head = whole(batch), whole(head), whole(head // group)
        q += entry * q_steps[0] + q_start * q_steps[1] + wide_head * q_steps[2]
        k += entry * k_steps[0] + k_start * k_steps[1] + kv_head * k_steps[2]
        v += entry * v_steps[0] + k_start * v_steps[1] + kv_head * v_steps[2]
        dout += entry * dout_steps[0] + q_start * dout_steps[1] + wide_head * dout_steps[2]
        dq += entry * dq_steps[0] + q_start * dq_steps[1] + wide_head * dq_steps[2]
        stats += entry * stats_steps[1] + wide_head * stats_steps[2] + q_start * stats_steps[3]
        delta += entry * delta_steps[0] + wide_head * delta_steps[1] + q_start * delta_steps[2]
        rows = first_row + tl.arange(0, BLOCK_M)
        there = rows < q_len
        place = rows.to(tl.int64) * stats_steps[3]
        m = tl.load(stats + place, mask=there, other=0.0)
        log_sum = tl.load(stats + stats_steps[0] + place, mask=there, other=0.0)
        taken = tl.load(delta + rows.to(tl.int64) * delta_steps[2], mask=there, other=0.0)
        # (BLOCK_M, DIM), (BLOCK_M, DIM_V)
        q_wide, q_rest = pieces(q, first_row, q_len, q_steps[1], q_steps[3], True, DIM, WIDE, REST, BLOCK_M)
        d_wide, d_rest = pieces(
            dout, first_row, q_len, dout_steps[1], dout_steps[3], True, DIM_V, WIDE_V, REST_V, BLOCK_M
        )
        queries = (q_wide, q_rest, d_wide, d_rest, m, log_sum, taken)
        at = (batch, head, q_len, k_len)
        numbers = (scale, unit, seed, threshold, keep_scale)
        dq_wide, dq_rest = over_keys(
            queries, k, v, k_steps, v_steps, tables, first_row, at, numbers,
            SCORE, SLOPE, ALLOWED, TILE_CLASS, IDENTITY, MASK, DROPOUT, CAREFUL, PRECISION,
            DIM, WIDE, REST, DIM_V, WIDE_V, REST_V, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        if not CAREFUL:
            tl.store(odd + tl.program_id(0), any_odd(dq_wide, dq_rest, REST))
        store_pieces(
            dq, dq_wide * scale, dq_rest * scale, first_row, q_len, dq_steps[1], dq_steps[3],
            DIM, WIDE, REST, BLOCK_M,
        )  # fmt: skip
