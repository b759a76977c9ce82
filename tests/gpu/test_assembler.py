"""Masked calls of Hopper's kernels, and versions of ptxas that may miscompile them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton", reason="needs triton: nox -s 'systems(triton39)'")
from triton.backends.nvidia import compiler

from anyflash.backends.hopper import BACKEND
from anyflash.contract import direct
from anyflash.core.device import Device
from anyflash.kernels.gluon import assembler
from anyflash.kernels.triton import device as devices

SAID = "ptxas: NVIDIA (R) Ptx optimizing assembler\nCuda compilation tools, release {}, V{}\n"
# What ptxas prints of itself, and whether it is trusted.
VERSIONS = {
    ("12.6", "12.6.85"): True,
    ("12.8", "12.8.61"): False,
    ("12.8", "12.8.93"): False,
    ("12.9", "12.9.41"): False,
    ("12.9", "12.9.86"): True,
    ("13.0", "13.0.88"): True,
}


def program(path: Path, release: str, full: str) -> Path:
    path.write_text(f"#!/bin/sh\ncat <<'END'\n{SAID.format(release, full)}END\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose `ptxas` Triton would use."""
    monkeypatch.setattr(compiler, "get_ptxas", lambda arch: SimpleNamespace(path=str(tmp_path / "ptxas")))
    return tmp_path


@pytest.mark.parametrize(("said", "trusted"), VERSIONS.items(), ids=lambda x: str(x))
def test_versions(said: tuple[str, str], trusted: bool, here: Path) -> None:
    program(here / "ptxas", *said)
    assert (assembler.doubtful() is None) is trusted


def test_the_one_beside_it_is_named(here: Path) -> None:
    program(here / "ptxas", "12.8", "12.8.93")
    assert "none other is beside it" in str(assembler.doubtful())
    program(here / "ptxas-blackwell", "12.9", "12.9.86")
    why = str(assembler.doubtful())
    assert f"{here / 'ptxas-blackwell'} is 12.9.86" in why
    assert "ptxas 12.8.93 may miscompile" in why and "TRITON_PTXAS_PATH" in why


def test_one_that_says_nothing(here: Path) -> None:
    (here / "ptxas").write_text("#!/bin/sh\necho hello\n")
    (here / "ptxas").chmod(0o755)
    with pytest.raises(ValueError, match="has no version"):
        assembler.doubtful()


@pytest.mark.parametrize("full", ["12.8.93", "12.9.86"])
@pytest.mark.parametrize("mask", [{}, {"causal": True}, {"window": (8, 8)}], ids=["none", "causal", "window"])
def test_masked_calls_are_declined(
    mask: dict[str, Any], full: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(here / "ptxas", full[:4], full)
    monkeypatch.setattr(devices, "architecture", lambda device: "sm_90")
    q = np.zeros((1, 256, 1, 64), np.float16)
    problem, _ = direct.prepare(q, q, q, **mask)
    reasons = BACKEND.decline(problem, Device("cuda", 0))
    assert bool(reasons) is (bool(mask) and full == "12.8.93")
    assert all("ptxas 12.8.93" in why for why in reasons)


def test_the_installed_one() -> None:
    """Triton's own for Hopper can be asked."""
    assert assembler.version(Path(compiler.get_ptxas(90).path)) >= (12, 0, 0)
