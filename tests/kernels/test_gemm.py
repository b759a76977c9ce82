"""The products: every kind of word, odd sizes, either operand's zeros over values that are not finite."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from anyflash.kernels.llvm import gemm, tiles
from anyflash.kernels.llvm.gemm import Dot, Matrix
from anyflash.kernels.llvm.ir import DOUBLE, FLOAT, I64, Builder, Value
from anyflash.kernels.llvm.spec import RegisterTile
from anyflash.kernels.llvm.target import get_target
from anyflash.semantics.arrays import numpy_dtype
from kernels.cases import Array
from kernels.functions import compiled, pointer, usable

BFLOAT16 = numpy_dtype("bfloat16")
DOTS: dict[str, tuple[str, Dot]] = {
    "float": ("avx512", gemm.fma_dot(FLOAT, 16)),
    "double": ("avx512", gemm.fma_dot(DOUBLE, 8)),
    "float avx2": ("avx2", gemm.fma_dot(FLOAT, 8)),
    "double avx2": ("avx2", gemm.fma_dot(DOUBLE, 4)),
    "float neon": ("neon", gemm.fma_dot(FLOAT, 4)),
    "pairs": ("avx512bf16", gemm.bf16_pair_dot(16, native=True)),
    "pairs written out": ("avx512", gemm.bf16_pair_dot(16, native=False)),
}
HERE = [name for name, (target, _) in DOTS.items() if usable(target)]

SMALL = RegisterTile(4, 3, 12)


@dataclass(frozen=True)
class Operands:
    """Small whole numbers, so that every order of the sums gives the same. `a` (rows, depth) and `y`
    (depth, n) in words; `plain_a`, `plain_y` are the numbers in them, depth being twice as long for pairs."""

    a: Array
    y: Array
    plain_a: Array
    plain_y: Array


def operands(dot: Dot, rows: int, columns: int, depth: int, edit=lambda a, y: None) -> Operands:
    rng = np.random.default_rng(rows * 1000 + columns + depth)
    pair = dot.kind != "fma"
    inner = 2 * depth if pair else depth
    a = rng.integers(-4, 5, (rows, inner)).astype(np.float64)
    y = rng.integers(-4, 5, (inner, columns)).astype(np.float64)
    edit(a, y)
    if not pair:
        dtype = np.float32 if dot.accumulator == FLOAT else np.float64
        return Operands(a.astype(dtype), y.astype(dtype), a, y)
    words_a = np.ascontiguousarray(a.astype(BFLOAT16)).view(np.uint32)
    both = y.astype(BFLOAT16).view(np.uint16).astype(np.uint32)
    return Operands(words_a, both[0::2] | both[1::2] << 16, a, y)


def run(
    target: str,
    dot: Dot,
    given: Operands,
    *,
    tile=SMALL,
    dynamic=False,
    product=gemm.product,
    **options,
) -> Array:
    """1 + a y, with `a` read through strides of its own."""
    rows, depth = given.a.shape
    columns = given.y.shape[1]
    vectors = columns // dot.lanes
    number = np.dtype(np.float32 if dot.accumulator == FLOAT else np.float64)
    out = np.full((rows, columns), np.nan, number)
    spread = np.zeros((rows, 2, depth + 3), given.a.dtype)
    spread[:, 1, :depth] = given.a
    a, y = spread[:, 1, :depth], np.ascontiguousarray(given.y)

    def emit(b: Builder, words) -> None:
        a_at, y_at, out_at = (pointer(b, w) for w in words[:3])

        def finish(row, vector: int, value: Value) -> None:
            place = b.at(b.at(out_at, row * out.strides[0]), vector * dot.vector_bytes)
            b.store(value, place, number.itemsize)

        size = (words[3], words[4]) if dynamic else (rows, depth)
        if product is gemm.product:
            options.update(tile=tile)
        product(
            b, dot, Matrix(a_at, a.strides[0], a.strides[1]), Matrix(y_at, y.strides[0], dot.vector_bytes),
            size[0], vectors, size[1], start=lambda row, vector: b.const(1.0, dot.vector), finish=finish,
            **options,
        )  # fmt: skip

    compiled(target, 5, emit)(a, y, out, rows, depth)
    return out


@np.errstate(invalid="ignore")
def expected(given: Operands, where: Array | None = None) -> Array:
    """The products in float64; with `where` (rows, depth, n) only those terms."""
    terms = given.plain_a[:, :, None] * given.plain_y[None]
    return 1 + (terms if where is None else np.where(where, terms, 0)).sum(axis=1)


SIZES = [(1, 1, 1), (3, 2, 5), (8, 3, 8), (9, 4, 7), (17, 5, 12), (23, 7, 33)]


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_products_of_any_size(name: str, size: tuple[int, int, int]) -> None:
    target, dot = DOTS[name]
    rows, vectors, depth = size
    given = operands(dot, rows, vectors * dot.lanes, depth)
    tile = RegisterTile(8, 3, 24) if rows > 9 else RegisterTile(4, 2, 8)
    assert (run(target, dot, given, tile=tile) == expected(given)).all()


@pytest.mark.parametrize("name", HERE)
def test_sizes_known_at_run_time(name: str) -> None:
    target, dot = DOTS[name]
    given = operands(dot, 16, 3 * dot.lanes, 12)
    assert (run(target, dot, given, tile=RegisterTile(8, 3, 24), dynamic=True) == expected(given)).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("side", ["a", "y"])
@pytest.mark.parametrize("name", HERE)
def test_zeros_guard_what_is_not_finite(name: str, side: str, bad: float) -> None:
    """Zeros of either sign in the probabilities remove a term whatever it is; others let it through."""
    target, dot = DOTS[name]

    def edit(a: Array, y: Array) -> None:
        p, other = (a, y.T) if side == "a" else (y.T, a)
        p[:, [0, 1]], p[0::2, 3], p[1::2, 2], p[1::2, 3] = 0.0, -0.0, 0.0, 2.0
        other[:, [0, 1]] = bad
        other[-1, 3] = bad

    given = operands(dot, 5, 2 * dot.lanes, 4, edit)
    p = given.plain_a[:, :, None] if side == "a" else given.plain_y[None]
    exact = expected(given, np.broadcast_to(p != 0, (5, given.plain_a.shape[1], 2 * dot.lanes)))
    got = run(target, dot, given, product=gemm.guarded_product, probability=side)
    assert np.array_equal(got, exact, equal_nan=True)
    assert np.isfinite(got).any()
    assert not np.isfinite(got).all()


@pytest.mark.parametrize("vectors", [1, 2, 3, 4])
@pytest.mark.parametrize(("rows", "depth"), [(32, 16), (33, 32), (47, 48), (16, 16), (64, 32)])
def test_tiles(rows: int, vectors: int, depth: int) -> None:
    """Rows beyond the last are read, up to whole pairs of tiles, and never given to `finish`."""
    dot, target = gemm.bf16_pair_dot(16, native=False), get_target("amx-emulated")
    if target.vector_bytes != 64:
        pytest.skip("tiles are scheduled for vectors of 64 bytes")
    given = operands(dot, rows, vectors * 16, depth)
    readable = np.full((-(-rows // 32) * 32, depth), 0x7FC07FC0, np.uint32)
    readable[:rows] = given.a
    out = np.full((rows + 1, vectors * 16), np.nan, np.float32)

    def emit(b: Builder, words) -> None:
        a_at, y_at, out_at = (pointer(b, w) for w in words)

        def finish(row, vector: int, value: Value) -> None:
            b.store(value, b.at(b.at(out_at, row * out.strides[0]), vector * 64), 4)

        tiles.product(
            b, target, Matrix(a_at, readable.strides[0], 4), Matrix(y_at, given.y.strides[0], 64),
            b.const(rows, I64), vectors, b.const(depth, I64),
            start=lambda row, vector: b.const(1.0, dot.vector), finish=finish,
        )  # fmt: skip

    compiled("amx-emulated", 3, emit)(readable, given.y, out)
    assert (out[:rows] == expected(given)).all()
    assert np.isnan(out[rows]).all()
