"""Tile classes in device code: the interval rules of semantics written as scalar source.

A tile's class is found where it is needed, from the ends of its rows and keys; nothing is prepared. A table
that is read along exactly one of row, q and k is bounded by the smallest and largest of the elements that the
tile reads. Ints are 64 bit and saturate, floats are float32.
"""

from __future__ import annotations

from typing import Any

from anyflash.kernels.triton.expressions import Writer, literal
from anyflash.semantics.expr import Expr, Kind
from anyflash.semantics.interval import Interval, Number, bound
from anyflash.semantics.limits import LIMIT

_POSITIONS = ("row", "q", "k")


class Source:
    """The algebra of `semantics.interval` whose end points are names and literals of a function's body."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer

    def const(self, value: float | int | bool, kind: Kind) -> str:
        return literal({"int": int, "float": float, "bool": bool}[kind](value))

    def limits(self, kind: Kind) -> Interval[str]:
        ends: dict[Kind, tuple[Any, Any]] = {
            "int": (-LIMIT, LIMIT),
            "float": (float("-inf"), float("inf")),
            "bool": (False, True),
        }
        low, high = ends[kind]
        return literal(low), literal(high)

    def _keep(self, value: str, kind: Number | None = None) -> str:
        if kind == "int":
            value = f"saturated({value})"
        return self._writer.assign(value)

    def add(self, a: str, b: str, kind: Number) -> str:
        return self._keep(f"({a}) + ({b})", kind)

    def sub(self, a: str, b: str, kind: Number) -> str:
        return self._keep(f"({a}) - ({b})", kind)

    def mul(self, a: str, b: str, kind: Number) -> str:
        return self._keep(f"({a}) * ({b})", kind)

    def div(self, a: str, b: str) -> str:
        return self._keep(f"scalar({a}) / ({b})")

    def floordiv(self, a: str, b: str) -> str:
        return self._keep(f"floor_div(whole({a}), whole({b}))")

    def mod(self, a: str, b: str) -> str:
        return self._keep(f"floor_mod(whole({a}), whole({b}))")

    def min(self, a: str, b: str, kind: Number) -> str:
        return self._keep(f"tl.minimum({a}, {b})")

    def max(self, a: str, b: str, kind: Number) -> str:
        return self._keep(f"tl.maximum({a}, {b})")

    def lt(self, a: str, b: str, kind: Number) -> str:
        return self._keep(f"truth({a} < {b})")

    def le(self, a: str, b: str, kind: Number) -> str:
        return self._keep(f"truth({a} <= {b})")

    def eq(self, a: str, b: str, kind: Number) -> str:
        return self._keep(f"truth({a} == {b})")

    def and_(self, a: str, b: str) -> str:
        return self._keep(f"({a}) & ({b})")

    def or_(self, a: str, b: str) -> str:
        return self._keep(f"({a}) | ({b})")

    def not_(self, a: str) -> str:
        return self._keep(f"({a}) ^ True")

    def select(self, condition: str, a: str, b: str, kind: Kind) -> str:
        return self._keep(f"tl.where({condition}, {a}, {b})")

    def to_float(self, a: str) -> str:
        return self._keep(f"whole({a}).to(tl.float32)")


def write_class(writer: Writer, mask: Expr) -> Interval[str]:
    """Assignments that bound `mask` over a tile: names of "surely holds" and "possibly holds".

    The function's variables are batch, head, q_len, k_len and the ends, included, of the others: row_low,
    row_high, q_low, q_high, k_low, k_high.
    """
    algebra = Source(writer)
    ends = {name: (f"{name}_low", f"{name}_high") for name in _POSITIONS}
    still = {name: (name, name) for name in ("batch", "head", "q_len", "k_len")}
    env = {name: tuple(writer.assign(f"whole({e})") for e in pair) for name, pair in (ends | still).items()}

    def load(node: Expr, _: tuple[Interval[str], ...]) -> Interval[str] | None:
        return _table(writer, node)

    return bound(mask, env, algebra, load)  # type: ignore[arg-type]


def _table(writer: Writer, node: Expr) -> Interval[str] | None:
    """Smallest and largest element along one moving axis, or None for anything else."""
    moving = [a for a in node.args if a.op == "var" and a.value in _POSITIONS]
    still = [a for a in node.args if a.op == "const" or (a.op == "var" and a.value in ("batch", "head"))]
    if len(moving) > 1 or len(moving) + len(still) < len(node.args) or node.kind == "float":
        return None
    offset = " + ".join(
        f"{_index(a)}, tables[{node.value}][2][{axis}]) * tables[{node.value}][1][{axis}]"
        for axis, a in enumerate(node.args)
    )
    values = writer.assign(f"tl.load(tables[{node.value}][0] + {offset or '0'}).to(tl.int64)")
    low, high = (
        (writer.assign(f"tl.min({values}, 0)"), writer.assign(f"tl.max({values}, 0)"))
        if moving
        else (values, values)
    )
    if node.kind == "bool":
        return writer.assign(f"{low} != 0"), writer.assign(f"{high} != 0")
    return low, high


def _index(a: Expr) -> str:
    """The indices that a tile reads: all of a moving axis, one of another."""
    if a.op == "const":
        return f"clamped({a.value}"
    if a.value not in _POSITIONS:
        return f"clamped({a.value}"
    extent = "BLOCK_N" if a.value == "k" else "BLOCK_M"
    return f"clamped(tl.minimum({a.value}_low + indices({extent}), {a.value}_high)"
