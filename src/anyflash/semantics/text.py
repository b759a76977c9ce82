"""Expressions as text: the form that keys every cache and travels through framework op schemas.

    (sub (mul 30.0 (tanh (div score 30.0))) (mul (load 0:f head) (float (sub q k))))

A node is `(op arg ...)`. Constants and variables stand bare: `3` is an int, `3.0`, `1e-05`, `inf` and `nan`
are floats, `true` and `false` bools. A load is `(load slot:kind index ...)`, kind being the first letter of
float, int or bool. The text never contains `|`, which separates the parts of a Program.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NoReturn

from anyflash.core.errors import InvalidCall
from anyflash.semantics.expr import (
    ARITHMETIC,
    COMPARISONS,
    FUNCTIONS,
    VARIABLES,
    Expr,
    Kind,
    Table,
    const,
    var,
)

MAX_NODES = 5000
MAX_DEPTH = 200

_ARITY = {
    **dict.fromkeys((*ARITHMETIC, *COMPARISONS, "div", "floordiv", "mod", "and", "or"), 2),
    **dict.fromkeys((*FUNCTIONS, "neg", "abs", "not", "float"), 1),
    "where": 3,
}
_KIND: dict[str, Kind] = {
    **dict.fromkeys((*COMPARISONS, "and", "or", "not"), "bool"),
    **dict.fromkeys((*FUNCTIONS, "div", "float"), "float"),
    "floordiv": "int",
    "mod": "int",
}
_LETTER: dict[str, Kind] = {"f": "float", "i": "int", "b": "bool"}
_TOKEN = re.compile(r"[()]|[^\s()]+")
_INTEGER = re.compile(r"-?\d+\Z")


def show(expr: Expr) -> str:
    """The text of a bound expression. `parse` inverts it exactly."""
    if expr.op == "const":
        return _literal(expr)
    if expr.op == "var":
        return expr.value
    if expr.op == "load":
        if isinstance(expr.value, Table):
            raise ValueError("the expression holds arrays; replace them by slots with text.bind first")
        head = f"load {expr.value}:{expr.kind[0]}"
    else:
        head = expr.op
    return f"({' '.join([head, *map(show, expr.args)])})"


@lru_cache(maxsize=4096)
def parse(text: str) -> Expr:
    """The expression that `show` printed. Equal subtrees of the result are one object.

    Raises ValueError if the text is not an expression.
    """
    tokens = _TOKEN.findall(text)
    made: dict[tuple[Any, ...], Expr] = {}
    expr, end = _read(tokens, 0, made)
    if end != len(tokens):
        raise ValueError(f"not an expression: {text!r} goes on after its end")
    return expr


def node(op: str, args: tuple[Expr, ...]) -> Expr:
    """An operation on expressions of the right kinds; its own kind follows from them."""
    kind = _KIND.get(op) or (args[1].kind if op == "where" else args[0].kind)
    return Expr(op, args, kind=kind)


def bind(exprs: Sequence[Expr | None]) -> tuple[list[Expr | None], list[Table]]:
    """Replace the tables of some expressions by slot numbers, one slot for each distinct array.

    Slots are numbered in order of first appearance, over all the expressions in the order given. None stands
    for an absent expression and stays None.
    """
    tables: list[Table] = []
    done: dict[int, Expr] = {}

    def slot(table: Table) -> int:
        # Compared by `is`: torch.compile takes id() of a tensor for a promise that it always is the same one.
        for i, known in enumerate(tables):
            if known.array is table.array:
                return i
        tables.append(table)
        return len(tables) - 1

    def visit(expr: Expr) -> Expr:
        old, value = expr.args, expr.value
        if not old and expr.op != "load":
            return expr
        made = done.get(id(expr))
        if made is None:
            args = tuple([visit(a) for a in old])
            if isinstance(value, Table):
                made = Expr(expr.op, args, slot(value), expr.kind)
            else:
                unchanged = all(map(operator.is_, args, old))
                made = expr if unchanged else Expr(expr.op, args, value, expr.kind)
            done[id(expr)] = made
        return made

    for expr in exprs:
        if expr is not None and _budget_left(expr, MAX_NODES, MAX_DEPTH) < 0:
            _refuse_size(expr)
    return [None if expr is None else visit(expr) for expr in exprs], tables


def pretty(expr: Expr) -> str:
    """The expression as a person would write it, for messages and `explain`."""
    return _infix(expr)[0]


def _literal(expr: Expr) -> str:
    if expr.kind == "bool":
        return "true" if expr.value else "false"
    return repr(int(expr.value)) if expr.kind == "int" else repr(float(expr.value))


def _atom(token: str) -> Expr:
    if token in ("true", "false"):
        return const(token == "true")
    if token in VARIABLES:
        return var(token)
    return const(int(token) if _INTEGER.match(token) else float(token))


def _read(tokens: list[str], at: int, made: dict[tuple[Any, ...], Expr]) -> tuple[Expr, int]:
    if at >= len(tokens) or tokens[at] == ")":
        raise ValueError(f"not an expression: {' '.join(tokens)!r}")
    if tokens[at] != "(":
        key: tuple[Any, ...] = (tokens[at],)
        if key not in made:
            made[key] = _atom(tokens[at])
        return made[key], at + 1
    if at + 1 >= len(tokens):
        raise ValueError(f"not an expression: {' '.join(tokens)!r} ends too early")
    op, at = tokens[at + 1], at + 2
    slot = ""
    if op == "load" and at < len(tokens):
        slot, at = tokens[at], at + 1
    args: list[Expr] = []
    while at < len(tokens) and tokens[at] != ")":
        arg, at = _read(tokens, at, made)
        args.append(arg)
    if at >= len(tokens):
        raise ValueError(f"not an expression: {' '.join(tokens)!r} ends too early")
    key = (op, slot, *(id(a) for a in args))
    if key not in made:
        made[key] = _load(slot, tuple(args)) if op == "load" else _operation(op, tuple(args))
    return made[key], at + 1


def _load(slot: str, args: tuple[Expr, ...]) -> Expr:
    number, _, letter = slot.partition(":")
    if not number.isdigit() or letter not in _LETTER:
        raise ValueError(f"not an expression: a load from {slot!r}")
    return Expr("load", args, int(number), _LETTER[letter])


def _operation(op: str, args: tuple[Expr, ...]) -> Expr:
    if _ARITY.get(op) != len(args):
        raise ValueError(f"not an expression: {op} of {len(args)} arguments")
    return node(op, args)


def _budget_left(expr: Expr, nodes: int, depth: int) -> int:
    """What is left of `nodes` after a walk over the tree, at most `depth` deep; negative if it is too large.

    Every walk visits shared nodes once for each use, so a small graph may be a huge tree; this one gives up.
    """
    nodes -= 1
    if depth == 0:
        return -1
    for a in expr.args:
        if nodes < 0:
            break
        nodes = _budget_left(a, nodes, depth - 1)
    return nodes


def _refuse_size(expr: Expr) -> NoReturn:
    seen: dict[int, tuple[int, int]] = {}
    stack = [(expr, False)]
    while stack:
        item, children_done = stack.pop()
        if id(item) in seen:
            continue
        if not children_done:
            stack.append((item, True))
            stack.extend((a, False) for a in item.args)
            continue
        sizes = [seen[id(a)] for a in item.args]
        seen[id(item)] = (1 + sum(n for n, _ in sizes), 1 + max([0, *(d for _, d in sizes)]))
    nodes, depth = seen[id(expr)]
    raise InvalidCall(
        "score or mask",
        f"an expression of {nodes} operations, nested {depth} deep",
        f"at most {MAX_NODES} operations, nested at most {MAX_DEPTH} deep",
        "Put values that depend on positions alone into an anyflash.table",
    )


_INFIX = {
    "or": ("|", 1),
    "and": ("&", 2),
    "lt": ("<", 3),
    "le": ("<=", 3),
    "eq": ("==", 3),
    "ne": ("!=", 3),
    "add": ("+", 4),
    "sub": ("-", 4),
    "mul": ("*", 5),
    "div": ("/", 5),
    "floordiv": ("//", 5),
    "mod": ("%", 5),
}
_PREFIX = {"not": ("~", 6), "neg": ("-", 6)}
_TIGHT = 7


def _infix(expr: Expr) -> tuple[str, int]:
    """Text and binding strength. In Python `&` and `|` bind tighter than comparisons, which get brackets."""
    op = expr.op
    if op == "const":
        text = _literal(expr)
        return text, 6 if text.startswith("-") else _TIGHT
    if op == "var":
        return expr.value, _TIGHT
    if op in _INFIX:
        symbol, level = _INFIX[op]
        need = 4 if level == 3 else _TIGHT if level < 3 else level
        left, right = (_infix(a) for a in expr.args)
        associative = level < 3 and expr.args[0].op == op
        a = left[0] if left[1] >= need or associative else f"({left[0]})"
        b = right[0] if right[1] > need or right[1] == _TIGHT else f"({right[0]})"
        return f"{a} {symbol} {b}", level
    if op in _PREFIX:
        symbol, level = _PREFIX[op]
        text, inner = _infix(expr.args[0])
        return symbol + (text if inner > level else f"({text})"), level
    if op == "float":
        return _infix(expr.args[0])
    args = ", ".join(_infix(a)[0] for a in expr.args)
    if op == "load":
        name = "table" if isinstance(expr.value, Table) else f"table{expr.value}"
        return f"{name}[{args or '()'}]", _TIGHT
    return f"{op}({args})", _TIGHT
