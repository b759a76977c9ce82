"""Which tiles of keys a block of rows reads, and what its scores become.

A tile is empty, partial or full: no pair, some pairs, all pairs of it exist and are allowed. Tiles are walked
from the last to the first in runs of one class, so that only edges are masked; producer and consumers find
the same runs, each for itself, from scalars alone.

The class of several tiles together follows by the same interval rules as that of one, unless the mask reads
tables along the keys (WIDE False): then a run is found in O(log tiles) steps.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from anyflash.kernels.gluon.heads import pairs

EMPTY, PARTIAL, FULL = 0, 1, 2
_EMPTY, _PARTIAL, _FULL = gl.constexpr(EMPTY), gl.constexpr(PARTIAL), gl.constexpr(FULL)


@gluon.jit
def class_of(first_row, first_tile, last_tile, at, tables, TILE_CLASS: gl.constexpr, MASK: gl.constexpr,
             BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):  # fmt: skip
    """The class of tiles first_tile to last_tile taken together; `at` is (batch, head, q_len, k_len)."""
    batch, head, q_len, k_len = at
    first_k = first_tile * BLOCK_N
    end_k = (last_tile + 1) * BLOCK_N
    kind = gl.where(end_k <= k_len, _FULL, _PARTIAL)
    if MASK:
        last_row = gl.minimum(first_row + BLOCK_M, q_len) - 1
        last_k = gl.minimum(end_k, k_len) - 1
        shift = k_len - q_len
        kind = gl.minimum(
            kind,
            TILE_CLASS(
                batch, head, first_row, last_row, first_row + shift, last_row + shift, first_k, last_k,
                q_len, k_len, tables, BLOCK_M, BLOCK_N,
            ),
        )  # fmt: skip
    return kind


@gluon.jit
def run_down(high, first_row, at, tables, TILE_CLASS: gl.constexpr, WIDE: gl.constexpr,
             BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):  # fmt: skip
    """The class of tile `high` and the lowest tile of the run of that class that ends there."""
    kind = class_of(first_row, high, high, at, tables, TILE_CLASS, True, BLOCK_M, BLOCK_N)
    low = high
    step = gl.where(high > 0, 1, 0)
    growing = kind != _PARTIAL
    while step > 0:
        below = low - step
        alike = below >= 0
        if alike:
            other = class_of(first_row, below, low - 1, at, tables, TILE_CLASS, True, BLOCK_M, BLOCK_N)
            alike = other == kind
        low = gl.where(alike, below, low)
        if WIDE:
            growing = growing & alike
            step = gl.where(growing, step * 2, gl.where(kind == _PARTIAL, gl.where(alike, 1, 0), step // 2))
        else:
            step = gl.where(alike, 1, 0)
    return kind, low


@gluon.jit
def next_run(high, first_row, at, tables, TILE_CLASS: gl.constexpr, WIDE: gl.constexpr,
             BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):  # fmt: skip
    """The next run from tile `high` down that is not empty: class, highest and lowest tile; -1, 0 if none."""
    kind = gl.where(high >= 0, _EMPTY, _FULL)
    low = high + 1
    while kind == _EMPTY:
        high = low - 1
        kind, low = run_down(high, first_row, at, tables, TILE_CLASS, WIDE, BLOCK_M, BLOCK_N)
        none = (kind == _EMPTY) & (low == 0)
        high = gl.where(none, -1, high)
        kind = gl.where(none, _FULL, kind)
    return kind, high, gl.where(high < 0, 0, low)


@gluon.jit
def first_run(first_row, at, tables, TILE_CLASS: gl.constexpr, MASK: gl.constexpr, WIDE: gl.constexpr,
              BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):  # fmt: skip
    """The first run of tiles of an item, from the last keys; its highest tile is -1 if there is none."""
    last = gl.where(first_row < at[2], gl.cdiv(at[3], BLOCK_N), 0) - 1
    if MASK:
        kind, high, low = next_run(last, first_row, at, tables, TILE_CLASS, WIDE, BLOCK_M, BLOCK_N)
    else:
        kind, high, low = last * 0 + 2, last, last * 0
    return kind, high, low


@gluon.jit
def along(first, EXTENT: gl.constexpr, AXIS: gl.constexpr, LAYOUT: gl.constexpr):
    """first, first + 1, ... along an axis of a tile: (EXTENT, 1) or (1, EXTENT).

    The columns of a thread lie 8 apart: what differs between threads is added to `first`, and the rest are
    constants. Columns taken as they come would be a register each, kept from the start of the kernel on.
    """
    steps = gl.arange(0, EXTENT, layout=gl.SliceLayout(1 - AXIS, LAYOUT))
    if AXIS == 1:
        steps = (first + (steps & 7)) + (steps & -8)
    else:
        steps = first + steps
    return gl.expand_dims(steps, 1 - AXIS)


@gluon.jit
def scores(s, first_row, first_k, at, scale, tables, SCORE: gl.constexpr, ALLOWED: gl.constexpr,
           IDENTITY: gl.constexpr, MASK: gl.constexpr, EDGE: gl.constexpr, TRANSPOSED: gl.constexpr,
           ROWS: gl.constexpr, KEYS: gl.constexpr, LAYOUT: gl.constexpr,
           MEMBERS: gl.constexpr = 1):  # fmt: skip
    """Final scores of a tile of q . k, (ROWS, KEYS) or TRANSPOSED, with -inf where no pair is.

    EDGE False: the tile is full. Rows past the end are left as they come out: nobody stores them.
    """
    batch, head, q_len, k_len = at
    row = along(first_row, ROWS, 1 if TRANSPOSED else 0, LAYOUT)
    key = along(first_k, KEYS, 0 if TRANSPOSED else 1, LAYOUT)
    if MEMBERS > 1:
        token, heads = pairs(first_row, head, MEMBERS, gl.SliceLayout(1, LAYOUT))
        row, head = gl.expand_dims(token, 1), gl.expand_dims(heads, 1)
    position = row + (k_len - q_len)
    if not IDENTITY:
        s = SCORE(s * scale, batch, head, row, position, key, q_len, k_len, tables)
    if EDGE:
        seen = key < k_len
        if MASK:
            seen = seen & ALLOWED(batch, head, row, position, key, q_len, k_len, tables)
        s = gl.where(seen, s, float("-inf"))
    return s
