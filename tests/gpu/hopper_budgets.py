"""Figures of Hopper's kernels against those that are kept, one file for each family of kernels."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Figures = dict[str, Any]
# Of a configuration's figures and what is kept of them: what is wrong.
Judge = Callable[[Figures, Any], list[str]]


def check(
    path: Path, measured: Callable[[str], dict[str, Figures]], wrong: Judge, some: bool = False
) -> None:
    """Fail where a configuration breaks a rule. `some`: not all that are kept need be measured."""
    triton = pytest.importorskip("triton", reason="needs triton: nox -s 'systems(triton39)'")
    budgets = json.loads(path.read_text())
    if triton.__version__ not in budgets:
        pytest.skip(f"budgets are kept for triton {', '.join(budgets)}, here is {triton.__version__}")
    allowed, found = budgets[triton.__version__], measured(triton.__version__)
    assert found and (found.keys() <= allowed.keys() if some else found.keys() == allowed.keys())
    said = [f"{name}: {why}" for name, figures in found.items() for why in wrong(figures, allowed[name])]
    assert not said, "\n".join(said)


def write(
    path: Path, found: dict[str, Figures], wrong: Judge, kept: Callable[[Figures], Any], some: bool = False
) -> None:
    """Keep the figures of the installed Triton, and say which rules they break as they are."""
    import triton

    budgets = json.loads(path.read_text()) if path.exists() else {}
    own = {name: kept(figures) for name, figures in found.items()}
    budgets[triton.__version__] = (budgets.get(triton.__version__, {}) if some else {}) | own
    for name, figures in found.items():
        for why in wrong(figures, own[name]):
            sys.stderr.write(f"{name}: {why}\n")
    path.write_text(json.dumps(budgets, indent=1, sort_keys=True) + "\n")
