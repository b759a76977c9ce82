"""What 64 rows of the forward leave behind: out, lse, stats, and whether sums came out infinite or NaN.

    out  = acc / l                  through shared memory and TMA, which ends where the sequence ends
    lse  = ln 2 (m unit + log2 l),  stats = (m, log2 l)

Shared: the buffer of out, 64 * DIM_V elements, in pieces. The next item's store waits for this one's.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from anyflash.kernels.gluon.heads import pairs, report
from anyflash.kernels.gluon.hopper import fence, tma_store_wait
from anyflash.kernels.gluon.pieces import any_odd, put, scaled, store
from anyflash.kernels.gluon.sequences import box, unknown_zero
from anyflash.kernels.gluon.softmax import settled


@gluon.jit
def finish(acc, state, at, q_start, first_row, arrays, grid, numbers, out_tiles, C: gl.constexpr,
           ME: gl.constexpr, factor=None):  # fmt: skip
    """Store the results of 64 rows, out times `factor`. TMA leaves out what lies past the end of the sequence
    or of a row."""
    q, k, v, out, lse, stats, odd, sinks, plane_rows, odd_blocks = arrays
    scale, unit = numbers
    batch, head, q_len, k_len = at
    natural, m, log_sum, inverse = settled(state, unit)
    if C.members > 1:
        LAYOUT: gl.constexpr = m.type.layout
        rows, heads = pairs(first_row, head, C.members, LAYOUT)
        plane = batch * (grid[1] * C.members) + heads
    else:
        rows = first_row + gl.arange(0, 64, layout=m.type.layout)
        plane = head if C.packed else batch * grid[1] + head
    there = rows < q_len
    late = unknown_zero(first_row)
    place = plane.to(gl.int64) * (plane_rows + late) + q_start + rows
    gl.store(lse + place, natural, mask=there)
    gl.store(stats + place, m, mask=there)
    gl.store(stats + place + gl.cast(grid[2] * C.members + late, gl.int64) * plane_rows, log_sum, mask=there)
    if C.guard:
        block = first_row // (64 // C.members)
        if C.members > 1:
            report(odd, any_odd(acc), plane, block, odd_blocks, first_row < q_len, C.members)
        else:
            if C.packed:
                block += q_start // 64 + batch
            else:
                block = odd_blocks - 1 - block
            gl.store(odd + plane * odd_blocks + block, any_odd(acc), mask=first_row < q_len)
    if factor is not None:
        inverse *= factor
    values = scaled(acc, inverse)
    # The last item's store has to be done with the buffer.
    tma_store_wait(0)
    put(values, out_tiles, ME)
    fence()
    store(out, box(batch, head, q_start, q_len, first_row, C.packed, C.members), out_tiles, ME)
