"""Rings of stages between the producer and the consumers, and turns between consumers.

A ring is (buffers, full, empty): STAGES buffers, and for each a barrier that a load completes and one that
every reader arrives at once done. Use n of a ring, counted from 0 over the whole life of the block, is of
stage n % STAGES, and both barriers then are in their phase of parity (n // STAGES) & 1. A first wait for
"empty" is for the phase before the first, which counts as ended.

Ping-pong: while one consumer issues its products the others compute their softmax. A turn is passed round by
mbarriers (TURNS = 1) or hardware barriers (TURNS = 2), or not at all (TURNS = 0).

Shared memory: STAGES times a tile, and 16 bytes a stage. A barrier takes 8, and 16 with its alignment.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from anyflash.kernels.gluon.hopper import (
    barrier_arrive,
    barrier_init,
    barrier_wait,
    barriers,
    named_arrive,
    named_wait,
)

NO_TURNS, MBARRIER_TURNS, NAMED_TURNS = 0, 1, 2
# Triton itself takes the hardware barriers below: one for the block and one for each partition.
_FIRST_NAME = gl.constexpr(9)


@gluon.jit
def ring_of(buffers, STAGES: gl.constexpr, READERS: gl.constexpr):
    """A ring of these buffers; how they are indexed is for those who fill and read them to know."""
    full = barriers(STAGES)
    empty = barriers(STAGES)
    for i in gl.static_range(STAGES):
        barrier_init(full.index(i), count=1)
        barrier_init(empty.index(i), count=READERS)
    return buffers, full, empty


@gluon.jit
def await_empty(ring, n, STAGES: gl.constexpr):
    """Producer: wait until the readers have left the stage of use n."""
    buffers, full, empty = ring
    barrier_wait(empty.index(n % STAGES), ((n // STAGES) & 1) ^ 1)


@gluon.jit
def await_full(ring, n, STAGES: gl.constexpr):
    """Consumer: wait for use n."""
    buffers, full, empty = ring
    barrier_wait(full.index(n % STAGES), (n // STAGES) & 1)


@gluon.jit
def tile_of(ring, n, ROWS: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr):
    """The buffer of use n as a (ROWS, COLUMNS) matrix, without its axes of extent 1."""
    buffers, full, empty = ring
    return buffers.index(n % STAGES).reshape([ROWS, COLUMNS])


@gluon.jit
def release(ring, n, STAGES: gl.constexpr):
    """Consumer: done with use n."""
    buffers, full, empty = ring
    barrier_arrive(empty.index(n % STAGES), count=1)


@gluon.jit
def make_turns(CONSUMERS: gl.constexpr, TURNS: gl.constexpr):
    """Barriers of the consumers' turns; the first consumer has the first turn."""
    turns = barriers(CONSUMERS)
    for i in gl.static_range(CONSUMERS):
        barrier_init(turns.index(i), count=1)
    if TURNS == 1:
        barrier_arrive(turns.index(0), count=1)
    return turns


@gluon.jit
def open_turns(ME: gl.constexpr, CONSUMERS: gl.constexpr, TURNS: gl.constexpr):
    """Called by every consumer once, before its first turn."""
    if TURNS == 2:
        if ME == CONSUMERS - 1:
            named_arrive(_FIRST_NAME, 256)


@gluon.jit
def take_turn(turns, n, ME: gl.constexpr, TURNS: gl.constexpr):
    """Wait for this consumer's turn n, counted from 0."""
    if TURNS == 1:
        barrier_wait(turns.index(ME), n & 1)
    if TURNS == 2:
        named_wait(_FIRST_NAME + ME, 256)


@gluon.jit
def pass_turn(turns, ME: gl.constexpr, CONSUMERS: gl.constexpr, TURNS: gl.constexpr):
    """The next consumer's turn."""
    if TURNS == 1:
        barrier_arrive(turns.index((ME + 1) % CONSUMERS), count=1)
    if TURNS == 2:
        named_arrive(_FIRST_NAME + (ME + 1) % CONSUMERS, 256)
