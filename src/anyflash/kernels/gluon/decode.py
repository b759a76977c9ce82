"""Attention over a KV cache, and of few queries over many keys: kernels/triton/decode.py for Hopper.

    s, m, p, l, acc        as in forward.py, over the keys of one segment

Rows of a tile are pairs of a query token and a head of one key head's group, r = token * group + member, so
that every key is read once for all heads of a group: a block has all rows of a sequence, 64 for each of its
one or two consumers, and one segment of its keys. How keys are cut, what a mask leaves at both ends, and how
segments are added up, is as there: segments.py; nothing depends on the batch, the grid or the device.

The producer loads k and v tile by tile, from any cache that pages.py knows: rows behind the last key are 0.
Consumers load their rows of q by pointers, as these are scattered over heads, and put them where wgmma reads
them, once. Then for each tile s = q . k, softmax, acc += p . v, one behind the other: counted at the rates of
an H200's units, products and exponentials of 64 rows take less than half of the time that the tile's bytes
do, so no overlap of theirs is sought; other stages are under way meanwhile.

    layout      s (64, BLOCK_N) and acc (64, DIM_V): wgmma's; p its operand in registers
    registers   schedule_decode.py
    shared      64 * CONSUMERS * DIM, STAGES * BLOCK_N * (DIM + DIM_V) elements, 8 bytes a barrier

Where a mask or a score program may hide keys (GUARD), `odd` says of each 64 rows whether their sums came out
infinite or NaN; the portable kernel then does those again, carefully.

A configuration may change BLOCK_N, STAGES and registers; a result depends on BLOCK_N and on the segments.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from anyflash.kernels.gluon.hopper import fence, meet, shared_layout, wgmma, wgmma_wait
from anyflash.kernels.gluon.mask import along
from anyflash.kernels.gluon.pages import fill_from_pages, make_page_ring
from anyflash.kernels.gluon.pipeline import await_full, release, tile_of
from anyflash.kernels.gluon.segments import add_up, any_odd, publish, row_places, store_out, store_stats
from anyflash.kernels.gluon.sequences import held, keys_of
from anyflash.kernels.gluon.softmax import step


@gluon.jit
def rows_of(batch, cu_seqlens_q, seqlen_q, total_q, PACKED: gl.constexpr):
    """First row and number of rows. Nobody has looked at them: they are held inside the array."""
    q_start = gl.full([], 0, gl.int32)
    q_len = gl.full([], 0, gl.int32) + seqlen_q
    if PACKED:
        q_start = held(cu_seqlens_q, batch, total_q)
        q_len = gl.maximum(held(cu_seqlens_q, batch + 1, total_q) - q_start, 0)
        q_len = gl.minimum(q_len, seqlen_q)
    return q_start, q_len


@gluon.jit
def class_of(first_tile, last_tile, at, tables, TILE_CLASS: gl.constexpr, BLOCK_M: gl.constexpr,
             BLOCK_N: gl.constexpr):  # fmt: skip
    """The mask's class of all rows of a sequence and tiles first_tile to last_tile taken together."""
    batch, head, q_len, k_len = at
    shift = k_len - q_len
    last_k = gl.minimum((last_tile + 1) * BLOCK_N, k_len) - 1
    return TILE_CLASS(
        batch, head, q_len * 0, q_len - 1, shift, k_len - 1, first_tile * BLOCK_N, last_k, q_len, k_len,
        tables, BLOCK_M, BLOCK_N,
    )  # fmt: skip


@gluon.jit
def reach(tiles, at, tables, TILE_CLASS: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """First tile that is not known to be empty, and the end of the last.

    Of tiles that are empty together each is, and so is any part of them: both ends are found by halving.
    """
    low, high = tiles * 0, tiles
    while low < high:
        middle = (low + high) // 2
        empty = class_of(tiles * 0, middle, at, tables, TILE_CLASS, BLOCK_M, BLOCK_N) == 0
        low = gl.where(empty, middle + 1, low)
        high = gl.where(empty, high, middle)
    first = low
    high = tiles
    while low < high:
        middle = (low + high) // 2
        empty = class_of(middle, tiles - 1, at, tables, TILE_CLASS, BLOCK_M, BLOCK_N) == 0
        low = gl.where(empty, low, middle + 1)
        high = gl.where(empty, middle, high)
    return first, low


@gluon.jit
def segments_of(tiles, SEGMENTS: gl.constexpr, LEAST: gl.constexpr):
    """Tiles of a segment, and how many segments there are: at most SEGMENTS, of at least LEAST tiles each."""
    each = gl.maximum(gl.cdiv(tiles, SEGMENTS), LEAST)
    return each, gl.maximum(gl.cdiv(tiles, each), 1)


@gluon.jit
def is_read(tile, at, tables, TILE_CLASS: gl.constexpr, SKIPS: gl.constexpr, BLOCK_M: gl.constexpr,
            BLOCK_N: gl.constexpr):  # fmt: skip
    """Is there a pair in a tile? Without SKIPS it is taken for granted."""
    read = tile >= 0
    if SKIPS:
        read = class_of(tile, tile, at, tables, TILE_CLASS, BLOCK_M, BLOCK_N) != 0
    return read


@gluon.jit
def producer(
    shared, arrays, item, steps, tables, numbers, C: gl.constexpr, ME: gl.constexpr,
    SCORE: gl.constexpr, ALLOWED: gl.constexpr, TILE_CLASS: gl.constexpr,
):  # fmt: skip
    """One warp: k and v."""
    BLOCK_M: gl.constexpr = 64 * C.consumers
    q_tiles, k_ring, v_ring, k_boxes, v_boxes = shared
    k, v, cache = arrays[0], arrays[1], arrays[2]
    batch, kv_head, q_start, group, first_slot, tiles, place, at = item
    n = batch * 0
    for tile in range(tiles[0], tiles[1]):
        if is_read(tile, at, tables, TILE_CLASS, C.skips, BLOCK_M, C.block_n):
            first_k = tile * C.block_n
            # (BLOCK_N, DIM), (BLOCK_N, DIM_V)
            fill_from_pages(k_ring, k_boxes, n, k, cache[4], cache, batch, kv_head, first_slot, first_k,
                            at[3], C.page, C.block_n, C.width, C.stages)  # fmt: skip
            fill_from_pages(v_ring, v_boxes, n, v, cache[5], cache, batch, kv_head, first_slot, first_k,
                            at[3], C.page, C.block_n, C.width_v, C.stages)  # fmt: skip
            n += 1


@gluon.jit
def take_queries(q, buffer, first_row, count, place, group, q_steps, DIM: gl.constexpr, WIDTH: gl.constexpr):
    """Put 64 rows of q where wgmma reads them, zeros behind the last row and the last column."""
    ACROSS: gl.constexpr = WIDTH // 8
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 // ACROSS, ACROSS], [4, 1], [1, 0])
    rows = first_row + gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT))
    columns = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, LAYOUT))
    places = row_places(rows, place, (q_steps[0], q_steps[2], q_steps[1]), group)
    at = gl.expand_dims(places, 1) + gl.expand_dims(columns.to(gl.int64) * q_steps[3], 0)
    there = gl.expand_dims(rows < count, 1) & gl.expand_dims(columns < DIM, 0)
    # (64, DIM)
    buffer.store(gl.load(q + at, mask=there, other=0.0))
    fence()
    meet()


@gluon.jit
def attend(
    sums, n, tile, pairs, shared, at, tables, numbers, C: gl.constexpr, ME: gl.constexpr,
    SCORE: gl.constexpr, ALLOWED: gl.constexpr, S_LAYOUT: gl.constexpr, O_LAYOUT: gl.constexpr,
):  # fmt: skip
    """Add tile `tile`, use n of the rings."""
    STAGES: gl.constexpr = C.stages
    BLOCK_N: gl.constexpr = C.block_n
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    q_tiles, k_ring, v_ring = shared
    acc, m, l = sums
    token, head = pairs
    batch, _, q_len, k_len = at
    scale, unit = numbers
    zero = gl.zeros([64, BLOCK_N], gl.float32, layout=S_LAYOUT)
    await_full(k_ring, n, STAGES)
    s = wgmma(q_tiles.index(ME), tile_of(k_ring, n, BLOCK_N, C.width, STAGES).permute((1, 0)), zero,
              use_acc=False, is_async=True)  # fmt: skip
    s = wgmma_wait(0, deps=(s,))
    release(k_ring, n, STAGES)
    key = along(tile * BLOCK_N, BLOCK_N, 1, S_LAYOUT)
    position = token + (k_len - q_len)
    if not C.identity:
        s = SCORE(s * scale, batch, head, token, position, key, q_len, k_len, tables)
    seen = key < k_len
    if C.masked:
        seen = seen & ALLOWED(batch, head, token, position, key, q_len, k_len, tables)
    weights, state, shrink = step(gl.where(seen, s, float("-inf")), (m, l), unit)
    p = gl.convert_layout(weights.to(q_tiles.dtype), P_LAYOUT)
    acc = acc * gl.expand_dims(gl.convert_layout(shrink, gl.SliceLayout(1, O_LAYOUT)), 1)
    await_full(v_ring, n, STAGES)
    acc = wgmma(p, tile_of(v_ring, n, BLOCK_N, C.width_v, STAGES), acc, is_async=True)
    acc = wgmma_wait(0, deps=(acc,))
    release(v_ring, n, STAGES)
    m, l = state
    return acc, m, l


@gluon.jit
def consumer(
    shared, arrays, item, steps, tables, numbers, C: gl.constexpr, ME: gl.constexpr,
    SCORE: gl.constexpr, ALLOWED: gl.constexpr, TILE_CLASS: gl.constexpr,
):  # fmt: skip
    """One warpgroup: rows ME * 64 to ME * 64 + 63 of the sequence."""
    q_tiles, k_ring, v_ring, k_boxes, v_boxes = shared
    k, v, cache, q, out, lse, stats, partial, counters, odd, sinks = arrays
    q_steps, out_steps, lse_steps, stats_steps = steps
    batch, kv_head, q_start, group, first_slot, tiles, place, at = item
    segment, segments, instance, parts = place
    BLOCK_M: gl.constexpr = 64 * C.consumers
    WIDTH_V: gl.constexpr = C.width_v
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.block_n, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH_V, 16])
    unit = numbers[1]
    count = at[2] * group
    first_row = ME * 64
    rows = first_row + gl.arange(0, 64, layout=gl.SliceLayout(1, S_LAYOUT))
    token = gl.expand_dims(rows // group, 1)
    head = gl.expand_dims(kv_head * group + rows % group, 1)
    where = (batch, kv_head, q_start)
    # A program without a segment has no tile, and leaves nothing behind.
    if segment < segments:
        take_queries(q, q_tiles.index(ME), first_row, count, where, group, q_steps, C.dim, C.width)
    acc = gl.zeros([64, WIDTH_V], gl.float32, layout=O_LAYOUT)
    m = gl.full([64], float("-inf"), gl.float32, layout=gl.SliceLayout(1, S_LAYOUT))
    l = gl.zeros([64], gl.float32, layout=gl.SliceLayout(1, S_LAYOUT))
    if C.sinks:
        if segment == 0:
            logit = gl.load(sinks + (kv_head * group + rows % group), mask=rows < count, other=float("-inf"))
            m = logit.to(gl.float32) * (1.4426950408889634 / unit)
            l = gl.where(m == float("-inf"), 0.0, l + 1.0)
    n = batch * 0
    for tile in range(tiles[0], tiles[1]):
        if is_read(tile, at, tables, TILE_CLASS, C.skips, BLOCK_M, C.block_n):
            acc, m, l = attend(
                (acc, m, l), n, tile, (token, head), (q_tiles, k_ring, v_ring), at, tables, numbers,
                C, ME, SCORE, ALLOWED, S_LAYOUT, O_LAYOUT,
            )  # fmt: skip
            n += 1
    if (segment < segments) & (first_row < count):
        slot = instance * C.consumers + ME
        o_rows = first_row + gl.arange(0, 64, layout=gl.SliceLayout(1, O_LAYOUT))
        broken = segments * 0
        last = segments == 1
        if last:
            if C.guard:
                broken = any_odd(acc, o_rows < count)
            inverse = store_stats(
                (m, l), rows, rows < count, where, group, (lse, stats), lse_steps, stats_steps, unit
            )
            inverse = gl.expand_dims(gl.convert_layout(inverse, gl.SliceLayout(1, O_LAYOUT)), 1)
            store_out(out, acc * inverse, o_rows, o_rows < count, 0, where, group, out_steps, C.dim_v)
        else:
            SIZE: gl.constexpr = C.head + C.kept * WIDTH_V
            sums = partial + slot.to(gl.int64) * parts * SIZE
            arrived = publish(
                sums + segment * SIZE, counters + slot, acc, (m, l), count - first_row, C.kept, C.head
            )
            last = arrived == segments - 1
            if last:
                gl.store(counters + slot, 0)
                broken = add_up(
                    sums, segments, first_row, count - first_row, where, group, (out, lse, stats),
                    (out_steps, lse_steps, stats_steps), unit, C, WIDTH_V,
                )  # fmt: skip
        if C.guard:
            if last:
                gl.store(odd + (instance * 2 + ME), broken)


_NUMBERS = ["parts", "heads", "group", "seqlen_q", "seqlen_k", "total_q", "least_rows", "most_rows"]


@gluon.jit(do_not_specialize=_NUMBERS)
def decode(
    q, k, v, out, lse, stats, partial, counters, odd, sinks, cu_seqlens_q, seqused_k, cache, tables,
    q_steps, out_steps, lse_steps, stats_steps,
    parts, heads, group, seqlen_q, seqlen_k, total_q, least_rows, most_rows, scale, unit,
    SCORE: gl.constexpr, ALLOWED: gl.constexpr, TILE_CLASS: gl.constexpr,
    C: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """One program for each segment (of `parts`), key head and sequence.

    k and v are descriptors, and `cache` is a tuple, as pages.py has them. Only sequences with least_rows to
    most_rows rows are answered for, at most 64 for each consumer. Steps are in elements: (batch, token, head,
    dim) of q and out, of lse (batch, head, row), of stats (plane, batch, head, row). partial and counters are
    as kernels/triton/decode.py has them, for 64 rows each; odd is (sequences, key heads, 2).
    """
    CONSUMERS: gl.constexpr = C.consumers
    BLOCK_M: gl.constexpr = 64 * CONSUMERS
    heads_kv = heads // group
    segment = gl.program_id(0) % parts
    instance = gl.program_id(0) // parts
    kv_head = instance % heads_kv
    batch = instance // heads_kv
    q_start, q_len = rows_of(batch, cu_seqlens_q, seqlen_q, total_q, C.packed)
    first_slot, k_len = keys_of(batch, seqused_k, seqlen_k, cache, C.used, C.leftpad)
    count = q_len * group
    at = (batch, kv_head * group, q_len, k_len)
    mine = (count >= least_rows) & (count <= most_rows)
    first_tile, end_tile = k_len * 0, gl.where(mine, gl.cdiv(k_len, C.block_n), 0)
    if C.trim:
        first_tile, end_tile = reach(end_tile, at, tables, TILE_CLASS, BLOCK_M, C.block_n)
    each, segments = segments_of(end_tile - first_tile, C.segments, C.least)
    segments = gl.where(mine, segments, 0)
    first_tile += segment * each
    end_tile = gl.minimum(first_tile + each, end_tile)
    tiles, place = (first_tile, end_tile), (segment, segments, instance, parts)
    item = (batch, kv_head, q_start, group, first_slot, tiles, place, at)
    q_tiles = gl.allocate_shared_memory(
        q.dtype.element_ty, [CONSUMERS, 64, C.width], shared_layout([64, C.width], q.dtype.element_ty)
    )
    k_ring, k_boxes = make_page_ring(k, C.block_n, C.width, C.stages, CONSUMERS)
    v_ring, v_boxes = make_page_ring(v, C.block_n, C.width_v, C.stages, CONSUMERS)
    shared = (q_tiles, k_ring, v_ring, k_boxes, v_boxes)
    arrays = (k, v, cache, q, out, lse, stats, partial, counters, odd, sinks)
    steps = (q_steps, out_steps, lse_steps, stats_steps)
    numbers = (scale, unit)
    # Functions are handed over in place: they cannot be kept in a tuple.
    if CONSUMERS == 1:
        gl.warp_specialize([
            (consumer, (shared, arrays, item, steps, tables, numbers, C, 0, SCORE, ALLOWED, TILE_CLASS)),
            (producer, (shared, arrays, item, steps, tables, numbers, C, 0, SCORE, ALLOWED, TILE_CLASS)),
        ], [1], [C.producer_registers])  # fmt: skip
    else:
        gl.warp_specialize([
            (consumer, (shared, arrays, item, steps, tables, numbers, C, 0, SCORE, ALLOWED, TILE_CLASS)),
            (consumer, (shared, arrays, item, steps, tables, numbers, C, 1, SCORE, ALLOWED, TILE_CLASS)),
            (producer, (shared, arrays, item, steps, tables, numbers, C, 0, SCORE, ALLOWED, TILE_CLASS)),
        ], [4, 1], [C.consumer_registers, C.producer_registers])  # fmt: skip
