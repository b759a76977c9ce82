"""The kernel of calls over a cache, compiled for GPUs that are not here, within budgets; and what the
interpreter cannot show: that partial sums are published before they are counted, and read after.

`decode_budgets.json` is as `budgets.json`; `python tests/gpu/test_compiled_decode.py` writes it.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
from gpu.budget import over
from gpu.machine_code import printed

HERE = Path(__file__).parent
BUDGETS = HERE / "decode_budgets.json"
TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942")


def measured() -> dict[str, dict[str, int]]:
    return printed("shipped_decode.py", *TARGETS)


@pytest.mark.timeout(1200)
def test_budgets() -> None:
    triton = pytest.importorskip("triton", reason="needs triton: nox -s 'systems(triton39)'")
    budgets = json.loads(BUDGETS.read_text())
    if triton.__version__ not in budgets:
        pytest.skip(f"budgets are kept for triton {', '.join(budgets)}, here is {triton.__version__}")
    allowed, found = budgets[triton.__version__], measured()
    assert found.keys() == allowed.keys()
    complaints = over(found, allowed)
    assert not complaints, "\n".join(complaints)


def test_shared_memory_fits() -> None:
    from anyflash.kernels.triton.schedule import SHARED_BYTES

    for version, budgets in json.loads(BUDGETS.read_text()).items():
        for name, budget in budgets.items():
            assert budget["shared"] <= SHARED_BYTES[name.split()[0]], (version, name)


def code(arch: str, stage: str) -> str:
    """One stage of the plain kernel."""
    pytest.importorskip("triton", reason="needs triton: nox -s 'systems(triton39)'")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("kernels are interpreted in this process")
    from anyflash.kernels.triton import decode, offline
    from gpu import shipped_decode

    arguments, constants = shipped_decode.launch("few 128 plain row", arch)
    return str(offline.binary(decode.decode, arch, *arguments, **constants).asm[stage])


def places(pattern: str, text: str) -> list[int]:
    return [m.start() for m in re.finditer(pattern, text)]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_sums_are_published_then_counted_then_read(arch: str) -> None:
    """Stores of all threads, their barrier, one atomic that releases and acquires on the device, another
    barrier, and loads past the first-level cache."""
    ptx = code(arch, "ptx")
    (counted,) = places(r"atom\.global\.gpu\.acq_rel\.add", ptx)
    stores = places(r"st\.global\.v4", ptx[:counted])
    barriers = places(r"\b(?:bar\.sync|barrier\.sync)", ptx)
    reads = places(r"ld\.global\.cg", ptx)
    assert any(stores[-1] < barrier < counted for barrier in barriers)
    assert min(reads) > counted
    assert any(counted < barrier < min(reads) for barrier in barriers)
    assert not [store for store in places(r"st\.global\.v4", ptx) if counted < store < min(reads)]
    assert not places(r"ld\.global\.(?!cg)", ptx[counted:])


def test_the_barrier_is_asked_for() -> None:
    """Triton puts one of its own before an atomic today, which nobody promises."""
    asked = code("sm_90", "ttgir")
    (counted,) = places(r"tt\.atomic_rmw", asked)
    stored = places(r"tt\.store", asked[:counted])[-1]
    assert places(r"\bbarrier\b", asked[stored:counted])


def test_the_same_on_amd() -> None:
    """Every wave has seen its stores arrive before the barrier; the atomic writes the caches back and drops
    what they held."""
    lines = [line.strip() for line in code("gfx942", "amdgcn").splitlines()]
    (counted,) = (i for i, line in enumerate(lines) if line.startswith("global_atomic_add"))
    barrier = max(i for i in range(counted) if lines[i].startswith("s_barrier"))
    stored = max(i for i in range(barrier) if lines[i].startswith(("buffer_store", "global_store")))
    assert any(re.match(r"s_waitcnt.*vmcnt\(0\)", line) for line in lines[stored:barrier])
    assert any(line.startswith("buffer_wbl2") for line in lines[barrier:counted])
    after = lines[counted:]
    dropped = next(i for i, line in enumerate(after) if line.startswith("buffer_inv"))
    assert dropped < next(
        i for i, line in enumerate(after) if line.startswith(("buffer_load", "global_load"))
    )


if __name__ == "__main__":
    import triton

    kept = json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}
    kept[triton.__version__] = measured()
    BUDGETS.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
