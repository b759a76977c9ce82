"""The forward: out, lse and stats.

    s   = program(scale q . k)      without a program s stays q . k, and `unit` has the scale
    p   = softmax of s over keys    online, see softmax.py
    out = p . v / l                 of p with dropout: what is dropped is in l, and the rest is scaled in out

A work item is 64 * CONSUMERS rows of one head, or of several that read the same keys (heads.py). The
producer loads its q, one tile of 64 rows for each consumer, and then k and v tile by tile, from the last keys
to the first. A consumer has 64 rows. For tile j it issues S_j = q . k_j and then out += P_(j-1) . v_(j-1);
softmax j runs while the second is computed. Consumers take turns in issuing, so that one's softmax also runs
under another's products. Blocks are persistent: each takes the items i, i + programs, ...

Whatever has columns of a head is in one piece or two (pieces.py): 96 columns are 64 and 32, 192 128 and 64.

    layout      s  (64, BLOCK_N)  and acc (64, DIM_V): wgmma's, one row in 4 threads, 2 rows a thread
                p  wgmma's operand in registers: P never goes through memory
    registers   acc DIM_V / 2, s and p BLOCK_N / 2, P BLOCK_N / 4 words a thread; see schedule.py
    shared      q 64 * CONSUMERS * DIM, STAGES * BLOCK_N * (DIM + DIM_V), out 64 * CONSUMERS * DIM_V elements
                (OWN_OUT; else out is put where q was), 8 bytes a barrier

A configuration may change BLOCK_N, STAGES, CONSUMERS, TURNS, OWN_OUT, registers and the number of programs.
None of them but BLOCK_N changes a result.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from anyflash.kernels.gluon.dropout import dropped
from anyflash.kernels.gluon.heads import heads_of
from anyflash.kernels.gluon.hopper import (
    barrier_arrive,
    barrier_init,
    barrier_wait,
    barriers,
    pin,
    tma_store_wait,
    wgmma_wait,
)
from anyflash.kernels.gluon.mask import first_run, next_run, scores
from anyflash.kernels.gluon.pages import buffers_in_boxes, fill_keys
from anyflash.kernels.gluon.pieces import (
    await_last,
    await_outer,
    buffers_for,
    inner,
    load,
    operand,
    outer,
    scaled,
    sums,
    together,
)
from anyflash.kernels.gluon.pipeline import (
    await_full,
    make_turns,
    open_turns,
    pass_turn,
    release,
    ring_of,
    take_turn,
)
from anyflash.kernels.gluon.results import finish
from anyflash.kernels.gluon.sequences import box, item_at, more
from anyflash.kernels.gluon.softmax import start, step


@gluon.jit
def producer(
    shared, arrays, grid, lengths, tables, numbers, C: gl.constexpr, ME: gl.constexpr,
    SCORE: gl.constexpr, ALLOWED: gl.constexpr, TILE_CLASS: gl.constexpr,
):  # fmt: skip
    """One warp: every load."""
    q, k, v, out, lse, stats, odd, sinks, plane_rows, odd_blocks = arrays
    q_tiles, q_full, q_empty, k_ring, v_ring, out_tiles, turns, k_parts, v_parts = shared
    CONSUMERS: gl.constexpr = C.consumers
    ROWS: gl.constexpr = 64 // C.members
    BLOCK_M: gl.constexpr = ROWS * CONSUMERS
    BLOCK_N: gl.constexpr = k_ring[0][0].shape[-2]
    item = gl.program_id(0)
    taken = item * 0
    n = item * 0
    while more(item, grid):
        first_row, at, q_start, k_start = item_at(item, grid, lengths, C, BLOCK_M)
        batch, head, q_len, k_len = at
        where = (batch, head // grid[5], k_start, k_len)
        kind, high, low = first_run(first_row, at, tables, TILE_CLASS, C.masked, C.wide, BLOCK_M, BLOCK_N)
        if first_row < q_len:
            # The first k is on its way while the consumers still need the q of the item before.
            # (BLOCK_N, DIM)
            if high >= 0:
                fill_keys(k_ring, k_parts, n, k, 0, where, high * BLOCK_N, lengths[5], C)
            for i in gl.static_range(CONSUMERS):
                barrier_wait(q_empty.index(i), (taken & 1) ^ 1)
                # (64, DIM)
                rows = box(batch, head, q_start, q_len, first_row + i * ROWS, C.packed, C.members)
                load(q, rows, q_full.index(i), q_tiles, i)
            # (BLOCK_N, DIM_V)
            if high >= 0:
                fill_keys(v_ring, v_parts, n, v, 1, where, high * BLOCK_N, lengths[5], C)
                n += 1
                high -= 1
            taken += 1
        while high >= 0:
            for j in range(high - low + 1):
                first_k = (high - j) * BLOCK_N
                # (BLOCK_N, DIM), (BLOCK_N, DIM_V)
                fill_keys(k_ring, k_parts, n, k, 0, where, first_k, lengths[5], C)
                fill_keys(v_ring, v_parts, n, v, 1, where, first_k, lengths[5], C)
                n += 1
            if C.masked:
                kind, high, low = next_run(
                    low - 1, first_row, at, tables, TILE_CLASS, C.wide, BLOCK_M, BLOCK_N
                )
            else:
                high = low - 1
        item += gl.num_programs(0)


@gluon.jit
def under_product(
    q_tiles, p, acc, state, n, turn, tile, first_row, at, k_ring, v_ring, turns, tables, numbers,
    SCORE: gl.constexpr, ALLOWED: gl.constexpr, EDGE: gl.constexpr, C: gl.constexpr, ME: gl.constexpr,
    S_LAYOUT: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """Tile `tile`, use n of the rings: its scores and softmax, and the product of the tile before it."""
    scale, unit, dropout = numbers
    CONSUMERS: gl.constexpr = C.consumers
    STAGES: gl.constexpr = C.stages
    TURNS: gl.constexpr = C.turns
    await_full(k_ring, n, STAGES)
    take_turn(turns, turn, ME, TURNS)
    zero = gl.zeros([64, BLOCK_N], gl.float32, layout=S_LAYOUT)
    s = inner(q_tiles, ME, k_ring, n, zero, STAGES)
    await_full(v_ring, n - 1, STAGES)
    acc = outer(p, acc, v_ring, n - 1, STAGES)
    pass_turn(turns, ME, CONSUMERS, TURNS)
    s = wgmma_wait(len(acc), deps=(s,))
    release(k_ring, n, STAGES)
    s = scores(
        s, first_row, tile * BLOCK_N, at, scale, tables, SCORE, ALLOWED, C.identity, C.masked, EDGE, False,
        64, BLOCK_N, S_LAYOUT, C.members,
    )  # fmt: skip
    weights, state, shrink = step(s, state, unit)
    if C.dropout:
        weights = dropped(weights, first_row, tile * BLOCK_N, at, dropout, False, False)
    weights = pin(weights)
    # Its phase has ended; the basic block ends here, and with it what ptxas may move.
    await_full(v_ring, n - 1, STAGES)
    acc, weights = await_outer(acc, weights)
    release(v_ring, n - 1, STAGES)
    return operand(weights.to(q_tiles[0].dtype), acc), scaled(acc, shrink), state


@gluon.jit
def consumer(
    shared, arrays, grid, lengths, tables, numbers, C: gl.constexpr, ME: gl.constexpr,
    SCORE: gl.constexpr, ALLOWED: gl.constexpr, TILE_CLASS: gl.constexpr,
):  # fmt: skip
    """One warpgroup: rows ME * 64 to ME * 64 + 63 of every item."""
    q, k, v, out, lse, stats, odd, sinks, plane_rows, odd_blocks = arrays
    q_tiles, q_full, q_empty, k_ring, v_ring, out_tiles, turns, k_parts, v_parts = shared
    CONSUMERS: gl.constexpr = C.consumers
    STAGES: gl.constexpr = C.stages
    TURNS: gl.constexpr = C.turns
    ROWS: gl.constexpr = 64 // C.members
    BLOCK_M: gl.constexpr = ROWS * CONSUMERS
    BLOCK_N: gl.constexpr = k_ring[0][0].shape[-2]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    scale, unit, dropout = numbers
    item = gl.program_id(0)
    # Items taken, items that had keys, uses of the rings.
    taken, started, n = item * 0, item * 0, item * 0
    open_turns(ME, CONSUMERS, TURNS)
    while more(item, grid):
        block_row, at, q_start, k_start = item_at(item, grid, lengths, C, BLOCK_M)
        batch, head, q_len, k_len = at
        first_row = block_row + ME * ROWS
        if block_row < q_len:
            acc = sums(out)
            heads = heads_of(head, C.members, gl.SliceLayout(1, S_LAYOUT))
            state = start(sinks, heads, unit, C.sinks, 64, gl.SliceLayout(1, S_LAYOUT))
            kind, high, low = first_run(block_row, at, tables, TILE_CLASS, C.masked, C.wide, BLOCK_M, BLOCK_N)
            barrier_wait(q_full.index(ME), taken & 1)
            if high >= 0:
                # The first tile has no product to run under, and is the one with the last key.
                await_full(k_ring, n, STAGES)
                zero = gl.zeros([64, BLOCK_N], gl.float32, layout=S_LAYOUT)
                s = wgmma_wait(0, deps=(inner(q_tiles, ME, k_ring, n, zero, STAGES),))
                release(k_ring, n, STAGES)
                s = scores(
                    s, first_row, high * BLOCK_N, at, scale, tables, SCORE, ALLOWED, C.identity, C.masked,
                    True, False, 64, BLOCK_N, S_LAYOUT, C.members,
                )  # fmt: skip
                weights, state, shrink = step(s, state, unit)
                if C.dropout:
                    weights = dropped(weights, first_row, high * BLOCK_N, at, dropout, False, False)
                p = operand(weights.to(q_tiles[0].dtype), acc)
                n += 1
                started += 1
                high -= 1
                while high >= 0:
                    count = high - low + 1
                    if C.masked:
                        for j in range(gl.where(kind == 1, count, 0)):
                            p, acc, state = under_product(
                                q_tiles, p, acc, state, n, n - started, high - j, first_row, at, k_ring,
                                v_ring, turns, tables, numbers, SCORE, ALLOWED, True, C, ME,
                                S_LAYOUT, BLOCK_N,
                            )  # fmt: skip
                            n += 1
                        count = gl.where(kind == 1, 0, count)
                    for j in range(count):
                        p, acc, state = under_product(
                            q_tiles, p, acc, state, n, n - started, high - j, first_row, at, k_ring,
                            v_ring, turns, tables, numbers, SCORE, ALLOWED, False, C, ME,
                            S_LAYOUT, BLOCK_N,
                        )  # fmt: skip
                        n += 1
                    if C.masked:
                        kind, high, low = next_run(
                            low - 1, block_row, at, tables, TILE_CLASS, C.wide, BLOCK_M, BLOCK_N
                        )
                    else:
                        high = low - 1
                await_full(v_ring, n - 1, STAGES)
                acc = await_last(outer(p, acc, v_ring, n - 1, STAGES))
                release(v_ring, n - 1, STAGES)
            if C.own_out:
                barrier_arrive(q_empty.index(ME), count=1)
            finish(
                acc, state, at, q_start, first_row, arrays, grid, (scale, unit), out_tiles, C, ME, dropout[3]
            )
            if not C.own_out:
                tma_store_wait(0)
                barrier_arrive(q_empty.index(ME), count=1)
            taken += 1
        item += gl.num_programs(0)
    tma_store_wait(0)


_NUMBERS = [
    "plane_rows", "odd_blocks", "blocks", "heads", "planes", "section", "entries", "group",
    "seqlen_q", "seqlen_k", "seed_low", "seed_high", "threshold",
]  # fmt: skip


@gluon.jit(do_not_specialize=_NUMBERS)
def forward(
    q, k, v, out, q_rest, k_rest, v_rest, out_rest,
    lse, stats, odd, sinks, cu_seqlens_q, cu_seqlens_k, seqused_k, cache, tables,
    plane_rows, odd_blocks, blocks, heads, planes, section, entries, group,
    seqlen_q, seqlen_k, scale, unit, seed_low, seed_high, threshold, keep_scale,
    SCORE: gl.constexpr, ALLOWED: gl.constexpr, TILE_CLASS: gl.constexpr,
    C: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Persistent: `blocks` blocks of rows in each of `planes` planes, shared out to the programs.

    q, k, v, out are descriptors (sequences.py), of boxes of 64 rows, BLOCK_N keys, BLOCK_N keys and 64 rows;
    *_rest of boxes with the columns behind, None for a head in one piece.
    With C.chunk keys lie in a `cache`, and k and v are boxes of its chunks and panels (pages.py).
    lse is contiguous, (planes, plane_rows), and stats (2, planes, plane_rows). C.guard: `odd` (planes,
    odd_blocks) has a number for each 64 rows, as the careful launch of kernels/triton/forward.py reads it
    with blocks of 64: whether sums came out infinite or NaN. The last four numbers are dropout.py's.
    """
    CONSUMERS: gl.constexpr = C.consumers
    STAGES: gl.constexpr = C.stages
    q, k, v, out = together(q, q_rest), together(k, k_rest), together(v, v_rest), together(out, out_rest)
    q_tiles = buffers_for(q, CONSUMERS)
    q_full = barriers(CONSUMERS)
    q_empty = barriers(CONSUMERS)
    for i in gl.static_range(CONSUMERS):
        barrier_init(q_full.index(i), count=1)
        barrier_init(q_empty.index(i), count=1)
    if C.chunk > 0:
        k_parts, k_tiles = buffers_in_boxes(k, q, C.block_n, STAGES)
        v_parts, v_tiles = buffers_in_boxes(v, out, C.block_n, STAGES)
    else:
        k_parts, v_parts = None, None
        k_tiles, v_tiles = buffers_for(k, STAGES), buffers_for(v, STAGES)
    k_ring = ring_of(k_tiles, STAGES, CONSUMERS)
    v_ring = ring_of(v_tiles, STAGES, CONSUMERS)
    turns = make_turns(CONSUMERS, C.turns)
    if C.own_out:
        out_tiles = buffers_for(out, CONSUMERS)
    else:
        out_tiles = q_tiles
    shared = (q_tiles, q_full, q_empty, k_ring, v_ring, out_tiles, turns, k_parts, v_parts)
    arrays = (q, k, v, out, lse, stats, odd, sinks, plane_rows, odd_blocks)
    grid = (blocks, heads, planes, section, entries, group)
    lengths = (cu_seqlens_q, cu_seqlens_k, seqused_k, seqlen_q, seqlen_k, cache)
    numbers = (scale, unit, (seed_low, seed_high, threshold, keep_scale))
    # Functions are handed over in place: they cannot be kept in a tuple.
    if CONSUMERS == 2:
        gl.warp_specialize([
            (consumer, (shared, arrays, grid, lengths, tables, numbers, C, 0, SCORE, ALLOWED, TILE_CLASS)),
            (consumer, (shared, arrays, grid, lengths, tables, numbers, C, 1, SCORE, ALLOWED, TILE_CLASS)),
            (producer, (shared, arrays, grid, lengths, tables, numbers, C, 0, SCORE, ALLOWED, TILE_CLASS)),
        ], [4, 1], [C.consumer_registers, C.producer_registers])  # fmt: skip
    else:
        gl.warp_specialize([
            (consumer, (shared, arrays, grid, lengths, tables, numbers, C, 0, SCORE, ALLOWED, TILE_CLASS)),
            (consumer, (shared, arrays, grid, lengths, tables, numbers, C, 1, SCORE, ALLOWED, TILE_CLASS)),
            (consumer, (shared, arrays, grid, lengths, tables, numbers, C, 2, SCORE, ALLOWED, TILE_CLASS)),
            (producer, (shared, arrays, grid, lengths, tables, numbers, C, 0, SCORE, ALLOWED, TILE_CLASS)),
        ], [4, 4, 1], [C.consumer_registers, C.consumer_registers, C.producer_registers])  # fmt: skip
