"""Score and mask expressions as Triton source.

Each distinct node becomes one assignment, so that common parts are computed once. Names of variables are
those of `semantics.expr`; a node's shape follows by broadcasting from what it reads: a load indexed by `k`
alone is one row of a tile, not the tile. Integers are 32 bit, floats float32.
"""

from __future__ import annotations

import math

import numpy as np

from anyflash.semantics.evaluate import evaluate
from anyflash.semantics.expr import Expr
from anyflash.semantics.problem import TableSpec

_INFIX = {
    "add": "+",
    "sub": "-",
    "mul": "*",
    "div": "/",
    "lt": "<",
    "le": "<=",
    "eq": "==",
    "ne": "!=",
    "and": "&",
    "or": "|",
}
_CALLS = {"exp": "tl.exp", "log": "tl.log", "tanh": "tanh", "abs": "tl.abs"}


def literal(value: float | int | bool) -> str:
    """A Python literal for device code; non-finite floats are calls."""
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    return repr(value)


class Writer:
    """Collects the assignments of one function's body."""

    def __init__(self, tables: tuple[TableSpec, ...]) -> None:
        self.tables = tables
        self.lines: list[str] = []
        self._done: dict[int, str] = {}
        self._kept: list[Expr] = []

    def assign(self, value: str) -> str:
        name = f"x{len(self.lines)}"
        self.lines.append(f"{name} = {value}")
        return name

    def __call__(self, expr: Expr) -> str:
        """The name or literal that holds `expr`; equal nodes are one object, as `text.parse` makes them."""
        found = self._done.get(id(expr))
        if found is None:
            found = self._done[id(expr)] = self._write(expr)
            self._kept.append(expr)
        return found

    def _write(self, e: Expr) -> str:
        if e.op == "var":
            return str(e.value)
        if e.op == "load":
            return self.assign(self._load(e))
        if is_constant(e):
            return literal(folded(e))
        args = [self(a) for a in e.args]
        if e.op in _INFIX:
            return self.assign(f"{args[0]} {_INFIX[e.op]} {args[1]}")
        if e.op in _CALLS:
            return self.assign(f"{_CALLS[e.op]}({args[0]})")
        if e.op in ("min", "max"):
            name = f"{e.op}imum"
            return self.assign(f"{name if e.kind == 'float' else 'tl.' + name}({args[0]}, {args[1]})")
        match e.op:
            case "neg":
                return self.assign(f"-{args[0]}")
            case "not":
                return self.assign(f"~{args[0]}")
            case "float":
                return self.assign(f"{args[0]}.to(tl.float32)")
            case "where":
                return self.assign(f"tl.where({', '.join(args)})")
            case "floordiv" | "mod":
                return self.assign(f"floor_{e.op.removeprefix('floor')}({args[0]}, {args[1]})")
        raise ValueError(f"no rule for the operation {e.op!r}")

    def _load(self, e: Expr) -> str:
        spec = self.tables[e.value]
        offset = " + ".join(
            f"clamped({self(a)}, tables[{e.value}][2][{axis}]) * tables[{e.value}][1][{axis}]"
            for axis, a in enumerate(e.args)
        )
        loaded = f"tl.load(tables[{e.value}][0] + {offset or '0'})"
        if e.kind == "bool":
            return f"{loaded} != 0"
        if spec.dtype in ("float16", "bfloat16", "float64"):
            return f"{loaded}.to(tl.float32)"
        return loaded if spec.dtype in ("float32", "int32") else f"{loaded}.to(tl.int32)"


def is_constant(e: Expr) -> bool:
    """Does the expression read nothing?"""
    return e.op not in ("var", "load") and all(is_constant(a) for a in e.args)


def folded(e: Expr) -> float | int | bool:
    """The value of an expression that reads nothing, floats rounded to float32."""
    with np.errstate(all="ignore"):
        value = evaluate(e, {}, ())
    if e.kind == "bool":
        return bool(value)
    return int(value) if e.kind == "int" else float(np.float32(value))
