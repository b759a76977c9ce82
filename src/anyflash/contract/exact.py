"""Masks, tested with integers and without tolerance.

With q = 0 every allowed key weighs 1 / count. If v is one-hot, column j of `out` is 1 / count where key j is
allowed and 0 elsewhere: what is not zero is the mask, and out * count are integers. The backward shows its
masks in the same way: dv where dout is one-hot, dq where k is, dk where q is (and then k = 0).

Thousands of cells (queries, keys, left, right, prefix) go into one packed call; their bounds come from
tables, so that they share one kernel:

    allowed = (q - left <= k <= q + right) or k < prefix
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from anyflash.contract.direct import Outcome, attend
from anyflash.contract.poison import numpy_dtype
from anyflash.core.dtypes import accumulate
from anyflash.semantics.expr import At, Expr, Table

UNBOUNDED = 1 << 20
"""Stands for a missing bound."""

MOST = 17
"""Lengths of the exhaustive sweep go from 0 to this."""

Keywords = Callable[["Cells"], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Cells:
    """(n,) integer arrays, one entry a sequence."""

    q_len: np.ndarray
    k_len: np.ndarray
    left: np.ndarray
    right: np.ndarray
    prefix: np.ndarray

    def __len__(self) -> int:
        return len(self.q_len)

    def __getitem__(self, chosen: Any) -> Cells:
        return Cells(*(getattr(self, name)[chosen] for name in self.__slots__))

    def sorted(self) -> Cells:
        """With cells of equal lengths together."""
        return self[np.lexsort((self.k_len, self.q_len))]

    def allowed(self) -> Iterator[tuple[slice, np.ndarray]]:
        """(which cells, (cells, queries, keys) bool) for each run of cells with equal lengths."""
        changes = np.flatnonzero(np.diff(self.q_len) | np.diff(self.k_len)) + 1
        for first, last in zip((0, *changes), (*changes, len(self)), strict=True):
            if first == last:
                continue
            row = np.arange(self.q_len[first])[None, :, None]
            k = np.arange(self.k_len[first])[None, None, :]
            q = row + self.k_len[first] - self.q_len[first]
            part = slice(int(first), int(last))
            left, right, prefix = (x[part][:, None, None] for x in (self.left, self.right, self.prefix))
            yield part, ((k - q >= -left) & (k - q <= right)) | (k < prefix)


def every_cell() -> Cells:
    """All lengths up to 17 with every window, None included, and with every causal prefix."""
    length, bound = np.arange(MOST + 1), np.array([*range(MOST + 1), UNBOUNDED])
    windows = np.stack(np.meshgrid(length, length, bound, bound, [0], indexing="ij"), -1).reshape(-1, 5)
    prefixes = np.stack(np.meshgrid(length, length, [UNBOUNDED], [0], length, indexing="ij"), -1)
    return Cells(*np.concatenate([windows, prefixes.reshape(-1, 5)]).T).sorted()


def plain_cells(left: int | None, right: int | None, prefix: int = 0) -> Cells:
    """All lengths up to 17 with one window."""
    lengths = np.stack(np.meshgrid(*[np.arange(MOST + 1)] * 2, indexing="ij"), -1).reshape(-1, 2)
    bounds = [UNBOUNDED if bound is None else bound for bound in (left, right)] + [prefix]
    return Cells(*lengths.T, *(np.full(len(lengths), bound) for bound in bounds))


def edge_cells(count: int, most: int, seed: int) -> Cells:
    """Random windows and prefixes at lengths near multiples of the sizes that tiles may have."""
    rng = np.random.default_rng(seed)
    tiles = rng.choice([8, 16, 32, 48, 64, 96, 128], (2, count))
    near = tiles * rng.integers(1, 1 + most // tiles) + rng.integers(-1, 2, (2, count))
    left, right = rng.integers(0, most, (2, count))
    left[rng.random(count) < 0.3] = UNBOUNDED
    right[rng.random(count) < 0.5] = 0
    prefix = np.where(rng.random(count) < 0.3, rng.integers(0, most, count), 0)
    return Cells(*np.clip(near, 0, most), left, right, prefix).sorted()


def by_tables(cells: Cells) -> dict[str, Any]:
    """The bounds as a user's mask with one table for each."""
    left, right, prefix = (
        Table(bound.astype(np.int32), "int") for bound in (cells.left, cells.right, cells.prefix)
    )

    def mask(at: At) -> Expr:
        near = (at.q - left[at.batch] <= at.k) & (at.k <= at.q + right[at.batch])
        return near | (at.k < prefix[at.batch])

    return {"mask": mask}


def check(backend: str, cells: Cells, keywords: Keywords, dtype: str = "float32") -> list[str]:
    """What the forward of `backend` gets wrong, for cells in one packed call with the given keywords."""
    most = max(int(cells.k_len.max()), 1)
    q, k, v = _operands(cells, dtype, 1, most)
    _one_hot(v, cells.k_len)
    found = _call(backend, cells, q, k, v, keywords)
    return _compare(cells, found.out, found.lse[0], dtype)


def check_backward(backend: str, cells: Cells, keywords: Keywords, dtype: str = "float32") -> list[str]:
    """What the backward gets wrong: dq and dv with one-hot keys, dk with one-hot queries."""
    most = max(int(cells.k_len.max()), int(cells.q_len.max()), 1)
    complaints: list[str] = []
    for one_hot in ("k", "q"):
        q, k, v = _operands(cells, dtype, most, most)
        dout = np.zeros((len(q), 1, most), q.dtype)
        _one_hot(dout, cells.q_len)
        _one_hot(k if one_hot == "k" else q, cells.k_len if one_hot == "k" else cells.q_len)
        dlse = np.ones((1, len(q)), numpy_dtype(accumulate(dtype)))
        found = _call(backend, cells, q, k, v, keywords, dout, dlse)
        by_keys = {"dv": found.dv} if one_hot == "k" else {"dv": found.dv, "dk": found.dk}
        for name, grad in by_keys.items():
            complaints += _compare_transposed(cells, name, grad)
        if one_hot == "k":
            complaints += [f"dq: {said}" for said in _compare(cells, found.dq, None, dtype)]
    return complaints


def _operands(cells: Cells, dtype: str, dim: int, dim_v: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    own = numpy_dtype(dtype)
    total_q, total_k = int(cells.q_len.sum()), int(cells.k_len.sum())
    return tuple(np.zeros((n, 1, d), own) for n, d in ((total_q, dim), (total_k, dim), (total_k, dim_v)))


def _one_hot(array: np.ndarray, lengths: np.ndarray) -> None:
    """Row i of each sequence gets a 1 in column i."""
    ends = np.cumsum(lengths)
    rows = np.arange(len(array))
    array[rows, 0, rows - np.repeat(ends - lengths, lengths)] = 1


def _call(
    backend: str,
    cells: Cells,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    keywords: Keywords,
    dout: np.ndarray | None = None,
    dlse: np.ndarray | None = None,
) -> Outcome:
    starts = lambda lengths: np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return attend(
        backend, q, k, v, dout=dout, dlse=dlse, scale=1.0,
        cu_seqlens_q=starts(cells.q_len), cu_seqlens_k=starts(cells.k_len), **keywords(cells),
    )  # fmt: skip


def _compare(cells: Cells, out: np.ndarray, lse: np.ndarray | None, dtype: str) -> list[str]:
    complaints: list[str] = []
    at = 0
    for part, allowed in cells.allowed():
        cells_here, q_len, k_len = allowed.shape
        rows = slice(at, at + cells_here * q_len)
        at = rows.stop
        if not q_len:
            continue
        count = allowed.sum(axis=2)
        weights = out[rows].astype(np.float64).reshape(cells_here, q_len, -1)
        integers = np.rint(weights * count[..., None])
        wrong = (weights[..., k_len:] != 0).any(axis=(1, 2))
        wrong |= ((weights[..., :k_len] != 0) != allowed).any(axis=(1, 2))
        wrong |= (integers[..., :k_len] != allowed).any(axis=(1, 2))
        if lse is not None:
            sums = np.exp(lse[rows].astype(np.float64).reshape(cells_here, q_len))
            wrong |= (np.rint(sums) != count).any(axis=1) | ((sums == 0) != (count == 0)).any(axis=1)
        complaints += _names(cells[part], wrong)
    return complaints


def _compare_transposed(cells: Cells, name: str, grad: np.ndarray) -> list[str]:
    complaints: list[str] = []
    at = 0
    for part, allowed in cells.allowed():
        cells_here, q_len, k_len = allowed.shape
        rows = slice(at, at + cells_here * k_len)
        at = rows.stop
        if not k_len:
            continue
        weights = grad[rows].astype(np.float64).reshape(cells_here, k_len, -1)
        expected = allowed.swapaxes(1, 2)
        integers = np.rint(weights[..., :q_len] * allowed.sum(axis=2)[:, None, :])
        wrong = (weights[..., q_len:] != 0).any(axis=(1, 2))
        wrong |= ((weights[..., :q_len] != 0) != expected).any(axis=(1, 2))
        wrong |= (integers != expected).any(axis=(1, 2))
        complaints += [f"{name}: {said}" for said in _names(cells[part], wrong)]
    return complaints


def _names(cells: Cells, wrong: np.ndarray) -> list[str]:
    bound = lambda x: None if x == UNBOUNDED else int(x)
    return [
        f"{cells.q_len[i]} queries, {cells.k_len[i]} keys, window ({bound(cells.left[i])}, "
        f"{bound(cells.right[i])}), prefix {cells.prefix[i]}: not the keys that the mask allows"
        for i in np.flatnonzero(wrong)
    ]
