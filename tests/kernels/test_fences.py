"""No byte beside an array or beside scratch is read."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="fences are made by mprotect as Linux has it")
def test_nothing_beside_the_memory_is_read() -> None:
    """A kernel that does so crashes the process; its last line says which."""
    paths = [str(Path(__file__).parents[1]), *sys.path]
    done = subprocess.run(
        [sys.executable, "-m", "kernels.fenced"], env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, (
        f"{done.returncode} after {done.stdout.splitlines()[-1:]}: {done.stderr[-2000:]}"
    )
    assert "amx-emulated" in done.stdout
