"""Hopper's asynchronous operations, under names that do not change with Triton's version.

Kernels of this folder use these names and no other way to the hardware; an emulator replaces exactly them.

    tma_load(descriptor, coordinates, barrier, buffer)   global -> shared, where its bytes end a phase
    tma_store(descriptor, coordinates, buffer)           shared -> global, in flight until tma_store_wait
    tma_add(descriptor, coordinates, buffer)             the same, added to what is there
    tma_store_wait(left)                                 until at most `left` of this warp's stores still read

    barriers(COUNT)                  COUNT mbarriers in shared memory; `.index(i)` is one
    barrier_init(barrier, count)     arrivals that end a phase
    barrier_expect(barrier, bytes)   one arrival, and so many bytes to come
    barrier_wait(barrier, parity)    until the phase of this parity has ended
    barrier_arrive(barrier, count=1) once for the whole partition

    wgmma(a, b, acc, use_acc=, is_async=)    acc + a . b; b in shared memory, a also in registers
    wgmma_wait(left, deps=(...))             until at most `left` products are in flight; `deps` come back
                                             as tensors

    fence()                          what this partition stored to shared memory, seen by TMA and wgmma
    meet()                           this partition's threads wait for each other, and see what each stored
    named_wait(name, THREADS)        hardware barrier `name` (9 to 15): until THREADS have come, with these
    named_arrive(name, THREADS)      come, and go on
    recast(buffers, COUNT, ROWS, COLUMNS)    the same shared memory as COUNT tiles, as wgmma reads them
    pin(x)                           x again, float32; its computation is not moved past this place
    four_e4m3(a, b, c, d)            words of four 8-bit floats, a in the lowest byte, of float32
    byte_planes(low, high)           bytes of 16-bit integers, see there
    seen_as(buffer, DTYPE, SHAPE, LAYOUT)    the same bytes of shared memory, as other elements
    here(number)                     a scalar again, int32: what follows from it is not computed before

    TensorDescriptor                 a descriptor made on the host
    shared_layout(block, dtype)      the layout of a tile that TMA and wgmma share

A partition is what `gl.warp_specialize` starts: it calls each of these with all its threads.
"""

from __future__ import annotations

from typing import Any

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from anyflash.kernels.gluon.versions import unsupported

__all__ = [
    "TensorDescriptor",
    "barrier_arrive",
    "barrier_expect",
    "barrier_init",
    "barrier_wait",
    "barriers",
    "byte_planes",
    "fence",
    "four_e4m3",
    "here",
    "meet",
    "named_arrive",
    "named_wait",
    "pin",
    "recast",
    "seen_as",
    "shared_layout",
    "tma_add",
    "tma_load",
    "tma_store",
    "tma_store_wait",
    "wgmma",
    "wgmma_wait",
]

if why := unsupported(triton.__version__):
    raise ImportError(why)

# 3.9 renamed the copies.
tma_load: Any = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
tma_store: Any = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
tma_store_wait: Any = tma.store_wait
barrier_init: Any = mbarrier.init
barrier_expect: Any = mbarrier.expect
barrier_wait: Any = mbarrier.wait
barrier_arrive: Any = mbarrier.arrive
wgmma: Any = warpgroup_mma
wgmma_wait: Any = warpgroup_mma_wait
fence: Any = fence_async_shared
# 3.9 renamed the barrier, too.
meet: Any = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
shared_layout: Any = gl.NVMMASharedLayout.get_default_for

# 3.9 took its underscore away.
_REINTERPRETS = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))

if hasattr(tma, "async_atomic_add"):
    tma_add: Any = tma.async_atomic_add
else:
    # 3.6 has the operation, but no name for it in Python.
    from triton._C.libtriton import ir
    from triton.experimental.gluon.language._core import builtin

    @builtin
    def tma_add(descriptor, coordinates, buffer, _semantic=None):
        places = _semantic._convert_to_ir_values(coordinates, require_i64=False)
        _semantic.builder.create_async_tma_reduce(
            ir.DESCRIPTOR_REDUCE_KIND.ADD, descriptor.handle, places, buffer.handle
        )


@gluon.jit
def barriers(COUNT: gl.constexpr):
    return gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())


@gluon.jit
def named_wait(name, THREADS: gl.constexpr):
    each = _each_thread()
    gl.inline_asm_elementwise(
        "bar.sync $1, $2; mov.b32 $0, $1;", "=r,r,r,~{memory}", [each + name, each + THREADS],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def named_arrive(name, THREADS: gl.constexpr):
    each = _each_thread()
    gl.inline_asm_elementwise(
        "bar.arrive $1, $2; mov.b32 $0, $1;", "=r,r,r,~{memory}", [each + name, each + THREADS],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _each_thread():
    """A zero in every thread of the partition."""
    threads: gl.constexpr = 32 * gl.num_warps()
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    return gl.zeros([threads], gl.int32, layout=layout)


@gluon.jit
def here(number):
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [number], dtype=gl.int32, is_pure=False, pack=1
    )  # fmt: skip


@gluon.jit
def pin(x):
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=False, pack=1
    )  # fmt: skip


@gluon.jit
def recast(buffers, COUNT: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    bits: gl.constexpr = buffers.dtype.primitive_bitwidth
    # A narrower tile's rows are exchanged in units of their own width.
    layout: gl.constexpr = gl.NVMMASharedLayout(min(128, COLUMNS * bits // 8), bits)
    return seen_as(buffers, buffers.dtype, [COUNT, ROWS, COLUMNS], layout)


@gluon.jit
def seen_as(buffer, DTYPE: gl.constexpr, SHAPE: gl.constexpr, LAYOUT: gl.constexpr):
    if _REINTERPRETS:
        found = buffer.reinterpret(DTYPE, SHAPE, LAYOUT)
    else:
        found = buffer._reinterpret(DTYPE, SHAPE, LAYOUT)
    return found


@gluon.jit
def byte_planes(low, high):
    """The low and the high bytes of 16-bit integers, of every four: two neighbours of `low` along axis 1, the
    first at an even place, and behind them the two of `high` in their places. A thread must hold neighbours
    one after the other."""
    return gl.inline_asm_elementwise(
        "prmt.b32 $0, $2, $3, 0x6420; prmt.b32 $1, $2, $3, 0x7531;", "=&r,=r,r,r", [low, high],
        dtype=(gl.int16, gl.int16), is_pure=True, pack=2,
    )  # fmt: skip


@gluon.jit
def four_e4m3(a, b, c, d):
    return gl.inline_asm_elementwise(
        "{.reg .b16 %low, %high; cvt.rn.satfinite.e4m3x2.f32 %low, $2, $1;"
        " cvt.rn.satfinite.e4m3x2.f32 %high, $4, $3; mov.b32 $0, {%low, %high};}",
        "=r,f,f,f,f", [a, b, c, d], dtype=gl.int32, is_pure=True, pack=1,
    )  # fmt: skip
