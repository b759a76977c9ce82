"""From views of a cache to descriptors and launches: what pages.py is given."""

from __future__ import annotations

import math
from typing import Any

from anyflash.core.view import View
from anyflash.kernels.gluon import launch
from anyflash.kernels.gluon.sequences import FAR, UNBOUNDED, WRAP
from anyflash.kernels.triton.device import steps
from anyflash.kernels.triton.vectors import neighbours
from anyflash.semantics.operands import Operands
from anyflash.semantics.problem import Problem

# Rows after which units of 16 bytes are exchanged as before, and the bytes of such a row.
_PATTERN = 8
_PANEL_BYTES = 128
# Where an axis has one place, its step is none; TMA wants a valid one.
_STEP_BYTES = 16
# Rows of a cache and coordinates of boxes are in 32 bits.
_MOST_ROWS = 2**30


def chunk(problem: Problem, operands: Operands, block_n: int) -> int:
    """Keys that are loaded as one: a tile's, or those of a tile that lie in one page."""
    return block_n if operands.block_table is None else math.gcd(problem.page_size, block_n)


def unfit(problem: Problem, operands: Operands, block_n: int) -> str | None:
    """Why pages.py cannot take the cache of a call, or None."""
    if not (problem.batch and problem.num_pages and problem.page_size):
        return "no sequence has a key"
    rows = chunk(problem, operands, block_n)
    if rows % _PATTERN:
        return f"pages of {problem.page_size} slots are not made of {_PATTERN} rows each"
    if operands.block_table is not None and operands.leftpad_k is not None:
        return "left padding moves keys away from the start of their pages"
    for name, view in (("k", operands.k), ("v", operands.v)):
        page, slot = view.strides[0], _slot(view)
        if view.shape[0] > 1 and page % slot:
            return f"pages of {name} lie {page} bytes apart, which is no number of slots, {slot} bytes each"
        if step(view) * view.shape[0] > _MOST_ROWS:
            return f"{name} reaches over more than {_MOST_ROWS} slots"
    return None


def step(view: View) -> int:
    """How many slots apart the pages of a cache lie."""
    return view.strides[0] // _slot(view) if view.shape[0] > 1 else view.shape[1]


def _slot(view: View) -> int:
    """Bytes from slot to slot, a valid step for TMA also where there is one alone."""
    pages, slots = view.shape[:2]
    return view.strides[1] if slots > 1 else view.strides[0] if pages > 1 else _STEP_BYTES


def boxes(view: View, rows: int) -> Any:
    """A descriptor of boxes of so many rows and of one panel of a cache, (pages, slots, heads, dim)."""
    size = view.itemsize
    heads, dim = view.shape[2:]
    token, head = _slot(view) // size, (view.strides[2] if heads > 1 else _STEP_BYTES) // size
    shape, strides = (UNBOUNDED, UNBOUNDED, heads, FAR, dim), (WRAP - token, token, head, token, 1)
    return launch.descriptor(view, shape, strides, (1, 1, 1, rows, _PANEL_BYTES // size))


def cache(problem: Problem, operands: Operands) -> tuple[Any, ...]:
    """The `cache` of pages.py."""
    table, leftpad = operands.block_table, operands.leftpad_k
    row, entry = (0, 0) if table is None else steps(table)
    pages = 1 if table is None else table.shape[1]
    return (
        None if table is None else launch.pointer(table),
        row,
        entry,
        problem.num_pages,
        step(operands.k),
        step(operands.v),
        None if leftpad is None else launch.pointer(neighbours(leftpad)),
        pages * problem.page_size,
    )
