"""The Hopper forward of 8-bit floats as it is shipped, compiled for sm_90a, within budgets.

The rules of test_compiled_hopper.py, and: v is turned by matrices, no byte is moved for itself, and threads
hand one another nothing but the sums and maxima of rows. `python tests/gpu/test_compiled_hopper_fp8.py`
writes the figures of the installed Triton into `budgets_hopper_fp8.json`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

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
    triton = pytest.importorskip("triton", reason="needs triton: nox -s 'systems(triton39)'")
    budgets = json.loads(BUDGETS.read_text())
    if triton.__version__ not in budgets:
        pytest.skip(f"budgets are kept for triton {', '.join(budgets)}, here is {triton.__version__}")
    allowed, found = budgets[triton.__version__], measured(triton.__version__)
    assert found.keys() == allowed.keys()
    said = [f"{name}: {why}" for name, figures in found.items() for why in wrong(figures, allowed[name])]
    assert not said, "\n".join(said)


if __name__ == "__main__":
    import triton

    kept = json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}
    found = measured(triton.__version__)
    kept[triton.__version__] = {
        name: {key: figures[key] for key in of_16_bits.KEPT} for name, figures in found.items()
    }
    for name, figures in found.items():
        for why in wrong(figures, figures):
            sys.stderr.write(f"{name}: {why}\n")
    BUDGETS.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
