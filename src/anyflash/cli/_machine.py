"""What is here: the facts that `anyflash doctor` shows, as plain values."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import sys
from collections.abc import Callable
from typing import Any

Facts = dict[str, Any]
_DEVELOPERS = {"dev", "test"}


def facts(check: bool = True) -> Facts:
    """Everything. With `check`, backends and adapters are run on a small problem; without, only asked."""
    return {
        "anyflash": installed("anyflash"),
        "python": {
            "version": platform.python_version(),
            "implementation": platform.python_implementation(),
            "executable": sys.executable,
            "platform": platform.platform(),
        },
        "processor": processor(),
        "packages": packages(),
        "frontends": frontends(),
        "backends": backends(check),
        "adapters": adapters(check),
        "cache": cache(),
        "settings": settings(),
    }


def installed(package: str) -> str | None:
    """The version of an installed distribution; imports nothing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor() -> Facts:
    """Cores, LLVM, and the instruction sets for which kernels can be compiled and run here."""
    import llvmlite.binding as llvm

    from anyflash.kernels.llvm.target import target_report

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "usable_cores": usable,
        "llvm": ".".join(map(str, llvm.llvm_version_info)),
        **target_report(),
    }


def packages() -> list[Facts]:
    """Every package that a user may want, the extra that asks for it, and how to get it."""
    try:
        requirements = importlib.metadata.requires("anyflash") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    groups: dict[str, list[str]] = {}
    for requirement in requirements:
        name = re.match(r"[A-Za-z0-9._-]+", requirement)
        extra = re.search(r"extra == ['\"]([^'\"]+)", requirement)
        if name is not None:
            groups.setdefault(extra.group(1) if extra else "", []).append(name.group())
    rows: dict[str, Facts] = {}
    # An extra lists what the extras within it list, so the smallest that has a package is the one to name.
    for extra in sorted(groups.keys() - _DEVELOPERS, key=lambda extra: (extra != "", len(groups[extra]))):
        wanted = f"anyflash[{extra}]" if extra else "anyflash"
        for name in groups[extra]:
            row = {
                "name": name,
                "version": installed(name),
                "for": wanted,
                "install": f"pip install '{wanted}'",
            }
            rows.setdefault(name, row)
    return list(rows.values())


def frontends() -> list[Facts]:
    """The frameworks whose arrays are taken, and their versions here."""
    from anyflash.frontends.registry import frameworks

    return [{"name": name, "version": installed(name)} for name in frameworks()]


def backends(check: bool) -> list[Facts]:
    """Each backend in order of preference: `problem` is None if it works, else why not."""
    from anyflash.backends import registry

    rows: list[Facts] = []
    for entry in registry.entries().values():
        problem = entry.reason
        broken = entry.backend is None
        if problem is None and check:
            problem = attempt(_run_backend, entry.name)
            broken = problem is not None
        rank = entry.backend.rank if entry.backend is not None else None
        rows.append(
            {
                "name": entry.name,
                "rank": rank,
                "problem": problem,
                "broken": broken,
                "ran": check and not broken,
            }
        )
    return rows


def _run_backend(name: str) -> str | None:
    """A small causal attention against the definition."""
    import numpy as np

    import anyflash as af

    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 24, 2, 16)) for _ in range(3))
    found = af.attention(*(x.astype(np.float32) for x in (q, k, v)), causal=True, backend=name)
    exact = af.attention(
        *(x.astype(np.float32).astype(np.float64) for x in (q, k, v)), causal=True, backend="reference"
    )
    # Each output is a weighted mean of v whose weights carry the rounding of head_dim products and 24 sums.
    bound = float(np.finfo(np.float32).eps) * (q.shape[-1] + k.shape[1]) * float(np.abs(v).max())
    error = float(np.abs(found - exact).max())
    return (
        None
        if error <= bound
        else f"differs from the definition by {error:.2e}; expected at most {bound:.2e}"
    )


def adapters(check: bool) -> list[Facts]:
    """Each adapter: its system's version, the range it is tested with, and None or why it does not work."""
    from anyflash.adapters import registry

    rows: list[Facts] = []
    for name in registry.names():
        row: Facts = {
            "name": name,
            "target": None,
            "version": None,
            "tested": None,
            "problem": None,
            "broken": False,
        }
        rows.append(row)
        try:
            adapter = registry.get(name)
        except ImportError as error:
            row.update(problem=f"cannot be loaded: {error}", broken=True)
            continue
        target = adapter.target
        version = target.installed()
        row.update(target=str(target), version=version)
        if version is None:
            row["problem"] = f"{target.package} is not installed: {target.how_to_install}"
            continue
        row["tested"] = target.tested(version)
        if check:
            row["problem"] = attempt(adapter.self_check)
            row["broken"] = row["problem"] is not None
    return rows


def attempt(function: Callable[..., str | None], *args: Any) -> str | None:
    """The function's own verdict, or what it failed with: a diagnosis shows a failure, whatever it is."""
    try:
        return function(*args)
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {error}"


def cache() -> Facts:
    """The compiled kernels kept on disk."""
    from anyflash.kernels.llvm.cache import report

    return report()


def settings() -> list[Facts]:
    """Each environment variable that is read: its meaning, its value now, and whether it was given."""
    from anyflash.core.settings import SETTINGS

    rows: list[Facts] = []
    for name, (meaning, value) in SETTINGS.items():
        row: Facts = {
            "name": name,
            "meaning": meaning,
            "given": name in os.environ,
            "value": None,
            "problem": None,
        }
        try:
            now = value()
            row["value"] = now if now is None or isinstance(now, bool | int) else str(now)
        except ValueError as error:
            row["problem"] = str(error)
        rows.append(row)
    return rows
