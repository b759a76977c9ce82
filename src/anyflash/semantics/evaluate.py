"""Expressions evaluated with numpy, for the reference and for everything that draws or counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from anyflash.semantics.expr import Expr

Array = NDArray[Any]

_UFUNCS: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "floordiv": np.floor_divide,
    "mod": np.remainder,
    "min": np.minimum,
    "max": np.maximum,
    "neg": np.negative,
    "abs": np.absolute,
    "exp": np.exp,
    "log": np.log,
    "tanh": np.tanh,
    "lt": np.less,
    "le": np.less_equal,
    "eq": np.equal,
    "ne": np.not_equal,
    "and": np.logical_and,
    "or": np.logical_or,
    "not": np.logical_not,
    "where": np.where,
}


def evaluate(
    expr: Expr,
    env: Mapping[str, ArrayLike],
    tables: Sequence[Array] = (),
    dtype: DTypeLike = np.float64,
) -> Array:
    """The value of a bound expression.

    `env` gives each variable as a number or array; they broadcast against each other, and so does the result:
    it is as small as what it depends on. Floats are computed in `dtype`, ints in int64. Division of an int by
    zero gives 0, `//` and `%` alike. Table indices are clamped to the table.
    """
    done: dict[int, Array] = {}

    def visit(node: Expr) -> Array:
        if id(node) not in done:
            done[id(node)] = _value(node, [visit(a) for a in node.args], env, tables, np.dtype(dtype))
        return done[id(node)]

    with np.errstate(all="ignore"):
        return visit(expr)


def clamped(indices: Sequence[Array], shape: Sequence[int]) -> tuple[Array, ...]:
    """Indices moved to the nearest element of a table of `shape`."""
    return tuple(np.clip(i, 0, n - 1) for i, n in zip(indices, shape, strict=True))


def _value(
    node: Expr, args: list[Array], env: Mapping[str, ArrayLike], tables: Sequence[Array], dtype: np.dtype[Any]
) -> Array:
    kinds = {"float": dtype, "int": np.dtype(np.int64), "bool": np.dtype(np.bool_)}
    if node.op == "const":
        return np.asarray(node.value, kinds[node.kind])
    if node.op == "var":
        return np.asarray(env[node.value]).astype(kinds[node.kind])
    if node.op == "load":
        slot: int = node.value
        table = tables[slot]
        return table[clamped(args, table.shape)].astype(kinds[node.kind])
    if node.op == "float":
        return args[0].astype(dtype)
    return np.asarray(_UFUNCS[node.op](*args))
