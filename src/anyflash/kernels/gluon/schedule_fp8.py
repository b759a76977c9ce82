"""Tiles, stages and registers of the forward of 8-bit floats, and the shared memory that they take.

    registers   a thread of a consumer keeps acc and a tile's product DIM_V / 2 each, s and p BLOCK_N / 2, P
                BLOCK_N / 8 words. A block is launched with 168 for each of 384 threads; the mover and the
                second consumer get the numbers below, the first consumer what is left.
    shared      q 128 * DIM, STAGES * BLOCK_N * (DIM + 2 DIM_V), out 2 * 128 * DIM_V bytes and the barriers,
                of 232448.

None is tuned on a device yet.
"""

from __future__ import annotations

from anyflash.kernels.gluon.schedule import Tiles, padded

# By (DIM, DIM_V). What each puts on the stack stands in tests/gpu/budgets_hopper_fp8.json.
_FORWARD = {
    (64, 64): Tiles(128, 2, 2, 208, 88, 1, True),
    (64, 128): Tiles(128, 2, 2, 240, 24, 1, True),
    (128, 64): Tiles(128, 2, 2, 208, 88, 1, True),
    (128, 128): Tiles(128, 2, 2, 240, 24, 1, True),
    (256, 64): Tiles(128, 2, 2, 208, 88, 1, True),
    (256, 128): Tiles(128, 2, 2, 240, 24, 1, True),
}


def forward_tiles(dim: int, dim_v: int) -> Tiles:
    """The configuration for a head_dim of at most 256 and of v at most 128."""
    return _FORWARD[padded(dim), padded(dim_v)]


def shared_bytes(tiles: Tiles, dim: int, dim_v: int) -> int:
    """Bytes of shared memory, barriers in 16 bytes each. Triton adds some hundred for what it hands to the
    partitions."""
    width, width_v = padded(dim), padded(dim_v)
    rows = tiles.block_m * (width + 2 * width_v)
    keys = tiles.stages * tiles.block_n * (width + 2 * width_v)
    return rows + keys + 16 * (3 * tiles.consumers + 6 * tiles.stages)
