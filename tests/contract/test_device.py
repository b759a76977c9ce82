"""Cases whose memory is copied elsewhere and back: as for a GPU, here onto other memory of the host."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import numpy as np
import pytest

from anyflash.contract import backends, direct, run
from anyflash.contract.cases import Case
from anyflash.contract.device import Elsewhere, spans
from anyflash.contract.memory import Memory
from anyflash.contract.poison import ALIGNMENT
from anyflash.contract.table import table
from anyflash.core.device import CPU, Device
from anyflash.semantics.operands import Results

if importlib.util.find_spec("torch") is None:
    pytest.skip("copies are torch's", allow_module_level=True)

BY_ID = {case.id: case for case in table()}
CASES = [
    BY_ID[f"float32-{name}"] for name in ("causal", "layout_mixed", "layout_packed_mixed", "layout_tables")
]


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> list[Elsewhere]:
    """The CPU backend works on copies, which are kept in the list."""
    made: list[Elsewhere] = []

    class Noted(Elsewhere):
        def __init__(self, device, buffers):
            super().__init__(CPU, buffers)
            made.append(self)

    for module in (run, direct):
        monkeypatch.setattr(module, "where", lambda backend: Device("cuda"))
        monkeypatch.setattr(module, "Elsewhere", Noted)
    return made


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_same_as_in_place(case, away, monkeypatch):
    found = run.run(case, "cpu")
    assert not found.failures
    assert len(away) == 6, "forward and backward, three times"
    monkeypatch.undo()
    assert run.run(case, "cpu").ratio == found.ratio


def test_direct(away):
    x = np.random.default_rng(0).standard_normal((2, 5, 3, 4)).astype(np.float32)
    found = direct.attend("cpu", x, x[:, ::-1], x, dout=x)
    assert len(away) == 2
    wanted = direct.attend(
        "reference", x.astype(np.float64), x[:, ::-1].astype(np.float64), x.astype(np.float64)
    )
    np.testing.assert_allclose(found.out, wanted.out, rtol=1e-5, atol=1e-6)


def test_copies_keep_their_alignment():
    case = BY_ID["float32-layout_shift_6"]
    values, truth = run.known(case)
    memory = Memory(case, values, truth, whole=True)
    copies = Elsewhere(CPU, memory.buffers())
    for name in ("q", "k", "v"):
        here = getattr(memory.operands, name)
        there = copies.view(here)
        assert there.ptr != here.ptr
        assert there.ptr % ALIGNMENT == here.ptr % ALIGNMENT
        assert here.ptr % here.itemsize == 0, "whole elements"


def test_a_write_outside_shows(monkeypatch):
    """A byte written beside a copy is found on the host."""
    case = CASES[0]
    memory = Memory(case, *run.known(case))
    memory.new_results()
    copies = Elsewhere(CPU, memory.buffers())
    next(copy for host, copy in copies._copies if host is memory.results["lse"].raw)[5] = 77
    copies.take_back()
    assert any("lse: 1 bytes outside" in said for said in memory.damage())


def test_spans_of_one_array_are_one():
    x = np.zeros((4, 6), np.float32)
    views = [direct.view_of(part) for part in (x[:, ::-1], x[1:], x.T)]
    (found,) = spans(Results(*views))
    assert found.nbytes == x.nbytes
    assert found.ctypes.data == x.ctypes.data


def test_only_gpus_decline():
    case = replace(Case("plain"), dtype="float64")
    problem = Memory(case, run.known(case)[0]).problem
    assert not backends.declined("cpu", problem)
    if importlib.util.find_spec("triton") is not None:
        assert backends.declined("triton", problem)
