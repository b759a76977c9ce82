"""The Hopper forward of 8-bit floats as it is shipped, compiled for sm_90a, within budgets.

The rules of test_compiled_hopper.py, and: v is turned by matrices, no byte is moved for itself, and threads
hand one another nothing but the sums and maxima of rows. `python tests/gpu/test_compiled_hopper_fp8.py`
writes the figures of the installed Triton into `budgets_hopper_fp8.json`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from gpu import hopper_budgets
from gpu import test_compiled_hopper as of_16_bits
from gpu.machine_code import printed

BUDGETS = Path(__file__).parent / "budgets_hopper_fp8.json"
# All configurations with the newer Triton, () for short; a few with the older one.
NAMES = {"3.9.0": (), "3.6.0": ("64 plain", "128 causal")}
# A maximum and a sum of each of a thread's two rows, over the four threads of a row.
SHUFFLES = 2 * 2 * 2
# Of `byte_planes` in hopper.py, before `split` takes the last axis.
NEIGHBOURS = [0, 1, 0, 0]


def measured(version: str) -> dict[str, dict[str, Any]]:
    return printed("shipped_hopper_fp8.py", *NAMES[version])


def wrong(figures: dict[str, Any], budget: dict[str, int]) -> list[str]:
    rules = {
        "v is not turned by ldmatrix": figures["turned"] > 0,
        f"pairs of bytes {figures['neighbours']} apart": figures["neighbours"] == NEIGHBOURS,
        f"{figures['single_bytes']} moves of single bytes": figures["single_bytes"] == 0,
        f"{figures['shuffles']} shuffles beside a product": figures["shuffles"] <= SHUFFLES,
    }
    return of_16_bits.wrong(figures, budget) + [said for said, holds in rules.items() if not holds]


@pytest.mark.timeout(2400)
def test_budgets() -> None:
    hopper_budgets.check(BUDGETS, measured, wrong)


if __name__ == "__main__":
    import triton

    hopper_budgets.write(BUDGETS, measured(triton.__version__), wrong, of_16_bits.kept)
