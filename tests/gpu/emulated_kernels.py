"""Small kernels that the emulator is tried on: one for each kind of synchronisation that attention needs."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

from anyflash.kernels.gluon.dropout import dropped
from anyflash.kernels.gluon.hopper import (
    barrier_arrive,
    barrier_expect,
    barrier_init,
    barrier_wait,
    barriers,
    fence,
    meet,
    named_arrive,
    named_wait,
    tma_add,
    tma_load,
    tma_store,
    tma_store_wait,
    wgmma,
    wgmma_wait,
)


@gluon.jit
def copy(source, target):
    """One partition: a tile in by TMA, out by TMA."""
    tile = gl.allocate_shared_memory(source.dtype, source.block_type.shape, source.layout)
    full = barriers(1)
    barrier_init(full.index(0), count=1)
    row = gl.program_id(0) * source.block_type.shape[0]
    barrier_expect(full.index(0), source.block_type.nbytes)
    tma_load(source, [row, 0], full.index(0), tile)
    barrier_wait(full.index(0), 0)
    tma_store(target, [row, 0], tile)
    tma_store_wait(0)


@gluon.jit
def ring_producer(args, STAGES: gl.constexpr):
    source, _target, tiles, full, empty, _result, count = args
    for n in range(count):
        stage = n % STAGES
        barrier_wait(empty.index(stage), ((n // STAGES) & 1) ^ 1)
        barrier_expect(full.index(stage), source.block_type.nbytes)
        tma_load(source, [n * source.block_type.shape[0], 0], full.index(stage), tiles.index(stage))


@gluon.jit
def ring_consumer(args, STAGES: gl.constexpr):
    source, target, tiles, full, empty, result, count = args
    ROWS: gl.constexpr = source.block_type.shape[0]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    for n in range(count):
        stage = n % STAGES
        barrier_wait(full.index(stage), (n // STAGES) & 1)
        x = tiles.index(stage).load(LAYOUT)
        barrier_arrive(empty.index(stage), count=1)
        tma_store_wait(0)
        result.store((x.to(gl.float32) * 2.0).to(source.dtype))
        fence()
        tma_store(target, [n * ROWS, 0], result)
    tma_store_wait(0)


@gluon.jit
def double(source, target, count, STAGES: gl.constexpr):
    """A producer and a consumer around a ring; the consumer doubles tiles and stores them by TMA."""
    tiles = gl.allocate_shared_memory(source.dtype, [STAGES] + source.block_type.shape, source.layout)
    result = gl.allocate_shared_memory(source.dtype, source.block_type.shape, source.layout)
    full = barriers(STAGES)
    empty = barriers(STAGES)
    for i in gl.static_range(STAGES):
        barrier_init(full.index(i), count=1)
        barrier_init(empty.index(i), count=1)
    args = (source, target, tiles, full, empty, result, count)
    gl.warp_specialize([(ring_consumer, (args, STAGES)), (ring_producer, (args, STAGES))], [1], [24])


@gluon.jit
def product_producer(args, ME: gl.constexpr, STAGES: gl.constexpr):
    a, b, _c, a_tiles, b_tiles, _result, full, empty, count = args
    for n in range(count):
        stage = n % STAGES
        barrier_wait(empty.index(stage), ((n // STAGES) & 1) ^ 1)
        barrier_expect(full.index(stage), a.block_type.nbytes * 2 + b.block_type.nbytes)
        tma_load(a, [0, n * 64], full.index(stage), a_tiles.index(stage).slice(0, 64))
        tma_load(a, [64, n * 64], full.index(stage), a_tiles.index(stage).slice(64, 64))
        tma_load(b, [n * 64, 0], full.index(stage), b_tiles.index(stage))


@gluon.jit
def product_consumer(args, ME: gl.constexpr, STAGES: gl.constexpr):
    _a, b, c, a_tiles, b_tiles, result, full, empty, count = args
    COLUMNS: gl.constexpr = b.block_type.shape[1]
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    acc = gl.zeros([64, COLUMNS], gl.float32, layout=LAYOUT)
    # Products are issued in turns: the first consumer's turn is opened by the second.
    if ME == 1:
        named_arrive(9, 256)
    for n in range(count):
        stage = n % STAGES
        barrier_wait(full.index(stage), (n // STAGES) & 1)
        named_wait(9 + ME, 256)
        mine = a_tiles.index(stage).slice(ME * 64, 64)
        acc = wgmma(mine, b_tiles.index(stage), acc, is_async=True)
        # The first's turn after the last is nobody's.
        if (ME == 0) | (n + 1 < count):
            named_arrive(9 + (1 - ME), 256)
        acc = wgmma_wait(0, deps=(acc,))
        barrier_arrive(empty.index(stage), count=1)
    result.index(ME).store(acc)
    fence()
    tma_add(c, [ME * 64, 0], result.index(ME))
    tma_store_wait(0)


@gluon.jit
def product(a, b, c, count, STAGES: gl.constexpr):
    """c += a . b: two consumers that take turns, sums leave by TMA addition."""
    a_tiles = gl.allocate_shared_memory(a.dtype, [STAGES, 128, 64], a.layout)
    b_tiles = gl.allocate_shared_memory(b.dtype, [STAGES] + b.block_type.shape, b.layout)
    result = gl.allocate_shared_memory(gl.float32, [2] + c.block_type.shape, c.layout)
    full = barriers(STAGES)
    empty = barriers(STAGES)
    for i in gl.static_range(STAGES):
        barrier_init(full.index(i), count=1)
        barrier_init(empty.index(i), count=2)
    args = (a, b, c, a_tiles, b_tiles, result, full, empty, count)
    gl.warp_specialize(
        [(product_consumer, (args, 0, STAGES)), (product_consumer, (args, 1, STAGES)),
         (product_producer, (args, 0, STAGES))],
        [4, 1], [240, 24],
    )  # fmt: skip


@gluon.jit
def in_turn(total, counter, TAKES_TURNS: gl.constexpr):
    """Programs add to one number, in the order of their numbers."""
    me = gl.program_id(0)
    if TAKES_TURNS:
        while gl.atomic_add(counter, 0) != me:
            pass
    gl.store(total, gl.load(total) * 2 + me)
    gl.atomic_add(counter, 1)


@gluon.jit
def counted(parts, count, total, FAULT: gl.constexpr):
    """Each program stores a part and counts itself; who comes last adds the parts up."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    i = gl.arange(0, 32, layout=LAYOUT)
    gl.store(parts + (gl.program_id(0) * 32 + i), i * 0 + (gl.program_id(0) + 1))
    if FAULT != "no barrier":
        meet()
    if FAULT == "relaxed":
        before = gl.atomic_add(count, 1, sem="relaxed")
    elif FAULT == "a block's scope":
        before = gl.atomic_add(count, 1, sem="acq_rel", scope="cta")
    else:
        before = gl.atomic_add(count, 1, sem="acq_rel", scope="gpu")
    if before == 2:
        gl.store(total + i, gl.load(parts + i) + gl.load(parts + (32 + i)) + gl.load(parts + (64 + i)))


@gluon.jit
def row_sums(source, target, lengths, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """By pointers: lengths, masked loads, a reduction, a masked store."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0])
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    columns = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, LAYOUT))
    start = gl.load(lengths + gl.program_id(0))
    length = gl.load(lengths + gl.program_id(0) + 1) - start
    inside = gl.expand_dims(rows < length, 1)
    at = gl.expand_dims(start + rows, 1) * COLUMNS + columns[None, :]
    x = gl.load(source + at, mask=inside, other=0.0)
    gl.store(target + start + rows, gl.sum(x, 1), mask=rows < length)


@gluon.jit
def handed_on(source, middle, flag, target, READ_ONLY: gl.constexpr):
    """Program 0 stores a tile by TMA and raises a flag; program 1 waits for the flag and copies the tile."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0])
    ROWS: gl.constexpr = source.block_type.shape[0]
    COLUMNS: gl.constexpr = source.block_type.shape[1]
    tile, full = gl.allocate_shared_memory(source.dtype, [ROWS, COLUMNS], source.layout), barriers(1)
    if gl.program_id(0) == 0:
        barrier_init(full.index(0), count=1)
        barrier_expect(full.index(0), source.block_type.nbytes)
        tma_load(source, [0, 0], full.index(0), tile)
        barrier_wait(full.index(0), 0)
        tma_store(source, [ROWS, 0], tile)
        tma_store_wait(0, READ_ONLY)
        gl.atomic_add(flag, 1)
    else:
        while gl.atomic_add(flag, 0) == 0:
            pass
        rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
        columns = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, LAYOUT))
        at = gl.expand_dims(rows, 1) * COLUMNS + gl.expand_dims(columns, 0)
        gl.store(target + at, gl.load(middle + at))


@gluon.jit
def product_of_8_bits(a, b, c, BY_ROWS: gl.constexpr):
    """c = a . b^T of 64 rows each, by a descriptor that the kernel makes. 8 bits are read along k alone."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 32])
    a_tile = gl.allocate_shared_memory(a.dtype, a.block_type.shape, a.layout)
    b_tile = gl.allocate_shared_memory(b.dtype, b.block_type.shape, b.layout)
    tile = gl.allocate_shared_memory(gl.float32, [64, 64], gl.NVMMASharedLayout(128, 32))
    full = barriers(1)
    barrier_init(full.index(0), count=1)
    barrier_expect(full.index(0), a.block_type.nbytes + b.block_type.nbytes)
    tma_load(a, [0, 0], full.index(0), a_tile)
    tma_load(b, [0, 0], full.index(0), b_tile)
    barrier_wait(full.index(0), 0)
    if BY_ROWS:
        right = b_tile.permute((1, 0))
    else:
        right = b_tile
    tile.store(wgmma(a_tile, right, gl.zeros([64, 64], gl.float32, layout=LAYOUT)))
    fence()
    made = tma.make_tensor_descriptor(c, [64, 64], [64, 1], [64, 64], gl.NVMMASharedLayout(128, 32))
    tma_store(made, [0, 0], tile)
    tma_store_wait(0)


@gluon.jit
def dropped_ones(out, first_row, first_k, batch, head, seed_low, seed_high, threshold,
                 TRANSPOSED: gl.constexpr, MARK: gl.constexpr):  # fmt: skip
    """64 rows by 32 keys, or TRANSPOSED 64 keys by 32 rows: what dropout leaves of ones."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 32, 16])
    ones = gl.full([64, 32], 1.0, gl.float32, layout=layout)
    numbers = (seed_low, seed_high, threshold, 1.0)
    found = dropped(ones, first_row, first_k, (batch, head), numbers, TRANSPOSED, MARK)
    rows = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    columns = gl.arange(0, 32, layout=gl.SliceLayout(0, layout))
    gl.store(out + gl.expand_dims(rows * 32, 1) + gl.expand_dims(columns, 0), found)
