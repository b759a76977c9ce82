"""Broken kernels: every call that synchronises, dropped or weakened, one at a time.

A call that stands alone is taken out. A call whose result is used hands its `deps` on as they are. Beyond
that a wait for all but n becomes one for all but n + 1, a parity is turned round, half of the bytes are
expected, a barrier wants one more arrival, and an arrival comes before the wait for an operation that stands
above it. Code objects keep the lines of the original, so that errors point into it.
"""

from __future__ import annotations
import __future__

import ast
import copy
import inspect
import textwrap
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from triton.runtime.jit import JITFunction

from gpu.emulator.errors import EmulationError

Change = Callable[[ast.expr], ast.expr]
# What is said of a changed call, which argument is changed, by place or name, and how.
Alteration = tuple[str, int | str, Change]
Replaced = Mapping[JITFunction[Any], types.FunctionType]


def _plus_one(value: ast.expr) -> ast.expr:
    return ast.BinOp(value, ast.Add(), ast.Constant(1))


def _half(value: ast.expr) -> ast.expr:
    return ast.BinOp(value, ast.FloorDiv(), ast.Constant(2))


def _turned(value: ast.expr) -> ast.expr:
    return ast.BinOp(value, ast.BitXor(), ast.Constant(1))


# Calls to take out, and to weaken, by the last part of their name.
CALLS: dict[str, Alteration | None] = {
    "barrier_wait": ("turned", 1, _turned),
    "barrier_arrive": None,
    "barrier_expect": ("halved", 1, _half),
    "barrier_init": ("for one more", "count", _plus_one),
    "fence": None,
    "meet": None,
    "atomic_add": ("relaxed", "sem", lambda _: ast.Constant("relaxed")),
    "wgmma_wait": ("one more in flight", 0, _plus_one),
    "tma_store_wait": ("one more in flight", 0, _plus_one),
    "tma_load": None,
    "tma_store": None,
    "tma_add": None,
    "named_wait": None,
    "named_arrive": None,
}

ARRIVALS = frozenset(("barrier_arrive", "release"))
WAITS = frozenset(("wgmma_wait", "await_outer", "await_last", "tma_store_wait"))


@dataclass(frozen=True)
class Mutation:
    """`name` says what was done to which call: "forward.consumer: barrier_wait 2 dropped"."""

    name: str
    line: str
    original: JITFunction[Any]
    mutant: types.FunctionType

    @property
    def replaced(self) -> Replaced:
        return {self.original: self.mutant}


def _called(node: ast.Call) -> str:
    function = node.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


class _Drop(ast.NodeTransformer):
    def __init__(self, target: int) -> None:
        self._target = target
        self._count = -1
        self._names: frozenset[str] = frozenset()

    def of(self, tree: ast.Module, names: frozenset[str]) -> ast.Module:
        self._names = names
        return ast.fix_missing_locations(self.visit(tree))

    def _is_target(self, node: ast.AST) -> bool:
        if not isinstance(node, ast.Call) or _called(node) not in self._names:
            return False
        self._count += 1
        return self._count == self._target

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        if self._is_target(node.value):
            return ast.copy_location(ast.Pass(), node)
        for argument in node.value.args if isinstance(node.value, ast.Call) else ():
            self.visit(argument)
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if self._is_target(node):
            deps = next((k.value for k in node.keywords if k.arg == "deps"), None)
            deps = deps if deps is not None else node.args[1]
            alone = isinstance(deps, ast.Tuple | ast.List) and len(deps.elts) == 1
            return ast.copy_location(deps.elts[0] if alone else deps, node)
        return self.generic_visit(node)


class _Alter(_Drop):
    def __init__(self, target: int, place: int | str, change: Change) -> None:
        super().__init__(target)
        self._place, self._change = place, change

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if not self._is_target(node):
            return self.generic_visit(node)
        if isinstance(self._place, int):
            node.args[self._place] = self._change(node.args[self._place])
        for keyword in node.keywords:
            if keyword.arg == self._place:
                keyword.value = self._change(keyword.value)
        return node


def _has(call: ast.Call, place: int | str) -> bool:
    if isinstance(place, int):
        return len(call.args) > place
    return any(keyword.arg == place for keyword in call.keywords)


def _ordered_calls(tree: ast.AST, names: frozenset[str]) -> list[ast.Call]:
    """In the order in which the transformers above meet them: outer before inner, earlier before later."""
    found: list[ast.Call] = []

    class Collect(ast.NodeVisitor):
        def visit_Call(self, node: ast.Call) -> None:
            if _called(node) in names:
                found.append(node)
            self.generic_visit(node)

    Collect().visit(tree)
    return found


def _early(tree: ast.Module, names: frozenset[str], target: int) -> ast.Module | None:
    """An arrival before the wait above it, if there is one."""
    call = _ordered_calls(tree, names)[target]
    for node in ast.walk(tree):
        for body in (getattr(node, "body", None), getattr(node, "orelse", None)):
            for i, statement in enumerate(body if isinstance(body, list) else ()):
                if isinstance(statement, ast.Expr) and statement.value is call and i:
                    if not _ordered_calls(body[i - 1], WAITS):
                        return None
                    body[i - 1 : i + 1] = [statement, body[i - 1]]
                    return tree
    return None


def _compiled(original: JITFunction[Any], tree: ast.Module, first_line: int) -> types.FunctionType:
    fn = original.fn
    ast.increment_lineno(tree, first_line - 1)
    flags = __future__.annotations.compiler_flag
    space: dict[str, Any] = {}
    exec(compile(tree, fn.__code__.co_filename, "exec", flags), dict(fn.__globals__), space)
    code = space[fn.__name__].__code__
    made = types.FunctionType(code, fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)
    made.__kwdefaults__ = fn.__kwdefaults__
    return made


def mutations(
    functions: Iterable[JITFunction[Any]], calls: Mapping[str, Alteration | None] = CALLS
) -> Iterator[Mutation]:
    """All of them, function by function."""
    names = frozenset(calls)
    for original in functions:
        lines, first_line = inspect.getsourcelines(original.fn)
        tree = ast.parse(textwrap.dedent("".join(lines)))
        tree.body[0].decorator_list = []  # type: ignore[attr-defined]
        counts: dict[str, int] = {}
        for target, call in enumerate(_ordered_calls(tree, names)):
            called = _called(call)
            counts[called] = counts.get(called, 0) + 1
            line = ast.unparse(call)
            module = original.fn.__module__.rsplit(".", 1)[-1]
            here = f"{module}.{original.fn.__name__}: {called} {counts[called]}"
            dropped = _Drop(target).of(copy.deepcopy(tree), names)
            yield Mutation(f"{here} dropped", line, original, _compiled(original, dropped, first_line))
            if (change := calls[called]) is not None and _has(call, change[1]):
                how, place, apply = change
                altered = _Alter(target, place, apply).of(copy.deepcopy(tree), names)
                yield Mutation(f"{here} {how}", line, original, _compiled(original, altered, first_line))
            if called in ARRIVALS and (moved := _early(copy.deepcopy(tree), names, target)) is not None:
                yield Mutation(f"{here} too early", line, original, _compiled(original, moved, first_line))


def noticed(run: Callable[[int, Replaced], bool], mutation: Mutation, seeds: Iterable[int]) -> str | None:
    """How a mutation is noticed: `run(seed, replaced)` raises, or says that results are wrong. None: not."""
    for seed in seeds:
        try:
            if not run(seed, mutation.replaced):
                return f"seed {seed}: wrong result"
        except EmulationError as error:
            return f"seed {seed}: {type(error).__name__}: {error}"
    return None
