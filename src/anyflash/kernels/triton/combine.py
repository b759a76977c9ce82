"""Partial sums of the segments of one block of rows: kept, added up, written.

    M   = max m_i,  w_i = exp2((m_i - M) unit)          over the segments i, in their order
    out = factor sum w_i acc_i / sum w_i l_i,  lse = M unit ln 2 + ln sum w_i l_i

A segment's sums are SIZE words: m and l of KEPT rows, then acc from HEAD on, with both pieces of a row beside
each other. KEPT is a power of two, BLOCK_M or what the rows of a call need; HEAD and SIZE keep 64 bytes'
alignment. Registers, in words a
thread: CHUNK + 1 times BLOCK_M * DIM_V / threads, because the loads of CHUNK segments are under way at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from anyflash.kernels.triton.forward import LN_2
from anyflash.kernels.triton.pages import scattered


@triton.jit
def meet(WAITS: tl.constexpr):
    """Threads of a block wait for each other and see each other's stores.

    An AMD barrier does not wait for the stores of a wave (WAITS), and an atomic that releases waits only for
    those of its own: each wave must have seen them arrive before it comes to the barrier.
    """
    if WAITS:
        # Every thread of up to 8 waves has an element.
        tl.inline_asm_elementwise(
            "s_waitcnt vmcnt(0)\nv_mov_b32 $0, $1", "=v,v,~{memory}", [tl.arange(0, 512)], dtype=tl.int32,
            is_pure=False, pack=1,
        )  # fmt: skip
    tl.debug_barrier()


@triton.jit
def keep(partial, acc_wide, acc_rest, m, l, there,
         WIDE_V: tl.constexpr, REST_V: tl.constexpr, BLOCK_M: tl.constexpr,
         KEPT: tl.constexpr, HEAD: tl.constexpr):  # fmt: skip
    """Store the sums of a segment."""
    r = tl.arange(0, BLOCK_M)
    tl.store(partial + r, m, mask=there)
    tl.store(partial + KEPT + r, l, mask=there)
    places = r * (WIDE_V + REST_V)
    scattered(partial + HEAD, acc_wide, acc_rest, places, there, 1, WIDE_V + REST_V, WIDE_V, REST_V)


@triton.jit
def kept_acc(partial, there, FIRST: tl.constexpr, WIDTH: tl.constexpr, ALL: tl.constexpr,
             CHUNK: tl.constexpr, SIZE: tl.constexpr, BLOCK_M: tl.constexpr,
             HEAD: tl.constexpr):  # fmt: skip
    """(CHUNK, BLOCK_M, WIDTH): columns from FIRST of some segments, past the first-level cache."""
    i, r, columns = tl.arange(0, CHUNK), tl.arange(0, BLOCK_M), FIRST + tl.arange(0, WIDTH)
    places = i[:, None, None] * SIZE + r[None, :, None] * ALL + columns[None, None, :]
    return tl.load(partial + HEAD + places, mask=there[:, :, None], other=0.0, cache_modifier=".cg")


@triton.jit
def add_up(partial, segments, there, unit, SEGMENTS: tl.constexpr, CHUNK: tl.constexpr, SIZE: tl.constexpr,
           WIDE_V: tl.constexpr, REST_V: tl.constexpr, BLOCK_M: tl.constexpr,
           KEPT: tl.constexpr, HEAD: tl.constexpr):  # fmt: skip
    """acc in two pieces, m and l of all segments."""
    r = tl.arange(0, BLOCK_M)
    every = tl.arange(0, SEGMENTS)
    # (SEGMENTS, BLOCK_M)
    known = (every < segments)[:, None] & there[None, :]
    every_m = tl.load(
        partial + (every[:, None] * SIZE + r[None, :]), mask=known, other=float("-inf"), cache_modifier=".cg"
    )
    m = tl.max(every_m, 0)
    base = tl.where(m == float("-inf"), 0.0, m)
    acc_wide = tl.zeros([BLOCK_M, WIDE_V], tl.float32)
    acc_rest = acc_wide
    if REST_V > 0:
        acc_rest = tl.zeros([BLOCK_M, REST_V], tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    for first in range(0, segments, CHUNK):
        own = partial + first * SIZE
        i = tl.arange(0, CHUNK)
        mine = (first + i < segments)[:, None] & there[None, :]
        # (CHUNK, BLOCK_M), and with the widths of both pieces behind
        at = own + (i[:, None] * SIZE + r[None, :])
        m_i = tl.load(at, mask=mine, other=float("-inf"), cache_modifier=".cg")
        l_i = tl.load(at + KEPT, mask=mine, other=0.0, cache_modifier=".cg")
        wide_i = kept_acc(own, mine, 0, WIDE_V, WIDE_V + REST_V, CHUNK, SIZE, BLOCK_M, HEAD)
        weight = tl.exp2((m_i - base[None, :]) * unit)
        l += tl.sum(l_i * weight, 0)
        acc_wide += tl.sum(wide_i * weight[:, :, None], 0)
        if REST_V > 0:
            rest_i = kept_acc(own, mine, WIDE_V, REST_V, WIDE_V + REST_V, CHUNK, SIZE, BLOCK_M, HEAD)
            acc_rest += tl.sum(rest_i * weight[:, :, None], 0)
        else:
            acc_rest = acc_wide
    return acc_wide, acc_rest, m, l


@triton.jit
def finish(out, lse, stats, acc_wide, acc_rest, m, l, places, there, unit, factor, out_dim_step, plane,
           DIM_V: tl.constexpr, WIDE_V: tl.constexpr, REST_V: tl.constexpr):  # fmt: skip
    """A row that sees no key has l = 0: its acc is 0, its lse -inf, its stats (-inf, 0)."""
    out_places, lse_places, stats_places = places
    total = tl.where(l == 0.0, 1.0, l)
    share = total / factor
    scattered(
        out, acc_wide / share[:, None], acc_rest / share[:, None], out_places, there, out_dim_step,
        DIM_V, WIDE_V, REST_V,
    )  # fmt: skip
    tl.store(lse + lse_places, m * (unit * LN_2) + tl.log(total), mask=there)
    tl.store(stats + stats_places, m, mask=there)
    tl.store(stats + stats_places + plane, tl.log2(total), mask=there)
