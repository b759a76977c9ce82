"""Scalar expressions over one (query, key) pair: the language of scores and masks.

A user's function is called once with symbols and leaves a small tree. From that one tree come the numpy
evaluation (`evaluate.py`), the derivative (`derivative.py`), bounds (`interval.py`), the short text that keys
every cache (`text.py`), and every backend's code.

Variables, all integers but the first:

    score   the scaled dot product (float)
    batch   batch entry, or sequence number of a packed call
    head    query head
    row     query row, 0 .. q_len - 1
    q       position of that row among the keys: row + k_len - q_len (bottom-right alignment)
    k       key, 0 .. k_len - 1
    q_len   queries of this sequence
    k_len   keys of this sequence

Kinds are "float", "int" and "bool". An int meets a float as a float; `/` always gives a float; `//` and `%`
take ints and round towards minus infinity. Comparisons give bools, and `&`, `|`, `~` combine them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from anyflash.core import dtypes

Kind = Literal["float", "int", "bool"]

VARIABLES: dict[str, Kind] = {
    "score": "float",
    "batch": "int",
    "head": "int",
    "row": "int",
    "q": "int",
    "k": "int",
    "q_len": "int",
    "k_len": "int",
}
ARITHMETIC = ("add", "sub", "mul", "min", "max")
FUNCTIONS = ("exp", "log", "tanh")
COMPARISONS = ("lt", "le", "eq", "ne")


class Expr:
    """One node, immutable. `==` builds a comparison node, so trees are kept and compared by their text.

    op        args                    value
    const     ()                      the Python number or bool
    var       ()                      the variable's name
    load      index expressions       the table: a `Table` while building, its slot number once bound
    add sub mul div floordiv mod min max   (a, b)
    neg abs exp log tanh              (a,)
    lt le eq ne                       (a, b)
    and or not                        (a, b), (a,)
    where                             (condition, a, b)
    float                             (a,), an int made a float
    """

    __slots__ = ("args", "kind", "op", "value")

    def __init__(self, op: str, args: tuple[Expr, ...] = (), value: Any = None, kind: Kind = "float") -> None:
        self.op = op
        self.args = args
        self.value = value
        self.kind: Kind = kind

    def __add__(self, other: Operand) -> Expr:
        return _arithmetic("add", self, other)

    def __radd__(self, other: Operand) -> Expr:
        return _arithmetic("add", other, self)

    def __sub__(self, other: Operand) -> Expr:
        return _arithmetic("sub", self, other)

    def __rsub__(self, other: Operand) -> Expr:
        return _arithmetic("sub", other, self)

    def __mul__(self, other: Operand) -> Expr:
        return _arithmetic("mul", self, other)

    def __rmul__(self, other: Operand) -> Expr:
        return _arithmetic("mul", other, self)

    def __truediv__(self, other: Operand) -> Expr:
        return Expr("div", (as_float(self), as_float(other)), kind="float")

    def __rtruediv__(self, other: Operand) -> Expr:
        return Expr("div", (as_float(other), as_float(self)), kind="float")

    def __floordiv__(self, other: Operand) -> Expr:
        return _integer("floordiv", self, other)

    def __rfloordiv__(self, other: Operand) -> Expr:
        return _integer("floordiv", other, self)

    def __mod__(self, other: Operand) -> Expr:
        return _integer("mod", self, other)

    def __rmod__(self, other: Operand) -> Expr:
        return _integer("mod", other, self)

    def __neg__(self) -> Expr:
        a = _number("-", self)
        return Expr("neg", (a,), kind=a.kind)

    def __pos__(self) -> Expr:
        return _number("+", self)

    def __abs__(self) -> Expr:
        a = _number("abs", self)
        return Expr("abs", (a,), kind=a.kind)

    def __lt__(self, other: Operand) -> Expr:
        return _compare("lt", self, other)

    def __le__(self, other: Operand) -> Expr:
        return _compare("le", self, other)

    def __gt__(self, other: Operand) -> Expr:
        return _compare("lt", other, self)

    def __ge__(self, other: Operand) -> Expr:
        return _compare("le", other, self)

    def __eq__(self, other: Operand) -> Expr:  # type: ignore[override]
        return _compare("eq", self, other)

    def __ne__(self, other: Operand) -> Expr:  # type: ignore[override]
        return _compare("ne", self, other)

    __hash__ = None  # type: ignore[assignment]  # == builds a node: key by `text.show(expr)` instead

    def __and__(self, other: Operand) -> Expr:
        return _logical("and", self, other)

    def __rand__(self, other: Operand) -> Expr:
        return _logical("and", other, self)

    def __or__(self, other: Operand) -> Expr:
        return _logical("or", self, other)

    def __ror__(self, other: Operand) -> Expr:
        return _logical("or", other, self)

    def __invert__(self) -> Expr:
        if self.kind != "bool":
            raise TypeError(f"~ takes a bool expression, got {self.kind}")
        return Expr("not", (self,), kind="bool")

    def __bool__(self) -> bool:
        raise TypeError(
            "an expression has no truth value: it stands for all (query, key) pairs at once. "
            "Use anyflash.where(condition, a, b), and &, |, ~ instead of and, or, not"
        )


Operand = Expr | float | int | bool


def const(value: float | int | bool) -> Expr:
    """A literal; its Python type gives the kind. numpy scalars are taken by their `item()`, those of a
    framework become tables without axes: they may want a gradient, and may differ at the next call."""
    if isinstance(value, Expr):
        return value
    if not isinstance(value, (bool, int, float)) and getattr(value, "ndim", None) == 0:
        if type(value).__module__.partition(".")[0] not in ("numpy", "ml_dtypes"):
            return Table(value, dtypes.kind(str(value.dtype).rpartition(".")[2]))[()]
        value = value.item()
    if isinstance(value, bool):
        return Expr("const", value=value, kind="bool")
    if isinstance(value, int):
        return Expr("const", value=value, kind="int")
    if isinstance(value, float):
        return Expr("const", value=value, kind="float")
    raise TypeError(
        f"cannot use {type(value).__name__} in a score or mask expression; "
        "wrap arrays in anyflash.table(array) and index it with at.batch, at.head, at.row, at.q or at.k"
    )


def var(name: str) -> Expr:
    return Expr("var", value=name, kind=VARIABLES[name])


def as_float(a: Operand) -> Expr:
    a = const(a) if not isinstance(a, Expr) else a
    if a.kind == "float":
        return a
    if a.op == "const":
        return const(float(a.value))
    if a.kind == "bool":
        return Expr("where", (a, const(1.0), const(0.0)), kind="float")
    return Expr("float", (a,), kind="float")


def as_bool(a: Operand) -> Expr:
    a = const(a) if not isinstance(a, Expr) else a
    return a if a.kind == "bool" else _compare("ne", a, const(0))


def _number(symbol: str, a: Operand) -> Expr:
    a = const(a) if not isinstance(a, Expr) else a
    if a.kind == "bool":
        raise TypeError(f"{symbol} takes numbers, got a bool expression; use anyflash.where(condition, a, b)")
    return a


def _pair(symbol: str, a: Operand, b: Operand) -> tuple[Expr, Expr, Kind]:
    a, b = _number(symbol, a), _number(symbol, b)
    if a.kind == b.kind:
        return a, b, a.kind
    return as_float(a), as_float(b), "float"


def _arithmetic(op: str, a: Operand, b: Operand) -> Expr:
    a, b, kind = _pair(op, a, b)
    return Expr(op, (a, b), kind=kind)


def _integer(op: str, a: Operand, b: Operand) -> Expr:
    a, b = _number(op, a), _number(op, b)
    if a.kind != "int" or b.kind != "int":
        raise TypeError(
            f"{'//' if op == 'floordiv' else '%'} takes int expressions, got {a.kind} and {b.kind}"
        )
    if b.op == "const" and b.value == 0:
        raise ZeroDivisionError("division of an expression by the constant 0")
    return Expr(op, (a, b), kind="int")


def _compare(op: str, a: Operand, b: Operand) -> Expr:
    a = const(a) if not isinstance(a, Expr) else a
    b = const(b) if not isinstance(b, Expr) else b
    if a.kind == "bool" and b.kind == "bool":
        both, neither = a & b, ~a & ~b
        return both | neither if op == "eq" else ~(both | neither)
    a, b, _ = _pair("a comparison", a, b)
    return Expr(op, (a, b), kind="bool")


def _logical(op: str, a: Operand, b: Operand) -> Expr:
    a = const(a) if not isinstance(a, Expr) else a
    b = const(b) if not isinstance(b, Expr) else b
    if a.kind != "bool" or b.kind != "bool":
        raise TypeError(f"&, | and ~ take bool expressions, got {a.kind} and {b.kind}")
    return Expr(op, (a, b), kind="bool")


def _function(op: str, a: Operand) -> Expr:
    return Expr(op, (as_float(a),), kind="float")


def exp(a: Operand) -> Expr:
    """e ** a."""
    return _function("exp", a)


def log(a: Operand) -> Expr:
    """Natural logarithm."""
    return _function("log", a)


def tanh(a: Operand) -> Expr:
    """Hyperbolic tangent."""
    return _function("tanh", a)


def minimum(a: Operand, b: Operand) -> Expr:
    """The smaller of two numbers; NaN if either is NaN."""
    return _arithmetic("min", a, b)


def maximum(a: Operand, b: Operand) -> Expr:
    """The larger of two numbers; NaN if either is NaN."""
    return _arithmetic("max", a, b)


def where(condition: Operand, a: Operand, b: Operand) -> Expr:
    """`a` where the condition holds, else `b`."""
    condition = as_bool(condition)
    a = const(a) if not isinstance(a, Expr) else a
    b = const(b) if not isinstance(b, Expr) else b
    if a.kind == "bool" and b.kind == "bool":
        return (condition & a) | (~condition & b)
    a, b, kind = _pair("where", a, b)
    return Expr("where", (condition, a, b), kind=kind)


class Table:
    """An array that a score or mask function reads by index. Made by `anyflash.table(array)`.

    `table[i, j]` takes one integer expression an axis. An index that may leave the array is clamped to its
    edge; one that surely leaves it is an error when the call is described.
    """

    __slots__ = ("array", "kind", "shape")

    def __init__(self, array: Any, kind: Kind) -> None:
        self.array = array
        self.shape: tuple[int, ...] = tuple(array.shape)
        self.kind: Kind = kind

    def __getitem__(self, index: Operand | tuple[Operand, ...]) -> Expr:
        items = index if isinstance(index, tuple) else (index,)
        if len(items) != len(self.shape):
            raise IndexError(f"table of shape {self.shape} takes {len(self.shape)} indices, got {len(items)}")
        args = tuple(const(i) if not isinstance(i, Expr) else i for i in items)
        for a in args:
            if a.kind != "int":
                raise IndexError(f"table indices are int expressions, got {a.kind}")
        return Expr("load", args, value=self, kind=self.kind)


class At:
    """Where a score stands: the second argument of a score function, the only one of a mask function."""

    __slots__ = ()

    batch = property(lambda self: var("batch"), doc="batch entry, or sequence number of a packed call")
    head = property(lambda self: var("head"), doc="query head")
    row = property(lambda self: var("row"), doc="query row, from 0")
    q = property(lambda self: var("q"), doc="position of the query among the keys: row + k_len - q_len")
    k = property(lambda self: var("k"), doc="key, from 0")
    q_len = property(lambda self: var("q_len"), doc="queries of this sequence")
    k_len = property(lambda self: var("k_len"), doc="keys of this sequence")


def walk(expr: Expr, visit: Callable[[Expr], None]) -> None:
    """Call `visit` on every node, children first."""
    for a in expr.args:
        walk(a, visit)
    visit(expr)
