"""The backward's tiles, stages and registers by head_dim, and the shared memory that they take.

What bounds a choice stands in backward.py and backward_dq.py. Two consumers get 240 registers a thread and
the producer 24, of wide heads 232 and 40: more columns are more coordinates. None is tuned on a device yet.
"""

from __future__ import annotations

from dataclasses import dataclass

from anyflash.kernels.gluon.schedule import padded, split

# Keys of a program of backward.py, rows of one of backward_dq.py: 64 for each of two consumers.
HELD = 128
# The greatest head dims of backward.py: dk and dv of wider ones do not fit a consumer's registers, and are
# backward_wide.py's, of 64 keys.
GREATEST_DIM = 128
_HELD_WIDE = 64
_REGISTERS = (240, 24)


@dataclass(frozen=True, slots=True)
class BackwardTiles:
    """One configuration: the rows (backward.py, backward_wide.py) or keys (backward_dq.py) of the tiles that
    move, and those of the block that stays."""

    moving: int
    stages: int
    held: int = HELD
    consumer_registers: int = _REGISTERS[0]
    producer_registers: int = _REGISTERS[1]


@dataclass(frozen=True, slots=True)
class BackwardForm:
    """All that a backward kernel is specialised by beside its functions and its descriptors.

    identity    scores are q . k as it comes
    masked      there is a mask; wide: the class of several tiles together may be asked for
    guard       blocks whose sums are infinite or NaN are reported
    packed      sequences are packed; used: not all of their keys are there
    dropout     some probabilities are dropped
    reduce      dq is added up by TMA, in no fixed order
    dim, dim_v  columns of the arrays, at most those of a tile
    """

    identity: bool
    masked: bool
    wide: bool
    guard: bool
    packed: bool
    used: bool
    dropout: bool
    reduce: bool
    dim: int
    dim_v: int
    stages: int
    consumer_registers: int
    producer_registers: int


def wide(dim: int, dim_v: int, dropped: bool = False) -> bool:
    """Are dk and dv backward_wide.py's? With dropout, which takes registers too, they are sooner."""
    return max(dim, dim_v) > (GREATEST_DIM // 2 if dropped else GREATEST_DIM)


def keys_width(dim: int, dim_v: int, of: int, dropped: bool = False) -> int:
    """The columns of tiles of one of the two head dims, in the kernel that keeps keys."""
    return max(padded(of), 128) if wide(dim, dim_v, dropped) else padded(of)


def keys_tiles(dim: int, dim_v: int, scored: bool, dropped: bool = False) -> BackwardTiles:
    """The configuration of backward.py, or of backward_wide.py; `scored`: a score program takes registers."""
    if wide(dim, dim_v, dropped):
        return BackwardTiles(64, 2, held=_HELD_WIDE, consumer_registers=232, producer_registers=40)
    return BackwardTiles(32 if scored and padded(dim) + padded(dim_v) > 128 else 64, 2)


def adds(dim: int, dim_v: int, scored: bool, dropped: bool = False) -> bool:
    """Can backward.py add up dq, too? wgmma makes 64 rows of it at least."""
    return not wide(dim, dim_v, dropped) and keys_tiles(dim, dim_v, scored).moving >= 64


def rows_tiles(dim: int, dim_v: int, more: bool) -> BackwardTiles:
    """The configuration of backward_dq.py; `more`: a mask, a score program or dropout takes registers."""
    if wide(dim, dim_v):
        moving = 64 if sum(split(max(dim, dim_v))) <= 192 else 32
        return BackwardTiles(moving, 2, consumer_registers=232, producer_registers=40)
    return BackwardTiles(64 if more else 128, 2)


def keys_shared_bytes(tiles: BackwardTiles, dim: int, dim_v: int, reduce: bool, dropped: bool = False) -> int:
    """Bytes of shared memory of backward.py or backward_wide.py, barriers in 16 bytes each."""
    width, width_v = (keys_width(dim, dim_v, of, dropped) for of in (dim, dim_v))
    held = 2 * tiles.held * (width + width_v)
    moving = tiles.stages * tiles.moving * (2 * (width + width_v) + 3 * 4)
    added = tiles.moving * (2 * HELD + 4 * width) if reduce else 0
    if wide(dim, dim_v, dropped):
        added = 2 * 2 * tiles.held * tiles.moving
    return held + moving + added + 16 * (3 + 4 * tiles.stages)


def rows_shared_bytes(tiles: BackwardTiles, dim: int, dim_v: int) -> int:
    """Bytes of shared memory of backward_dq.py, barriers in 16 bytes each."""
    tokens = HELD + tiles.stages * tiles.moving
    return 2 * tokens * (sum(split(dim)) + sum(split(dim_v))) + 16 * (2 + 4 * tiles.stages)
