"""Derivatives of expressions, as expressions.

Where a function has a corner, one side is chosen: min and max follow their first argument when both are
equal, and the slope of abs at 0 is 0. Ints, comparisons and conditions have no derivative. `where(c, a, b)`
becomes `where(c, da, db)`, so what happens in the branch not taken (a division by zero, say) never reaches
the result.
"""

from __future__ import annotations

from anyflash.semantics.expr import Expr, const, where
from anyflash.semantics.text import node, parse, show

_ZERO = const(0.0)
_ONE = const(1.0)


def derivative(expr: Expr) -> Expr:
    """d expr / d score of a bound expression. Equal subtrees of the result are one object."""
    expr = parse(show(expr))
    scores = [e for e in _distinct(expr) if e.op == "var" and e.value == "score"]
    return parse(show(_by(expr, scores[0], {}))) if scores else _ZERO


def table_derivatives(expr: Expr, slot: int) -> list[tuple[Expr, tuple[Expr, ...]]]:
    """For each distinct load of table `slot`: d expr / d (that load), and the load's index expressions.

    The table's gradient is the sum, over these entries and over all pairs, of upstream * slope, each added to
    the element at the clamped indices. Entries whose slope is the constant 0 are left out.
    """
    expr = parse(show(expr))
    loads = [e for e in _distinct(expr) if e.op == "load" and e.value == slot and e.kind == "float"]
    slopes = [(parse(show(_by(expr, load, {}))), load.args) for load in loads]
    return [(slope, indices) for slope, indices in slopes if not _is(slope, 0.0)]


def _distinct(expr: Expr) -> list[Expr]:
    seen: dict[int, Expr] = {}

    def visit(e: Expr) -> None:
        if id(e) not in seen:
            for a in e.args:
                visit(a)
            seen[id(e)] = e

    visit(expr)
    return list(seen.values())


def _by(y: Expr, leaf: Expr, done: dict[int, Expr]) -> Expr:
    """d y / d leaf, where `leaf` is one object wherever it occurs."""
    if y is leaf:
        return _ONE
    if y.kind != "float" or y.op in ("const", "var", "load"):
        return _ZERO
    if id(y) not in done:
        done[id(y)] = _rule(y, [_by(a, leaf, done) for a in y.args])
    return done[id(y)]


def _rule(y: Expr, d: list[Expr]) -> Expr:
    match y.op, y.args:
        case "add", _:
            return _add(d[0], d[1])
        case "sub", _:
            return _add(d[0], _neg(d[1]))
        case "mul", (a, b):
            return _add(_mul(d[0], b), _mul(d[1], a))
        case "div", (_, b):
            return _div(_add(d[0], _neg(_mul(d[1], y))), b)
        case "min", (a, b):
            return _where(a <= b, d[0], d[1])
        case "max", (a, b):
            return _where(b <= a, d[0], d[1])
        case "where", (condition, _, _):
            return _where(condition, d[1], d[2])
        case "neg", _:
            return _neg(d[0])
        case "abs", (a,):
            return _where(a > 0.0, d[0], _where(a < 0.0, _neg(d[0]), _ZERO))
        case "exp", _:
            return _mul(d[0], y)
        case "log", (a,):
            return _div(d[0], a)
        case "tanh", _:
            return _mul(d[0], _ONE - y * y)
        case _:
            return _ZERO


def _is(a: Expr, value: float) -> bool:
    return a.op == "const" and a.value == value


def _add(a: Expr, b: Expr) -> Expr:
    if _is(a, 0.0):
        return b
    if _is(b, 0.0):
        return a
    if a.op == "const" and b.op == "const":
        return const(a.value + b.value)
    return node("sub", (a, b.args[0])) if b.op == "neg" else node("add", (a, b))


def _neg(a: Expr) -> Expr:
    if _is(a, 0.0):
        return _ZERO
    if a.op == "const":
        return const(-a.value)
    return a.args[0] if a.op == "neg" else node("neg", (a,))


def _mul(a: Expr, b: Expr) -> Expr:
    """The product, its constant factor first."""
    if b.op == "const":
        a, b = b, a
    if _is(a, 0.0):
        return _ZERO
    if _is(a, 1.0):
        return b
    if _is(a, -1.0):
        return _neg(b)
    if a.op == "const" and b.op == "const":
        return const(a.value * b.value)
    if a.op == "const" and b.op == "mul" and b.args[0].op == "const":
        return _mul(const(a.value * b.args[0].value), b.args[1])
    return node("mul", (a, b))


def _div(a: Expr, b: Expr) -> Expr:
    if _is(a, 0.0) or _is(b, 1.0):
        return a
    if b.op == "const" and b.value != 0.0:
        if a.op == "const":
            return const(a.value / b.value)
        if a.op == "mul" and a.args[0].op == "const":
            return _mul(const(a.args[0].value / b.value), a.args[1])
    return node("div", (a, b))


def _where(condition: Expr, a: Expr, b: Expr) -> Expr:
    if condition.op == "const":
        return a if condition.value else b
    if a.op == "const" and b.op == "const" and a.value == b.value:
        return a
    return where(condition, a, b)
