"""Tiles that were tuned on a device, from `tables/<architecture>.json`; benchmarks/tune_gpu.py writes them.

An entry's key is "part width itemsize": forward, backward_dkv, backward_dq, or decode_few, .._some, .._many;
the greatest width of the table's row; bytes of an element. Its `tiles` are [block_m, block_n, warps, stages].
What has no entry is as schedule.py says.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).with_name("tables")


def key(part: str, width: int, itemsize: int) -> str:
    return f"{part} {width} {itemsize}"


@cache
def entries(arch: str) -> dict[str, tuple[int, int, int, int]]:
    """The tiles of an architecture, by key; read once."""
    path = FOLDER / f"{arch}.json"
    if not path.exists():
        return {}
    found: dict[str, Any] = json.loads(path.read_text())
    return {name: tuple(entry["tiles"]) for name, entry in found.items()}


@contextmanager
def trying(arch: str, name: str, tiles: tuple[int, int, int, int]) -> Iterator[None]:
    """While it lasts, an entry is this one: for the tuner."""
    kept = dict(entries(arch))
    entries(arch)[name] = tiles
    try:
        yield
    finally:
        entries(arch).clear()
        entries(arch).update(kept)
