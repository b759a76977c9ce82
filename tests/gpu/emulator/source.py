"""Where in a kernel's source an operation stands, and what its author calls a buffer."""

from __future__ import annotations

import linecache
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import CodeType

# Set in the globals of every kernel function that runs under the emulator.
MARK = "__emulated__"
_ASSIGNED = re.compile(r"\s*([A-Za-z_]\w*)\s*(?::[^=]*)?=[^=]")


@cache
def _line(code: CodeType, number: int) -> tuple[str, str]:
    text = linecache.getline(code.co_filename, number).strip()
    return f"{Path(code.co_filename).name}:{number}", text


def _frames() -> Iterator[tuple[str, str]]:
    """Place and text of the kernel's lines that are being executed, innermost first."""
    frame = sys._getframe(2)
    while frame is not None:
        if MARK in frame.f_globals:
            yield _line(frame.f_code, frame.f_lineno)
        frame = frame.f_back


def where() -> str:
    """The innermost line of the kernel, with its text, and the lines that called it."""
    lines = list(_frames())
    if not lines:
        return "outside any kernel"
    place, text = lines[0]
    callers = "".join(f" < {caller}" for caller, _ in lines[1:3])
    return f"{place} `{text}`{callers}"


def assigned_name(otherwise: str) -> str:
    """What the result of the current call is assigned to, through the functions that hand it on."""
    names = [found.group(1) for _, text in _frames() if (found := _ASSIGNED.match(text))]
    return ".".join(reversed(names)) or otherwise
