"""What the kernels' 32-bit integers cannot hold."""

from __future__ import annotations

from anyflash.kernels.llvm.bounds import LIMIT
from anyflash.semantics.expr import Expr
from anyflash.semantics.interval import Numbers, bound
from anyflash.semantics.problem import Problem
from anyflash.semantics.text import parse


def integers_too_wide(problem: Problem) -> list[str]:
    """Reasons to decline: lengths or integer expressions that may leave 32 bits."""
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
        return numbers.const(-(LIMIT - 1), "int"), numbers.const(LIMIT - 1, "int")

    for which, text in (("score", problem.program.score), ("mask", problem.program.mask)):
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
