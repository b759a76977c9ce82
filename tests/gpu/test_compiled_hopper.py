"""The Hopper forward as it is shipped, compiled for sm_90a, within budgets.

What must hold for every configuration is tested as it stands. `budgets_hopper.json` keeps what may be taken
of the stack, in bytes, and how often loops may use it: nothing and never, unless somebody finds a reason.
`python tests/gpu/test_compiled_hopper.py` compiles what the test does with the installed Triton and writes
the figures into it, with `--all` every configuration.
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
BUDGETS = HERE / "budgets_hopper.json"
# What the test compiles: all kinds of forms with the newer Triton, those that once spilled with the older.
NAMES = {
    "3.9.0": (
        "64 plain", "64 causal", "96 causal", "128 plain", "128 causal", "128 packed causal",
        "128 everything", "192 causal", "192/128 plain", "192/128 causal", "256 plain", "256 causal",
        "64 dropout", "128 dropout causal", "128 members causal", "192/128 members everything",
    ),
    "3.6.0": (
        "64 plain", "96 causal", "128 packed causal", "192/128 causal", "128 dropout causal",
        "128 members causal",
    ),
}  # fmt: skip
# What Triton keeps in shared memory to hand arguments to partitions and for reductions.
SHARED_SLACK = 1024


def measured(*names: str) -> dict[str, dict[str, Any]]:
    return printed("shipped_hopper.py", *names)


def kept(figures: dict[str, Any]) -> dict[str, int]:
    """What ptxas may still change a little."""
    return {key: figures[key] for key in ("stack", "spilled_in_loops")}


def wrong(figures: dict[str, Any], budget: dict[str, int]) -> list[str]:
    from anyflash.kernels.gluon.schedule import SHARED_BYTES

    block_n, shared, accounted = figures["block_n"], figures["shared"], figures["accounted"]
    least = block_n * 64 // 128 + 2
    rules = {
        f"{shared} bytes of shared memory of {SHARED_BYTES}": shared <= SHARED_BYTES,
        f"{shared} bytes of shared memory, schedule.py says {accounted}": (
            accounted <= shared <= accounted + SHARED_SLACK
        ),
        "no wgmma": figures["wgmma"] > 0,
        "registers are not moved between warps": figures["reallocations"] > 0,
        "ptxas puts wgmma one after the other": figures["serialised"] == 0,
        f"{figures['overlapped']} exponentials under a product, wanted {least} in {figures['loops']} loops": (
            len(figures["overlapped"]) == figures["loops"] and min(figures["overlapped"]) >= least
        ),
        f"{figures['stack']} bytes of stack, allowed {budget['stack']}": (
            figures["stack"] <= budget["stack"]
        ),
        f"{figures['spilled_in_loops']} spills in loops": (
            figures["spilled_in_loops"] <= budget["spilled_in_loops"]
        ),
    }
    return [said for said, holds in rules.items() if not holds]


@pytest.mark.timeout(2400)
def test_budgets() -> None:
    hopper_budgets.check(BUDGETS, lambda version: measured(*NAMES[version]), wrong, some=True)


if __name__ == "__main__":
    import triton

    found = measured(*(() if "--all" in sys.argv else NAMES[triton.__version__]))
    hopper_budgets.write(BUDGETS, found, wrong, kept, some=True)
