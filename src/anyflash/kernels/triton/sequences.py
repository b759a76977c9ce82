"""Where a batch entry's rows and keys lie, and the classes of its tiles.

Lengths on a GPU have been read by nobody before a kernel reads them here. Each is held inside the array that
it is about, 0 <= start <= end <= total, so that a wrong one leads to a wrong result and never outside.
"""

from __future__ import annotations

import triton
import triton.language as tl

from anyflash.kernels.triton.elementary import whole


@triton.jit
def held(lengths, at, greatest):
    """Entry `at` of an array of lengths, (n,) int32 or int64, in 64 bits, from 0 to `greatest`."""
    return tl.minimum(tl.maximum(tl.load(lengths + at).to(tl.int64), 0), whole(greatest))


@triton.jit
def span(cu_seqlens, batch, total):
    """First row of a packed sequence, in 64 bits for addresses, and its number of rows."""
    start = held(cu_seqlens, batch, total)
    return start, tl.maximum(held(cu_seqlens, batch + 1, total) - start, 0).to(tl.int32)


@triton.jit
def sequence(batch, cu_seqlens_q, cu_seqlens_k, seqused_k, seqlen_q, seqlen_k,
             PACKED: tl.constexpr, USED: tl.constexpr):  # fmt: skip
    """First row and number of rows, first key and number of keys; firsts in 64 bits, for addresses.
    Packed, `seqlen_*` are the totals."""
    if PACKED:
        q_start, q_len = span(cu_seqlens_q, batch, seqlen_q)
        k_start, k_len = span(cu_seqlens_k, batch, seqlen_k)
    else:
        q_start = tl.full([], 0, tl.int64)
        k_start = tl.full([], 0, tl.int64)
        q_len = tl.full([], 0, tl.int32) + seqlen_q
        k_len = tl.full([], 0, tl.int32) + seqlen_k
    if USED:
        k_len = held(seqused_k, batch, k_len).to(tl.int32)
    return q_start, q_len, k_start, k_len


@triton.jit
def which(blocks, heads, batch, cu_seqlens, PACKED: tl.constexpr, BLOCK: tl.constexpr):
    """This program's block, head and batch entry, of a grid with one axis: the others hold 65535 at most.

    Packed, nobody has read how long the sequences are. Sequence s is given the blocks from cu_seqlens[s] //
    BLOCK + s on, which are enough, and `blocks` counts those of all; the sequence of a block is found by
    halving. A block past the end of its sequence has nothing to do, nor has one that no sequence is found
    for, which wrong lengths can bring about.
    """
    place = tl.program_id(0)
    block = place % blocks
    head = place // blocks % heads
    entry = place // (blocks * heads)
    if PACKED:
        low, high = entry * 0, batch + entry * 0
        while high - low > 1:
            middle = (low + high) // 2
            first = held(cu_seqlens, middle, blocks * BLOCK).to(tl.int32) // BLOCK + middle
            low = tl.where(first <= block, middle, low)
            high = tl.where(first <= block, high, middle)
        block -= held(cu_seqlens, low, blocks * BLOCK).to(tl.int32) // BLOCK + low
        block = tl.where(block < 0, blocks, block)
        entry = low
    return block, head, entry


@triton.jit
def class_of(first_row, first_k, at, tables, TILE_CLASS: tl.constexpr, MASK: tl.constexpr,
             BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """2 (full): all of the tile's pairs exist and are allowed; 1 (partial): some may be; 0 (empty): none.

    `at` is (batch, head, q_len, k_len).
    """
    batch, head, q_len, k_len = at
    last_row = tl.minimum(first_row + BLOCK_M, q_len) - 1
    last_k = tl.minimum(first_k + BLOCK_N, k_len) - 1
    kind = tl.where(first_k + BLOCK_N <= k_len, 2, 1)
    if MASK:
        shift = k_len - q_len
        kind = tl.minimum(
            kind,
            TILE_CLASS(
                batch, head, first_row, last_row, first_row + shift, last_row + shift, first_k, last_k,
                q_len, k_len, tables, BLOCK_M, BLOCK_N,
            ),
        )  # fmt: skip
    return tl.where((first_row < q_len) & (first_k < k_len), kind, 0)


@triton.jit
def run_over_keys(tile, tiles, first_row, at, tables, TILE_CLASS: tl.constexpr, MASK: tl.constexpr,
                  BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """The class of tile `tile` of keys, and the end of the run of tiles of that class."""
    kind = class_of(first_row, tile * BLOCK_N, at, tables, TILE_CLASS, MASK, BLOCK_M, BLOCK_N)
    end = tile + 1
    alike = end < tiles
    while alike:
        next_kind = class_of(first_row, end * BLOCK_N, at, tables, TILE_CLASS, MASK, BLOCK_M, BLOCK_N)
        end += tl.where(next_kind == kind, 1, 0)
        alike = (next_kind == kind) & (end < tiles)
    return kind, end


@triton.jit
def run_over_rows(tile, tiles, first_k, at, tables, TILE_CLASS: tl.constexpr, MASK: tl.constexpr,
                  BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """The same along the rows; there the last tile is partial if it has an edge."""
    kind = _class_of_rows(tile * BLOCK_M, first_k, at, tables, TILE_CLASS, MASK, BLOCK_M, BLOCK_N)
    end = tile + 1
    alike = end < tiles
    while alike:
        next_kind = _class_of_rows(end * BLOCK_M, first_k, at, tables, TILE_CLASS, MASK, BLOCK_M, BLOCK_N)
        end += tl.where(next_kind == kind, 1, 0)
        alike = (next_kind == kind) & (end < tiles)
    return kind, end


@triton.jit
def _class_of_rows(first_row, first_k, at, tables, TILE_CLASS: tl.constexpr, MASK: tl.constexpr,
                   BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    kind = class_of(first_row, first_k, at, tables, TILE_CLASS, MASK, BLOCK_M, BLOCK_N)
    return tl.where(first_row + BLOCK_M <= at[2], kind, tl.minimum(kind, 1))
