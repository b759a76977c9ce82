"""Tiles, stages and registers of `decode` by head_dim, and how its keys are cut.

What bounds a choice, for a head_dim rounded up to DIM and DIM_V:

    memory      it reads keys at the speed of memory, so bytes under way count: a processor wants some 64 KB
                of them at all times. Its segments are short, a few tiles, in whose first and last moments
                nothing is under way: two blocks a processor fill each other's.
    registers   two blocks of 256 threads may be launched with 128 each; the producer's warps then keep 24,
                and the consumer has 232: acc DIM_V / 2, s and p BLOCK_N / 2, P BLOCK_N / 4 words a thread.
                ptxas wants 158 for an instruction with DIM_V = 256, for which there is one block.
    shared      2 * (64 * CONSUMERS * DIM + STAGES * BLOCK_N * (DIM + DIM_V)) bytes and the barriers, of half
                of a processor's where there are two blocks. Two consumers are one block, which has all of it.

BLOCK_N is the same for one consumer and two, because results depend on it and a sequence's must not on the
rows of others. Keys are cut as kernels/triton/decode.py cuts them. None is tuned on a device yet.
"""

from __future__ import annotations

from dataclasses import dataclass

from anyflash.kernels.gluon.schedule import GREATEST_DIM, ROWS, padded
from anyflash.kernels.triton import schedule as portable

# By blocks of a processor: of 228 KB it keeps 1 KB for itself for each.
SHARED_BYTES = {1: 232_448, 2: 115_712}
# Words of a thread that one piece of a segment's acc may take where segments are added up.
_HELD, _THREADS = 16, 128
# Words that a segment's sums are aligned to.
_ALIGNED = 16


@dataclass(frozen=True, slots=True)
class Tiles:
    """One configuration. `launched_registers`: what all threads begin with; None: what there is for them."""

    block_n: int
    stages: int
    consumers: int
    launched_registers: int | None
    consumer_registers: int
    producer_registers: int

    def __str__(self) -> str:
        word = "consumer" if self.consumers == 1 else "consumers"
        return f"{self.block_m} rows x {self.block_n}, {self.consumers} {word}, {self.stages} stages"

    @property
    def block_m(self) -> int:
        return ROWS * self.consumers

    @property
    def blocks(self) -> int:
        """Of a processor."""
        return 2 if self.launched_registers else 1


@dataclass(frozen=True, slots=True)
class Form:
    """All that a kernel is specialised by beside its functions and its descriptors.

    identity    scores are q . k as it comes
    masked      there is a mask; trim: empty tiles at both ends are not shared out; skips: nor are others read
    sinks       sinks join the sums
    guard       sums that are infinite or NaN are reported
    packed      queries are packed
    used        not all keys of a sequence need be there: lengths lie on the device; leftpad: nor at its start
    page        slots of a page, 0 where a sequence is one
    segments    keys are cut into so many at most, of at least `least` tiles
    kept, head  of a segment's sums `kept` rows lie in memory, `head` words behind its beginning
    piece       columns of acc that are added up at once
    """

    identity: bool
    masked: bool
    trim: bool
    skips: bool
    sinks: bool
    guard: bool
    packed: bool
    used: bool
    leftpad: bool
    page: int
    dim: int
    dim_v: int
    width: int
    width_v: int
    block_n: int
    segments: int
    least: int
    kept: int
    head: int
    piece: int
    consumers: int
    stages: int
    consumer_registers: int
    producer_registers: int


# (DIM, DIM_V) -> BLOCK_N, and stages with one consumer and with two.
_TILES = {
    (64, 64): (64, 6, 12),
    (64, 128): (64, 4, 8),
    (64, 256): (32, 10, 9),
    (128, 64): (64, 4, 8),
    (128, 128): (64, 3, 6),
    (128, 256): (32, 8, 7),
    (256, 64): (32, 3, 8),
    (256, 128): (32, 3, 6),
    (256, 256): (32, 6, 5),
}


def tiles(dim: int, dim_v: int, rows: int) -> Tiles:
    """The configuration for sequences of at most `rows` rows (query tokens times heads of a group)."""
    block_n, one, two = _TILES[padded(dim), padded(dim_v)]
    if rows > ROWS:
        return Tiles(block_n, two, 2, None, 240, 24)
    return Tiles(block_n, one, 1, 128 if padded(dim_v) < GREATEST_DIM else None, 232, 24)


def shared_bytes(tiles: Tiles, dim: int, dim_v: int) -> int:
    """Bytes of shared memory, barriers in 16 bytes each."""
    width, width_v = padded(dim), padded(dim_v)
    elements = tiles.block_m * width + tiles.stages * tiles.block_n * (width + width_v)
    return 2 * elements + 16 * (4 * tiles.stages + 1)


def cut(rows: portable.Rows, block_n: int) -> tuple[int, int]:
    """At most so many segments, of at least so many tiles."""
    found = portable.cut(rows, "sm_90")
    return found.segments, max(found.keys // block_n, 1)


def kept_rows(rows: int) -> int:
    """Rows of 64 that a segment leaves in memory, where sequences have at most `rows`."""
    return min(ROWS, max(8, 1 << (rows - 1).bit_length()))


def head_words(kept: int) -> int:
    """Words of a segment's m and l."""
    return max(2 * kept, _ALIGNED)


def segment_words(kept: int, dim_v: int) -> int:
    """Words of a segment's sums."""
    return head_words(kept) + kept * padded(dim_v)


def piece(kept: int, dim_v: int) -> int:
    """Columns of acc that are added up at once."""
    return min(padded(dim_v), _HELD * _THREADS // kept)
