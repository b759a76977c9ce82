"""From views of a cache to what pages.py is given, and to the forward of many rows over it."""

from __future__ import annotations

import math
from typing import Any

from anyflash.kernels.gluon import launch
from anyflash.kernels.triton import launch as portable
from anyflash.kernels.triton import launch_decode as portable_decode
from anyflash.kernels.triton.device import steps
from anyflash.kernels.triton.schedule import ROWS
from anyflash.kernels.triton.vectors import neighbours
from anyflash.semantics.operands import Operands, Results
from anyflash.semantics.problem import Problem

# Rows after which units of 16 bytes are exchanged as before.
_PATTERN = 8
# Rows of a cache and coordinates of boxes are in 32 bits.
_MOST_ROWS = 2**30


def many(call: portable.Call, results: Results) -> None:
    """The forward of sequences with many rows, on the current device. The arrays are fit for it."""
    problem, operands = call.problem, call.operands
    cached = launch.Cached(
        cache(problem, operands),
        most_keys(problem, operands),
        chunk(problem, operands, launch.forward_tiles(problem).block_n),
        0 if operands.block_table is None else problem.page_size,
        operands.leftpad_k is not None,
        ROWS["some"][1],
    )
    odd, odd_blocks = launch.start(call, results, cached)
    if call.hides:
        portable_decode.launch(call, "many", results, (odd, odd_blocks))


def chunk(problem: Problem, operands: Operands, block_n: int) -> int:
    """Keys that are loaded as one: a tile's, or those of a tile that lie in one page."""
    return block_n if _whole(operands) else math.gcd(problem.page_size, block_n)


def _whole(operands: Operands) -> bool:
    """Do the keys of a sequence lie in one page?"""
    return operands.block_table is None or operands.block_table.shape[1] == 1


def unfit_for_many(problem: Problem, operands: Operands, results: Results) -> str | None:
    """Why `many` cannot take a call, or None."""
    block_n = launch.forward_tiles(problem).block_n
    return launch.unfit(problem, operands, results) or unfit(problem, operands, block_n)


def unfit(problem: Problem, operands: Operands, block_n: int) -> str | None:
    """Why pages.py cannot take the cache of a call in tiles of so many keys, or None. Its arrays are what TMA
    can move."""
    rows = chunk(problem, operands, block_n)
    if rows % _PATTERN:
        return f"pages of {problem.page_size} slots are no multiple of {_PATTERN}"
    if operands.leftpad_k is not None and not _whole(operands):
        return "left padding moves keys away from the start of their pages"
    for name, view in (("k", operands.k), ("v", operands.v)):
        page, slot = view.strides[0], launch.slot_bytes(view)
        if view.shape[0] > 1 and page % slot:
            return f"pages of {name} lie {page} bytes apart, which is no number of slots, {slot} bytes each"
        if launch.page_step(view) * view.shape[0] > _MOST_ROWS:
            return f"{name} reaches over more than {_MOST_ROWS} slots"
    return None


def slots(problem: Problem, operands: Operands) -> int:
    """Slots of a sequence."""
    pages = 1 if operands.block_table is None else operands.block_table.shape[1]
    return pages * problem.page_size


def most_keys(problem: Problem, operands: Operands) -> int:
    """Keys that a sequence has at most."""
    return min(problem.seqlen_k, slots(problem, operands))


def cache(problem: Problem, operands: Operands) -> tuple[Any, ...]:
    """The `cache` of pages.py."""
    table, leftpad = operands.block_table, operands.leftpad_k
    row, entry = (0, 0) if table is None else steps(table)
    return (
        None if table is None else launch.pointer(table),
        row,
        entry,
        problem.num_pages,
        launch.page_step(operands.k),
        launch.page_step(operands.v),
        None if leftpad is None else launch.pointer(neighbours(leftpad)),
        slots(problem, operands),
    )
