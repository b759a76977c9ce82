"""Which loads of an expression may be staged (see staging). Apart from the emitters: every call is scheduled,
few are compiled."""

from __future__ import annotations

from anyflash.semantics.expr import Expr, walk

_UNIFORM = {"batch", "head", "q_len", "k_len"}


def staged_axes(load: Expr) -> tuple[int, int] | None:
    """(axis of rows, axis of keys) of a load that may be staged."""
    alone = {index.value: axis for axis, index in enumerate(load.args) if index.op == "var"}
    if "row" not in alone or "k" not in alone:
        return None
    others = [index for axis, index in enumerate(load.args) if axis not in (alone["row"], alone["k"])]
    names: set[str] = set()
    for index in others:
        walk(
            index,
            lambda e: names.add(e.value if e.op == "var" else "load") if e.op in ("var", "load") else None,
        )
    return (alone["row"], alone["k"]) if names <= _UNIFORM else None


def loads_of(expr: Expr | None) -> list[Expr]:
    """Distinct loads, equal ones being one object."""
    found: dict[int, Expr] = {}

    def visit(e: Expr) -> None:
        if e.op == "load":
            found[id(e)] = e

    if expr is not None:
        walk(expr, visit)
    return list(found.values())
