"""What the kernels' 32-bit integers cannot hold."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from anyflash.core.errors import InvalidCall
from anyflash.semantics.expr import Expr
from anyflash.semantics.interval import Numbers, bound
from anyflash.semantics.problem import Problem
from anyflash.semantics.text import parse

LIMIT = 2**31
TABLE_LIMIT = 2**24


def check_table(values: NDArray[np.generic], slot: int) -> None:
    """Raises InvalidCall if an integer table holds what the kernels' arithmetic may not."""
    if values.dtype.kind in "iu" and values.dtype.itemsize > 2 and values.size:
        low, high = int(values.min()), int(values.max())
        if low < -TABLE_LIMIT or high > TABLE_LIMIT:
            raise InvalidCall(
                f"table {slot}",
                f"integers from {low} to {high}",
                f"integers of at most {TABLE_LIMIT} in magnitude",
                "Kernels compute with 32-bit integers; renumber the entries",
            )


def integers_too_wide(problem: Problem) -> list[str]:
    """Reasons to decline: lengths or integer expressions that may leave 32 bits.

    An integer table is taken to hold at most 2**TABLE_BITS in magnitude, which `check_table` makes sure of.
    """
    reasons: list[str] = []
    for name, extent in (("queries", problem.seqlen_q), ("keys", problem.seqlen_k)):
        if extent >= LIMIT // 2:
            reasons.append(f"{extent} {name} do not fit its 32-bit positions")
    last_q, last_k = max(problem.seqlen_q - 1, 0), max(problem.seqlen_k - 1, 0)
    numbers = Numbers()
    box = {
        "batch": (0, max(problem.batch - 1, 0)),
        "head": (0, problem.heads_q - 1),
        "row": (0, last_q),
        "q": (-last_q, last_k),
        "k": (0, last_k),
        "q_len": (0, problem.seqlen_q),
        "k_len": (0, problem.seqlen_k),
    }
    env = {name: (numbers.const(lo, "int"), numbers.const(hi, "int")) for name, (lo, hi) in box.items()}

    def inside(node: Expr, _: object) -> tuple[object, object] | None:
        if node.kind != "int":
            return None
        return numbers.const(-TABLE_LIMIT, "int"), numbers.const(TABLE_LIMIT, "int")

    for which, text in (
        ("score", problem.program.score),
        ("mask", problem.program.mask),
        ("factor of out", problem.program.factor),
    ):
        if text:
            seen: set[int] = set()
            for node in _integer_nodes(parse(text), seen):
                low, high = bound(node, env, numbers, inside)
                if node.op != "load" and (low <= -LIMIT or high >= LIMIT):
                    reasons.append(f"an integer of the {which} may exceed its 32 bits")
                    break
    return reasons


def _integer_nodes(expr: Expr, seen: set[int]) -> list[Expr]:
    if id(expr) in seen:
        return []
    seen.add(id(expr))
    found = [n for a in expr.args for n in _integer_nodes(a, seen)]
    return [*found, expr] if expr.kind == "int" else found
