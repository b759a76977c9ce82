"""Partial sums of the segments of 64 rows: kept, counted, added up, written. kernels/triton/combine.py here.

    M   = max m_i,  w_i = exp2((m_i - M) unit)          over the segments i, in their order
    out = sum w_i acc_i / sum w_i l_i,  lse = ln 2 (M unit + log2 sum w_i l_i)

A segment's sums are SIZE = head + kept * WIDTH_V words: m and l of `kept` rows, then acc row by row. They are
published as in kernels/triton/decode.py: all threads store, meet, and then one atomic releases and acquires
on the device; who counts last reads past the first-level cache.

Registers, in words a thread: piece * kept / 128 for the sum, and AT_ONCE times that under way.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from anyflash.kernels.gluon.hopper import meet
from anyflash.kernels.gluon.softmax import settled

# Segments whose sums are under way at once.
_AT_ONCE = gl.constexpr(4)


@gluon.jit
def row_places(rows, item, steps, group):
    """Where rows (pairs of a token and a head of the group) lie, in 64 bits: steps are (batch, head, token).

    Rows past the last are of a token that is not there; nothing is stored for them.
    """
    batch, kv_head, q_start = item
    token = q_start + rows // group
    head = kv_head * group + rows % group
    corner = batch.to(gl.int64) * steps[0]
    return corner + head.to(gl.int64) * steps[1] + token.to(gl.int64) * steps[2]


@gluon.jit
def any_odd(values, there):
    """1 if something in rows that are `there` is infinite or NaN."""
    broken = gl.where(gl.abs(values) < float("inf"), 0, 1)
    return gl.max(gl.max(gl.where(gl.expand_dims(there, 1), broken, 0), 1), 0)


@gluon.jit
def store_stats(state, rows, there, item, group, arrays, lse_steps, stats_steps, unit):
    """lse, and m and log2 l. Returns 1 / l."""
    lse, stats = arrays
    natural, m, log_sum, inverse = settled(state, unit)
    gl.store(lse + row_places(rows, item, lse_steps, group), natural, mask=there)
    places = row_places(rows, item, stats_steps[1:], group)
    gl.store(stats + places, m, mask=there)
    gl.store(stats + gl.cast(stats_steps[0], gl.int64) + places, log_sum, mask=there)
    return inverse


@gluon.jit
def store_out(out, values, rows, there, first_column, item, group, steps, DIM_V: gl.constexpr):
    """Columns from `first_column` on of some rows of out; steps are (batch, token, head, dim)."""
    LAYOUT: gl.constexpr = values.type.layout
    columns = first_column + gl.arange(0, values.shape[1], layout=gl.SliceLayout(0, LAYOUT))
    places = row_places(rows, item, (steps[0], steps[2], steps[1]), group)
    at = gl.expand_dims(places, 1) + gl.expand_dims(columns.to(gl.int64) * steps[3], 0)
    mask = gl.expand_dims(there, 1) & gl.expand_dims(columns < DIM_V, 0)
    gl.store(out + at, values.to(out.dtype.element_ty), mask=mask)


@gluon.jit
def publish(partial, counter, acc, state, count, KEPT: gl.constexpr, HEAD: gl.constexpr):
    """Store a segment's sums of `count` rows and say so. How many segments have done so before."""
    m, l = state
    O_LAYOUT: gl.constexpr = acc.type.layout
    r = gl.arange(0, 64, layout=m.type.layout)
    there = (r < count) & (r < KEPT)
    gl.store(partial + r, m, mask=there)
    gl.store(partial + (KEPT + r), l, mask=there)
    r = gl.arange(0, 64, layout=gl.SliceLayout(1, O_LAYOUT))
    columns = gl.arange(0, acc.shape[1], layout=gl.SliceLayout(0, O_LAYOUT))
    at = gl.expand_dims(HEAD + r * acc.shape[1], 1) + gl.expand_dims(columns, 0)
    # (64, WIDTH_V)
    gl.store(partial + at, acc, mask=gl.expand_dims((r < count) & (r < KEPT), 1))
    meet()
    return gl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")


@gluon.jit
def add_up(partial, segments, first_row, count, item, group, arrays, steps, unit, C: gl.constexpr,
           WIDTH_V: gl.constexpr):  # fmt: skip
    """Write the results of `count` rows from `first_row` on. 1 if sums came out infinite or NaN."""
    out, lse, stats = arrays
    out_steps, lse_steps, stats_steps = steps
    KEPT: gl.constexpr = C.kept
    PIECE: gl.constexpr = C.piece
    SIZE: gl.constexpr = C.head + C.kept * WIDTH_V
    ACROSS: gl.constexpr = 32 if PIECE >= 128 else PIECE // 4
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [32 // ACROSS, ACROSS], [4, 1], [1, 0])
    r = gl.arange(0, KEPT, layout=gl.SliceLayout(1, LAYOUT))
    columns = gl.arange(0, PIECE, layout=gl.SliceLayout(0, LAYOUT))
    there = r < count
    m = gl.full([KEPT], float("-inf"), gl.float32, layout=gl.SliceLayout(1, LAYOUT))
    l = gl.zeros([KEPT], gl.float32, layout=gl.SliceLayout(1, LAYOUT))
    for first in range(0, segments, _AT_ONCE):
        for i in gl.static_range(_AT_ONCE):
            known = there & (first + i < segments)
            # (KEPT,)
            other = gl.load(
                partial + ((first + i) * SIZE + r), mask=known, other=float("-inf"), cache_modifier=".cg"
            )
            m = gl.maximum(m, other)
    base = gl.where(m == float("-inf"), 0.0, m)
    for first in range(0, segments, _AT_ONCE):
        for i in gl.static_range(_AT_ONCE):
            known = there & (first + i < segments)
            at = partial + ((first + i) * SIZE + r)
            # (KEPT,), (KEPT,)
            other = gl.load(at, mask=known, other=float("-inf"), cache_modifier=".cg")
            more = gl.load(at + KEPT, mask=known, other=0.0, cache_modifier=".cg")
            l += more * gl.exp2((other - base) * unit)
    rows = first_row + r
    inverse = store_stats((m, l), rows, there, item, group, (lse, stats), lse_steps, stats_steps, unit)
    odd = segments * 0
    for part in range(WIDTH_V // PIECE):
        acc = gl.zeros([KEPT, PIECE], gl.float32, layout=LAYOUT)
        for first in range(0, segments, _AT_ONCE):
            for i in gl.static_range(_AT_ONCE):
                known = there & (first + i < segments)
                at = partial + (first + i) * SIZE
                other = gl.load(at + r, mask=known, other=float("-inf"), cache_modifier=".cg")
                place = C.head + part * PIECE + gl.expand_dims(r * WIDTH_V, 1) + gl.expand_dims(columns, 0)
                # (KEPT, PIECE)
                more = gl.load(at + place, mask=gl.expand_dims(known, 1), other=0.0, cache_modifier=".cg")
                acc += more * gl.expand_dims(gl.exp2((other - base) * unit), 1)
        if C.guard:
            odd = gl.maximum(odd, any_odd(acc, there))
        store_out(
            out, acc * gl.expand_dims(inverse, 1), rows, there, part * PIECE, item, group, out_steps, C.dim_v
        )
    return odd
