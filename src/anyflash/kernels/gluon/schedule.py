"""Tiles, stages, consumers and registers by head_dim, and the shared memory that they take.

What bounds a choice, for a head_dim rounded up to DIM and DIM_V:

    registers   a thread of a consumer keeps acc DIM_V / 2, s and p BLOCK_N / 2, P BLOCK_N / 4 words. A block
                with 2 consumers is launched with 168 for each of 384 threads, with 3 consumers with 128 for
                each of 512; the producer's warps and all consumers but the first get the numbers below, the
                first what is left.
    shared      2 * (64 * CONSUMERS * (DIM + own_out * DIM_V) + STAGES * BLOCK_N * (DIM + DIM_V)) bytes and
                the barriers, of 232448.

None is tuned on a device yet.
"""

from __future__ import annotations

from dataclasses import dataclass

SHARED_BYTES = 232_448
ROWS = 64
GREATEST_DIM = 256
_L2_BYTES = 32 * 2**20
_NEARLY = 0.9
# WIDE and REST columns of a head, by what they add up to: shapes are powers of two.
_PIECES = ((64, 0), (64, 32), (128, 0), (128, 64), (256, 0))


@dataclass(frozen=True, slots=True)
class Tiles:
    """One forward configuration. `turns` is as pipeline.py numbers them; `own_out`: out has a buffer of its
    own and is not put where q was."""

    block_n: int
    stages: int
    consumers: int
    consumer_registers: int
    producer_registers: int
    turns: int
    own_out: bool

    @property
    def block_m(self) -> int:
        return ROWS * self.consumers

    def __str__(self) -> str:
        return f"{self.block_m} x {self.block_n}, {self.consumers} consumers, {self.stages} stages"


@dataclass(frozen=True, slots=True)
class Form:
    """All that a forward kernel is specialised by beside its functions and its descriptors.

    identity    scores are q . k as it comes
    masked      there is a mask
    wide        the class of several tiles together may be asked for
    sinks       sinks join the sums
    guard       blocks whose sums are infinite or NaN are reported
    packed      sequences are packed; used: not all of their keys are there
    chunk       keys of a cache that are loaded as one (pages.py), 0: there is no cache
    page        slots of its pages, 0: a sequence has one; padded: keys do not begin at the first slot
    fewest      over a cache, packed sequences of so many rows of a group, or fewer, are somebody else's
    dropout     some probabilities are dropped
    members     heads of a group that are in one tile (heads.py)
    """

    identity: bool
    masked: bool
    wide: bool
    sinks: bool
    guard: bool
    packed: bool
    used: bool
    consumers: int
    stages: int
    turns: int
    own_out: bool
    consumer_registers: int
    producer_registers: int
    chunk: int = 0
    page: int = 0
    padded: bool = False
    fewest: int = 0
    block_n: int = 0
    dropout: bool = False
    members: int = 1


# By (DIM, DIM_V), each the sum of its pieces. None takes room on the stack: tests/gpu/budgets_hopper.json.
_FORWARD = {
    (64, 64): Tiles(128, 3, 2, 240, 32, 1, True),
    (64, 96): Tiles(128, 3, 2, 240, 32, 1, True),
    (64, 128): Tiles(128, 2, 2, 232, 40, 1, True),
    (64, 192): Tiles(64, 3, 2, 240, 32, 0, True),
    (64, 256): Tiles(64, 2, 2, 232, 40, 0, True),
    (96, 64): Tiles(128, 3, 2, 240, 32, 1, True),
    (96, 96): Tiles(128, 3, 2, 240, 32, 1, True),
    (96, 128): Tiles(128, 3, 2, 240, 32, 1, True),
    (96, 192): Tiles(64, 3, 2, 240, 32, 0, True),
    (96, 256): Tiles(64, 3, 2, 240, 32, 0, True),
    (128, 64): Tiles(128, 2, 2, 232, 40, 1, True),
    (128, 96): Tiles(128, 3, 2, 240, 32, 1, True),
    (128, 128): Tiles(128, 2, 2, 240, 32, 1, True),
    (128, 192): Tiles(64, 3, 2, 240, 32, 0, True),
    (128, 256): Tiles(64, 2, 2, 232, 40, 0, True),
    (192, 64): Tiles(128, 2, 2, 240, 32, 1, True),
    (192, 96): Tiles(128, 2, 2, 240, 32, 1, True),
    (192, 128): Tiles(128, 2, 2, 240, 32, 1, False),
    (192, 192): Tiles(64, 3, 2, 240, 32, 0, False),
    (192, 256): Tiles(64, 2, 2, 240, 32, 0, True),
    (256, 64): Tiles(64, 2, 2, 232, 40, 1, True),
    (256, 96): Tiles(64, 3, 2, 240, 32, 1, True),
    (256, 128): Tiles(64, 2, 2, 232, 40, 1, True),
    (256, 192): Tiles(64, 2, 2, 240, 32, 0, True),
    (256, 256): Tiles(64, 2, 2, 240, 32, 0, False),
}
# A mask leaves a third consumer too few registers.
_PLAIN = {(64, 64): Tiles(128, 2, 3, 160, 24, 1, True)}


def padded(dim: int) -> int:
    """The width of a head in tiles of one piece."""
    return next(width for width in (64, 128, GREATEST_DIM) if dim <= width)


def split(dim: int) -> tuple[int, int]:
    """The widths of the two pieces of a head, WIDE and REST; 0 if there is but one."""
    return next(pieces for pieces in _PIECES if dim <= sum(pieces))


def forward_tiles(dim: int, dim_v: int, masked: bool, scored: bool, dropped: bool = False) -> Tiles:
    """The configuration for head dims of at most GREATEST_DIM, a mask, a score program and dropout."""
    width = sum(split(dim)), sum(split(dim_v))
    usual = _FORWARD[width]
    if dropped or (scored and (width == (256, 256) or (usual.block_n == 128 and max(width) > 64))):
        # Their numbers need the registers of half of the scores.
        return Tiles(usual.block_n // 2, usual.stages + 1, 2, 240, 32, usual.turns, usual.own_out)
    return usual if masked or scored else _PLAIN.get(width, usual)


def members(group: int, rows: int, block_m: int) -> int:
    """How many heads of a group are best taken into one tile: the greatest power of two that divides the
    group, up to ROWS, or 1 where tiles of one head are nearly as full."""
    together = min(group & -group, ROWS)

    def filled(rows: int) -> float:
        return rows / (-(-rows // block_m) * block_m)

    return together if rows and filled(rows) < _NEARLY * filled(rows * together) else 1


def shared_bytes(tiles: Tiles, dim: int, dim_v: int) -> int:
    """Bytes of shared memory, barriers in 16 bytes each. Triton adds some hundred for what it hands to the
    partitions."""
    width, width_v = sum(split(dim)), sum(split(dim_v))
    rows = tiles.block_m * (width + tiles.own_out * width_v)
    keys = tiles.stages * tiles.block_n * (width + width_v)
    return 2 * (rows + keys) + 16 * (3 * tiles.consumers + 4 * tiles.stages)


def section(planes: int, group: int, keys: int, dim: int, dim_v: int, itemsize: int) -> int:
    """How many planes (heads of batch entries) work side by side: as many as have their keys in L2."""
    plane = max(keys * (dim + dim_v) * itemsize, 1)
    return min(planes, max(1, _L2_BYTES // plane) * group)
