"""Work items, where their rows and keys lie, and the coordinates of TMA boxes.

A work item is one block of BLOCK_M rows of one head of one batch entry. Items are numbered so that blocks
that start together share keys and long ones come first: planes (head, batch entry) are taken in sections
whose keys fit the L2 cache, and in a section all last blocks come first, which see most under a causal mask.

An array is (batch, head, token, dim) to TMA, or packed (token, head, dim) with two axes in front of it that
place a window: tokens then have _FAR places of which a sequence takes the last ones, so that the hardware's
own bounds end a box where the sequence ends. With y = start + length and x = _FAR - length + row the address
is _FAR * (2**34 - step) + y * step + x * step = (start + row) * step, modulo 2**64 bytes, as 2**30 * 2**34
elements of 2 bytes are 0. Rows past the end, of any array, are read as zeros and not written.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

FAR, WRAP, UNBOUNDED = 2**30, 2**34, 0x7FFF0000
_FAR = gl.constexpr(FAR)


@gluon.jit
def held(lengths, at, greatest):
    """Entry `at` of an array of lengths, (n,) int32 or int64, from 0 to `greatest`: nobody has read them
    before, and a wrong one must not lead outside."""
    return gl.minimum(gl.maximum(gl.load(lengths + at).to(gl.int64), 0), greatest).to(gl.int32)


@gluon.jit
def rows_of(batch, cu_seqlens_q, seqlen_q, PACKED: gl.constexpr):
    """First row and number of rows of a sequence."""
    if PACKED:
        q_start = held(cu_seqlens_q, batch, seqlen_q)
        q_len = gl.maximum(held(cu_seqlens_q, batch + 1, seqlen_q) - q_start, 0)
    else:
        q_start = gl.full([], 0, gl.int32)
        q_len = gl.full([], 0, gl.int32) + seqlen_q
    return q_start, q_len


@gluon.jit
def keys_of(batch, seqused_k, seqlen_k, cache, USED: gl.constexpr, PADDED: gl.constexpr):
    """First slot and number of keys of a sequence in a cache (pages.py), at most seqlen_k of them, which are
    not more than it has slots."""
    k_start = gl.full([], 0, gl.int32)
    k_len = gl.full([], 0, gl.int32) + seqlen_k
    if PADDED:
        leftpad, capacity = cache[6], cache[7]
        k_start = held(leftpad, batch, capacity)
        k_len = gl.minimum(capacity - k_start, k_len)
    if USED:
        k_len = held(seqused_k, batch, k_len)
    return k_start, k_len


@gluon.jit
def sequence(batch, cu_seqlens_q, cu_seqlens_k, seqused_k, seqlen_q, seqlen_k,
             PACKED: gl.constexpr, USED: gl.constexpr):  # fmt: skip
    """First row and number of rows, first key and number of keys, in 32 bits. Packed, `seqlen_*` are the
    totals."""
    q_start, q_len = rows_of(batch, cu_seqlens_q, seqlen_q, PACKED)
    if PACKED:
        k_start = held(cu_seqlens_k, batch, seqlen_k)
        k_len = gl.maximum(held(cu_seqlens_k, batch + 1, seqlen_k) - k_start, 0)
    else:
        k_start = gl.full([], 0, gl.int32)
        k_len = gl.full([], 0, gl.int32) + seqlen_k
    if USED:
        k_len = held(seqused_k, batch, k_len)
    return q_start, q_len, k_start, k_len


@gluon.jit
def work(item, blocks, heads, planes, section, entries, cu_seqlens,
         PACKED: gl.constexpr, BLOCK: gl.constexpr):  # fmt: skip
    """Block, head and batch entry of an item; `planes` of `blocks` each, `section` planes side by side.

    Packed, nobody has read how long the sequences are. Sequence s is given the blocks from cu_seqlens[s] //
    BLOCK + s on, which are enough, and `blocks` counts those of all; the sequence of a block is found by
    halving. A block past the end of its sequence has nothing to do, nor has one that no sequence is found
    for, which wrong lengths can bring about.
    """
    first = item // (section * blocks) * section
    rest = item - first * blocks
    width = gl.minimum(section, planes - first)
    block = blocks - 1 - rest // width
    plane = first + rest % width
    head = plane % heads
    entry = plane // heads
    if PACKED:
        low, high = entry * 0, entries + entry * 0
        while high - low > 1:
            middle = (low + high) // 2
            start = held(cu_seqlens, middle, blocks * BLOCK) // BLOCK + middle
            low = gl.where(start <= block, middle, low)
            high = gl.where(start <= block, high, middle)
        block -= held(cu_seqlens, low, blocks * BLOCK) // BLOCK + low
        block = gl.where(block < 0, blocks, block)
        entry = low
    return block, head, entry


@gluon.jit
def box(batch, head, start, length, row, PACKED: gl.constexpr, MEMBERS: gl.constexpr = 1):
    """Coordinates of the box from `row` of a sequence on, of one head or of several (heads.py)."""
    if PACKED:
        coordinates = (_FAR, start + length, head, _FAR - length + row, 0)
    elif MEMBERS > 1:
        coordinates = (batch, head, row, 0, 0)
    else:
        coordinates = (batch, head, row, 0)
    return coordinates


@gluon.jit
def unknown_zero(n):
    """0, for n from 0 on. A compiler that does not know the sign of n takes what this is added to for another
    with each n, and works out again what follows from it instead of keeping that in registers from
    the start of the kernel to its end."""
    return n >> 31


@gluon.jit
def more(item, grid):
    """Is there such an item?"""
    return item < (grid[0] + unknown_zero(item)) * grid[2]


@gluon.jit
def item_at(item, grid, lengths, C: gl.constexpr, BLOCK_M: gl.constexpr):
    """First row of an item, `at` (batch, head, q_len, k_len), and first row and key of its sequence."""
    blocks, heads, planes, section, entries, group = grid
    cu_seqlens_q, cu_seqlens_k, seqused_k, seqlen_q, seqlen_k, cache = lengths
    late = unknown_zero(item)
    seqlen_q += late
    seqlen_k += late
    block, head, batch = work(
        item, blocks + late, heads, planes, section, entries, cu_seqlens_q, C.packed, BLOCK_M
    )
    if C.chunk > 0:
        q_start, q_len = rows_of(batch, cu_seqlens_q, seqlen_q, C.packed)
        k_start, k_len = keys_of(batch, seqused_k, seqlen_k, cache, C.used, C.padded)
        if C.packed:
            # A sequence of fewer rows has a kernel of its own.
            q_len = gl.where(q_len > C.fewest // group, q_len, 0)
    else:
        q_start, q_len, k_start, k_len = sequence(
            batch, cu_seqlens_q, cu_seqlens_k, seqused_k, seqlen_q, seqlen_k, C.packed, C.used
        )
    return block * BLOCK_M, (batch, head, q_len, k_len), q_start, k_start
