"""numpy evaluation: kinds, broadcasting, clamping, integer division."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from anyflash.semantics.evaluate import evaluate
from anyflash.semantics.expr import At, Table, const, maximum, minimum, var, where
from anyflash.semantics.text import bind

AT = At()
S = var("score")


def value(e, tables=(), **env):
    (bound,), _ = bind([e])
    return evaluate(bound, env, tables)


def test_result_is_as_small_as_what_it_depends_on():
    env = {"q": np.arange(3)[:, None], "k": np.arange(5), "score": np.zeros((3, 5))}
    assert value(AT.k < 2, **env).shape == (5,)
    assert value(AT.k <= AT.q, **env).shape == (3, 5)
    assert value(const(True), **env).shape == ()


@pytest.mark.parametrize("a", [-7, -1, 0, 5])
@pytest.mark.parametrize("b", [-3, 2, 7])
def test_integer_division_rounds_down_as_in_python(a, b):
    assert value(AT.q // AT.k, q=a, k=b) == a // b
    assert value(AT.q % AT.k, q=a, k=b) == a % b


def test_integer_division_by_zero_gives_zero():
    assert value(AT.q // AT.k, q=5, k=0) == 0
    assert value(AT.q % AT.k, q=5, k=0) == 0


def test_table_indices_are_clamped():
    table = np.array([1.0, 2.0, 3.0])
    np.testing.assert_array_equal(
        value(Table(table, "float")[AT.k], [table], k=np.array([-2, 0, 2, 9])), [1.0, 1.0, 3.0, 3.0]
    )


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.int8, np.uint8, np.bool_])
def test_tables_of_every_type(dtype):
    table = np.array([0, 1, 1]).astype(dtype)
    kind = "bool" if dtype is np.bool_ else "int" if np.dtype(dtype).kind in "iu" else "float"
    got = value(Table(table, kind)[AT.k], [table], k=np.arange(3))
    assert got.dtype == {"bool": np.bool_, "int": np.int64, "float": np.float64}[kind]
    np.testing.assert_array_equal(got, [0, 1, 1])


def test_nan_in_minimum_and_maximum_wins():
    assert np.isnan(value(minimum(S, 1.0), score=np.nan))
    assert np.isnan(value(maximum(1.0, S), score=np.nan))


def test_where_does_not_warn_about_the_other_branch():
    with np.errstate(all="raise"):
        np.testing.assert_array_equal(
            value(where(AT.k > 0, 1.0 / AT.k, 0.0), k=np.arange(3)), [0.0, 1.0, 0.5]
        )
