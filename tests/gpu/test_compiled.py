"""The forward and backward kernels as they are shipped, compiled for GPUs that are not here, within budgets.

`budgets.json` holds what each kernel may take: bytes of shared memory, registers a thread, bytes spilled a
thread, and the tensor-core instructions that it must have. `python tests/gpu/test_compiled.py` writes the
figures of the installed Triton into it: a change of budget is a change of that file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gpu.budget import over

HERE = Path(__file__).parent
BUDGETS = HERE / "budgets.json"
# All targets with the newer Triton; with the older one those that it is used for.
TARGETS = {
    "3.9.0": ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942"),
    "3.6.0": ("sm_80", "sm_90", "gfx942"),
}


def measured(version: str) -> dict[str, dict[str, int]]:
    """In a process of its own, where kernels are not interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(HERE / "shipped.py"), *TARGETS[version]]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.timeout(2400)
def test_budgets() -> None:
    triton = pytest.importorskip("triton", reason="needs triton: nox -s 'systems(triton39)'")
    budgets = json.loads(BUDGETS.read_text())
    if triton.__version__ not in budgets:
        pytest.skip(f"budgets are kept for triton {', '.join(budgets)}, here is {triton.__version__}")
    allowed, found = budgets[triton.__version__], measured(triton.__version__)
    assert found.keys() == allowed.keys()
    complaints = over(found, allowed)
    assert not complaints, "\n".join(complaints)


def test_shared_memory_fits() -> None:
    from anyflash.kernels.triton.schedule import SHARED_BYTES

    for version, budgets in json.loads(BUDGETS.read_text()).items():
        for name, budget in budgets.items():
            assert budget["shared"] <= SHARED_BYTES[name.split()[0]], (version, name)


if __name__ == "__main__":
    import triton

    kept = json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}
    kept[triton.__version__] = measured(triton.__version__)
    BUDGETS.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
