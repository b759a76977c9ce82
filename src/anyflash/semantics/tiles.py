"""Which tiles of the score matrix a mask leaves empty, partial or full, by the rules that kernels use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from anyflash.semantics.evaluate import clamped
from anyflash.semantics.expr import Expr, walk
from anyflash.semantics.interval import Interval, Numbers, bound

EMPTY, PARTIAL, FULL = 0, 1, 2

_POSITIONS = ("row", "q", "k")


class Dims(NamedTuple):
    """Extents of a call. `q_len` and `k_len` are numbers, or (batch,) arrays where sequences differ."""

    batch: int
    heads: int
    q_len: ArrayLike
    k_len: ArrayLike


def tile_classes(
    mask: Expr | None, dims: Dims, tables: Sequence[NDArray[Any]], block_q: int, block_k: int
) -> NDArray[np.int8]:
    """EMPTY, PARTIAL or FULL for every tile: (batch, heads, tiles of q, tiles of k) int8.

    mask     a bound condition, or None for none
    tables   the arrays of its slots

    The batch and head axes have extent 1 where nothing depends on them. A class is proven by intervals: an
    EMPTY tile has no allowed pair and a FULL one only allowed pairs and no key past the end, while a PARTIAL
    tile may turn out to be either. A table is bounded block by block where one of its indices is exactly
    `row`, `q` or `k` and the others are constants, `batch` or `head`; any other load may be anything.
    """
    used = _variables(mask)
    lengths = [np.asarray(n, np.int64) for n in (dims.q_len, dims.k_len)]
    by_batch = "batch" in used or any(n.ndim for n in lengths)
    q_len, k_len = (n.reshape(-1, 1, 1, 1) for n in lengths)
    first_row = np.arange(0, int(q_len.max(initial=0)), block_q)[:, None]
    first_k = np.arange(0, int(k_len.max(initial=0)), block_k)
    last_row = np.minimum(first_row + block_q, q_len) - 1
    last_k = np.minimum(first_k + block_k, k_len) - 1
    offset = k_len - q_len
    batch = np.arange(dims.batch).reshape(-1, 1, 1, 1)
    head = np.arange(dims.heads).reshape(-1, 1, 1)
    env: dict[str, Interval[Any]] = {
        "batch": (batch, batch),
        "head": (head, head),
        "row": (first_row, last_row),
        "q": (first_row + offset, last_row + offset),
        "k": (first_k, last_k),
        "q_len": (q_len, q_len),
        "k_len": (k_len, k_len),
    }
    sure, possible = (
        (np.True_, np.True_)
        if mask is None
        else bound(mask, env, Numbers(), lambda node, indices: _table_bound(node, indices, tables))
    )
    exists = (first_row <= last_row) & (first_k <= last_k)
    whole = first_k + block_k <= k_len
    shape = (
        dims.batch if by_batch else 1,
        dims.heads if "head" in used else 1,
        len(first_row),
        len(first_k),
    )
    classes = np.where(sure & whole, FULL, PARTIAL) * (possible & exists)
    return np.broadcast_to(classes, shape).astype(np.int8)


def _variables(expr: Expr | None) -> set[str]:
    found: set[str] = set()

    def note(node: Expr) -> None:
        if node.op == "var":
            found.add(node.value)

    if expr is not None:
        walk(expr, note)
    return found


def _table_bound(
    node: Expr, indices: tuple[Interval[Any], ...], tables: Sequence[NDArray[Any]]
) -> Interval[Any] | None:
    moving = [axis for axis, a in enumerate(node.args) if a.op == "var" and a.value in _POSITIONS]
    still = [axis for axis, a in enumerate(node.args) if a.op == "const" or a.value in ("batch", "head")]
    if len(moving) > 1 or len(moving) + len(still) < len(node.args):
        return None
    slot: int = node.value
    table = tables[slot]
    low = clamped([lo for lo, _ in indices], table.shape)
    if not moving:
        return _proper(table[low], table[low])
    axis = moving[0]
    high = np.clip(indices[axis][1], low[axis], table.shape[axis] - 1)
    ranges, which = np.unique(
        np.stack(np.broadcast_arrays(low[axis], high), axis=-1).reshape(-1, 2), axis=0, return_inverse=True
    )
    which = which.reshape(np.broadcast_shapes(np.shape(low[axis]), np.shape(high)))
    lines = np.moveaxis(table, axis, -1)
    parts = [lines[..., a : b + 1] for a, b in ranges]
    place = (*(low[other] for other in still), which)
    lowest = np.stack([part.min(axis=-1) for part in parts], axis=-1)[place]
    highest = np.stack([part.max(axis=-1) for part in parts], axis=-1)[place]
    return _proper(lowest, highest)


def _proper(lo: NDArray[Any], hi: NDArray[Any]) -> Interval[Any]:
    """End points in the algebra's types; NaN in a table makes its bound infinite."""
    if lo.dtype.kind == "b":
        return lo, hi
    if lo.dtype.kind in "iu":
        return lo.astype(np.int64), hi.astype(np.int64)
    lo, hi = lo.astype(np.float64), hi.astype(np.float64)
    number = ~(np.isnan(lo) | np.isnan(hi))
    return np.where(number, lo, -np.inf), np.where(number, hi, np.inf)
