"""What comes before attention over a KV cache, in one launch: three kinds of programs, none needs another.

    counts    keys of each sequence: its slots in use and the new ones, without the left padding
    keys      new keys and values into the pages; a key is turned by its rotary position
    queries   turned queries into scratch

A turned pair is (a cos - b sin, a sin + b cos), as in semantics/rotary.py: float32, rounded once. Every
element loads its partner, too, and the table's number of its pair; that costs a second read of what is in the
first-level cache, and no shuffle.

Lengths, page numbers and positions have been read by nobody before. Each is held inside what it is about; a
slot beyond the capacity and a page outside the cache are not written.

A program has BLOCK rows of one head, WIDTH elements wide, the next power of two: BLOCK * WIDTH / threads
words a thread for each of row, partner, cos and sin. A configuration may change BLOCK and warps.
"""

from __future__ import annotations

import triton
import triton.language as tl

from anyflash.kernels.triton.elementary import whole
from anyflash.kernels.triton.sequences import held

# Sequences of a program that counts.
COUNTED = tl.constexpr(128)


@triton.jit
def rows_of(cu_seqlens, entry, each, total):
    """Rows of a sequence: `each`, or what the array says."""
    found = entry * 0 + each
    if cu_seqlens is not None:
        start = held(cu_seqlens, entry, total)
        found = tl.maximum(held(cu_seqlens, entry + 1, total) - start, 0)
    return found


@triton.jit
def owner(rows, cu_seqlens, each, batch, total, halvings):
    """The sequence of each of `rows`, the row's number in it, and whether it belongs to it at all."""
    if cu_seqlens is None:
        # Rows past the last, which a block may have, are looked up as if they were of the last sequence.
        entry = tl.minimum(rows // each, batch - 1)
        number = rows - entry * each
        belongs = rows < total
    else:
        low, high = rows * 0, rows * 0 + batch
        for _ in range(halvings):
            middle = (low + high) // 2
            before = held(cu_seqlens, middle, total) <= rows
            low = tl.where(before, middle, low)
            high = tl.where(before, high, middle)
        entry = low
        number = rows - held(cu_seqlens, entry, total)
        belongs = (number >= 0) & (rows < held(cu_seqlens, entry + 1, total)) & (rows < total)
    return entry, number, belongs


@triton.jit
def tile(base, places, dim_step, reads, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """(rows, WIDTH) at `places`; 0 past DIM, and where a row is not to be read."""
    columns = tl.arange(0, WIDTH)
    at = places[:, None] + whole(columns)[None, :] * dim_step
    return tl.load(base + at, mask=reads[:, None] & (columns < DIM)[None, :], other=0.0)


@triton.jit
def put(target, places, dim_step, values, there, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Store (rows, DIM) at `places`."""
    columns = tl.arange(0, WIDTH)
    at = places[:, None] + whole(columns)[None, :] * dim_step
    tl.store(target + at, values, mask=there[:, None] & (columns < DIM)[None, :])


@triton.jit
def turned(
    x, base, places, dim_step, position, there, cos, sin, cos_row, cos_pair, sin_row, sin_pair, known,
    INTERLEAVED: tl.constexpr, PAIRS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The tile x of rows at `places`, those that are `there` turned by their position; `known` positions are.
    Steps one by one: Triton 3.6 loses a step of 1 in a tuple within a tuple."""
    columns = tl.arange(0, WIDTH)
    if INTERLEAVED:
        second = columns % 2 == 1
        pair, partner = columns // 2, columns + 1 - 2 * (columns % 2)
    else:
        second = columns >= PAIRS
        pair = tl.where(second, columns - PAIRS, columns)
        partner = tl.where(second, columns - PAIRS, columns + PAIRS)
    turns = there[:, None] & (columns < 2 * PAIRS)[None, :]
    # (rows, 2 PAIRS)
    at = places[:, None] + whole(partner)[None, :] * dim_step
    mine, other = x.to(tl.float32), tl.load(base + at, mask=turns, other=0.0).to(tl.float32)
    # (rows, PAIRS), each twice
    row = tl.minimum(tl.maximum(position, 0), known - 1)[:, None]
    number = whole(pair)[None, :]
    c = tl.load(cos + (row * cos_row + number * cos_pair), mask=turns, other=0.0).to(tl.float32)
    s = tl.load(sin + (row * sin_row + number * sin_pair), mask=turns, other=0.0).to(tl.float32)
    moved = tl.where(second[None, :], mine * c + other * s, mine * c - other * s)
    return tl.where(turns, moved.to(x.dtype), x)


@triton.jit
def slots_used(seqlens, entry, capacity):
    """Slots in use before the call; all of them where nothing is said."""
    found = entry * 0 + capacity
    if seqlens is not None:
        found = held(seqlens, entry, capacity)
    return found


@triton.jit
def count(program, counts, seqlens, leftpad, cu_seqlens_k, batch, each_new, total_new, capacity):
    """Keys of COUNTED sequences."""
    entry = whole(program) * COUNTED + tl.arange(0, COUNTED)
    there = entry < batch
    entry = tl.where(there, entry, 0)
    old = slots_used(seqlens, entry, capacity)
    used = tl.minimum(old + rows_of(cu_seqlens_k, entry, each_new, total_new), capacity)
    if leftpad is not None:
        used -= held(leftpad, entry, old)
    tl.store(counts + tl.where(there, entry, 0), used.to(tl.int32), mask=there)


@triton.jit
def append_rows(
    program, new, cache, new_steps, cache_steps, cu_seqlens_k, seqlens, block_table, table_steps, positions,
    position_steps, cos, sin, cos_steps, sin_steps, known, blocks, batch, each_new, total_new, halvings,
    page_size, num_pages, capacity,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, PAIRS: tl.constexpr,
    DIM: tl.constexpr, DIM_V: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK new rows of one key head."""
    new_k, new_v = new
    cache_k, cache_v = cache
    k_steps, v_steps = new_steps
    cache_k_steps, cache_v_steps = cache_steps
    rows = whole(program % blocks) * BLOCK + tl.arange(0, BLOCK)
    head = whole(program // blocks)
    entry, number, there = owner(rows, cu_seqlens_k, each_new, batch, total_new, halvings)
    # Packed arrays have no batch axis: its step is 0.
    token = number
    if cu_seqlens_k is not None:
        token = rows
    slot = slots_used(seqlens, entry, capacity) + number
    there = there & (slot < capacity)
    slot = tl.where(there, slot, 0)
    column = slot // page_size
    page = entry
    if block_table is not None:
        at = entry * table_steps[0] + column * table_steps[1]
        page = tl.load(block_table + at, mask=there, other=-1).to(tl.int64)
    there = there & (page >= 0) & (page < num_pages)
    row = slot - column * page_size
    k_base = new_k + head * k_steps[2]
    places = entry * k_steps[0] + token * k_steps[1]
    # (BLOCK, DIM)
    k = tile(k_base, places, k_steps[3], there, DIM, WIDTH)
    if ROTARY:
        position = slot
        if positions is not None:
            at = entry * position_steps[0] + token * position_steps[1]
            position = tl.load(positions + at, mask=there, other=0).to(tl.int64)
        k = turned(
            k, k_base, places, k_steps[3], position, there, cos, sin, cos_steps[0], cos_steps[1],
            sin_steps[0], sin_steps[1], known, INTERLEAVED, PAIRS, WIDTH,
        )  # fmt: skip
    written = page * cache_k_steps[0] + row * cache_k_steps[1]
    put(cache_k + head * cache_k_steps[2], written, cache_k_steps[3], k, there, DIM, WIDTH)
    # (BLOCK, DIM_V)
    places = entry * v_steps[0] + token * v_steps[1]
    v = tile(new_v + head * v_steps[2], places, v_steps[3], there, DIM_V, WIDTH_V)
    written = page * cache_v_steps[0] + row * cache_v_steps[1]
    put(cache_v + head * cache_v_steps[2], written, cache_v_steps[3], v, there, DIM_V, WIDTH_V)


@triton.jit
def turn_queries(
    program, q, scratch, q_steps, heads, cu_seqlens_q, cu_seqlens_k, seqlens, positions, position_steps,
    cos, sin, cos_steps, sin_steps, known, blocks, batch, each_q, total_q, each_new, total_new, halvings,
    capacity,
    NEW: tl.constexpr, INTERLEAVED: tl.constexpr, PAIRS: tl.constexpr,
    DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK queries of one head. Those of no sequence are copied as they are."""
    rows = whole(program % blocks) * BLOCK + tl.arange(0, BLOCK)
    head = whole(program // blocks)
    entry, number, there = owner(rows, cu_seqlens_q, each_q, batch, total_q, halvings)
    reads = rows < total_q
    token = number
    if cu_seqlens_q is not None:
        token = rows
    places = tl.where(reads, entry, 0) * q_steps[0] + token * q_steps[1]
    # Queries end where the new keys do, in slots and in positions that are given.
    behind = rows_of(cu_seqlens_k, entry, each_new, total_new) - rows_of(cu_seqlens_q, entry, each_q, total_q)
    last = number + behind
    if positions is None:
        position = slots_used(seqlens, entry, capacity) + last
    else:
        given = there
        at = entry * position_steps[0] + token * position_steps[1]
        if NEW:
            # Before the first new key of the sequence there is none; the last one is never passed.
            given = there & (last >= 0)
            if cu_seqlens_k is not None:
                last += held(cu_seqlens_k, entry, total_new)
            at = entry * position_steps[0] + last * position_steps[1]
        position = tl.load(positions + at, mask=given, other=0).to(tl.int64)
    base = q + head * q_steps[2]
    # (BLOCK, DIM)
    x = tile(base, places, q_steps[3], reads, DIM, WIDTH)
    x = turned(
        x, base, places, q_steps[3], position, there, cos, sin, cos_steps[0], cos_steps[1], sin_steps[0],
        sin_steps[1], known, INTERLEAVED, PAIRS, WIDTH,
    )  # fmt: skip
    put(scratch, (rows * heads + head) * DIM, 1, x, reads, DIM, WIDTH)


@triton.jit
def append(
    counts, new, cache, q, scratch, cu_seqlens_q, cu_seqlens_k, seqlens, leftpad, block_table, positions,
    cos, sin, cos_steps, sin_steps, known, new_steps, cache_steps, q_steps, table_steps, position_steps,
    counting, blocks_new, heads_new, blocks_q, heads_q, batch, each_q, total_q, each_new, total_new, halvings,
    page_size, num_pages, capacity,
    COUNT: tl.constexpr, NEW: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
    PAIRS: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: `counting` programs that count, blocks_new * heads_new that append, blocks_q * heads_q that turn
    queries.

    `new`, `cache` and their steps are pairs, of keys and of values; steps are in elements, (batch or page,
    token or slot, head, dim). `positions` are those of new keys, or without any of queries, and lie
    (batch, token). Rows are dense, `each_*` a sequence, or packed with cumulative lengths. cos and sin know
    `known` positions.
    """
    program = tl.program_id(0)
    if COUNT:
        if program < counting:
            count(program, counts, seqlens, leftpad, cu_seqlens_k, batch, each_new, total_new, capacity)
    if NEW:
        first = program - counting
        if (first >= 0) & (first < blocks_new * heads_new):
            append_rows(
                first, new, cache, new_steps, cache_steps, cu_seqlens_k, seqlens, block_table, table_steps,
                positions, position_steps, cos, sin, cos_steps, sin_steps, known, blocks_new, batch, each_new,
                total_new, halvings, page_size, num_pages, capacity, ROTARY, INTERLEAVED, PAIRS, DIM, DIM_V,
                WIDTH, WIDTH_V, BLOCK,
            )  # fmt: skip
    if ROTARY:
        first_q = program - counting - blocks_new * heads_new
        if first_q >= 0:
            turn_queries(
                first_q, q, scratch, q_steps, heads_q, cu_seqlens_q, cu_seqlens_k, seqlens, positions,
                position_steps, cos, sin, cos_steps, sin_steps, known, blocks_q, batch, each_q, total_q,
                each_new, total_new, halvings, capacity, NEW, INTERLEAVED, PAIRS, DIM, WIDTH, BLOCK,
            )  # fmt: skip
