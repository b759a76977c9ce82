"""Cells that take milliseconds, and an effort to match."""

from __future__ import annotations

from anyflash.bench.cells import Cell
from anyflash.bench.timing import Effort

EFFORT = Effort(least=2, most=3, seconds=0.2, spread=0.5, turn=1e-4)


def cell(variant: str = "full", dtype: str = "float32", backward: bool = False, **changes: object) -> Cell:
    shape = {"batch": 2, "heads": 4, "seqlen_q": 48, "head_dim": 16} | changes
    return Cell("tiny", dtype=dtype, variant=variant, backward=backward, **shape)
