"""The Hopper kernel of calls over a cache as it is shipped, compiled for sm_90a, within budgets; and what the
emulator cannot show: that sums are published before they are counted and read after, and that all threads
have stored their queries before any multiplies them.

Of what ptxas may still change a little `budgets_hopper_decode.json` keeps the bytes of the stack. `python
tests/gpu/test_compiled_hopper_decode.py` writes the figures of the installed Triton into it.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from gpu import hopper_budgets
from gpu.machine_code import printed

HERE = Path(__file__).parent
BUDGETS = HERE / "budgets_hopper_decode.json"
# All configurations with the newer Triton, () for short; a few with the older one.
NAMES = {"3.9.0": (), "3.6.0": ("8 128 plain pages", "16 128 causal gather", "128 256 causal pages")}
# What Triton keeps in shared memory to hand arguments to partitions and for reductions; a barrier takes 8
# bytes or 16.
SHARED_SLACK = 512


def measured(version: str) -> dict[str, dict[str, Any]]:
    return printed("shipped_hopper_decode.py", *NAMES[version])


def wrong(figures: dict[str, Any], stack: int) -> list[str]:
    shared, accounted, room = (figures[name] for name in ("shared", "accounted", "room"))
    rules = {
        f"{shared} bytes of shared memory of {room}": shared <= room,
        f"{shared} bytes of shared memory, schedule_decode.py says {accounted}": (
            abs(shared - accounted) <= SHARED_SLACK
        ),
        "no wgmma": figures["wgmma"] > 0,
        "registers are not moved between warps": figures["reallocations"] > 0,
        "ptxas puts wgmma one after the other": figures["serialised"] == 0,
        f"launched with {figures['registers']} registers": figures["registers"] <= figures["launched"],
        f"{figures['stack']} bytes of stack, allowed {stack}": figures["stack"] <= stack,
    }
    return [said for said, holds in rules.items() if not holds]


@pytest.mark.timeout(1200)
def test_budgets() -> None:
    hopper_budgets.check(BUDGETS, measured, wrong)


def places(pattern: str, text: str) -> list[int]:
    return [m.start() for m in re.finditer(pattern, text)]


def test_order() -> None:
    pytest.importorskip("triton", reason="needs triton: nox -s 'systems(triton39)'")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("kernels are interpreted in this process")
    from gpu.shipped_hopper_decode import made

    ptx = made("8 64 plain row").asm["ptx"]
    barriers = places(r"\bbar(?:rier)?\.sync\b", ptx)
    (counted,) = places(r"atom\.global\.gpu\.acq_rel\.add", ptx)
    stored = max(place for place in places(r"st\.global\.v2", ptx) if place < counted)
    reads = places(r"ld\.global\.cg", ptx)
    assert any(stored < barrier < counted for barrier in barriers)
    assert any(counted < barrier < min(reads) for barrier in barriers)
    assert not places(r"ld\.global\.(?!cg)", ptx[counted:])
    (fenced,) = places(r"fence\.proxy\.async", ptx)
    assert places(r"st\.shared\.v4", ptx[:fenced])
    product = min(places(r"wgmma\.mma_async", ptx))
    assert any(fenced < barrier < product for barrier in barriers)


if __name__ == "__main__":
    import triton

    found = measured(triton.__version__)
    hopper_budgets.write(BUDGETS, found, wrong, lambda figures: figures["stack"])
