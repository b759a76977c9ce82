"""The project's own sources, and the imports in them."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "anyflash"
MODULES = sorted(PACKAGE.rglob("*.py"))


@dataclass(frozen=True)
class Import:
    """One imported module. `top_level` says that it runs when the importing file is imported."""

    module: str
    line: int
    top_level: bool

    @property
    def root(self) -> str:
        return self.module.partition(".")[0]

    @property
    def third_party(self) -> bool:
        return self.root not in sys.stdlib_module_names and self.root != "anyflash"


def place(path: Path) -> str:
    """The file's place in the package, dotted, without `anyflash.`: "core.view", "api", "" for __init__."""
    parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
    if parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts)


def imports(path: Path) -> list[Import]:
    return list(_imports(ast.parse(path.read_text(encoding="utf-8")), top_level=True))


def _imports(node: ast.AST, top_level: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, child.lineno, top_level)
        elif isinstance(child, ast.ImportFrom):
            base = child.module or ""
            for alias in child.names:
                full = f"{base}.{alias.name}"
                yield Import(full if _is_module(full) else base, child.lineno, top_level)
        else:
            yield from _imports(child, top_level and not _runs_later(child))


def _runs_later(node: ast.AST) -> bool:
    if isinstance(node, ast.If):
        return ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


def _is_module(dotted: str) -> bool:
    """Whether `from package import name` names a module of ours rather than something in one."""
    head, *rest = dotted.split(".")
    target = PACKAGE.joinpath(*rest)
    return head == "anyflash" and (target.is_dir() or target.with_suffix(".py").is_file())
