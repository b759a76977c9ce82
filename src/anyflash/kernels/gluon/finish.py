"""dq from the float32 sums of the REDUCE form of backward.py: times scale, in dq's type. A Triton kernel.

A program owns 64 rows of one head. Rows of no sequence stay as they are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from anyflash.kernels.triton.elementary import whole
from anyflash.kernels.triton.sequences import span, which
from anyflash.kernels.triton.tiles import finite


@triton.jit
def finish(
    sums, dq, odd, cu_seqlens_q, sums_steps, dq_steps, blocks, entries, heads, seqlen_q, scale,
    GUARD: tl.constexpr, PACKED: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program for each block of rows, head and batch entry, numbered as those of the portable dq kernel:
    `odd` says, with GUARD, whether the block's sums came out infinite or NaN. Steps are (batch, token, head,
    dim)."""
    block, head, batch = which(blocks, heads, entries, cu_seqlens_q, PACKED, BLOCK)
    q_start, q_len = tl.full([], 0, tl.int64), seqlen_q
    if PACKED:
        q_start, q_len = span(cu_seqlens_q, batch, seqlen_q)
    else:
        block = blocks - 1 - block
    rows = block * BLOCK + tl.arange(0, BLOCK)
    columns = tl.arange(0, WIDTH)
    token = (q_start + rows)[:, None]
    there = (rows < q_len)[:, None] & (columns < DIM)[None, :]
    corner = whole(batch) * sums_steps[0] + whole(head) * sums_steps[2]
    # (BLOCK, WIDTH)
    total = tl.load(sums + corner + token * sums_steps[1] + columns[None, :], mask=there, other=0.0)
    corner = whole(batch) * dq_steps[0] + whole(head) * dq_steps[2]
    at = corner + token * dq_steps[1] + columns[None, :] * dq_steps[3]
    tl.store(dq + at, (total * scale).to(dq.dtype.element_ty), mask=there)
    if GUARD:
        tl.store(odd + tl.program_id(0), tl.max(tl.max(tl.where(finite(total), 0, 1), 1), 0))
