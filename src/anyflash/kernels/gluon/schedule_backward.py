"""The backward's tiles, stages and registers by head_dim, and the shared memory that they take.

What bounds a choice stands in backward.py and backward_dq.py. None is tuned on a device yet.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BackwardForm:
    """All that a backward kernel is specialised by beside its functions and its descriptors.

    identity    scores are q . k as it comes
    masked      there is a mask; wide: the class of several tiles together may be asked for
    guard       blocks whose sums are infinite or NaN are reported
    packed      sequences are packed; used: not all of their keys are there
    reduce      dq is added up by TMA, in no fixed order
    dim, dim_v  columns of the arrays, at most those of a tile
    """

    identity: bool
    masked: bool
    wide: bool
    guard: bool
    packed: bool
    used: bool
    reduce: bool
    dim: int
    dim_v: int
    stages: int
    consumer_registers: int
    producer_registers: int
