"""The forward: out, lse and stats of one block of rows of one head.

    s   = program(scale q . k)      without a program s stays q . k, and `unit` has the scale
    m   = max_k s                   in the unit of s
    p   = exp2((s - m) unit)        unit = log2 e, or scale log2 e
    l   = sum_k p,  acc = sum_k dropout(p) v
    out = factor acc / l,  lse = m unit ln 2 + ln l,  stats = (m, log2 l)

m is subtracted before the factor, not folded into it: where scores are huge, a rounded product would not
cancel.

Keys are walked in runs of tiles of one class. A run of full tiles has no mask and no edge; one of partial
tiles has both; empty tiles are skipped by their class alone, a few scalar operations. A sink starts as a
key that has been seen: m is its logit, l is 1.

Registers, in words a thread: acc BLOCK_M * DIM_V / threads, s and p BLOCK_M * BLOCK_N / threads, q from
shared memory. What a configuration may change: BLOCK_M, BLOCK_N (multiples of 16), warps, stages. A result
does not depend on BLOCK_M, warps or stages.
"""

from __future__ import annotations

import triton
import triton.language as tl

from anyflash.kernels.triton.dropout import kept
from anyflash.kernels.triton.elementary import whole
from anyflash.kernels.triton.narrow import WEIGHT_UNIT
from anyflash.kernels.triton.sequences import run_over_keys, sequence, which
from anyflash.kernels.triton.tiles import add_product, any_odd, pieces, scores, store_pieces

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def attend(
    sums, queries, first_tile, end_tile, k, v, k_steps, v_steps, tables, first_row, at, numbers,
    SCORE: tl.constexpr, ALLOWED: tl.constexpr, IDENTITY: tl.constexpr, MASKED: tl.constexpr,
    DROPOUT: tl.constexpr, CAREFUL: tl.constexpr, PRECISION: tl.constexpr,
    DIM: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr,
    DIM_V: tl.constexpr, WIDE_V: tl.constexpr, REST_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FORMAT: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """Add the tiles of one run to `sums`: acc in two pieces, m, l."""
    acc_wide, acc_rest, m, l = sums
    q_wide, q_rest = queries
    batch, head, q_len, k_len = at
    scale, unit, seed, threshold, keep_scale = numbers
    rows = first_row + tl.arange(0, BLOCK_M)
    row = rows[:, None]
    position = row + (k_len - q_len)
    for tile in range(first_tile, end_tile):
        first_k = tile * BLOCK_N
        # (BLOCK_N, DIM)
        k_wide, k_rest = pieces(
            k, first_k, k_len, k_steps[1], k_steps[3], MASKED, DIM, WIDE, REST, BLOCK_N, FORMAT
        )
        # (BLOCK_M, BLOCK_N)
        s = scores(q_wide, q_rest, k_wide, k_rest, REST, PRECISION)
        key = (first_k + tl.arange(0, BLOCK_N))[None, :]
        if not IDENTITY:
            s = SCORE(s * scale, batch, head, row, position, key, q_len, k_len, tables)
        if MASKED:
            seen = (row < q_len) & (key < k_len)
            seen = seen & ALLOWED(batch, head, row, position, key, q_len, k_len, tables)
            s = tl.where(seen, s, float("-inf"))
        new_m = tl.maximum(m, tl.max(s, 1))
        # A row that has seen nothing yet has m = -inf, and -inf - -inf is no number.
        base = tl.where(new_m == float("-inf"), 0.0, new_m)
        shrink = tl.exp2((m - base) * unit)
        p = tl.exp2((s - base[:, None]) * unit)
        l = l * shrink + tl.sum(p, 1)
        m = new_m
        if DROPOUT:
            # In e4m3 it would leave the range: there the whole sum is scaled.
            scaled = p if NARROW else p * keep_scale
            p = tl.where(kept(seed, batch, head, rows, first_k, threshold, BLOCK_M, BLOCK_N), scaled, 0.0)
        # (BLOCK_N, DIM_V)
        v_wide, v_rest = pieces(
            v, first_k, k_len, v_steps[1], v_steps[3], MASKED, DIM_V, WIDE_V, REST_V, BLOCK_N, FORMAT
        )
        seen = s != float("-inf")
        acc_wide = add_product(
            acc_wide * shrink[:, None], p, v_wide, seen, PRECISION, CAREFUL, FORMAT, NARROW
        )
        if REST_V > 0:
            acc_rest = add_product(
                acc_rest * shrink[:, None], p, v_rest, seen, PRECISION, CAREFUL, FORMAT, NARROW
            )
        else:
            acc_rest = acc_wide
    return acc_wide, acc_rest, m, l


@triton.jit
def over_keys(
    queries, k, v, k_steps, v_steps, tables, sinks, first_row, at, numbers,
    SCORE: tl.constexpr, ALLOWED: tl.constexpr, TILE_CLASS: tl.constexpr, IDENTITY: tl.constexpr,
    MASK: tl.constexpr, SINKS: tl.constexpr, DROPOUT: tl.constexpr, CAREFUL: tl.constexpr,
    PRECISION: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr,
    DIM_V: tl.constexpr, WIDE_V: tl.constexpr, REST_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FORMAT: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """acc in two pieces, m and l of one block of rows over all keys."""
    acc_wide = tl.zeros([BLOCK_M, WIDE_V], tl.float32)
    acc_rest = acc_wide
    if REST_V > 0:
        acc_rest = tl.zeros([BLOCK_M, REST_V], tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    if SINKS:
        logit = tl.load(sinks + at[1]).to(tl.float32)
        m = tl.zeros([BLOCK_M], tl.float32) + logit * (LOG2_E / numbers[1])
        l = l + tl.where(logit == float("-inf"), 0.0, 1.0)
    tiles = tl.cdiv(at[3], BLOCK_N)
    tile = tiles * 0
    while tile < tiles:
        kind, end = run_over_keys(tile, tiles, first_row, at, tables, TILE_CLASS, MASK, BLOCK_M, BLOCK_N)
        if CAREFUL:
            kind = tl.minimum(kind, 1)
        if kind == 1:
            acc_wide, acc_rest, m, l = attend(
                (acc_wide, acc_rest, m, l), queries, tile, end, k, v, k_steps, v_steps, tables, first_row, at,
                numbers, SCORE, ALLOWED, IDENTITY, True, DROPOUT, CAREFUL, PRECISION,
                DIM, WIDE, REST, DIM_V, WIDE_V, REST_V, BLOCK_M, BLOCK_N, FORMAT, NARROW,
            )  # fmt: skip
        if not CAREFUL:
            if kind == 2:
                acc_wide, acc_rest, m, l = attend(
                    (acc_wide, acc_rest, m, l), queries, tile, end, k, v, k_steps, v_steps, tables, first_row,
                    at, numbers, SCORE, ALLOWED, IDENTITY, False, DROPOUT, False, PRECISION,
                    DIM, WIDE, REST, DIM_V, WIDE_V, REST_V, BLOCK_M, BLOCK_N, FORMAT, NARROW,
                )  # fmt: skip
        tile = end
    return acc_wide, acc_rest, m, l


@triton.jit
def forward(
    q, k, v, out, lse, stats, odd, sinks, cu_seqlens_q, cu_seqlens_k, seqused_k, tables,
    q_steps, k_steps, v_steps, out_steps, lse_steps, stats_steps,
    blocks, entries, heads, group, seqlen_q, seqlen_k, scale, unit, seed: tl.int64, threshold: tl.int64,
    keep_scale,
    SCORE: tl.constexpr, ALLOWED: tl.constexpr, TILE_CLASS: tl.constexpr,
    IDENTITY: tl.constexpr, MASK: tl.constexpr, SINKS: tl.constexpr, DROPOUT: tl.constexpr,
    PACKED: tl.constexpr, USED: tl.constexpr, CAREFUL: tl.constexpr, PRECISION: tl.constexpr,
    DIM: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr,
    DIM_V: tl.constexpr, WIDE_V: tl.constexpr, REST_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    FACTOR: tl.constexpr = None, FORMAT: tl.constexpr = "", NARROW: tl.constexpr = False,
):  # fmt: skip
    """One program for each block of rows, head and batch entry.

    `odd` has a number for each program: whether its sums came out infinite or NaN. A CAREFUL launch, after
    a plain one, does those again. Steps are in elements: (batch, token, head, dim), of lse (batch, head,
    row), of stats (plane, batch, head, row). `threshold` and `keep_scale` are dropout's.
    """
    # Under a causal mask the last rows see most: they go first.
    block, head, batch = which(blocks, heads, entries, cu_seqlens_q, PACKED, BLOCK_M)
    if not PACKED:
        block = blocks - 1 - block
    first_row = block * BLOCK_M
    wanted = True
    if CAREFUL:
        wanted = tl.load(odd + tl.program_id(0)) != 0
    q_start, q_len, k_start, k_len = sequence(
        batch, cu_seqlens_q, cu_seqlens_k, seqused_k, seqlen_q, seqlen_k, PACKED, USED
    )
    if (first_row < q_len) & wanted:
        # Packed arrays have no batch axis: its step is 0.
        entry, kv_head = whole(batch), whole(head // group)
        q += entry * q_steps[0] + q_start * q_steps[1] + whole(head) * q_steps[2]
        k += entry * k_steps[0] + k_start * k_steps[1] + kv_head * k_steps[2]
        v += entry * v_steps[0] + k_start * v_steps[1] + kv_head * v_steps[2]
        out += entry * out_steps[0] + q_start * out_steps[1] + whole(head) * out_steps[2]
        at = (batch, head, q_len, k_len)
        numbers = (scale, unit, seed, threshold, keep_scale)
        # (BLOCK_M, DIM)
        queries = pieces(q, first_row, q_len, q_steps[1], q_steps[3], True, DIM, WIDE, REST, BLOCK_M, FORMAT)
        acc_wide, acc_rest, m, l = over_keys(
            queries, k, v, k_steps, v_steps, tables, sinks, first_row, at, numbers,
            SCORE, ALLOWED, TILE_CLASS, IDENTITY, MASK, SINKS, DROPOUT, CAREFUL, PRECISION,
            DIM, WIDE, REST, DIM_V, WIDE_V, REST_V, BLOCK_M, BLOCK_N, FORMAT, NARROW,
        )  # fmt: skip
        if not CAREFUL:
            tl.store(odd + tl.program_id(0), any_odd(acc_wide, acc_rest, REST_V))
        # A row that sees no key has l = 0: its acc is 0, its lse -inf, its stats (-inf, 0).
        total = tl.where(l == 0.0, 1.0, l)
        share = total
        if NARROW:
            share = total * (WEIGHT_UNIT / keep_scale if DROPOUT else WEIGHT_UNIT)
        if FACTOR is not None:
            share = share / FACTOR(batch, head, tables)
        store_pieces(
            out, acc_wide / share[:, None], acc_rest / share[:, None], first_row, q_len,
            out_steps[1], out_steps[3], DIM_V, WIDE_V, REST_V, BLOCK_M,
        )  # fmt: skip
        rows = first_row + tl.arange(0, BLOCK_M)
        place = (rows + q_start) * lse_steps[2] + entry * lse_steps[0] + whole(head) * lse_steps[1]
        tl.store(lse + place, m * (unit * LN_2) + tl.log(total), mask=rows < q_len)
        place = (rows + q_start) * stats_steps[3] + entry * stats_steps[1] + whole(head) * stats_steps[2]
        tl.store(stats + place, m, mask=rows < q_len)
        tl.store(stats + place + stats_steps[0], tl.log2(total), mask=rows < q_len)
