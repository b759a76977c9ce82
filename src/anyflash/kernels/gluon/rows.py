"""Which tiles of rows a block of keys is read by: `mask` with the axes exchanged.

Tiles are walked from the first to the last in runs of one class, found in O(log tiles) steps as there. A tile
whose last row is past the end is partial: in the backward what lies there would be summed.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

EMPTY, PARTIAL, FULL = 0, 1, 2
_PARTIAL, _FULL = gl.constexpr(PARTIAL), gl.constexpr(FULL)


@gluon.jit
def class_of(first_tile, last_tile, first_k, at, tables, TILE_CLASS: gl.constexpr, MASK: gl.constexpr,
             BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):  # fmt: skip
    """The class of tiles of rows that exist, taken together; `at` is (batch, head, q_len, k_len)."""
    batch, head, q_len, k_len = at
    first_row = first_tile * BLOCK_M
    end_row = (last_tile + 1) * BLOCK_M
    whole = (end_row <= q_len) & (first_k + BLOCK_N <= k_len)
    kind = gl.where(whole, _FULL, _PARTIAL)
    if MASK:
        last_row = gl.minimum(end_row, q_len) - 1
        last_k = gl.minimum(first_k + BLOCK_N, k_len) - 1
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
def run_up(tile, tiles, first_k, at, tables, TILE_CLASS: gl.constexpr, MASK: gl.constexpr,
           WIDE: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):  # fmt: skip
    """The class of tile `tile`, and the end of the run of that class that begins there."""
    kind = class_of(tile, tile, first_k, at, tables, TILE_CLASS, MASK, BLOCK_M, BLOCK_N)
    end = tile + 1
    if MASK:
        step = gl.where(end < tiles, 1, 0)
        growing = kind != _PARTIAL
        while step > 0:
            above = end + step
            alike = above <= tiles
            if alike:
                other = class_of(end, above - 1, first_k, at, tables, TILE_CLASS, True, BLOCK_M, BLOCK_N)
                alike = other == kind
            end = gl.where(alike, above, end)
            if WIDE:
                growing = growing & alike
                alone = gl.where(alike, 1, 0)
                step = gl.where(growing, step * 2, gl.where(kind == _PARTIAL, alone, step // 2))
            else:
                step = gl.where(alike, 1, 0)
    else:
        # Only the last tile may have an edge, or all have that of the keys.
        last_kind = class_of(tiles - 1, tiles - 1, first_k, at, tables, TILE_CLASS, MASK, BLOCK_M, BLOCK_N)
        end = gl.where((kind == last_kind) | (end == tiles), tiles, tiles - 1)
    return kind, end
