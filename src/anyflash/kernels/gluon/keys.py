"""What the kernels share that keep a block of keys: its place, rings of rows, their producer, the results."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from anyflash.kernels.gluon.hopper import barrier_expect, barrier_init, barrier_wait, barriers, tma_load
from anyflash.kernels.gluon.rows import run_up
from anyflash.kernels.gluon.sequences import box, sequence, work


@gluon.jit
def block_of_keys(
    blocks, entries, heads, group, seqlen_q, seqlen_k, odd_blocks, cu_seqlens_q, cu_seqlens_k, seqused_k,
    C: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """What a program works on, and the number of its plane's first flag."""
    heads_kv = heads // group
    # `work` begins with the last block; under a causal mask the first keys have most rows.
    program = gl.program_id(0)
    turned = program // blocks * blocks + (blocks - 1 - program % blocks)
    block, kv_head, batch = work(
        turned, blocks, heads_kv, heads_kv * entries, 1, entries, cu_seqlens_k, C.packed, BLOCK_N
    )
    q_start, q_len, k_start, k_len = sequence(
        batch, cu_seqlens_q, cu_seqlens_k, seqused_k, seqlen_q, seqlen_k, C.packed, C.used
    )
    first_k = block * BLOCK_N
    # A block past the end of its sequence has no rows to walk.
    members = gl.where(first_k < k_len, group, 0)
    item = (batch, kv_head, members, group, q_start, q_len, k_start, k_len, first_k)
    # Flags are numbered as programs of the careful launch, which have 64 keys.
    first_odd = (batch * heads_kv + kv_head) * odd_blocks
    if C.packed:
        first_odd = kv_head * odd_blocks + k_start // 64 + batch
    return item, first_odd


@gluon.jit
def rings(q, dout, stats, delta, STAGES: gl.constexpr):
    """The barrier of k and v, two that the consumers exchange tiles by, and the rings of the rows."""
    BLOCK_M: gl.constexpr = q.block_type.shape[-2]
    q_tiles = gl.allocate_shared_memory(q.dtype, [STAGES] + q.block_type.shape, q.layout)
    dout_tiles = gl.allocate_shared_memory(dout.dtype, [STAGES] + dout.block_type.shape, dout.layout)
    m_rows = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], stats.layout)
    log_rows = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], stats.layout)
    delta_rows = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], delta.layout)
    held, exchange = barriers(1), barriers(2)
    q_full, q_empty = barriers(STAGES), barriers(STAGES)
    dout_full, dout_empty = barriers(STAGES), barriers(STAGES)
    barrier_init(held.index(0), count=1)
    for i in gl.static_range(2):
        barrier_init(exchange.index(i), count=2)
    for i in gl.static_range(STAGES):
        barrier_init(q_full.index(i), count=1)
        barrier_init(q_empty.index(i), count=2)
        barrier_init(dout_full.index(i), count=1)
        barrier_init(dout_empty.index(i), count=2)
    q_ring = (q_tiles, m_rows, log_rows, delta_rows, q_full, q_empty)
    dout_ring = (dout_tiles, dout_full, dout_empty)
    return held, exchange, q_ring, dout_ring


@gluon.jit
def producer(
    shared, arrays, item, layout, tables, numbers, C: gl.constexpr, ME: gl.constexpr,
    SCORE: gl.constexpr, SLOPE: gl.constexpr, ALLOWED: gl.constexpr, TILE_CLASS: gl.constexpr,
):  # fmt: skip
    """One warp: k and v once; then, tile by tile, what the consumers read of the rows."""
    STAGES: gl.constexpr = C.stages
    q, k, v, dout, stats, delta, dq, dk, dv, odd = arrays
    BLOCK_M: gl.constexpr = q.block_type.shape[-2]
    BLOCK_N: gl.constexpr = k.block_type.shape[-2]
    ROW_BYTES: gl.constexpr = 2 * stats.block_type.nbytes + delta.block_type.nbytes
    k_tile, v_tile, held, q_ring, dout_ring, ds_tile, dq_tiles, exchange = shared
    q_tiles, m_rows, log_rows, delta_rows, q_full, q_empty = q_ring
    dout_tiles, dout_full, dout_empty = dout_ring
    batch, kv_head, members, group, q_start, q_len, k_start, k_len, first_k = item
    row_steps, dk_steps, dv_steps, first_odd = layout
    corner = box(batch, kv_head, k_start, k_len, first_k, C.packed)
    barrier_expect(held.index(0), k.block_type.nbytes + v.block_type.nbytes)
    # (BLOCK_N, DIM), (BLOCK_N, DIM_V)
    tma_load(k, corner, held.index(0), k_tile.index(0))
    tma_load(v, corner, held.index(0), v_tile.index(0))
    tiles = gl.cdiv(q_len, BLOCK_M)
    n = tiles * 0
    for member in range(members):
        head = kv_head * group + member
        at = (batch, head, q_len, k_len)
        place = batch * row_steps[0] + head * row_steps[1] + q_start
        delta_place = batch * row_steps[3] + head * row_steps[4] + q_start
        tile = tiles * 0
        while tile < tiles:
            kind, end = run_up(
                tile, tiles, first_k, at, tables, TILE_CLASS, C.masked, C.wide, BLOCK_M, BLOCK_N
            )
            tile = gl.where(kind == 0, end, tile)
            while tile < end:
                row = tile * BLOCK_M
                corner = box(batch, head, q_start, q_len, row, C.packed)
                stage = n % STAGES
                free = ((n // STAGES) & 1) ^ 1
                barrier_wait(q_empty.index(stage), free)
                full = q_full.index(stage)
                barrier_expect(full, q.block_type.nbytes + ROW_BYTES)
                # (BLOCK_M,) three times, (BLOCK_M, DIM)
                tma_load(stats, [place + row], full, m_rows.index(stage))
                tma_load(stats, [row_steps[2] + place + row], full, log_rows.index(stage))
                tma_load(delta, [delta_place + row], full, delta_rows.index(stage))
                tma_load(q, corner, full, q_tiles.index(stage))
                barrier_wait(dout_empty.index(stage), free)
                full = dout_full.index(stage)
                barrier_expect(full, dout.block_type.nbytes)
                # (BLOCK_M, DIM_V)
                tma_load(dout, corner, full, dout_tiles.index(stage))
                n += 1
                tile += 1


@gluon.jit
def store_sums(sums, arrays, item, layout, numbers, first, C: gl.constexpr, COLUMN: gl.constexpr,
               COLUMN_V: gl.constexpr):  # fmt: skip
    """64 keys' dK and dV, or their columns from COLUMN and COLUMN_V on, to global memory."""
    dk, dv = sums
    q, k, v, dout, stats, delta, dq, dk_base, dv_base, odd = arrays
    batch, kv_head, members, group, q_start, q_len, k_start, k_len, first_k = item
    row_steps, dk_steps, dv_steps, first_odd = layout
    if C.guard:
        mark_odd(odd + (first_odd + first // 64), dk, first < k_len)
        mark_odd(odd + (first_odd + first // 64), dv, first < k_len)
    entry, wide_head = batch.to(gl.int64), kv_head.to(gl.int64)
    if C.packed:
        entry = k_start.to(gl.int64)
    dk_base += entry * dk_steps[0] + wide_head * dk_steps[2] + COLUMN
    dv_base += entry * dv_steps[0] + wide_head * dv_steps[2] + COLUMN_V
    if C.dropout:
        dv *= numbers[2][3]
    store_rows(dk_base, dk * numbers[0], first, k_len, dk_steps[1], C.dim - COLUMN)
    store_rows(dv_base, dv, first, k_len, dv_steps[1], C.dim_v - COLUMN_V)


@gluon.jit
def mark_odd(flag, values, there):
    """1 to `flag`, which starts as 0, if something is infinite or NaN. Row by row: no sum across warps."""
    odd = gl.max(gl.where(gl.abs(values) < float("inf"), 0, 1), 1)
    gl.store(flag + odd * 0, odd, mask=(odd != 0) & there)


@gluon.jit
def store_rows(base, value, first, end, step, DIM: gl.constexpr):
    """Rows from `first` up to `end` of a matrix of DIM columns, whose rows lie `step` apart."""
    LAYOUT: gl.constexpr = value.type.layout
    rows = first + gl.arange(0, value.shape[0], layout=gl.SliceLayout(1, LAYOUT))
    columns = gl.arange(0, value.shape[1], layout=gl.SliceLayout(0, LAYOUT))
    there = gl.expand_dims(rows < end, 1)
    if value.shape[1] > DIM:
        there = there & gl.expand_dims(columns < DIM, 0)
    at = gl.expand_dims(rows.to(gl.int64) * step, 1) + gl.expand_dims(columns, 0)
    gl.store(base + at, value.to(base.dtype.element_ty), mask=there)
