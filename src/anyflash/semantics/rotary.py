"""Rotary position embedding, the part of it that a KV cache applies while keys are appended.

The first rotary_dim = 2 * n elements of a row turn in n pairs (a, b) by the angles of the row's position:

    a' = a cos - b sin
    b' = a sin + b cos

Pair i is elements (i, i + n), or (2 i, 2 i + 1) if interleaved; the others stay. Computed in the
accumulator's type and rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from anyflash.core.dtypes import FLOATS
from anyflash.core.errors import InvalidCall
from anyflash.core.view import View

# Elements turned at a time: their copies in the accumulator's type stay in a second-level cache.
_CHUNK = 1 << 16


class Rotary(NamedTuple):
    """cos and sin are (positions, n)."""

    cos: View
    sin: View
    interleaved: bool


def check_rotary(rotary: Rotary, head_dim: int) -> None:
    """Raises InvalidCall unless the tables go together and with rows of `head_dim`."""
    cos, sin = rotary.cos, rotary.sin
    for argument, view in (("rotary cos", cos), ("rotary sin", sin)):
        if view.dtype not in FLOATS:
            expected = f"one of {', '.join(FLOATS)}"
            raise InvalidCall(argument, f"dtype {view.dtype}, shape {view.shape}", expected)
        if view.ndim != 2 or not 1 <= view.shape[1] <= head_dim // 2:
            raise InvalidCall(
                argument,
                f"shape {view.shape}",
                f"(positions, pairs) with at most {head_dim // 2} pairs, half of head_dim {head_dim}",
            )
    if cos.shape != sin.shape:
        raise InvalidCall("rotary sin", f"shape {sin.shape}", f"{cos.shape}, the shape of cos")


def check_positions(rotary: Rotary, argument: str, positions: NDArray[np.int64]) -> None:
    """Raises InvalidCall if a row of `argument` stands where the tables say nothing."""
    rows = rotary.cos.shape[0]
    if not len(positions) or (positions.min() >= 0 and positions.max() < rows):
        return
    wrong = np.flatnonzero((positions < 0) | (positions >= rows))
    raise InvalidCall(
        argument,
        f"row {int(wrong[0])} has rotary position {int(positions[wrong[0]])}",
        f"0 to {rows - 1}, the rows of cos and sin",
    )


def check_some_positions(rotary: Rotary) -> None:
    """Raises InvalidCall if the tables say nothing of any position."""
    if not rotary.cos.shape[0]:
        raise InvalidCall("rotary cos", f"shape {rotary.cos.shape}", "at least one position")


def rotated(
    x: NDArray[Any], positions: NDArray[np.int64], cos: NDArray[Any], sin: NDArray[Any], interleaved: bool
) -> Iterator[tuple[slice, NDArray[Any]]]:
    """Turned rows of x (rows, heads, dim), a few at a time: (which rows, their new values in x's dtype).

    positions   (rows,)

    >>> import numpy as np
    >>> angle = np.array([[0.0], [np.pi / 2]])
    >>> x = np.array([[[1.0, 2.0, 3.0]]])
    >>> for rows, turned in rotated(x, np.array([1]), np.cos(angle), np.sin(angle), interleaved=False):
    ...     print(rows, turned.round(3))
    slice(0, 1, None) [[[-2.  1.  3.]]]
    """
    work = np.dtype(np.float64 if x.dtype == np.float64 else np.float32)
    n = cos.shape[1]
    first, second = (slice(0, 2 * n, 2), slice(1, 2 * n, 2)) if interleaved else (slice(n), slice(n, 2 * n))
    step = max(1, _CHUNK // max(1, x[0].size if len(x) else 1))
    for start in range(0, len(x), step):
        rows = slice(start, min(start + step, len(x)))
        where = positions[rows]
        c, s = (table[where, None].astype(work, copy=False) for table in (cos, sin))
        old = x[rows].astype(work, copy=False)
        turned = np.empty_like(old)
        turned[..., 2 * n :] = old[..., 2 * n :]
        a, b = old[..., first], old[..., second]
        for target, with_a, with_b in ((turned[..., first], c, -s), (turned[..., second], s, c)):
            np.multiply(a, with_a, out=target)
            target += b * with_b
        # A value beyond the range of a narrow dtype becomes inf, as everywhere.
        with np.errstate(over="ignore", invalid="ignore"):
            narrow = turned.astype(x.dtype, copy=False)
        yield rows, narrow
