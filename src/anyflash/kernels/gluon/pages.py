"""Keys of a cache, tile by tile, by TMA.

Key j of sequence b lies at slot s = j + leftpad[b]: row s % PAGE of page block_table[b, s // PAGE]. To TMA a
cache is its rows, (row, head, dim), pages STEP rows apart, placed in windows as packed sequences are
(sequences.py), so that the hardware's own bounds end a box behind the last key of the sequence: whatever
stands there, or on a page that is no longer somebody's, is never read, and v is 0 there.

    chunk       ROWS = gcd(PAGE, BLOCK_N) keys, which lie in one page; of sequences of one page BLOCK_N
    panel       COLUMNS = 128 bytes of each row, the widest that TMA and wgmma exchange units in

A tile is loaded by chunks and panels, each box into a buffer of its own. In memory a tile of wgmma's is its
panels one behind the other, each panel its rows, exchanged in patterns of 8 rows: so the boxes

    [(stage * PANELS + panel) * CHUNKS + chunk]  (ROWS, COLUMNS)      ROWS a multiple of 8

are, bit for bit, the ring [stage] (BLOCK_N, PANELS * COLUMNS) that consumers multiply from. tests/gpu checks
this against the compiler's layouts, and the emulator keeps such buffers as the hardware would.

    cache   (block_table, step of a sequence, step of a page, pages, STEP of k, STEP of v, leftpad, capacity)

    block_table  (sequences, pages of one) int32 or int64, or None: then sequence b is page b (PAGE = 0)
    leftpad      (sequences,), or None for zeros; only for sequences of one page
    capacity     slots of a sequence

Memory: that of the ring. Registers: the producer's, which looks one chunk ahead. A configuration may change
what it does for the forward and for decoding; chunks follow from it and from the page, and change no result.

Nobody has read these numbers: entries of the table are looked up only where they hold a key, and are held
inside the cache. Rows are in 32 bits, which `launch_pages` sees to.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from anyflash.kernels.gluon.hopper import barrier_expect, recast, tma_load
from anyflash.kernels.gluon.pieces import fill
from anyflash.kernels.gluon.pipeline import await_empty, ring_of
from anyflash.kernels.gluon.sequences import FAR, box

_FAR = gl.constexpr(FAR)


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
def boxes_and_tiles(box, WIDTH: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr):
    """The boxes of a ring, and the same memory as STAGES tiles of (BLOCK_N, WIDTH)."""
    ROWS: gl.constexpr = box.block_type.shape[-2]
    COLUMNS: gl.constexpr = box.block_type.shape[-1]
    COUNT: gl.constexpr = STAGES * (WIDTH // COLUMNS) * (BLOCK_N // ROWS)
    parts = gl.allocate_shared_memory(box.dtype, [COUNT] + box.block_type.shape, box.layout)
    return parts, recast(parts, STAGES, BLOCK_N, WIDTH)


@gluon.jit
def make_page_ring(box, BLOCK_N: gl.constexpr, WIDTH: gl.constexpr, STAGES: gl.constexpr,
                   READERS: gl.constexpr):  # fmt: skip
    """A ring of tiles (BLOCK_N, WIDTH), as pipeline.py has them, and the boxes that it consists of."""
    parts, tiles = boxes_and_tiles(box, WIDTH, BLOCK_N, STAGES)
    return ring_of(tiles, STAGES, READERS), parts


@gluon.jit
def buffers_in_boxes(boxes, like, BLOCK_N: gl.constexpr, STAGES: gl.constexpr):
    """For each piece of a head (pieces.py), as many columns as `like` has, its boxes and its tiles."""
    parts, tiles = boxes_and_tiles(boxes[0], like[0].block_type.shape[-1], BLOCK_N, STAGES)
    parts, tiles = (parts,), (tiles,)
    if len(boxes) > 1:
        rest_parts, rest_tiles = boxes_and_tiles(boxes[1], like[1].block_type.shape[-1], BLOCK_N, STAGES)
        parts, tiles = parts + (rest_parts,), tiles + (rest_tiles,)
    return parts, tiles


@gluon.jit
def _load_panels(box, window, FIRST: gl.constexpr, barrier, parts, stage, chunk, CHUNKS: gl.constexpr,
                 STAGES: gl.constexpr):  # fmt: skip
    """The panels of one chunk and of one piece of the head, whose columns are those from FIRST on."""
    PANELS: gl.constexpr = parts.shape[0] // (STAGES * CHUNKS)
    # (ROWS, COLUMNS)
    for panel in gl.static_range(PANELS):
        place = window + (FIRST + panel * box.block_type.shape[-1],)
        tma_load(box, place, barrier, parts.index((stage * PANELS + panel) * CHUNKS + chunk))


@gluon.jit
def fill_from_pages(
    ring, parts, n, box, step, cache, batch, head, first_slot, first_key, k_len,
    PAGE: gl.constexpr, BLOCK_N: gl.constexpr, WIDTH: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Producer: load keys first_key to first_key + BLOCK_N - 1 into the stage of use n, as soon as its
    readers have left it. `step` is that of the pages of this box."""
    tiles, full, empty = ring
    fill_pieces_from_pages(
        ((tiles,), full, empty), (parts,), n, (box,), step, cache, batch, head, first_slot, first_key, k_len,
        PAGE, BLOCK_N, STAGES,
    )  # fmt: skip


@gluon.jit
def fill_pieces_from_pages(
    ring, parts, n, boxes, step, cache, batch, head, first_slot, first_key, k_len,
    PAGE: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The same of all pieces of a head."""
    ROWS: gl.constexpr = boxes[0].block_type.shape[-2]
    BYTES: gl.constexpr = parts[0].shape[0] // STAGES * boxes[0].block_type.nbytes
    REST_BYTES: gl.constexpr = (
        parts[1].shape[0] // STAGES * boxes[1].block_type.nbytes if len(boxes) > 1 else 0
    )
    CHUNKS: gl.constexpr = BLOCK_N // ROWS
    tiles, full, empty = ring
    WIDE: gl.constexpr = tiles[0].shape[-1]
    stage = n % STAGES
    await_empty(ring, n, STAGES)
    barrier_expect(full.index(stage), BYTES + REST_BYTES)
    start, there = chunk_at(batch, first_slot, first_key, k_len, step, cache, PAGE, ROWS)
    # k_len is never negative, which ptxas does not know: unrolled, the loop takes too many registers.
    for chunk in range(CHUNKS + gl.minimum(k_len, 0)):
        window = (_FAR, start + there, head, _FAR - there)
        # Its page is looked up while this chunk is on its way.
        first_key += ROWS
        start, there = chunk_at(batch, first_slot, first_key, k_len, step, cache, PAGE, ROWS)
        _load_panels(boxes[0], window, 0, full.index(stage), parts[0], stage, chunk, CHUNKS, STAGES)
        if len(boxes) > 1:
            _load_panels(boxes[1], window, WIDE, full.index(stage), parts[1], stage, chunk, CHUNKS, STAGES)


@gluon.jit
def fill_keys(ring, parts, n, boxes, WHICH: gl.constexpr, where, first_key, cache, C: gl.constexpr):
    """Producer: load a tile of k (WHICH 0) or v (1) from a cache, or where keys follow each other. `where` is
    (batch, key head, first key, number of keys)."""
    batch, head, k_start, k_len = where
    if C.chunk > 0:
        fill_pieces_from_pages(
            ring, parts, n, boxes, cache[4 + WHICH], cache, batch, head, k_start, first_key, k_len, C.page,
            C.block_n, C.stages,
        )  # fmt: skip
    else:
        fill(ring, n, boxes, box(batch, head, k_start, k_len, first_key, C.packed), C.stages)
