"""Heads in pieces: shapes are powers of two, so 96 columns are multiplied as 64 and 32, 192 as 128 and 64.

What has columns of a head (descriptors, buffers, q, acc) is a tuple of one or two: WIDE columns and, unless
the head is one power of two, the REST behind them. All pieces of a tile are filled under one barrier.

    s        q_wide . k_wide^T + q_rest . k_rest^T    a product for each piece of the head, into one sum
    acc      p . v_wide, p . v_rest                   a product for each piece of v's head, each with its sum

With n pieces of v, n products are in flight under the softmax instead of one. 32 columns of 2 bytes have a
swizzle of 64 bytes, 64 and 128 columns one of 128.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from anyflash.kernels.gluon.hopper import (
    barrier_expect,
    tma_load,
    tma_store,
    wgmma,
    wgmma_wait,
)
from anyflash.kernels.gluon.pipeline import await_empty
from anyflash.kernels.gluon.sequences import unknown_zero


@gluon.jit
def together(wide, rest):
    """The pieces of one array, of which `rest` may be None."""
    if rest is None:
        pieces = (wide,)
    else:
        pieces = (wide, rest)
    return pieces


@gluon.jit
def buffers_for(boxes, COUNT: gl.constexpr):
    """COUNT buffers in shared memory for each piece."""
    buffers = (
        gl.allocate_shared_memory(boxes[0].dtype, [COUNT] + boxes[0].block_type.shape, boxes[0].layout),
    )
    if len(boxes) > 1:
        buffers += (
            gl.allocate_shared_memory(boxes[1].dtype, [COUNT] + boxes[1].block_type.shape, boxes[1].layout),
        )
    return buffers


@gluon.jit
def load(boxes, coordinates, barrier, buffers, at):
    """All pieces of a box into buffers `at`, where their bytes end one phase. `coordinates` are those of the
    first piece."""
    REST_BYTES: gl.constexpr = boxes[1].block_type.nbytes if len(boxes) > 1 else 0
    barrier_expect(barrier, boxes[0].block_type.nbytes + REST_BYTES)
    tma_load(boxes[0], coordinates, barrier, buffers[0].index(at))
    if len(boxes) > 1:
        behind = coordinates[:-1] + (boxes[0].block_type.shape[-1],)
        tma_load(boxes[1], behind, barrier, buffers[1].index(at))


@gluon.jit
def fill(ring, n, boxes, coordinates, STAGES: gl.constexpr):
    """Producer: load a tile into the stage of use n, as soon as its readers have left it."""
    buffers, full, empty = ring
    await_empty(ring, n, STAGES)
    load(boxes, coordinates, full.index(n % STAGES), buffers, n % STAGES)


@gluon.jit
def matrix(buffers, at, PIECE: gl.constexpr):
    """Buffer `at` of a piece as a matrix, without its axes of extent 1."""
    one = buffers[PIECE].index(at)
    ABOVE: gl.constexpr = one.shape[-3] if len(one.shape) > 2 else 1
    return one.reshape([ABOVE * one.shape[-2], one.shape[-1]])


@gluon.jit
def inner(q_tiles, at, k_ring, n, zero, STAGES: gl.constexpr):
    """q . k^T, with the q of buffers `at` and the k of use n, in flight.

    Each 16 columns of q have an address, up to 32 registers in all, that would be kept from the start of the
    kernel to its end.
    """
    at += unknown_zero(n)
    q = matrix(q_tiles, at, 0)
    k = matrix(k_ring[0], n % STAGES, 0).permute((1, 0))
    s = wgmma(q, k, zero, use_acc=False, is_async=True)
    if len(q_tiles) > 1:
        q = matrix(q_tiles, at, 1)
        k = matrix(k_ring[0], n % STAGES, 1).permute((1, 0))
        s = wgmma(q, k, s, is_async=True)
    return s


@gluon.jit
def sums(boxes):
    """Zeros for what `outer` adds to: 64 rows of every piece."""
    WIDE: gl.constexpr = boxes[0].block_type.shape[-1]
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDE, 16])
    acc = (gl.zeros([64, WIDE], gl.float32, layout=LAYOUT),)
    if len(boxes) > 1:
        REST: gl.constexpr = boxes[1].block_type.shape[-1]
        REST_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, REST, 16])
        acc += (gl.zeros([64, REST], gl.float32, layout=REST_LAYOUT),)
    return acc


@gluon.jit
def operand(p, acc):
    """p as a product with v wants it, in registers."""
    return gl.convert_layout(p, gl.DotOperandLayout(0, acc[0].type.layout, 2))


@gluon.jit
def outer(p, acc, v_ring, n, STAGES: gl.constexpr):
    """acc + p . v with the v of use n, in flight. The registers that hold p for the first piece hold it for
    the other one, too."""
    found = (wgmma(p, matrix(v_ring[0], n % STAGES, 0), acc[0], is_async=True),)
    if len(acc) > 1:
        p = gl.convert_layout(p, gl.DotOperandLayout(0, acc[1].type.layout, 2))
        found += (wgmma(p, matrix(v_ring[0], n % STAGES, 1), acc[1], is_async=True),)
    return found


@gluon.jit
def await_outer(acc, beside):
    """acc, after all products in flight, and what shall not be computed later than that."""
    if len(acc) > 1:
        wide, rest, beside = wgmma_wait(0, deps=(acc[0], acc[1], beside))
        acc = (wide, rest)
    else:
        wide, beside = wgmma_wait(0, deps=(acc[0], beside))
        acc = (wide,)
    return acc, beside


@gluon.jit
def await_last(acc):
    if len(acc) > 1:
        wide, rest = wgmma_wait(0, deps=(acc[0], acc[1]))
        acc = (wide, rest)
    else:
        acc = (wgmma_wait(0, deps=(acc[0],)),)
    return acc


@gluon.jit
def by_row(piece, factor):
    """Each row of a piece times its factor."""
    return piece * gl.expand_dims(gl.convert_layout(factor, gl.SliceLayout(1, piece.type.layout)), 1)


@gluon.jit
def scaled(acc, factor):
    """Each row of all pieces times its factor."""
    found = (by_row(acc[0], factor),)
    if len(acc) > 1:
        found += (by_row(acc[1], factor),)
    return found


@gluon.jit
def any_odd(acc):
    """Is something infinite or NaN?"""
    found = gl.max(gl.max(gl.where(gl.abs(acc[0]) < float("inf"), 0, 1), 1), 0)
    if len(acc) > 1:
        found = gl.maximum(found, gl.max(gl.max(gl.where(gl.abs(acc[1]) < float("inf"), 0, 1), 1), 0))
    return found


@gluon.jit
def put(acc, buffers, at):
    """Round all pieces into buffers `at`."""
    matrix(buffers, at, 0).store(acc[0].to(buffers[0].dtype))
    if len(acc) > 1:
        matrix(buffers, at, 1).store(acc[1].to(buffers[1].dtype))


@gluon.jit
def store(boxes, coordinates, buffers, at):
    """Buffers `at` to the places of all pieces of a box."""
    tma_store(boxes[0], coordinates, buffers[0].index(at))
    if len(boxes) > 1:
        behind = coordinates[:-1] + (boxes[0].block_type.shape[-1],)
        tma_store(boxes[1], behind, buffers[1].index(at))
