"""Partial sums of the segments of one block of rows: kept, added up, written.

    M   = max m_i,  w_i = exp2((m_i - M) unit)          over the segments i, in their order
    out = sum w_i acc_i / sum w_i l_i,  lse = M unit ln 2 + ln sum w_i l_i

A segment's sums are SIZE words: m and l of BLOCK_M rows, then acc in two pieces. Registers, in words a
thread: CHUNK + 1 times BLOCK_M * DIM_V / threads, because the loads of CHUNK segments are under way at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from anyflash.kernels.triton.forward import LN_2
from anyflash.kernels.triton.pages import scattered


@triton.jit
def keep(partial, acc_wide, acc_rest, m, l, there,
         WIDE_V: tl.constexpr, REST_V: tl.constexpr, BLOCK_M: tl.constexpr):  # fmt: skip
    """Store the sums of a segment: m, l, acc with both pieces of a row beside each other."""
    r = tl.arange(0, BLOCK_M)
    tl.store(partial + r, m, mask=there)
    tl.store(partial + BLOCK_M + r, l, mask=there)
    places = r * (WIDE_V + REST_V)
    scattered(partial + 2 * BLOCK_M, acc_wide, acc_rest, places, there, 1, WIDE_V + REST_V, WIDE_V, REST_V)


@triton.jit
def kept_acc(partial, there, FIRST: tl.constexpr, WIDTH: tl.constexpr, ALL: tl.constexpr,
             BLOCK_M: tl.constexpr):  # fmt: skip
    """(BLOCK_M, WIDTH): a segment's columns from FIRST, past the first-level cache."""
    r = tl.arange(0, BLOCK_M)
    at = partial + 2 * BLOCK_M + (r[:, None] * ALL + FIRST + tl.arange(0, WIDTH)[None, :])
    return tl.load(at, mask=there[:, None], other=0.0, cache_modifier=".cg")


@triton.jit
def add_up(partial, segments, there, unit, SEGMENTS: tl.constexpr, CHUNK: tl.constexpr, SIZE: tl.constexpr,
           WIDE_V: tl.constexpr, REST_V: tl.constexpr, BLOCK_M: tl.constexpr):  # fmt: skip
    """acc in two pieces, m and l of all segments; the loads of CHUNK of them are under way at once."""
    r = tl.arange(0, BLOCK_M)
    i = tl.arange(0, SEGMENTS)
    # (SEGMENTS, BLOCK_M)
    known = (i < segments)[:, None] & there[None, :]
    every_m = tl.load(
        partial + (i[:, None] * SIZE + r[None, :]), mask=known, other=float("-inf"), cache_modifier=".cg"
    )
    m = tl.max(every_m, 0)
    base = tl.where(m == float("-inf"), 0.0, m)
    acc_wide = tl.zeros([BLOCK_M, WIDE_V], tl.float32)
    acc_rest = acc_wide
    if REST_V > 0:
        acc_rest = tl.zeros([BLOCK_M, REST_V], tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    for first in range(0, segments, CHUNK):
        for j in tl.static_range(CHUNK):
            number = first + j
            mine = there & (r * 0 + number < segments)
            own = partial + number * SIZE
            m_i = tl.load(own + r, mask=mine, other=float("-inf"), cache_modifier=".cg")
            l_i = tl.load(own + BLOCK_M + r, mask=mine, other=0.0, cache_modifier=".cg")
            weight = tl.exp2((m_i - base) * unit)
            l += l_i * weight
            acc_wide += kept_acc(own, mine, 0, WIDE_V, WIDE_V + REST_V, BLOCK_M) * weight[:, None]
            if REST_V > 0:
                acc_rest += kept_acc(own, mine, WIDE_V, REST_V, WIDE_V + REST_V, BLOCK_M) * weight[:, None]
            else:
                acc_rest = acc_wide
    return acc_wide, acc_rest, m, l


@triton.jit
def finish(out, lse, stats, acc_wide, acc_rest, m, l, places, there, unit, out_dim_step, plane,
           DIM_V: tl.constexpr, WIDE_V: tl.constexpr, REST_V: tl.constexpr):  # fmt: skip
    """A row that sees no key has l = 0: its acc is 0, its lse -inf, its stats (-inf, 0)."""
    out_places, lse_places, stats_places = places
    total = tl.where(l == 0.0, 1.0, l)
    scattered(
        out, acc_wide / total[:, None], acc_rest / total[:, None], out_places, there, out_dim_step,
        DIM_V, WIDE_V, REST_V,
    )  # fmt: skip
    tl.store(lse + lse_places, m * (unit * LN_2) + tl.log(total), mask=there)
    tl.store(stats + stats_places, m, mask=there)
    tl.store(stats + stats_places + plane, tl.log2(total), mask=there)
