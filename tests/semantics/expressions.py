"""Random expressions, bound to the tables of `TABLES`, for the property tests."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import strategies as st

from anyflash.semantics import expr as ex
from anyflash.semantics.expr import Expr, Table
from anyflash.semantics.text import bind

INTS = np.array([[3, -2, 7], [0, 5, 1]])
FLOATS = np.array([0.5, -1.25, 2.0, 0.0])
BOOLS = np.array([True, False, True])
TABLES = (Table(INTS, "int"), Table(FLOATS, "float"), Table(BOOLS, "bool"))
ARRAYS = tuple(t.array for t in TABLES)

INT_VARIABLES = ("batch", "head", "row", "q", "k", "q_len", "k_len")


def slotted(e: Expr) -> Expr:
    """`e` with the tables above as slots 0, 1, 2, whichever of them it uses."""
    bound = bind([INT_LOAD, FLOAT_LOAD, BOOL_LOAD, e])[0][3]
    assert bound is not None
    return bound


INT_LOAD = TABLES[0][0, 0]
FLOAT_LOAD = TABLES[1][0]
BOOL_LOAD = TABLES[2][0]


def ints(depth: int) -> st.SearchStrategy[Expr]:
    leaf = st.one_of(
        st.sampled_from(INT_VARIABLES).map(ex.var),
        st.integers(-9, 9).map(ex.const),
    )
    if depth == 0:
        return leaf
    a, b, c = ints(depth - 1), ints(depth - 1), bools(depth - 1)
    return st.one_of(
        leaf,
        st.builds(lambda x, y: x + y, a, b),
        st.builds(lambda x, y: x - y, a, b),
        st.builds(lambda x, y: x * y, a, b),
        st.builds(lambda x, y: ex.Expr("floordiv", (x, y), kind="int"), a, b),
        st.builds(lambda x, y: ex.Expr("mod", (x, y), kind="int"), a, b),
        st.builds(ex.minimum, a, b),
        st.builds(ex.maximum, a, b),
        st.builds(lambda x: -x, a),
        st.builds(abs, a),
        st.builds(ex.where, c, a, b),
        st.builds(lambda x, y: TABLES[0][x, y], a, b),
    )


def floats(depth: int, extremes: bool = True) -> st.SearchStrategy[Expr]:
    """`extremes` allows infinite constants and functions that leave the reals."""
    numbers = st.floats(-4, 4).map(lambda x: round(x, 2))
    if extremes:
        numbers = st.one_of(numbers, st.sampled_from([math.inf, -math.inf, math.nan, 1e308]))
    leaf = st.one_of(st.just(ex.var("score")), numbers.map(ex.const))
    if depth == 0:
        return leaf
    a, b = floats(depth - 1, extremes), floats(depth - 1, extremes)
    smooth = [
        leaf,
        st.builds(lambda x, y: x + y, a, b),
        st.builds(lambda x, y: x - y, a, b),
        st.builds(lambda x, y: x * y, a, b),
        st.builds(lambda x: -x, a),
        st.builds(ex.tanh, a),
        st.builds(ex.minimum, a, b),
        st.builds(ex.maximum, a, b),
        st.builds(abs, a),
        st.builds(ex.where, bools(depth - 1), a, b),
        ints(depth - 1).map(ex.as_float),
        st.builds(lambda x: TABLES[1][x], ints(depth - 1)),
    ]
    wild = [st.builds(lambda x, y: x / y, a, b), st.builds(ex.exp, a), st.builds(ex.log, a)]
    return st.one_of(*smooth, *(wild if extremes else ()))


def bools(depth: int) -> st.SearchStrategy[Expr]:
    leaf = st.booleans().map(ex.const)
    if depth == 0:
        return leaf
    a, b = bools(depth - 1), bools(depth - 1)
    compare = st.sampled_from(
        [lambda x, y: x < y, lambda x, y: x <= y, lambda x, y: x == y, lambda x, y: x != y]
    )
    numbers = st.one_of(ints(depth - 1), floats(depth - 1))
    return st.one_of(
        leaf,
        st.builds(lambda f, x, y: f(x, y), compare, ints(depth - 1), ints(depth - 1)),
        st.builds(lambda f, x, y: f(x, y), compare, numbers, numbers),
        st.builds(lambda x, y: x & y, a, b),
        st.builds(lambda x, y: x | y, a, b),
        st.builds(lambda x: ~x, a),
        st.builds(lambda x: TABLES[2][x], ints(depth - 1)),
    )


def any_kind(depth: int) -> st.SearchStrategy[Expr]:
    return st.one_of(ints(depth), floats(depth), bools(depth)).map(slotted)
