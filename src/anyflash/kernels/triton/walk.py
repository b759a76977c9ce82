"""The walk of `decode`: one block of rows of a key head's group over some tiles of its sequence's keys.

    s   = program(scale q . k)      without a program s stays q . k, and `unit` has the scale
    m   = max_k s,  p = exp2((s - m) unit),  l = sum_k p,  acc = sum_k p v

Rows are pairs of a token and a head, so that `token` and `head` are columns (BLOCK_M, 1) where the forward
has rows of one head. Keys are walked in runs of tiles of one class, as there; `pages` finds them. Sums that
came out infinite or NaN where keys may be hidden are mended by a second walk, few columns at a time. 8-bit
floats of a cache are made the type of the queries.

Registers, in words a thread: acc BLOCK_M * DIM_V / threads, s and p BLOCK_M * BLOCK_N / threads, mending
4 BLOCK_M * MENDED / threads in place of acc.
"""

from __future__ import annotations

import triton
import triton.language as tl

from anyflash.kernels.triton.combine import meet
from anyflash.kernels.triton.elementary import whole
from anyflash.kernels.triton.forward import LOG2_E
from anyflash.kernels.triton.narrow import beside
from anyflash.kernels.triton.pages import keys_at, scattered, spot
from anyflash.kernels.triton.tiles import add_product, scores

# How many tiles are classed at once to find the first and the last that is not empty.
SCANNED = tl.constexpr(128)


@triton.jit
def class_at(tile, tokens, at, tables, TILE_CLASS: tl.constexpr,
             BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """The mask's class of tiles of keys, one or an array of them; `tokens` are the first and the last."""
    batch, head, q_len, k_len = at
    first, last = tokens
    shift = k_len - q_len
    low = tile * BLOCK_N
    high = tl.minimum(low + BLOCK_N, k_len) - 1
    return TILE_CLASS(
        batch, head, first, last, first + shift, last + shift, low, high, q_len, k_len, tables, BLOCK_M,
        BLOCK_N,
    )  # fmt: skip


@triton.jit
def reach(tiles, tokens, at, tables, TILE_CLASS: tl.constexpr,
          BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """First tile that is not empty, and the end of the last."""
    first, end = tiles, tiles * 0
    for start in range(0, tiles, SCANNED):
        tile = start + tl.arange(0, SCANNED)
        kind = class_at(tile, tokens, at, tables, TILE_CLASS, BLOCK_M, BLOCK_N)
        some = (kind > 0) & (tile < tiles)
        first = tl.minimum(first, tl.min(tl.where(some, tile, tiles), 0))
        end = tl.maximum(end, tl.max(tl.where(some, tile + 1, 0), 0))
    return tl.minimum(first, end), end


@triton.jit
def run_of(tile, end, tokens, at, tables, TILE_CLASS: tl.constexpr, MASK: tl.constexpr,
           RUNS: tl.constexpr, EDGED: tl.constexpr,
           BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """The class of tile `tile`, and the end of the run of tiles of that class.

    Tiles are classed by the mask with RUNS alone. Without, all are partial if there is a mask: no class holds
    for all of a tile whose heads have masks of their own, and between the ends of what an interval of keys
    leaves nothing is empty. EDGED: full tiles are walked as partial ones.
    """
    whole_tiles = at[3] // BLOCK_N
    if EDGED:
        whole_tiles = whole_tiles * 0
    if RUNS:
        kind = class_at(tile, tokens, at, tables, TILE_CLASS, BLOCK_M, BLOCK_N)
        kind = tl.minimum(kind, tl.where(tile < whole_tiles, 2, 1))
        stop = tile + 1
        alike = stop < end
        while alike:
            next_kind = class_at(stop, tokens, at, tables, TILE_CLASS, BLOCK_M, BLOCK_N)
            next_kind = tl.minimum(next_kind, tl.where(stop < whole_tiles, 2, 1))
            stop += tl.where(next_kind == kind, 1, 0)
            alike = (next_kind == kind) & (stop < end)
    elif MASK or EDGED:
        kind = tile * 0 + 1
        stop = end
    else:
        kind = tl.where(tile < whole_tiles, 2, 1)
        stop = tl.where(tile < whole_tiles, tl.minimum(end, whole_tiles), end)
    return kind, stop


@triton.jit
def attend(
    sums, queries, rows, first_tile, end_tile, k, v, cache, k_steps, v_steps, tables, at, numbers,
    SCORE: tl.constexpr, ALLOWED: tl.constexpr, IDENTITY: tl.constexpr, MASKED: tl.constexpr,
    CAREFUL: tl.constexpr, PAGE: tl.constexpr, GATHER: tl.constexpr, PRECISION: tl.constexpr,
    DIM: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr,
    DIM_V: tl.constexpr, WIDE_V: tl.constexpr, REST_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    """Add the tiles of one run to `sums`: acc in two pieces, m, l."""
    acc_wide, acc_rest, m, l = sums
    q_wide, q_rest = queries
    batch, _, q_len, k_len = at
    token, head, row_there = rows
    scale, unit = numbers
    position = token + (k_len - q_len)
    for tile in tl.range(first_tile, end_tile, num_stages=STAGES):
        first_k = tile * BLOCK_N
        page, slot, there = spot(first_k, k_len, cache, PAGE, GATHER, BLOCK_N)
        # (BLOCK_N, DIM)
        k_wide, k_rest = keys_at(
            k, page, slot, there, k_len - first_k, k_steps, MASKED, GATHER, DIM, WIDE, REST, BLOCK_N
        )
        k_wide, k_rest = beside(k_wide, k_rest, q_wide, REST, FORMAT)
        # (BLOCK_M, BLOCK_N)
        s = scores(q_wide, q_rest, k_wide, k_rest, REST, PRECISION)
        key = (first_k + tl.arange(0, BLOCK_N))[None, :]
        if not IDENTITY:
            s = SCORE(s * scale, batch, head, token, position, key, q_len, k_len, tables)
        if MASKED:
            seen = row_there & (key < k_len)
            seen = seen & ALLOWED(batch, head, token, position, key, q_len, k_len, tables)
            s = tl.where(seen, s, float("-inf"))
        new_m = tl.maximum(m, tl.max(s, 1))
        # A row that has seen nothing yet has m = -inf, and -inf - -inf is no number.
        base = tl.where(new_m == float("-inf"), 0.0, new_m)
        shrink = tl.exp2((m - base) * unit)
        p = tl.exp2((s - base[:, None]) * unit)
        l = l * shrink + tl.sum(p, 1)
        m = new_m
        # (BLOCK_N, DIM_V)
        v_wide, v_rest = keys_at(
            v, page, slot, there, k_len - first_k, v_steps, MASKED, GATHER, DIM_V, WIDE_V, REST_V, BLOCK_N
        )
        v_wide, v_rest = beside(v_wide, v_rest, q_wide, REST_V, FORMAT)
        seen = s != float("-inf")
        acc_wide = add_product(acc_wide * shrink[:, None], p, v_wide, seen, PRECISION, CAREFUL)
        if REST_V > 0:
            acc_rest = add_product(acc_rest * shrink[:, None], p, v_rest, seen, PRECISION, CAREFUL)
        else:
            acc_rest = acc_wide
    return acc_wide, acc_rest, m, l


@triton.jit
def over_keys(
    queries, rows, first_tile, end_tile, tokens, logit, k, v, cache, k_steps, v_steps, tables, at, numbers,
    SCORE: tl.constexpr, ALLOWED: tl.constexpr, TILE_CLASS: tl.constexpr, IDENTITY: tl.constexpr,
    MASK: tl.constexpr, RUNS: tl.constexpr, EDGED: tl.constexpr, CAREFUL: tl.constexpr,
    PAGE: tl.constexpr, GATHER: tl.constexpr, PRECISION: tl.constexpr,
    DIM: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr,
    DIM_V: tl.constexpr, WIDE_V: tl.constexpr, REST_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    """acc in two pieces, m and l of one block of rows over some tiles of keys.

    `logit` is each row's sink, -inf for none.
    """
    acc_wide = tl.zeros([BLOCK_M, WIDE_V], tl.float32)
    acc_rest = acc_wide
    if REST_V > 0:
        acc_rest = tl.zeros([BLOCK_M, REST_V], tl.float32)
    m = logit * (LOG2_E / numbers[1])
    l = tl.where(logit == float("-inf"), 0.0, 1.0)
    tile = first_tile
    while tile < end_tile:
        kind, stop = run_of(
            tile, end_tile, tokens, at, tables, TILE_CLASS, MASK, RUNS, EDGED, BLOCK_M, BLOCK_N
        )
        if kind == 1:
            acc_wide, acc_rest, m, l = attend(
                (acc_wide, acc_rest, m, l), queries, rows, tile, stop, k, v, cache, k_steps, v_steps, tables,
                at, numbers, SCORE, ALLOWED, IDENTITY, True, CAREFUL, PAGE, GATHER, PRECISION,
                DIM, WIDE, REST, DIM_V, WIDE_V, REST_V, BLOCK_M, BLOCK_N, STAGES, FORMAT,
            )  # fmt: skip
        if not EDGED:
            if kind == 2:
                acc_wide, acc_rest, m, l = attend(
                    (acc_wide, acc_rest, m, l), queries, rows, tile, stop, k, v, cache, k_steps, v_steps,
                    tables, at, numbers, SCORE, ALLOWED, IDENTITY, False, False, PAGE, GATHER, PRECISION,
                    DIM, WIDE, REST, DIM_V, WIDE_V, REST_V, BLOCK_M, BLOCK_N, STAGES, FORMAT,
                )  # fmt: skip
        tile = stop
    return acc_wide, acc_rest, m, l


@triton.jit
def mend_columns(
    target, places, dim_step, column, total, queries, rows, first_tile, end_tile, tokens, logit, k, v, cache,
    k_steps, v_steps, tables, at, numbers,
    SCORE: tl.constexpr, ALLOWED: tl.constexpr, TILE_CLASS: tl.constexpr, IDENTITY: tl.constexpr,
    MASK: tl.constexpr, RUNS: tl.constexpr, PAGE: tl.constexpr, GATHER: tl.constexpr,
    PRECISION: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr,
    DIM_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FORMAT: tl.constexpr,
    MENDED: tl.constexpr,
):  # fmt: skip
    """DIM_V columns of the sums, from `column` on, at most MENDED."""
    acc, _, _, _ = over_keys(
        queries, rows, first_tile, end_tile, tokens, logit, k, v + whole(column) * v_steps[3], cache,
        k_steps, v_steps, tables, at, numbers, SCORE, ALLOWED, TILE_CLASS, IDENTITY, MASK, RUNS, True, True,
        PAGE, GATHER, PRECISION, DIM, WIDE, REST, DIM_V, MENDED, 0, BLOCK_M, BLOCK_N, 1, FORMAT,
    )  # fmt: skip
    there = tl.reshape(rows[2], [BLOCK_M])
    acc = acc / total[:, None]
    scattered(target + whole(column) * dim_step, acc, acc, places, there, dim_step, DIM_V, MENDED, 0)


@triton.jit
def mend(
    target, places, dim_step, total, queries, rows, first_tile, end_tile, tokens, logit, k, v, cache,
    k_steps, v_steps, tables, at, numbers,
    SCORE: tl.constexpr, ALLOWED: tl.constexpr, TILE_CLASS: tl.constexpr, IDENTITY: tl.constexpr,
    MASK: tl.constexpr, RUNS: tl.constexpr, PAGE: tl.constexpr, GATHER: tl.constexpr,
    PRECISION: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr,
    DIM_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FORMAT: tl.constexpr,
    WAITS: tl.constexpr,
    MENDED: tl.constexpr = 16,
):  # fmt: skip
    """Overwrite acc / total at `places` of `target`: only rows that see an infinite value or a NaN have it.

    Few columns at a time, all keys for each: slow, seldom, and light on registers, which the kernel would
    otherwise hold for it always.
    """
    # Other threads stored what is now overwritten.
    meet(WAITS)
    none = first_tile * 0
    for part in range(DIM_V // MENDED):
        mend_columns(
            target, places, dim_step, none + part * MENDED, total, queries, rows, first_tile, end_tile,
            tokens, logit, k, v, cache, k_steps, v_steps, tables, at, numbers,
            SCORE, ALLOWED, TILE_CLASS, IDENTITY, MASK, RUNS, PAGE, GATHER, PRECISION, DIM, WIDE, REST,
            MENDED, BLOCK_M, BLOCK_N, FORMAT, MENDED,
        )  # fmt: skip
    if DIM_V % MENDED > 0:
        mend_columns(
            target, places, dim_step, none + DIM_V // MENDED * MENDED, total, queries, rows, first_tile,
            end_tile, tokens, logit, k, v, cache, k_steps, v_steps, tables, at, numbers,
            SCORE, ALLOWED, TILE_CLASS, IDENTITY, MASK, RUNS, PAGE, GATHER, PRECISION, DIM, WIDE, REST,
            DIM_V % MENDED, BLOCK_M, BLOCK_N, FORMAT, MENDED,
        )  # fmt: skip
