"""Bounds of an expression over a box of (query, key) pairs.

`bound` walks a tree once and knows the rules; an `Algebra` does the arithmetic on the end points. With
`Numbers` they are numpy scalars or arrays (one box an element); a kernel's algebra emits code instead, so
that a compiled kernel classes its tiles by these same rules. Everything is straight-line: choices go through
`select`.

An interval is a pair (lo, hi) of end points that are included. For a bool, `lo` says that it surely holds and
`hi` that it possibly does. For a float, (-inf, +inf) also admits NaN, and no other interval does; comparisons
of end points must be false where one is NaN. Ints are taken to stay within the algebra's limits, which stand
for "unknown".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from anyflash.semantics.expr import COMPARISONS, Expr, Kind

V = TypeVar("V")
Interval = tuple[V, V]
Number = Literal["float", "int"]


class Algebra(Protocol[V]):
    """Arithmetic on end points. `kind` is that of the operands.

    Int results saturate at the limits. `floordiv` and `mod` round towards minus infinity; their divisor is
    never 0, and no dividend may trap.
    """

    def const(self, value: float | int | bool, kind: Kind) -> V: ...
    def limits(self, kind: Kind) -> Interval[V]: ...
    def add(self, a: V, b: V, kind: Number) -> V: ...
    def sub(self, a: V, b: V, kind: Number) -> V: ...
    def mul(self, a: V, b: V, kind: Number) -> V: ...
    def div(self, a: V, b: V) -> V: ...
    def floordiv(self, a: V, b: V) -> V: ...
    def mod(self, a: V, b: V) -> V: ...
    def min(self, a: V, b: V, kind: Number) -> V: ...
    def max(self, a: V, b: V, kind: Number) -> V: ...
    def lt(self, a: V, b: V, kind: Number) -> V: ...
    def le(self, a: V, b: V, kind: Number) -> V: ...
    def eq(self, a: V, b: V, kind: Number) -> V: ...
    def and_(self, a: V, b: V) -> V: ...
    def or_(self, a: V, b: V) -> V: ...
    def not_(self, a: V) -> V: ...
    def select(self, condition: V, a: V, b: V, kind: Kind) -> V: ...
    def to_float(self, a: V) -> V: ...


Load = Callable[[Expr, tuple[Interval[Any], ...]], "Interval[Any] | None"]


def bound(
    expr: Expr,
    env: Mapping[str, Interval[V]],
    algebra: Algebra[V],
    load: Load | None = None,
) -> Interval[V]:
    """An interval that holds every value of `expr` while each variable stays in its interval.

    A variable missing from `env` may be anything. `load(node, index_intervals)` bounds a table load; None, or
    the answer None, means that it may be anything. Float end points must not be NaN: a table that holds
    NaN is bounded by (-inf, +inf).
    """
    done: dict[int, Interval[V]] = {}

    def visit(node: Expr) -> Interval[V]:
        if id(node) not in done:
            done[id(node)] = _bound(node, [visit(a) for a in node.args], env, algebra, load)
        return done[id(node)]

    return visit(expr)


def _bound(
    node: Expr,
    args: list[Interval[V]],
    env: Mapping[str, Interval[V]],
    algebra: Algebra[V],
    load: Load | None,
) -> Interval[V]:
    op, kind = node.op, node.kind
    unknown = algebra.limits(kind)
    if op == "const":
        if node.value != node.value:
            return unknown
        return algebra.const(node.value, kind), algebra.const(node.value, kind)
    if op == "var":
        return env.get(node.value, unknown)
    if op == "load":
        return (load(node, tuple(args)) if load else None) or unknown
    if op in COMPARISONS:
        return _comparison(op, args[0], args[1], "float" if node.args[0].kind == "float" else "int", algebra)
    if kind == "bool":
        return _logic(op, args, algebra)
    if op == "where":
        return _choice(args[0], args[1], args[2], kind, algebra)
    if op == "float":
        return algebra.to_float(args[0][0]), algebra.to_float(args[0][1])
    return _int(op, args, algebra) if kind == "int" else _float(op, args, algebra)


def _comparison(op: str, a: Interval[V], b: Interval[V], kind: Number, algebra: Algebra[V]) -> Interval[V]:
    if op == "lt":
        return algebra.lt(a[1], b[0], kind), algebra.lt(a[0], b[1], kind)
    if op == "le":
        sure = algebra.le(a[1], b[0], kind)
        if kind == "float":
            lowest, highest = algebra.limits("float")
            sure = algebra.and_(sure, algebra.lt(a[1], highest, kind))
            sure = algebra.and_(sure, algebra.lt(lowest, b[0], kind))
        return sure, algebra.le(a[0], b[1], kind)
    points = algebra.and_(algebra.eq(a[0], a[1], kind), algebra.eq(b[0], b[1], kind))
    sure = algebra.and_(points, algebra.eq(a[0], b[0], kind))
    possible = algebra.and_(algebra.le(a[0], b[1], kind), algebra.le(b[0], a[1], kind))
    return (sure, possible) if op == "eq" else (algebra.not_(possible), algebra.not_(sure))


def _logic(op: str, args: list[Interval[V]], algebra: Algebra[V]) -> Interval[V]:
    if op == "not":
        return algebra.not_(args[0][1]), algebra.not_(args[0][0])
    join = algebra.and_ if op == "and" else algebra.or_
    return join(args[0][0], args[1][0]), join(args[0][1], args[1][1])


def _choice(
    condition: Interval[V], a: Interval[V], b: Interval[V], kind: Kind, algebra: Algebra[V]
) -> Interval[V]:
    sure, possible = condition
    number: Number = "float" if kind == "float" else "int"
    ends: list[V] = []
    for i, join in ((0, algebra.min), (1, algebra.max)):
        either = join(a[i], b[i], number)
        ends.append(algebra.select(sure, a[i], algebra.select(possible, either, b[i], kind), kind))
    return ends[0], ends[1]


def _hull(values: list[V], kind: Number, algebra: Algebra[V]) -> Interval[V]:
    lo = hi = values[0]
    for v in values[1:]:
        lo, hi = algebra.min(lo, v, kind), algebra.max(hi, v, kind)
    return lo, hi


def _int(op: str, args: list[Interval[V]], algebra: Algebra[V]) -> Interval[V]:
    a = args[0]
    zero = algebra.const(0, "int")
    if op == "neg":
        return algebra.sub(zero, a[1], "int"), algebra.sub(zero, a[0], "int")
    if op == "abs":
        return _abs(a, "int", algebra)
    b = args[1]
    if op == "add":
        return algebra.add(a[0], b[0], "int"), algebra.add(a[1], b[1], "int")
    if op == "sub":
        return algebra.sub(a[0], b[1], "int"), algebra.sub(a[1], b[0], "int")
    if op == "mul":
        return _hull([algebra.mul(x, y, "int") for x in a for y in b], "int", algebra)
    if op in ("min", "max"):
        join = algebra.min if op == "min" else algebra.max
        return join(a[0], b[0], "int"), join(a[1], b[1], "int")
    return _division(op, a, b, algebra)


def _division(op: str, a: Interval[V], b: Interval[V], algebra: Algebra[V]) -> Interval[V]:
    zero, one = algebra.const(0, "int"), algebra.const(1, "int")
    by_zero = algebra.and_(algebra.le(b[0], zero, "int"), algebra.le(zero, b[1], "int"))
    d = tuple(algebra.select(by_zero, one, end, "int") for end in b)
    if op == "floordiv":
        lo, hi = _hull([algebra.floordiv(x, y) for x in a for y in d], "int", algebra)
        lowest, highest = algebra.limits("int")
        return algebra.select(by_zero, lowest, lo, "int"), algebra.select(by_zero, highest, hi, "int")
    lowest = algebra.min(algebra.add(b[0], one, "int"), zero, "int")
    highest = algebra.max(algebra.sub(b[1], one, "int"), zero, "int")
    same = algebra.eq(algebra.floordiv(a[0], d[0]), algebra.floordiv(a[1], d[0]), "int")
    exact = algebra.and_(algebra.and_(algebra.eq(b[0], b[1], "int"), algebra.not_(by_zero)), same)
    lo = algebra.select(exact, algebra.mod(a[0], d[0]), lowest, "int")
    return lo, algebra.select(exact, algebra.mod(a[1], d[0]), highest, "int")


def _abs(a: Interval[V], kind: Number, algebra: Algebra[V]) -> Interval[V]:
    zero = algebra.const(0, kind)
    below = algebra.sub(zero, a[0], kind)
    lo = algebra.max(algebra.max(a[0], algebra.sub(zero, a[1], kind), kind), zero, kind)
    return lo, algebra.max(a[1], below, kind)


def _float(op: str, args: list[Interval[V]], algebra: Algebra[V]) -> Interval[V]:
    a = args[0]
    zero = algebra.const(0.0, "float")
    if op == "neg":
        return algebra.sub(zero, a[1], "float"), algebra.sub(zero, a[0], "float")
    if op == "abs":
        return _whole_where(_is_whole(a, algebra), _abs(a, "float", algebra), algebra)
    if op == "exp":
        ends = zero, algebra.limits("float")[1]
        return _whole_where(_is_whole(a, algebra), ends, algebra)
    if op == "tanh":
        ends = algebra.const(-1.0, "float"), algebra.const(1.0, "float")
        return _whole_where(_is_whole(a, algebra), ends, algebra)
    if op == "log":
        return algebra.limits("float")
    b = args[1]
    if op in ("min", "max"):
        join = algebra.min if op == "min" else algebra.max
        ends = join(a[0], b[0], "float"), join(a[1], b[1], "float")
        return _whole_where(algebra.or_(_is_whole(a, algebra), _is_whole(b, algebra)), ends, algebra)
    if op == "add":
        return _settle([algebra.add(a[0], b[0], "float"), algebra.add(a[1], b[1], "float")], algebra)
    if op == "sub":
        return _settle([algebra.sub(a[0], b[1], "float"), algebra.sub(a[1], b[0], "float")], algebra)
    if op == "mul":
        return _settle([algebra.mul(x, y, "float") for x in a for y in b], algebra)
    by_zero = algebra.and_(algebra.le(b[0], zero, "float"), algebra.le(zero, b[1], "float"))
    return _whole_where(by_zero, _settle([algebra.div(x, y) for x in a for y in b], algebra), algebra)


def _is_whole(a: Interval[V], algebra: Algebra[V]) -> V:
    lowest, highest = algebra.limits("float")
    return algebra.and_(algebra.eq(a[0], lowest, "float"), algebra.eq(a[1], highest, "float"))


def _whole_where(condition: V, a: Interval[V], algebra: Algebra[V]) -> Interval[V]:
    lowest, highest = algebra.limits("float")
    return algebra.select(condition, lowest, a[0], "float"), algebra.select(condition, highest, a[1], "float")


def _settle(values: list[V], algebra: Algebra[V]) -> Interval[V]:
    """The hull of end points; everything if one is NaN (inf - inf, 0 * inf), as a true value may be too."""
    number = algebra.eq(values[0], values[0], "float")
    for v in values[1:]:
        number = algebra.and_(number, algebra.eq(v, v, "float"))
    return _whole_where(algebra.not_(number), _hull(values, "float", algebra), algebra)


class Numbers:
    """End points as numpy scalars or arrays that broadcast: one interval an element."""

    LIMIT = 2**62

    def const(self, value: float | int | bool, kind: Kind) -> Any:
        return {"float": np.float64, "int": np.int64, "bool": np.bool_}[kind](value)

    def limits(self, kind: Kind) -> Interval[Any]:
        if kind == "float":
            return np.float64(-np.inf), np.float64(np.inf)
        return (np.False_, np.True_) if kind == "bool" else (np.int64(-self.LIMIT), np.int64(self.LIMIT))

    def add(self, a: Any, b: Any, kind: Number) -> Any:
        return self._arithmetic(np.add, a, b, kind)

    def sub(self, a: Any, b: Any, kind: Number) -> Any:
        return self._arithmetic(np.subtract, a, b, kind)

    def mul(self, a: Any, b: Any, kind: Number) -> Any:
        return self._arithmetic(np.multiply, a, b, kind)

    def _arithmetic(self, ufunc: np.ufunc, a: Any, b: Any, kind: Number) -> Any:
        with np.errstate(all="ignore"):
            if kind == "float":
                return ufunc(np.float64(a), np.float64(b))
            rough = ufunc(np.float64(a), np.float64(b))
            exact = np.clip(ufunc(np.int64(a), np.int64(b)), -self.LIMIT, self.LIMIT)
        too_large = np.abs(rough) > self.LIMIT
        return np.where(too_large, np.where(rough > 0, self.LIMIT, -self.LIMIT), exact)

    def div(self, a: Any, b: Any) -> Any:
        with np.errstate(all="ignore"):
            return np.divide(np.float64(a), np.float64(b))

    def floordiv(self, a: Any, b: Any) -> Any:
        return np.floor_divide(a, b)

    def mod(self, a: Any, b: Any) -> Any:
        return np.remainder(a, b)

    def min(self, a: Any, b: Any, kind: Number) -> Any:
        return np.minimum(a, b)

    def max(self, a: Any, b: Any, kind: Number) -> Any:
        return np.maximum(a, b)

    def lt(self, a: Any, b: Any, kind: Number) -> Any:
        return np.less(a, b)

    def le(self, a: Any, b: Any, kind: Number) -> Any:
        return np.less_equal(a, b)

    def eq(self, a: Any, b: Any, kind: Number) -> Any:
        return np.equal(a, b)

    def and_(self, a: Any, b: Any) -> Any:
        return np.logical_and(a, b)

    def or_(self, a: Any, b: Any) -> Any:
        return np.logical_or(a, b)

    def not_(self, a: Any) -> Any:
        return np.logical_not(a)

    def select(self, condition: Any, a: Any, b: Any, kind: Kind) -> Any:
        return cast("NDArray[Any]", np.where(condition, a, b))

    def to_float(self, a: Any) -> Any:
        return np.float64(a)
