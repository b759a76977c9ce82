"""Tiles, stages and registers of the forward of 8-bit floats, and the shared memory that they take.

    registers   a thread of a consumer keeps acc and a tile's product DIM_V / 2 each, s and p BLOCK_N / 2, P
                BLOCK_N / 8 words. A block is launched with 168 for each of 384 threads; the mover and the
                second consumer get the numbers below, the first consumer what is left.
    shared      q 128 * DIM, STAGES * BLOCK_N * (DIM + 2 DIM_V), out 2 * 128 * DIM_V bytes and the barriers,
                of 232448.

None is tuned on a device yet.
"""

from __future__ import annotations

import functools

from anyflash.kernels.gluon.schedule import Tiles, padded
from anyflash.semantics.expr import Expr
from anyflash.semantics.text import parse

# By (DIM, DIM_V). What each puts on the stack stands in tests/gpu/budgets_hopper_fp8.json.
_FORWARD = {
    (64, 64): Tiles(128, 2, 2, 208, 88, 1, True),
    (64, 128): Tiles(128, 2, 2, 240, 24, 1, True),
    (128, 64): Tiles(128, 2, 2, 208, 88, 1, True),
    (128, 128): Tiles(128, 2, 2, 240, 24, 1, True),
    (256, 64): Tiles(128, 2, 2, 208, 88, 1, True),
    (256, 128): Tiles(128, 2, 2, 240, 24, 1, True),
}


# A score program leaves a wide tile too few registers.
_SCORED = {(dim, 128): Tiles(64, 3, 2, 224, 56, 1, True) for dim in (64, 128, 256)}


def forward_tiles(dim: int, dim_v: int, scored: bool) -> Tiles:
    """The configuration for a head_dim of at most 256, of v at most 128, and a score program that does more
    than `only_scales`."""
    width = padded(dim), padded(dim_v)
    return (_SCORED if scored else {}).get(width, _FORWARD[width])


@functools.lru_cache(maxsize=256)
def only_scales(text: str | None) -> bool:
    """Does a score program multiply by what batch and head alone decide, and no more?"""

    def of_item(e: Expr) -> bool:
        return e.value in ("batch", "head") if e.op == "var" else all(of_item(a) for a in e.args)

    def scales(e: Expr) -> bool:
        if e.op == "mul":
            a, b = e.args
            return (scales(a) and of_item(b)) or (of_item(a) and scales(b))
        return e.op == "var" and e.value == "score"

    return text is not None and scales(parse(text))


def shared_bytes(tiles: Tiles, dim: int, dim_v: int) -> int:
    """Bytes of shared memory, barriers in 16 bytes each. Triton adds some hundred for what it hands to the
    partitions."""
    width, width_v = padded(dim), padded(dim_v)
    rows = tiles.block_m * (width + 2 * width_v)
    keys = tiles.stages * tiles.block_n * (width + 2 * width_v)
    return rows + keys + 16 * (3 * tiles.consumers + 6 * tiles.stages)
