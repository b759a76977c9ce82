"""All rows, found by listing `rows/`: a file there is a system and defines `ROWS`."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil

import anyflash.adoption.rows as folder
from anyflash.adoption.row import Row


def defined_in(module: str) -> list[Row]:
    """The rows of one file."""
    return [dataclasses.replace(row, module=module) for row in importlib.import_module(module).ROWS]


def rows(only: str | None = None) -> list[Row]:
    """All rows, or those whose system or name contains `only`, in a fixed order. Raises KeyError if none
    does."""
    found: list[Row] = []
    for module in sorted(pkgutil.iter_modules(folder.__path__), key=lambda m: m.name):
        if not module.name.startswith("_"):
            found += defined_in(f"{folder.__name__}.{module.name}")
    if only is None:
        return found
    wanted = [r for r in found if only.lower() in (r.name + " " + r.system).lower()]
    if not wanted:
        raise KeyError(f"no row or system contains {only!r}; there are: {', '.join(r.name for r in found)}")
    return wanted
