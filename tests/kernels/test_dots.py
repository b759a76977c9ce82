"""Scores of few rows: the values, every stored dtype, and bits that depend on neither rows nor neighbours."""

from __future__ import annotations

import numpy as np
import pytest

from anyflash.kernels.llvm.dots import KeyRows, row_products
from anyflash.kernels.llvm.ir import BFLOAT, DOUBLE, FLOAT, HALF, Builder, Value
from anyflash.kernels.llvm.spec import RegisterTile
from anyflash.semantics.arrays import numpy_dtype
from kernels.cases import Array
from kernels.functions import compiled, pointer, usable

STORED = {FLOAT: "float32", DOUBLE: "float64", HALF: "float16", BFLOAT: "bfloat16"}
VECTORS = [
    (target, element, lanes, accumulators)
    for target, element, lanes, accumulators in (
        ("avx512", FLOAT, 16, 24), ("avx512", DOUBLE, 8, 24), ("avx2", FLOAT, 8, 12), ("avx2", DOUBLE, 4, 12),
        ("neon", FLOAT, 4, 24),
    )
    if usable(target)
]  # fmt: skip


def scores(vector: tuple[str, str, int, int], stored: str, q: Array, k: Array) -> Array:
    """q k^T, from rows of k that lie apart."""
    target, element, lanes, accumulators = vector
    (rows, columns), keys = q.shape, len(k)
    spread = np.zeros((keys, columns + 3), k.dtype)
    spread[:, :columns] = k
    out = np.full((rows, keys), np.nan, q.dtype)
    spare = np.empty(rows * lanes * lanes + 16, q.dtype)

    def emit(b: Builder, words) -> None:
        q_at, k_at, out_at, spare_at = (pointer(b, w) for w in words)

        def store(r: int, j: Value, x: Value) -> None:
            b.store(x, b.at(b.at(out_at, r * out.strides[0]), j * out.itemsize))

        row_products(
            b, KeyRows(q_at, q.strides[0], element), KeyRows(k_at, spread.strides[0], stored), keys, columns,
            lanes, tile=RegisterTile(rows, 1, accumulators), spare=spare_at, store=store,
            upcoming=lambda j: [(b.at(k_at, (j + keys) * spread.strides[0]), spread.strides[0], 1 << 20)],
        )  # fmt: skip

    start = -spare.ctypes.data % 64 // spare.itemsize
    compiled(target, 4, emit)(q, spread, out, spare[start:])
    return out


def aligned(rows: int, columns: int, dtype: np.dtype) -> Array:
    memory = np.empty(rows * columns * dtype.itemsize + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + rows * columns * dtype.itemsize].view(dtype).reshape(rows, columns)


# Doubles are multiplied as doubles, all others as floats.
CASES = [(v, stored) for v in VECTORS for stored in STORED if (v[1] == DOUBLE) == (stored == DOUBLE)]


@pytest.mark.parametrize(("vector", "stored"), CASES, ids=str)
def test_scores(vector: tuple[str, str, int, int], stored: str) -> None:
    _, element, lanes, _ = vector
    number = np.dtype(np.float64 if element == DOUBLE else np.float32)
    rng = np.random.default_rng(0)
    for columns in (lanes, 3 * lanes, 8 * lanes):
        q = aligned(8, columns, number)
        q[...] = rng.standard_normal(q.shape)
        k = rng.standard_normal((4 * lanes, columns)).astype(numpy_dtype(STORED[stored]))
        together = scores(vector, stored, q, k)
        exact = q.astype(np.float64) @ k.astype(np.float64).T
        terms = np.abs(q.astype(np.float64)) @ np.abs(k.astype(np.float64)).T
        assert (np.abs(together - exact) <= columns * np.finfo(number).eps * terms).all()
        for rows in (1, 2, 4):
            few = aligned(rows, columns, number)
            few[...] = q[:rows]
            assert (scores(vector, stored, few, k) == together[:rows]).all()
        assert (scores(vector, stored, q, k[lanes : 3 * lanes]) == together[:, lanes : 3 * lanes]).all()
