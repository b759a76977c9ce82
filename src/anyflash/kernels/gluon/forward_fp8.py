"""The forward of 8-bit floats: out, lse and stats.

    s   = program(scale q . k)      without a program s stays q . k, and `unit` has the scale; of a program of
                                    factors by batch and head alone, such as descale_q's, one number is made
    p   = 2 ** 8 exp(s - max s)     in e4m3: what exceeds 2 ** -14 has its three bits of fraction
    out = factor p . v / l          l has the 2 ** 8, too

As forward.py, but for v, which has to lie along the keys (transpose.py). One warpgroup, the mover, loads by
TMA and turns: while tile n of k and v is on its way it turns v of tile n - 1 into a ring of its own, from
which the consumers multiply.

Tensor cores keep about 14 bits of a running sum of 8-bit products. So the product of a tile starts from 0,
and is added to acc in float32:  acc = acc shrink_(j-1) + P_(j-1) . v_(j-1),  one multiply-add.

    layout      s  (64, BLOCK_N), acc and the product of a tile (64, DIM_V): wgmma's
                p  wgmma's operand in registers, where the scores were
    registers   acc DIM_V / 2, a tile's product DIM_V / 2, s and p BLOCK_N / 2, P BLOCK_N / 8 words a thread
    shared      q 128 * DIM, STAGES * BLOCK_N * (DIM + 2 DIM_V), out 2 * 128 * DIM_V bytes, 8 a barrier

A configuration may change BLOCK_N, STAGES, TURNS, registers and the number of programs. None of them but
BLOCK_N changes a result.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from anyflash.kernels.gluon.hopper import (
    barrier_arrive,
    barrier_expect,
    barrier_init,
    barrier_wait,
    barriers,
    fence,
    pin,
    tma_load,
    tma_store_wait,
    wgmma,
    wgmma_wait,
)
from anyflash.kernels.gluon.mask import first_run, next_run, scores
from anyflash.kernels.gluon.pieces import buffers_for, by_row, fill, matrix
from anyflash.kernels.gluon.pipeline import (
    await_empty,
    await_full,
    make_turns,
    open_turns,
    pass_turn,
    release,
    ring_of,
    take_turn,
    tile_of,
)
from anyflash.kernels.gluon.results import finish
from anyflash.kernels.gluon.sequences import box, item_at
from anyflash.kernels.gluon.softmax import start, step
from anyflash.kernels.gluon.transpose import narrow, operand, turn, turned_layout

# As kernels/triton/narrow.py: WEIGHT_UNIT is 2 ** LIFT.
LIFT = gl.constexpr(8)
CONSUMERS = gl.constexpr(2)


@gluon.jit
def turn_tile(v_ring, turned_ring, n, BLOCK_N: gl.constexpr, DIM_V: gl.constexpr, STAGES: gl.constexpr):
    """Use n of v's ring to use n of the ring of turned tiles."""
    await_full(v_ring, n, STAGES)
    await_empty(turned_ring, n, STAGES)
    tiles, full, empty = turned_ring
    turn(v_ring[0][0].index(n % STAGES), tiles.index(n % STAGES), BLOCK_N, DIM_V)
    fence()
    barrier_arrive(full.index(n % STAGES), count=1)
    release(v_ring, n, STAGES)


@gluon.jit
def mover(
    shared, arrays, grid, lengths, tables, numbers, C: gl.constexpr, ME: gl.constexpr,
    SCORE: gl.constexpr, ALLOWED: gl.constexpr, TILE_CLASS: gl.constexpr, FACTOR: gl.constexpr,
):  # fmt: skip
    """One warpgroup: every load, and v turned."""
    q, k, v, out, lse, stats, odd, sinks, plane_rows, odd_blocks = arrays
    q_tiles, q_full, q_empty, k_ring, v_ring, turned_ring, out_tiles, turns = shared
    STAGES: gl.constexpr = C.stages
    BLOCK_M: gl.constexpr = 64 * CONSUMERS
    BLOCK_N: gl.constexpr = k.block_type.shape[-2]
    DIM_V: gl.constexpr = v.block_type.shape[-1]
    items = grid[0] * grid[2]
    item = gl.program_id(0)
    # Items taken, uses of the rings, and whether the last of v is still to be turned.
    taken, n, owed = item * 0, item * 0, item * 0
    while item < items:
        first_row, at, q_start, k_start = item_at(item, grid, lengths, C, BLOCK_M)
        batch, head, q_len, k_len = at
        kv_head = head // grid[5]
        kind, high, low = first_run(first_row, at, tables, TILE_CLASS, C.masked, C.wide, BLOCK_M, BLOCK_N)
        if first_row < q_len:
            # The first k is on its way while the consumers still need the q of the item before.
            # (BLOCK_N, DIM)
            if high >= 0:
                fill(k_ring, n, (k,), box(batch, kv_head, k_start, k_len, high * BLOCK_N, C.packed), STAGES)
            # They need its last v, too, to be done with that q.
            if owed > 0:
                turn_tile(v_ring, turned_ring, n - 1, BLOCK_N, DIM_V, STAGES)
            owed = gl.where(high >= 0, 1, 0)
            for i in gl.static_range(CONSUMERS):
                barrier_wait(q_empty.index(i), (taken & 1) ^ 1)
                barrier_expect(q_full.index(i), q.block_type.nbytes)
                # (64, DIM)
                tma_load(
                    q, box(batch, head, q_start, q_len, first_row + i * 64, C.packed),
                    q_full.index(i), q_tiles.index(i),
                )  # fmt: skip
            # (BLOCK_N, DIM_V)
            if high >= 0:
                fill(v_ring, n, (v,), box(batch, kv_head, k_start, k_len, high * BLOCK_N, C.packed), STAGES)
                n += 1
                high -= 1
            taken += 1
        while high >= 0:
            for j in range(high - low + 1):
                first_k = (high - j) * BLOCK_N
                # (BLOCK_N, DIM), (BLOCK_N, DIM_V)
                fill(k_ring, n, (k,), box(batch, kv_head, k_start, k_len, first_k, C.packed), STAGES)
                fill(v_ring, n, (v,), box(batch, kv_head, k_start, k_len, first_k, C.packed), STAGES)
                turn_tile(v_ring, turned_ring, n - 1, BLOCK_N, DIM_V, STAGES)
                n += 1
            if C.masked:
                kind, high, low = next_run(
                    low - 1, first_row, at, tables, TILE_CLASS, C.wide, BLOCK_M, BLOCK_N
                )
            else:
                high = low - 1
        item += gl.num_programs(0)
    if owed > 0:
        turn_tile(v_ring, turned_ring, n - 1, BLOCK_N, DIM_V, STAGES)


@gluon.jit
def with_turned(p, turned_ring, n, O_LAYOUT: gl.constexpr, DIM_V: gl.constexpr, BLOCK_N: gl.constexpr,
                STAGES: gl.constexpr):  # fmt: skip
    """p . v with the turned v of use n, in flight, from 0."""
    nothing = gl.zeros([64, DIM_V], gl.float32, layout=O_LAYOUT)
    v = tile_of(turned_ring, n, DIM_V, BLOCK_N, STAGES).permute((1, 0))
    p = operand(p, BLOCK_N, gl.DotOperandLayout(0, O_LAYOUT, 4))
    return wgmma(p, v, nothing, use_acc=False, is_async=True)


@gluon.jit
def under_product(
    q_tile, p, sums, state, n, turn_number, tile, first_row, at, k_ring, turned_ring, turns, tables, numbers,
    by, SCORE: gl.constexpr, ALLOWED: gl.constexpr, EDGE: gl.constexpr, C: gl.constexpr, ME: gl.constexpr,
    S_LAYOUT: gl.constexpr, O_LAYOUT: gl.constexpr, BLOCK_N: gl.constexpr, DIM: gl.constexpr,
    DIM_V: gl.constexpr,
):  # fmt: skip
    """Tile `tile`, use n of the rings: its scores and softmax, and the product of the tile before it. `sums`:
    acc without that product, and by what it shrinks before it is added."""
    acc, shrink = sums
    scale, unit = numbers
    STAGES: gl.constexpr = C.stages
    TURNS: gl.constexpr = C.turns
    await_full(k_ring, n, STAGES)
    take_turn(turns, turn_number, ME, TURNS)
    zero = gl.zeros([64, BLOCK_N], gl.float32, layout=S_LAYOUT)
    s = wgmma(q_tile, matrix(k_ring[0], n % STAGES, 0).permute((1, 0)), zero,
              use_acc=False, is_async=True)  # fmt: skip
    await_full(turned_ring, n - 1, STAGES)
    product = with_turned(p, turned_ring, n - 1, O_LAYOUT, DIM_V, BLOCK_N, STAGES)
    pass_turn(turns, ME, CONSUMERS, TURNS)
    s = wgmma_wait(1, deps=(s,))
    release(k_ring, n, STAGES)
    if by is not None:
        s *= by
    s = scores(
        s, first_row, tile * BLOCK_N, at, scale, tables, SCORE, ALLOWED, C.identity, C.masked, EDGE, False,
        64, BLOCK_N, S_LAYOUT,
    )  # fmt: skip
    weights, state, next_shrink = step(s, state, unit, LIFT)
    weights = pin(weights)
    # Its phase has ended; the basic block ends here, and with it what ptxas may move.
    await_full(turned_ring, n - 1, STAGES)
    product, weights = wgmma_wait(0, deps=(product, weights))
    release(turned_ring, n - 1, STAGES)
    acc = by_row(acc, shrink) + product
    return narrow(weights, BLOCK_N), (acc, next_shrink), state


@gluon.jit
def consumer(
    shared, arrays, grid, lengths, tables, numbers, C: gl.constexpr, ME: gl.constexpr,
    SCORE: gl.constexpr, ALLOWED: gl.constexpr, TILE_CLASS: gl.constexpr, FACTOR: gl.constexpr,
    LINEAR: gl.constexpr,
):  # fmt: skip
    """One warpgroup: rows ME * 64 to ME * 64 + 63 of every item."""
    q, k, v, out, lse, stats, odd, sinks, plane_rows, odd_blocks = arrays
    q_tiles, q_full, q_empty, k_ring, v_ring, turned_ring, out_tiles, turns = shared
    STAGES: gl.constexpr = C.stages
    TURNS: gl.constexpr = C.turns
    BLOCK_M: gl.constexpr = 64 * CONSUMERS
    BLOCK_N: gl.constexpr = k.block_type.shape[-2]
    DIM: gl.constexpr = k.block_type.shape[-1]
    DIM_V: gl.constexpr = v.block_type.shape[-1]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 32])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM_V, 32])
    scale, unit = numbers
    items = grid[0] * grid[2]
    item = gl.program_id(0)
    # Items taken, items that had keys, uses of the rings.
    taken, started, n = item * 0, item * 0, item * 0
    open_turns(ME, CONSUMERS, TURNS)
    while item < items:
        block_row, at, q_start, k_start = item_at(item, grid, lengths, C, BLOCK_M)
        batch, head, q_len, k_len = at
        first_row = block_row + ME * 64
        if block_row < q_len:
            acc = gl.zeros([64, DIM_V], gl.float32, layout=O_LAYOUT)
            m, l = start(sinks, head, unit, C.sinks, 64, gl.SliceLayout(1, S_LAYOUT))
            state = (m, l * (1 << LIFT))
            by = None
            if LINEAR:
                none = batch * 0
                by = SCORE(scale, batch, head, none, none, none, q_len, k_len, tables)
            kind, high, low = first_run(block_row, at, tables, TILE_CLASS, C.masked, C.wide, BLOCK_M, BLOCK_N)
            barrier_wait(q_full.index(ME), taken & 1)
            q_tile = q_tiles.index(ME).reshape([64, DIM])
            if high >= 0:
                # The first tile has no product to run under, and is the one with the last key.
                await_full(k_ring, n, STAGES)
                zero = gl.zeros([64, BLOCK_N], gl.float32, layout=S_LAYOUT)
                s = wgmma(q_tile, matrix(k_ring[0], n % STAGES, 0).permute((1, 0)), zero,
                          use_acc=False, is_async=True)  # fmt: skip
                s = wgmma_wait(0, deps=(s,))
                release(k_ring, n, STAGES)
                if by is not None:
                    s *= by
                s = scores(
                    s, first_row, high * BLOCK_N, at, scale, tables, SCORE, ALLOWED, C.identity, C.masked,
                    True, False, 64, BLOCK_N, S_LAYOUT,
                )  # fmt: skip
                weights, state, _ = step(s, state, unit, LIFT)
                p = narrow(weights, BLOCK_N)
                sums = (acc, gl.full([64], 1.0, gl.float32, layout=gl.SliceLayout(1, S_LAYOUT)))
                n += 1
                started += 1
                high -= 1
                while high >= 0:
                    count = high - low + 1
                    if C.masked:
                        for j in range(gl.where(kind == 1, count, 0)):
                            p, sums, state = under_product(
                                q_tile, p, sums, state, n, n - started, high - j, first_row, at, k_ring,
                                turned_ring, turns, tables, numbers, by, SCORE, ALLOWED, True, C, ME,
                                S_LAYOUT, O_LAYOUT, BLOCK_N, DIM, DIM_V,
                            )  # fmt: skip
                            n += 1
                        count = gl.where(kind == 1, 0, count)
                    for j in range(count):
                        p, sums, state = under_product(
                            q_tile, p, sums, state, n, n - started, high - j, first_row, at, k_ring,
                            turned_ring, turns, tables, numbers, by, SCORE, ALLOWED, False, C, ME,
                            S_LAYOUT, O_LAYOUT, BLOCK_N, DIM, DIM_V,
                        )  # fmt: skip
                        n += 1
                    if C.masked:
                        kind, high, low = next_run(
                            low - 1, block_row, at, tables, TILE_CLASS, C.wide, BLOCK_M, BLOCK_N
                        )
                    else:
                        high = low - 1
                await_full(turned_ring, n - 1, STAGES)
                product = with_turned(p, turned_ring, n - 1, O_LAYOUT, DIM_V, BLOCK_N, STAGES)
                product = wgmma_wait(0, deps=(product,))
                release(turned_ring, n - 1, STAGES)
                acc = by_row(sums[0], sums[1]) + product
            barrier_arrive(q_empty.index(ME), count=1)
            # 2 ** LIFT is no part of lse and stats.
            state = (state[0], state[1] * (1.0 / (1 << LIFT)))
            factor = 1.0 / (1 << LIFT)
            if FACTOR is not None:
                factor = FACTOR(batch, head, tables) * factor
            finish((acc,), state, at, q_start, first_row, arrays, grid, numbers, out_tiles, C, ME, factor)
            taken += 1
        item += gl.num_programs(0)
    tma_store_wait(0)


_NUMBERS = [
    "plane_rows", "odd_blocks", "blocks", "heads", "planes", "section", "entries", "group",
    "seqlen_q", "seqlen_k",
]  # fmt: skip


@gluon.jit(do_not_specialize=_NUMBERS)
def forward_fp8(
    q, k, v, out, lse, stats, odd, sinks, cu_seqlens_q, cu_seqlens_k, seqused_k, tables,
    plane_rows, odd_blocks, blocks, heads, planes, section, entries, group,
    seqlen_q, seqlen_k, scale, unit,
    SCORE: gl.constexpr, ALLOWED: gl.constexpr, TILE_CLASS: gl.constexpr, FACTOR: gl.constexpr,
    LINEAR: gl.constexpr, C: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """As forward.py: forward; FACTOR(batch, head, tables) is what out is multiplied by, None for nothing.
    LINEAR: SCORE multiplies by what is the same in all of an item; C.identity is then set."""
    STAGES: gl.constexpr = C.stages
    BLOCK_N: gl.constexpr = k.block_type.shape[-2]
    DIM_V: gl.constexpr = v.block_type.shape[-1]
    q_tiles = gl.allocate_shared_memory(q.dtype, [CONSUMERS] + q.block_type.shape, q.layout)
    q_full = barriers(CONSUMERS)
    q_empty = barriers(CONSUMERS)
    for i in gl.static_range(CONSUMERS):
        barrier_init(q_full.index(i), count=1)
        barrier_init(q_empty.index(i), count=1)
    k_ring = ring_of(buffers_for((k,), STAGES), STAGES, CONSUMERS)
    v_ring = ring_of(buffers_for((v,), STAGES), STAGES, 1)
    TURNED: gl.constexpr = turned_layout(BLOCK_N)
    turned = gl.allocate_shared_memory(v.dtype, [STAGES, DIM_V, BLOCK_N], TURNED)
    turned_ring = ring_of(turned, STAGES, CONSUMERS)
    turns = make_turns(CONSUMERS, C.turns)
    out_tiles = buffers_for((out,), CONSUMERS)
    shared = (q_tiles, q_full, q_empty, k_ring, v_ring, turned_ring, out_tiles, turns)
    arrays = (q, k, v, (out,), lse, stats, odd, sinks, plane_rows, odd_blocks)
    grid = (blocks, heads, planes, section, entries, group)
    lengths = (cu_seqlens_q, cu_seqlens_k, seqused_k, seqlen_q, seqlen_k, None)
    numbers = (scale, unit)
    # Functions are handed over in place: they cannot be kept in a tuple.
    gl.warp_specialize([
        (consumer, (
            shared, arrays, grid, lengths, tables, numbers, C, 0, SCORE, ALLOWED, TILE_CLASS, FACTOR, LINEAR,
        )),
        (consumer, (
            shared, arrays, grid, lengths, tables, numbers, C, 1, SCORE, ALLOWED, TILE_CLASS, FACTOR, LINEAR,
        )),
        (mover, (
            shared, arrays, grid, lengths, tables, numbers, C, 0, SCORE, ALLOWED, TILE_CLASS, FACTOR,
        )),
    ], [4, 4], [C.consumer_registers, C.producer_registers])  # fmt: skip
