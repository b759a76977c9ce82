"""What a backward needs first: for every row

    delta = sum_d out dout - dlse           the part that the normalisation takes back
    dsink = -sum_rows p_sink delta          p_sink = exp(sink - lse), each head's, over batch and rows

and the small jobs around it. The sinks' sum is taken in two steps, both in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from anyflash.kernels.triton.elementary import whole
from anyflash.kernels.triton.sequences import held, span, which
from anyflash.kernels.triton.tiles import pieces

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def delta(
    out, dout, dlse, stats, written, partial, sinks, cu_seqlens_q,
    out_steps, dout_steps, dlse_steps, stats_steps, written_steps, blocks, entries, heads,
    seqlen_q, unit,
    DLSE: tl.constexpr, SINKS: tl.constexpr, PACKED: tl.constexpr,
    DIM: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program for each block of rows, head and batch entry. `written` gets delta, `partial` the
    program's share of dsink."""
    block, head, batch = which(blocks, heads, entries, cu_seqlens_q, PACKED, BLOCK)
    first_row = block * BLOCK
    q_start, q_len = tl.full([], 0, tl.int64), seqlen_q
    if PACKED:
        q_start, q_len = span(cu_seqlens_q, batch, seqlen_q)
    entry, wide_head = whole(batch), whole(head)
    out += entry * out_steps[0] + q_start * out_steps[1] + wide_head * out_steps[2]
    dout += entry * dout_steps[0] + q_start * dout_steps[1] + wide_head * dout_steps[2]
    # (BLOCK, DIM)
    o_wide, o_rest = pieces(out, first_row, q_len, out_steps[1], out_steps[3], True, DIM, WIDE, REST, BLOCK)
    d_wide, d_rest = pieces(
        dout, first_row, q_len, dout_steps[1], dout_steps[3], True, DIM, WIDE, REST, BLOCK
    )
    found = tl.sum(o_wide.to(tl.float32) * d_wide.to(tl.float32), 1)
    if REST > 0:
        found += tl.sum(o_rest.to(tl.float32) * d_rest.to(tl.float32), 1)
    rows = first_row + tl.arange(0, BLOCK)
    there = rows < q_len
    token = rows + q_start
    if DLSE:
        place = entry * dlse_steps[0] + wide_head * dlse_steps[1] + token * dlse_steps[2]
        found -= tl.load(dlse + place, mask=there, other=0.0)
    place = entry * stats_steps[1] + wide_head * stats_steps[2] + token * stats_steps[3]
    m = tl.load(stats + place, mask=there, other=0.0)
    log_sum = tl.load(stats + place + stats_steps[0], mask=there, other=0.0)
    # A row that sees nothing has no gradient, whatever the one of its lse is.
    found = tl.where((m == float("-inf")) | (log_sum == float("inf")), 0.0, found)
    place = entry * written_steps[0] + wide_head * written_steps[1] + token * written_steps[2]
    tl.store(written + place, found, mask=there)
    if SINKS:
        logit = tl.load(sinks + head).to(tl.float32) * (LOG2_E / unit)
        # A row without sink and keys has m = -inf.
        p_sink = tl.where(m == float("-inf"), 0.0, tl.exp2((logit - m) * unit - log_sum))
        share = tl.sum(tl.where(there & (p_sink != 0.0), -p_sink * found, 0.0), 0)
        tl.store(partial + tl.program_id(0), share)


@triton.jit
def sum_sinks(partial, dsinks, dsinks_step, blocks, entries, BLOCK: tl.constexpr):
    """One program for each head: the shares of all blocks and batch entries."""
    head = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    for entry in range(entries):
        row = partial + (whole(entry) * tl.num_programs(0) + head) * blocks
        for first in range(0, blocks, BLOCK):
            at = first + tl.arange(0, BLOCK)
            total += tl.load(row + at, mask=at < blocks, other=0.0)
    tl.store(dsinks + head * dsinks_step, tl.sum(total, 0))


@triton.jit
def fill_rest(
    out, lse, stats, cu_seqlens_q, out_steps, lse_steps, stats_steps, batch, total,
    DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: (heads,). Rows past the last sequence: out 0, lse -inf, stats (-inf, 0)."""
    head = tl.program_id(0).to(tl.int64)
    used = held(cu_seqlens_q, batch, total).to(tl.int32)
    columns = tl.arange(0, WIDTH)
    for first in range(used, total, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        there = rows < total
        wide = rows.to(tl.int64)
        place = wide[:, None] * out_steps[1] + columns[None, :] * out_steps[3] + head * out_steps[2]
        zeros = tl.zeros([BLOCK, WIDTH], tl.float32).to(out.dtype.element_ty)
        tl.store(out + place, zeros, mask=there[:, None] & (columns < DIM)[None, :])
        nothing = tl.full([BLOCK], float("-inf"), tl.float32)
        tl.store(lse + wide * lse_steps[2] + head * lse_steps[1], nothing, mask=there)
        place = wide * stats_steps[3] + head * stats_steps[2]
        tl.store(stats + place, nothing, mask=there)
        tl.store(stats + place + stats_steps[0], tl.zeros([BLOCK], tl.float32), mask=there)


@triton.jit
def stats_of_lse(lse, stats, lse_steps, stats_steps, size: tl.int64, heads, rows, unit, BLOCK: tl.constexpr):
    """One program for each block of rows of all heads and entries: stats that say the same as lse does. A row
    without keys has a sum without bound, so that its probabilities are 0."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < size
    row, head, entry = at % rows, at // rows % heads, at // rows // heads
    place = entry * lse_steps[0] + head * lse_steps[1] + row * lse_steps[2]
    given = tl.load(lse + place, mask=there, other=0.0)
    none = given == float("-inf")
    place = entry * stats_steps[1] + head * stats_steps[2] + row * stats_steps[3]
    tl.store(stats + place, tl.where(none, 0.0, given * (LOG2_E / unit)), mask=there)
    tl.store(stats + place + stats_steps[0], tl.where(none, float("inf"), 0.0), mask=there)


@triton.jit
def zero(base, base_steps, size: tl.int64, second, third, fourth, BLOCK: tl.constexpr):
    """One program for each block of elements of an array with four axes, of which the last three are
    given."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    place = at % fourth * base_steps[3] + at // fourth % third * base_steps[2]
    place += at // fourth // third % second * base_steps[1] + at // fourth // third // second * base_steps[0]
    zeros = tl.zeros([BLOCK], tl.float32).to(base.dtype.element_ty)
    tl.store(base + place, zeros, mask=at < size)
