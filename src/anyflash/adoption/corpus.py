"""A real text collection that every Python installation carries: its own documentation.

The language reference of `help()` and the documentation strings of the standard library, the same for
everybody with the same Python. Passages are cut to lengths between a sentence and some pages, as a collection
of documents has.
"""

from __future__ import annotations

import ast
import random
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

_SHORTEST_TEXT = 200


def texts() -> Iterator[str]:
    """Documentation texts, in a fixed order."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        topics = {}
    for name in sorted(topics):
        yield topics[name]
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.glob("*.py")):
        yield from _docstrings(path)


def _docstrings(path: Path) -> Iterator[str]:
    tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    for node in ast.walk(tree):
        text = ast.get_docstring(node) if isinstance(node, documented) else None
        if text and len(text) >= _SHORTEST_TEXT:
            yield text


def text(characters: int) -> str:
    """The first `characters` of the collection, joined. Raises RuntimeError if this Python carries less."""
    parts: list[str] = []
    size = 0
    for part in texts():
        parts.append(part)
        size += len(part) + 2
        if size >= characters:
            return "\n\n".join(parts)[:characters]
    raise RuntimeError(
        f"this Python carries {size} characters of documentation, {characters} are needed: "
        "install its standard library in full"
    )


def passages(count: int, shortest: int, longest: int) -> list[str]:
    """`count` passages of `shortest` to `longest` words, short ones more often than long ones
    (log-uniform)."""
    draw = random.Random(0)
    found: list[str] = []
    for source in texts():
        words = re.findall(r"\S+", source)
        start = 0
        while len(words) - start >= shortest:
            length = round(shortest * (longest / shortest) ** draw.random())
            found.append(" ".join(words[start : start + length]))
            start += length
    if len(found) < count:
        raise RuntimeError(f"this Python carries {len(found)} passages of documentation, {count} are needed")
    draw.shuffle(found)
    return found[:count]
