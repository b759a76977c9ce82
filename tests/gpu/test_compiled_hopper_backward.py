"""The Hopper backward as it is shipped, compiled for sm_90a, within budgets.

What must hold for every configuration is tested as it stands. What ptxas may still change a little,
`budgets_hopper_backward.json` keeps: bytes of the stack. `python tests/gpu/test_compiled_hopper_backward.py`
writes the figures of the installed Triton into it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from gpu import hopper_budgets
from gpu.machine_code import printed

HERE = Path(__file__).parent
BUDGETS = HERE / "budgets_hopper_backward.json"
# What Triton keeps in shared memory to hand arguments to partitions and for reductions.
SHARED_SLACK = 1024


def measured() -> dict[str, dict[str, Any]]:
    return printed("shipped_hopper_backward.py")


def wrong(figures: dict[str, Any], stack: int) -> list[str]:
    from anyflash.kernels.gluon.schedule import SHARED_BYTES

    shared, accounted = figures["shared"], figures["accounted"]
    overlapped, least = figures["overlapped"], figures["exponentials"]
    # Those of p; a score program may have some of its own.
    enough = set(overlapped) == {least} if figures["identity"] else min(overlapped, default=0) >= least
    rules = {
        f"{shared} bytes of shared memory of {SHARED_BYTES}": shared <= SHARED_BYTES,
        f"{shared} bytes of shared memory, schedule_backward.py says {accounted}": (
            accounted <= shared <= accounted + SHARED_SLACK
        ),
        "no wgmma": figures["wgmma"] > 0,
        "registers are not moved between warps": figures["reallocations"] > 0,
        "ptxas puts wgmma one after the other": figures["serialised"] == 0,
        f"{overlapped} exponentials under a product in the loops of two consumers, wanted {least}": (
            len(overlapped) == 2 and enough
        ),
        f"{figures['reductions']} places that add by TMA": (figures["reductions"] > 0) == figures["added"],
        f"{figures['stack']} bytes of stack, allowed {stack}": figures["stack"] <= stack,
    }
    return [said for said, holds in rules.items() if not holds]


@pytest.mark.timeout(2400)
def test_budgets() -> None:
    hopper_budgets.check(BUDGETS, lambda _version: measured(), wrong)


if __name__ == "__main__":
    hopper_budgets.write(BUDGETS, measured(), wrong, lambda figures: figures["stack"])
