"""Where in a kernel's source an operation stands, and what its author calls a buffer."""

from __future__ import annotations

import ast
import linecache
import sys
from collections.abc import Iterator
from functools import cache
from itertools import islice
from pathlib import Path
from types import CodeType, FrameType

# Set in the globals of every kernel function that runs under the emulator.
MARK = "__emulated__"


@cache
def _line(code: CodeType, number: int) -> tuple[str, str]:
    text = linecache.getline(code.co_filename, number).strip()
    return f"{Path(code.co_filename).name}:{number}", text


def _frames() -> Iterator[FrameType]:
    """The kernel's functions that are being executed, innermost first."""
    frame = sys._getframe(2)
    while frame is not None:
        if MARK in frame.f_globals:
            yield frame
        frame = frame.f_back


def where() -> str:
    """The innermost line of the kernel, with its text, and the lines that called it."""
    lines = [_line(frame.f_code, frame.f_lineno) for frame in islice(_frames(), 3)]
    if not lines:
        return "outside any kernel"
    place, text = lines[0]
    callers = "".join(f" < {caller}" for caller, _ in lines[1:])
    return f"{place} `{text}`{callers}"


def assigned_name(otherwise: str) -> str:
    """What the result of the current call is assigned to, through the functions that hand it on."""
    names = [name for frame in _frames() if (name := _target(frame.f_code, frame.f_lasti))]
    return ".".join(reversed(names)) or otherwise


@cache
def _assignments(filename: str) -> list[tuple[ast.expr, ast.expr]]:
    """Targets and values of a file's assignments, those of tuples one by one."""
    found: list[tuple[ast.expr, ast.expr]] = []
    for node in ast.walk(ast.parse("".join(linecache.getlines(filename)))):
        if isinstance(node, ast.Assign):
            target, value = node.targets[0], node.value
            if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                found.extend(zip(target.elts, value.elts, strict=True))
            else:
                found.append((target, value))
    return found


@cache
def _target(code: CodeType, instruction: int) -> str | None:
    """The name to which the value of the call at this instruction is assigned, if it is at once."""
    first, last, start, end = next(islice(code.co_positions(), instruction // 2, None))
    for target, value in _assignments(code.co_filename):
        place = (value.lineno, value.end_lineno, value.col_offset, value.end_col_offset)
        if place == (first, last, start, end) and isinstance(target, ast.Name):
            return target.id
    return None
