"""Kernels as they are shipped, compiled for GPUs that are not here, within budgets.

`budgets.json` holds what each launch of `shipped.py` may take: bytes of shared memory, registers a thread,
bytes spilled a thread, and the tensor-core instructions that it must have. The test compiles a part of them
that has the main kernels in every configuration on every target, and everything else on sm_90; all of them,
which takes about an hour, are compiled by

    python tests/gpu/test_compiled.py --all

which writes the figures of the installed Triton into the file, as `--only TEXT` does those of names that
contain TEXT: a change of budget is a change of that file.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from gpu.budget import over
from gpu.machine_code import printed

HERE = Path(__file__).parent
BUDGETS = HERE / "budgets.json"
TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942")
VERSIONS = ("3.6.0", "3.9.0")


def shipped(*arguments: str) -> object:
    return printed("shipped.py", *arguments)


@pytest.mark.timeout(2400)
def test_budgets(tmp_path: Path) -> None:
    triton = pytest.importorskip("triton", reason="needs triton: nox -s 'systems(triton39)'")
    budgets = json.loads(BUDGETS.read_text())
    if triton.__version__ not in budgets:
        pytest.skip(f"budgets are kept for triton {', '.join(budgets)}, here is {triton.__version__}")
    allowed = budgets[triton.__version__]
    wanted = shipped(*TARGETS, "--names")
    assert isinstance(wanted, list)
    assert set(wanted) <= allowed.keys(), set(wanted) - allowed.keys()
    listed = tmp_path / "names.json"
    listed.write_text(json.dumps(wanted))
    found = shipped(*TARGETS, "--within", str(listed))
    assert isinstance(found, dict)
    over_budget = over(found, allowed)
    assert not over_budget, "\n".join(over_budget)


def test_budgets_are_of_what_is_shipped() -> None:
    """None is of a launch that is gone."""
    triton = pytest.importorskip("triton", reason="needs triton: nox -s 'systems(triton39)'")
    budgets = json.loads(BUDGETS.read_text())
    wanted = shipped(*TARGETS, "--all", "--names")
    assert isinstance(wanted, list)
    assert set(budgets) == set(VERSIONS)
    assert budgets.get(triton.__version__, {}).keys() <= set(wanted)


def test_shared_memory_fits() -> None:
    from anyflash.kernels.triton.schedule import SHARED_BYTES

    for version, budgets in json.loads(BUDGETS.read_text()).items():
        for name, budget in budgets.items():
            assert budget["shared"] <= SHARED_BYTES[name.split()[0]], (version, name)


def test_over() -> None:
    budget = {"shared": 100, "registers": 200, "spilled": 0, "products": 8}
    worse = {"shared": 101, "registers": 209, "spilled": 17, "products": 7}
    assert not over({"a": budget}, {"a": budget})
    assert len(over({"a": worse}, {"a": budget})) == 4


def write(all_of_them: bool, only: str) -> None:
    """Compile, and keep the figures; with everything, forget what is gone."""
    import triton

    kept = json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}
    found = shipped(*TARGETS, "--all", "--only", only)
    assert isinstance(found, dict)
    own = {} if all_of_them else kept.get(triton.__version__, {})
    kept[triton.__version__] = own | found
    BUDGETS.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--all", action="store_true", help="compile and write all")
    group.add_argument("--only", default="", metavar="TEXT", help="those whose name contains TEXT")
    asked = parser.parse_args()
    write(asked.all, asked.only)
