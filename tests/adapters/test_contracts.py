"""What adapters to systems outside PyPI rely on: the signatures pinned in `contracts/`.

Ours must take the call as the system makes it, by position and by name. Where the environment names a
checkout, its source must still say what is pinned.
"""

from __future__ import annotations

import ast
import inspect
import os
import pydoc
import tomllib
from pathlib import Path
from typing import Any

import pytest

CALLS = [
    pytest.param(
        tomllib.loads(file.read_text(encoding="utf-8"))["variable"], call, id=f"{file.stem}-{call['name']}"
    )
    for file in sorted(Path(__file__).with_name("contracts").glob("*.toml"))
    for call in tomllib.loads(file.read_text(encoding="utf-8"))["call"]
]


def arguments(signature: str) -> ast.arguments:
    """Of a pinned signature."""
    function = ast.parse(f"def f{signature}: ...").body[0]
    assert isinstance(function, ast.FunctionDef)
    return function.args


def plain(found: ast.arguments) -> str:
    """Names, kinds and defaults; annotations come and go."""
    for each in ast.walk(found):
        if isinstance(each, ast.arg):
            each.annotation = None
    return ast.unparse(found)


def definition(tree: ast.AST, name: str) -> ast.FunctionDef:
    """`function` or `Class.method`, the last of that name, as it is the one in effect."""
    for part in name.split("."):
        found = [
            n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name == part
        ]
        assert found, f"{name} is not defined there"
        tree = found[-1]
    assert isinstance(tree, ast.FunctionDef)
    return tree


@pytest.mark.parametrize(("variable", "call"), [c for c in CALLS if "ours" in c.values[1]])
def test_ours_takes_the_call(variable: str, call: dict[str, Any]) -> None:
    pytest.importorskip("torch")
    ours = pydoc.locate(call["ours"])
    assert callable(ours), f"{call['ours']} is no function"
    accepted = inspect.signature(ours)
    theirs = arguments(call["signature"])
    places = [a.arg for a in (*theirs.posonlyargs, *theirs.args)]
    names = [a.arg for a in theirs.kwonlyargs]
    accepted.bind(*places, **{n: n for n in names})
    # All that can be named, named: only what is left after the object itself.
    first = 1 if places[:1] == ["self"] else 0
    accepted.bind(*places[:first], **{n: n for n in (*places[first:], *names)})
    required = places[: len(places) - len(theirs.defaults)]
    accepted.bind(*required, **{n: n for n, d in zip(names, theirs.kw_defaults, strict=True) if d is None})


@pytest.mark.parametrize(("variable", "call"), CALLS)
def test_source_says_so(variable: str, call: dict[str, Any]) -> None:
    root = os.environ.get(variable)
    if root is None:
        pytest.skip(f"{variable} names no checkout")
    source = Path(root, call["file"]).read_text(encoding="utf-8")
    found = definition(ast.parse(source), call["name"])
    assert plain(found.args) == plain(arguments(call["signature"]))
