"""What a pair of a row and a key adds to the gradient of the table element that it read.

    ds * d program / d load,   ds = p (dp - delta)          p, dp and delta as in the backward

Registers, in words a thread: two tiles of BLOCK_M * BLOCK_N / threads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from anyflash.kernels.triton.backward import probabilities
from anyflash.kernels.triton.dropout import kept
from anyflash.kernels.triton.elementary import whole
from anyflash.kernels.triton.tiles import pieces, scores


@triton.jit
def tile_of_slopes(
    q, k, v, dout, stats, delta, tables, q_steps, k_steps, v_steps, dout_steps, stats_steps, delta_steps,
    q_start, k_start, first_row, first_k, at, group, numbers,
    SCORE: tl.constexpr, SLOPE_OF: tl.constexpr, ALLOWED: tl.constexpr, IDENTITY: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    DIM: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr,
    DIM_V: tl.constexpr, WIDE_V: tl.constexpr, REST_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(BLOCK_M, BLOCK_N): what each pair adds to the element that it read."""
    batch, head, q_len, k_len = at
    entry, wide_head, kv_head = whole(batch), whole(head), whole(head // group)
    q += entry * q_steps[0] + q_start * q_steps[1] + wide_head * q_steps[2]
    k += entry * k_steps[0] + k_start * k_steps[1] + kv_head * k_steps[2]
    v += entry * v_steps[0] + k_start * v_steps[1] + kv_head * v_steps[2]
    dout += entry * dout_steps[0] + q_start * dout_steps[1] + wide_head * dout_steps[2]
    stats += entry * stats_steps[1] + wide_head * stats_steps[2] + q_start * stats_steps[3]
    delta += entry * delta_steps[0] + wide_head * delta_steps[1] + q_start * delta_steps[2]
    rows = first_row + tl.arange(0, BLOCK_M)
    row = rows[:, None]
    key = (first_k + tl.arange(0, BLOCK_N))[None, :]
    there = rows < q_len
    place = rows.to(tl.int64) * stats_steps[3]
    m = tl.load(stats + place, mask=there, other=0.0)[:, None]
    log_sum = tl.load(stats + stats_steps[0] + place, mask=there, other=0.0)[:, None]
    taken = tl.load(delta + rows.to(tl.int64) * delta_steps[2], mask=there, other=0.0)[:, None]
    q_wide, q_rest = pieces(q, first_row, q_len, q_steps[1], q_steps[3], True, DIM, WIDE, REST, BLOCK_M)
    k_wide, k_rest = pieces(k, first_k, k_len, k_steps[1], k_steps[3], True, DIM, WIDE, REST, BLOCK_N)
    d_wide, d_rest = pieces(
        dout, first_row, q_len, dout_steps[1], dout_steps[3], True, DIM_V, WIDE_V, REST_V, BLOCK_M
    )
    v_wide, v_rest = pieces(v, first_k, k_len, v_steps[1], v_steps[3], True, DIM_V, WIDE_V, REST_V, BLOCK_N)
    s = scores(q_wide, q_rest, k_wide, k_rest, REST, PRECISION)
    seen = (row < q_len) & (key < k_len)
    p, slope, seen = probabilities(
        s, m, log_sum, seen, row, key, at, tables, numbers, SCORE, SLOPE_OF, ALLOWED, IDENTITY, True
    )
    dp = scores(d_wide, d_rest, v_wide, v_rest, REST_V, PRECISION)
    if DROPOUT:
        stays = kept(numbers[2], batch, head, rows, first_k, numbers[3], BLOCK_M, BLOCK_N)
        dp = tl.where(stays, dp * numbers[4], 0.0)
    return tl.where(seen, p * (dp - taken) * slope, 0.0)
