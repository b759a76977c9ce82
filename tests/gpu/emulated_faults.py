"""One-line faults, each in a kernel of one partition or two, that the emulator must name."""

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
    here,
    named_wait,
    shared_layout,
    tma_load,
    tma_store,
    tma_store_wait,
    wgmma,
    wgmma_wait,
)

ROWS = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
COLUMNS = gl.constexpr(gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1]))
EIGHT_WARPS = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0]))
SUM = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))


@gluon.jit
def values(x, FAULT: gl.constexpr):
    """Types, layouts and addresses; `x` is a float tensor of 64 elements."""
    a = gl.zeros([64, 64], gl.float32, layout=ROWS)
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, ROWS))
    if FAULT == "layouts":
        a = a + gl.zeros([64, 64], gl.float32, layout=COLUMNS)
    elif FAULT == "layouts of where":
        a = gl.where(a > 0, gl.zeros([64, 64], gl.float32, layout=COLUMNS), 0.0)
    elif FAULT == "ranks":
        a = a + row
    elif FAULT == "expanded axis":
        a = a + gl.expand_dims(row, 0)
    elif FAULT == "warps":
        a = gl.zeros([64, 64], gl.float32, layout=EIGHT_WARPS)
    elif FAULT == "extents":
        a = gl.zeros([96, 64], gl.float32, layout=ROWS)
    elif FAULT == "load outside":
        gl.load(x + row + 1)
    elif FAULT == "store outside":
        gl.store(x + row - 1, gl.sum(a, 1))
    elif FAULT == "32 bits":
        first = gl.program_id(0) + 70000
        first = first * first
    elif FAULT == "not modelled":
        a = gl.dot_fma(a, a, a)
    elif FAULT == "constexpr":
        take_constant(gl.program_id(0))
    elif FAULT == "no number":
        here(row)
    elif FAULT == "two stores":
        gl.store(x + row, gl.sum(a, 1))
    elif FAULT == "half exponent":
        a = gl.exp2(a.to(gl.bfloat16))
    elif FAULT == "assertion":
        gl.device_assert(row < 63, "63 rows")


@gluon.jit
def take_constant(N: gl.constexpr):
    gl.static_assert(N >= 0)


@gluon.jit
def memory(source, target, FAULT: gl.constexpr):
    """Shared memory, barriers and products in one partition; tiles of (64, 64) in bfloat16."""
    tile = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 64], source.layout)
    full = barriers(1)
    x = gl.zeros([64, 64], gl.bfloat16, layout=ROWS)
    acc = gl.zeros([64, 64], gl.float32, layout=SUM)
    if FAULT != "not initialised":
        barrier_init(full.index(0), count=1)
    if FAULT == "stage":
        tile.index(2).store(x)
    elif FAULT == "stored shape":
        tile.store(x)
    elif FAULT == "stored type":
        tile.index(0).store(x.to(gl.float32))
    elif FAULT == "read while loaded":
        barrier_expect(full.index(0), source.block_type.nbytes)
        tma_load(source, [0, 0], full.index(0), tile.index(0))
        x = tile.index(0).load(ROWS)
    elif FAULT == "load in flight at the end":
        barrier_expect(full.index(0), source.block_type.nbytes)
        tma_load(source, [0, 0], full.index(0), tile.index(0))
    elif FAULT == "box of another shape":
        tma_load(source, [0, 0], full.index(0), tile)
    elif FAULT == "stored and not fenced":
        tile.index(0).store(x)
        tma_store(target, [0, 0], tile.index(0))
        tma_store_wait(0)
    elif FAULT == "overwritten while stored":
        tile.index(0).store(x)
        fence()
        tma_store(target, [0, 0], tile.index(0))
        tile.index(0).store(x)
    elif FAULT == "multiplied and not fenced":
        tile.index(0).store(x)
        acc = wgmma(tile.index(0), tile.index(0), acc)
    elif FAULT == "overwritten while multiplied":
        tile.index(0).store(x)
        fence()
        acc = wgmma(tile.index(0), tile.index(0), acc, is_async=True)
        tile.index(0).store(x)
    elif FAULT == "product used in flight":
        acc = wgmma(tile.index(0), tile.index(0), acc, is_async=True)
        acc = acc * 2.0
    elif FAULT == "product not waited for":
        acc = wgmma(tile.index(0), tile.index(0), acc, is_async=True)
    elif FAULT == "two sums of one":
        first = wgmma(tile.index(0), tile.index(0), acc, is_async=True)
        second = wgmma(tile.index(0), tile.index(0), first, is_async=True)
        third = wgmma(tile.index(0), tile.index(0), first, is_async=True)
        acc = wgmma_wait(0, deps=(second, third))
    elif FAULT == "register operand":
        acc = wgmma(x, tile.index(0), acc)
    elif FAULT == "sum's layout":
        acc = wgmma(tile.index(0), tile.index(0), gl.zeros([64, 64], gl.float32, layout=ROWS))
    elif FAULT == "arrivals":
        barrier_arrive(full.index(0), count=2)
    elif FAULT == "nobody comes" or FAULT == "not initialised":
        barrier_wait(full.index(0), 0)
    elif FAULT == "named":
        named_wait(9, 64)
    elif FAULT == "initialised twice":
        barrier_init(full.index(0), count=1)
    elif FAULT == "too much memory":
        tile = gl.allocate_shared_memory(gl.float32, [1024, 64], shared_layout([1024, 64], gl.float32))


@gluon.jit
def sender(tile, full, FAULT: gl.constexpr):
    ROWS_OF_ONE: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    for n in range(2):
        if FAULT != "written without order" or n == 0:
            tile.index(n).store(gl.zeros([64, 64], gl.bfloat16, layout=ROWS_OF_ONE) + n)
        if FAULT == "written without order":
            barrier_arrive(full.index(0), count=1)
            tile.index(0).store(gl.zeros([64, 64], gl.bfloat16, layout=ROWS_OF_ONE))
        else:
            barrier_arrive(full.index(0), count=1)


@gluon.jit
def receiver(tile, full, FAULT: gl.constexpr):
    if FAULT == "initialised too late":
        barrier_init(full.index(0), count=1)
    for n in range(2):
        barrier_wait(full.index(0), n)
        tile.index(n).load(ROWS)


@gluon.jit
def between(source, FAULT: gl.constexpr):
    """Two partitions: one fills two tiles and says so, the other reads them."""
    tile = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 64], source.layout)
    full = barriers(1)
    if FAULT != "initialised too late":
        barrier_init(full.index(0), count=1)
    registers: gl.constexpr = 20 if FAULT == "registers" else 24
    gl.warp_specialize([(receiver, (tile, full, FAULT)), (sender, (tile, full, FAULT))], [4], [registers])
