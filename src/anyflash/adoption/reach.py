"""How large a problem each attention takes in the same memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from anyflash.adoption import memory, units
from anyflash.adoption.row import Reach, Role, Variant


def longest(reach: Reach, variants: Sequence[Variant], done: Callable[[float], None]) -> dict[str, Any]:
    """By role: `peaks`, the bytes of every size tried, and `longest`, the last size within the limit, 0 if
    none. `open` names the roles for which no size passed it."""
    peaks: dict[Role, dict[str, int]] = {}
    for i, variant in enumerate(variants):
        tried = peaks[variant.role] = {}
        with variant.context():
            for size in reach.sizes:
                rise = memory.peak_rise(reach.prepare(variant.role, size))
                tried[str(size)] = rise
                if rise > reach.limit:
                    break
        done((i + 1) / len(variants))
    fits = {
        role: max((int(size) for size, rise in tried.items() if rise <= reach.limit), default=0)
        for role, tried in peaks.items()
    }
    unbounded = [role for role, size in fits.items() if size == reach.sizes[-1]]
    return {
        "unit": reach.unit,
        "limit": reach.limit,
        "longest": fits,
        "open": unbounded,
        "peaks": peaks,
    }


def sentence(row: dict[str, Any]) -> str:
    """Of a row's record."""
    found = row["reach"]
    parts = [
        f"{v['label']} {'at least ' if v['role'] in found['open'] else ''}{found['longest'][v['role']]}"
        for v in row["variants"]
    ]
    memory_given = units.size(found["limit"])
    return f"Longest in {memory_given} beside the input, in {found['unit']}: {', '.join(parts)}."
