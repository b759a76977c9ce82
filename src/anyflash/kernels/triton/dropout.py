"""Dropout's factors for a tile: the numbers of `semantics.rng`, bit for bit.

Philox4x32 with 7 rounds gives four numbers for four neighbouring keys, so a tile of M rows and N keys needs
M * N / 4 counters. The four words of a counter are put side by side again by two joins.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def kept(seed, batch, head, row, first_k, threshold, M: tl.constexpr, N: tl.constexpr):
    """(M, N): which probabilities of rows `row` (M,) and keys from `first_k`, a multiple of 4, stay."""
    group = first_k // 4 + tl.arange(0, N // 4)
    c0 = tl.broadcast_to(group[None, :], [M, N // 4])
    c1 = tl.broadcast_to(row[:, None], [M, N // 4])
    c2 = tl.zeros([M, N // 4], tl.int32) + head
    c3 = tl.zeros([M, N // 4], tl.int32) + batch
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, c2, c3, 7)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(M, N)
    return words.to(tl.uint32, bitcast=True).to(tl.int64) >= threshold
