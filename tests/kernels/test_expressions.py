"""Expressions in emitted code give what `semantics.evaluate` gives, bit for bit but for exp, log and tanh."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from anyflash.kernels.llvm import vmath
from anyflash.kernels.llvm.emit import Emitter, TableAccess
from anyflash.kernels.llvm.ir import DOUBLE, FLOAT, I32, I64, Builder, vec
from anyflash.semantics import evaluate as semantics
from anyflash.semantics.arrays import numpy_dtype
from anyflash.semantics.evaluate import evaluate
from anyflash.semantics.expr import VARIABLES, Expr, walk
from anyflash.semantics.text import parse, show
from kernels.cases import Array
from kernels.functions import compiled, pointer, usable
from kernels.programs import TABLE_DTYPES
from semantics import expressions

TOGETHER = 6  # expressions in one module: most of the time is spent compiling
POINTS = 32
LANES = {FLOAT: 16, DOUBLE: 8}
pytestmark = pytest.mark.skipif(not usable("avx512"), reason="emits AVX-512 code")


def rational(b: Builder, x):
    """Stands for exp, log and tanh, whose own accuracy test_vmath measures."""
    return x * 0.5 + 1.0


@pytest.fixture(autouse=True)
def _exact_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("exp", "log", "tanh"):
        monkeypatch.setattr(vmath, name, rational)
        monkeypatch.setitem(semantics._UFUNCS, name, lambda x: x * x.dtype.type(0.5) + x.dtype.type(1))


def points(rng: np.random.Generator, vectors: frozenset[str]) -> dict[str, Array]:
    """Values of each variable: many where it runs along the lanes, else one."""
    env: dict[str, Array] = {}
    for name, kind in VARIABLES.items():
        count = POINTS if name in vectors else 1
        if kind == "float":
            env[name] = rng.choice([0.0, -0.0, 1.5, -2.25, np.inf, -np.inf, np.nan, 3e38, -1e-40], count)
        else:
            env[name] = rng.integers(-6, 9, count)
    return env


def emitted(element: str, exprs: list[Expr], env: dict[str, Array], tables: tuple[Array, ...]) -> list[Array]:
    """The values of bound expressions at the points of `env`."""
    lanes = LANES[element]
    number = np.dtype(np.float32 if element == FLOAT else np.float64)
    inputs = {
        n: np.ascontiguousarray(a.astype(number if VARIABLES[n] == "float" else np.int32))
        for n, a in env.items()
    }
    outputs = [np.zeros(POINTS, number if e.kind == "float" else np.int32) for e in exprs]

    def emit(b: Builder, words) -> None:
        places = [pointer(b, w) for w in words]
        accesses = []
        for t, place in zip(tables, places[len(inputs) + len(outputs) :], strict=True):
            strides, extents = ([b.const(x, I64) for x in xs] for xs in (t.strides, t.shape))
            accesses.append(TableAccess(place, t.dtype.name, tuple(strides), tuple(extents)))
        with b.loop(0, POINTS, lanes) as i:
            variables = {}
            for (name, array), place in zip(inputs.items(), places, strict=False):
                type_ = element if VARIABLES[name] == "float" else I32
                if array.size == 1:
                    variables[name] = b.load(type_, place)
                else:
                    variables[name] = b.load(vec(type_, lanes), b.at(place, i * array.itemsize))
            emitter = Emitter(b, element, variables, tuple(accesses))
            for e, out, place in zip(exprs, outputs, places[len(inputs) :], strict=False):
                value = b.splat(emitter(e), lanes)
                if e.kind == "bool":
                    value = b.cast("zext", value, I32)
                b.store(value, b.at(place, i * out.itemsize))

    arrays = [*inputs.values(), *outputs, *tables]
    compiled("avx512", len(arrays), emit)(*arrays)
    return outputs


def fits(e: Expr, env: dict[str, Array], element: str, tables: tuple[Array, ...]) -> bool:
    """Whether integers stay within 32 bits (a backend declines others) and constants within the number."""
    inside = []

    def visit(node: Expr) -> None:
        if node.kind == "int":
            inside.append(np.abs(evaluate(node, env, tables)).max() < 2**31)
        if node.op == "const" and element == FLOAT:
            inside.append(not 1e38 < abs(node.value) < math.inf)

    walk(e, visit)
    return all(inside)


@pytest.mark.parametrize("element", [FLOAT, DOUBLE])
@pytest.mark.parametrize(
    "along", [frozenset({"score", "row", "q"}), frozenset({"score", "k"})], ids=["row", "k"]
)
@given(st.lists(expressions.any_kind(4), min_size=TOGETHER, max_size=TOGETHER), st.integers(0, 1000))
@settings(max_examples=25)
def test_as_evaluate(element: str, along: frozenset[str], exprs: list[Expr], seed: int) -> None:
    tables = expressions.ARRAYS
    env = points(np.random.default_rng(seed), along)
    exprs = [parse(show(e)) for e in exprs if fits(e, env, element, tables)]
    assume(exprs)
    narrow = {
        n: a.astype(np.float32) if element == FLOAT and a.dtype.kind == "f" else a for n, a in env.items()
    }
    dtype = np.float32 if element == FLOAT else np.float64
    for e, got in zip(exprs, emitted(element, exprs, env, tables), strict=True):
        want = np.broadcast_to(evaluate(e, narrow, tables, dtype), got.shape)
        assert np.array_equal(got.astype(want.dtype), want, equal_nan=want.dtype.kind == "f"), show(e)


@pytest.mark.parametrize("element", [FLOAT, DOUBLE])
@pytest.mark.parametrize("index", ["scalar", "vector", "both"])
def test_tables_of_every_dtype(element: str, index: str) -> None:
    """Clamped at both ends of both axes; strides of any sign; extremes of the type."""
    rng = np.random.default_rng(0)
    tables = []
    for name in TABLE_DTYPES:
        low = {"bool": 0, "uint8": 0}.get(name, -99)
        values = rng.integers(low, 2 if name == "bool" else 99, (7, 10)).astype(numpy_dtype(name))
        if name in ("uint8", "int8", "int16"):
            values[0, 0], values[6, 8] = np.iinfo(name).max, np.iinfo(name).min
        tables.append(values[::-1, ::2])  # (7, 5)
    text = {"scalar": ("k", "head"), "vector": ("row", "(sub row 2)"), "both": ("row", "k")}[index]
    kinds = ["b" if t.dtype == bool else "i" if t.dtype.kind in "iu" else "f" for t in tables]
    exprs = [parse(f"(load {i}:{kind} {text[0]} {text[1]})") for i, kind in enumerate(kinds)]
    for seed in range(3):
        env = points(np.random.default_rng(seed), frozenset({"score", "row", "q"}))
        for e, got in zip(exprs, emitted(element, exprs, env, tuple(tables)), strict=True):
            want = np.broadcast_to(evaluate(e, env, tables), got.shape)
            assert np.array_equal(got.astype(want.dtype), want), show(e)
