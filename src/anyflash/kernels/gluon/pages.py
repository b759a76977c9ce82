"""Keys of a cache, tile by tile, by TMA.

Key j of sequence b lies at slot s = j + leftpad[b]: row s % PAGE of page block_table[b, s // PAGE]. To TMA a
cache is its rows, (row, head, dim), pages STEP rows apart, placed in windows as packed sequences are
(sequences.py), so that the hardware's own bounds end a box behind the last key of the sequence: whatever
stands there, or on a page that is no longer somebody's, is never read, and v is 0 there.

    chunk       ROWS = gcd(PAGE, BLOCK_N) keys, which lie in one page; without pages, ROWS = BLOCK_N
    panel       COLUMNS = 128 bytes of each row, the widest that TMA and wgmma exchange units in

A tile is loaded by chunks and panels, each box into a buffer of its own. In memory a tile of wgmma's is its
panels one behind the other, each panel its rows, exchanged in patterns of 8 rows: so the boxes

    [(stage * PANELS + panel) * CHUNKS + chunk]  (ROWS, COLUMNS)      ROWS a multiple of 8

are, bit for bit, the ring [stage] (BLOCK_N, PANELS * COLUMNS) that consumers multiply from. tests/gpu checks
this against the compiler's layouts, and the emulator keeps such buffers as the hardware would.

    cache   (block_table, step of a sequence, step of a page, pages, STEP of k, STEP of v, leftpad, capacity)

    block_table  (sequences, pages of one) int32 or int64, or None: then sequence b is page b (PAGE = 0)
    leftpad      (sequences,), or None for zeros; only with PAGE = 0
    capacity     slots of a sequence

Nobody has read these numbers: entries of the table are looked up only where they hold a key, and are held
inside the cache. Rows are in 32 bits, which `launch_pages` sees to.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from anyflash.kernels.gluon.hopper import (
    barrier_expect,
    barrier_init,
    barrier_wait,
    barriers,
    recast,
    tma_load,
)
from anyflash.kernels.gluon.sequences import FAR, held

_FAR = gl.constexpr(FAR)


@gluon.jit
def keys_of(batch, seqused_k, seqlen_k, cache, USED: gl.constexpr, PADDED: gl.constexpr):
    """First slot and number of keys of a sequence, at most seqlen_k of them."""
    leftpad, capacity = cache[6], cache[7]
    k_start = gl.full([], 0, gl.int32)
    if PADDED:
        k_start = held(leftpad, batch, capacity)
    k_len = gl.minimum(capacity - k_start, seqlen_k)
    if USED:
        k_len = held(seqused_k, batch, k_len)
    return k_start, k_len


@gluon.jit
def chunk_at(batch, first_slot, first_key, k_len, step, cache, PAGE: gl.constexpr, ROWS: gl.constexpr):
    """Row of the cache that holds key `first_key`, and how many of the ROWS rows from there hold keys."""
    there = gl.minimum(gl.maximum(k_len - first_key, 0), ROWS)
    slot = first_slot + first_key
    page = batch
    if PAGE > 0:
        # A chunk behind the last key may lie behind the table, too.
        entry = batch.to(gl.int64) * cache[1] + (slot // PAGE).to(gl.int64) * cache[2]
        page = gl.load(cache[0] + entry, mask=there > 0, other=0).to(gl.int64)
        slot = slot % PAGE
    page = gl.minimum(gl.maximum(page, 0), cache[3] - 1).to(gl.int32)
    return page * step + slot, there


@gluon.jit
def make_page_ring(descriptor, BLOCK_N: gl.constexpr, DIM: gl.constexpr, STAGES: gl.constexpr,
                   READERS: gl.constexpr):  # fmt: skip
    """A ring of tiles (BLOCK_N, DIM), as pipeline.py has them, and the boxes that it consists of."""
    ROWS: gl.constexpr = descriptor.block_type.shape[-2]
    COLUMNS: gl.constexpr = descriptor.block_type.shape[-1]
    boxes = gl.allocate_shared_memory(
        descriptor.dtype,
        [STAGES * (DIM // COLUMNS) * (BLOCK_N // ROWS)] + descriptor.block_type.shape,
        descriptor.layout,
    )
    full = barriers(STAGES)
    empty = barriers(STAGES)
    for i in gl.static_range(STAGES):
        barrier_init(full.index(i), count=1)
        barrier_init(empty.index(i), count=READERS)
    return (recast(boxes, STAGES, BLOCK_N, DIM), full, empty), boxes


@gluon.jit
def fill_from_pages(
    ring, boxes, n, descriptor, step, cache, batch, head, first_slot, first_key, k_len,
    PAGE: gl.constexpr, BLOCK_N: gl.constexpr, DIM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Producer: load keys first_key to first_key + BLOCK_N - 1 into the stage of use n, as soon as its
    readers have left it."""
    ROWS: gl.constexpr = descriptor.block_type.shape[-2]
    COLUMNS: gl.constexpr = descriptor.block_type.shape[-1]
    PANELS: gl.constexpr = DIM // COLUMNS
    CHUNKS: gl.constexpr = BLOCK_N // ROWS
    buffers, full, empty = ring
    stage = n % STAGES
    barrier_wait(empty.index(stage), ((n // STAGES) & 1) ^ 1)
    barrier_expect(full.index(stage), PANELS * CHUNKS * descriptor.block_type.nbytes)
    for chunk in range(CHUNKS):
        start, there = chunk_at(batch, first_slot, first_key + chunk * ROWS, k_len, step, cache, PAGE, ROWS)
        # (ROWS, COLUMNS)
        for panel in gl.static_range(PANELS):
            tma_load(
                descriptor, (_FAR, start + there, head, _FAR - there, panel * COLUMNS), full.index(stage),
                boxes.index((stage * PANELS + panel) * CHUNKS + chunk),
            )  # fmt: skip
