"""Rows moved between the user's memory and scratch: any strides, any address, nothing beside them touched."""

from __future__ import annotations

import numpy as np
import pytest

from anyflash.core.dtypes import FLOATS
from anyflash.kernels.llvm import layout
from anyflash.kernels.llvm.ir import BFLOAT, BYTES, DOUBLE, FLOAT, I64, Builder, vec
from anyflash.kernels.llvm.layout import UserRows, padded
from anyflash.semantics.arrays import numpy_dtype
from kernels.cases import Array
from kernels.functions import compiled, pointer, usable
from kernels.memory import LAYOUTS, place

BF16 = numpy_dtype("bfloat16")
NUMPY = {FLOAT: np.dtype(np.float32), DOUBLE: np.dtype(np.float64), BFLOAT: BF16}
# Scratch element and lanes for each vector that kernels use.
VECTORS = [
    (target, element, lanes)
    for target, element, lanes in (
        ("avx512", FLOAT, 16), ("avx512", DOUBLE, 8), ("avx2", FLOAT, 8), ("avx2", DOUBLE, 4),
        ("neon", FLOAT, 4),
    )
    if usable(target)
]  # fmt: skip
PAIRS = [("avx512bf16", BFLOAT, 32)] if usable("avx512bf16") else []


def sources(element: str) -> tuple[str, ...]:
    if element == BFLOAT:
        return ("bfloat16",)
    return ("float64",) if element == DOUBLE else tuple(d for d in FLOATS if d != "float64")


def scratch(rows: int, stride: int, fill: int = 0xFF) -> Array:
    memory = np.full(rows * stride + 128, fill, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + rows * stride + 64]


def rows_in(memory: Array, rows: int, stride: int, element: str) -> Array:
    return memory[: rows * stride].view(NUMPY[element]).reshape(rows, -1)


@pytest.mark.parametrize("columns", [1, 3, 8, 17, 40, 64])
@pytest.mark.parametrize("vector", VECTORS + PAIRS, ids=str)
def test_pack_rows(vector: tuple[str, str, int], columns: int) -> None:
    """Converted, scaled, padded with zeros to whole vectors; rows past `valid` are zero."""
    target, element, lanes = vector
    valid, rows, scale = 5, 7, 3.0
    stride = padded(columns, lanes) * BYTES[element]
    for dtype in sources(element):
        user = np.random.default_rng(0).standard_normal((valid, columns)).astype(numpy_dtype(dtype))
        functions = {}
        for dense in (True, False):

            def emit(b: Builder, w, dtype: str = dtype, dense: bool = dense) -> None:
                source = UserRows(pointer(b, w[0]), w[1], w[2], dtype, columns, dense)
                factor = None if element == BFLOAT else b.const(scale, element)
                layout.pack_rows(b, source, pointer(b, w[3]), stride, w[4], rows, element, lanes, factor)

            functions[dense] = compiled(target, 5, emit)
        for name in LAYOUTS:
            found = place(user, name).array
            out = scratch(rows, stride)
            dense = found.strides[1] == found.itemsize
            functions[dense](found, *found.strides, out, valid)
            got = rows_in(out, rows, stride, element)
            exact = user if element == BFLOAT else user.astype(NUMPY[element]) * NUMPY[element].type(scale)
            assert np.array_equal(got[:valid, :columns], exact), (dtype, name)
            assert not got[valid:].any() and not got[:, columns:].any(), (dtype, name)
            assert (out[rows * stride :] == 0xFF).all(), (dtype, name)


@pytest.mark.parametrize("columns", [1, 3, 8, 17, 40, 64])
@pytest.mark.parametrize("vector", VECTORS, ids=str)
def test_unpack_rows(vector: tuple[str, str, int], columns: int) -> None:
    """Only `valid` rows of `columns` elements are written, whatever lies between them."""
    target, element, lanes = vector
    valid, scale = 5, 0.5
    stride = padded(columns, lanes) * BYTES[element]
    out = scratch(valid, stride)
    values = rows_in(out, valid, stride, element)
    values[...] = np.random.default_rng(0).standard_normal(values.shape)
    for dtype in sources(element):
        functions = {}
        for dense in (True, False):

            def emit(b: Builder, w, dtype: str = dtype, dense: bool = dense) -> None:
                user = UserRows(pointer(b, w[0]), w[1], w[2], dtype, columns, dense)
                factor = b.const(scale, element)
                layout.unpack_rows(b, pointer(b, w[3]), stride, user, w[4], element, lanes, factor)

            functions[dense] = compiled(target, 5, emit)
        for name in LAYOUTS:
            block = place(np.zeros((valid + 1, columns), numpy_dtype(dtype)), name)
            block.array[valid] = 7
            functions[block.array.strides[1] == block.array.itemsize](
                block.array, *block.array.strides, out, valid
            )
            exact = (values[:, :columns] * NUMPY[element].type(scale)).astype(numpy_dtype(dtype))
            assert np.array_equal(block.array[:valid], exact), (dtype, name)
            assert (block.array[valid] == 7).all(), (dtype, name)
            assert block.intact(), (dtype, name)


@pytest.mark.parametrize("columns", [1, 5, 16, 33])
@pytest.mark.parametrize("row_vectors", [1, 3])
@pytest.mark.parametrize("vector", VECTORS, ids=str)
def test_transpose(vector: tuple[str, str, int], row_vectors: int, columns: int) -> None:
    target, element, lanes = vector
    size = BYTES[element]
    rows = row_vectors * lanes
    source = (
        np.random.default_rng(0)
        .standard_normal((rows, padded(columns, lanes) + lanes))
        .astype(NUMPY[element])
    )
    factors = np.arange(1, padded(columns, lanes) + 1).astype(NUMPY[element])
    for scaled in (False, True):
        out = np.full((columns + 1, rows + 4), np.nan, NUMPY[element])

        def emit(b: Builder, w, scaled: bool = scaled) -> None:
            layout.transpose(
                b, pointer(b, w[0]), source.strides[0], pointer(b, w[1]), (rows + 4) * size, row_vectors,
                columns, element, lanes, pointer(b, w[2]) if scaled else None,
            )  # fmt: skip

        compiled(target, 3, emit)(source, out, factors)
        exact = source[:, :columns] * (factors[:columns] if scaled else 1)
        assert np.array_equal(out[:columns, :rows], exact.T)
        assert np.isnan(out[columns]).all() and np.isnan(out[:, rows:]).all()


def test_bfloat16_is_rounded_as_ml_dtypes_does() -> None:
    """Every upper half with lower halves around the tie: to even, into infinity, NaN kept, denormals."""
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    lower = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    bits = (upper[:, None] | lower).ravel()
    single = bits.view(np.float32)
    with np.errstate(invalid="ignore"):
        exact = single.astype(BF16)
    for target, lanes in (("avx512", 16), ("avx2", 8), ("avx2", 1)):
        if not usable(target):
            continue
        out = np.zeros(len(single), np.uint16)

        def emit(b: Builder, w, lanes: int = lanes) -> None:
            with b.loop(0, len(single), lanes) as i:
                value = b.load(vec(FLOAT, lanes), b.at(pointer(b, w[0]), i * 4), 4)
                b.store(layout.convert(b, value, BFLOAT), b.at(pointer(b, w[1]), i * 2), 2)

        compiled(target, 2, emit)(single, out)
        nan = np.isnan(single)
        assert np.array_equal(out[~nan], exact[~nan].view(np.uint16)), (target, lanes)
        assert np.isnan(out[nan].view(BF16).astype(np.float32)).all(), (target, lanes)


@pytest.mark.parametrize("vector", VECTORS, ids=str)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
def test_all_finite(vector: tuple[str, str, int], bad: float) -> None:
    target, element, lanes = vector
    values = np.full(4 * lanes, np.finfo(NUMPY[element]).max, NUMPY[element])
    values[1] = np.finfo(NUMPY[element]).smallest_subnormal
    answer = np.zeros(1, np.int64)

    def emit(b: Builder, w) -> None:
        clean = layout.all_finite(b, pointer(b, w[0]), w[1], element, lanes)
        b.store(b.cast("zext", clean, I64), pointer(b, w[2]), 8)

    function = compiled(target, 3, emit)
    half = values.nbytes // 2
    function(values, values.nbytes, answer)
    assert answer[0] == 1
    for place_of_bad in (0, lanes - 1, lanes, 2 * lanes - 1):
        spoilt = values.copy()
        spoilt[place_of_bad] = bad
        function(spoilt, half, answer)
        assert answer[0] == 0, place_of_bad
    spoilt = values.copy()
    spoilt[2 * lanes] = bad
    function(spoilt, half, answer)
    assert answer[0] == 1
