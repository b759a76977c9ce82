"""The Hopper backend's backward under the emulator: cases of the contract, judged as every backend's are.

Each case runs clean, in poisoned memory (NaN in what is masked, behind lengths and around arrays) and again.
"""

from __future__ import annotations

import os

import pytest

pytest.importorskip("triton", reason="needs triton: nox -s 'systems(triton39)'")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1: nox -s 'systems(triton39)'", allow_module_level=True)

import logging
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import triton

from anyflash.contract import direct, run
from anyflash.contract.cases import Case, Packed
from anyflash.contract.poison import Layout
from anyflash.contract.rules import MASKS, Causal, Window
from anyflash.contract.terms import Alibi, Biases, Softcap
from anyflash.kernels.gluon import launch_backward
from anyflash.semantics.problem import Problem
from gpu import emulated

# The older Triton gets fewer cases: the kernels are the same.
EVERY = 1 if triton.__version__ >= "3.9" else 4
LENGTHS = Packed((70, 0, 130, 3), (70, 33, 150, 0))
SPARE = Packed((130, 40), (160, 70), used_k=(140, 0), slack_q=9, slack_k=33)
ADDED = ["forward", "backward"]


def summed(case: Case) -> list[str]:
    keys = "backward_wide" if max(case.dims) > (64 if case.dropout_p else 128) else "backward"
    return ["forward", keys, "backward_dq"]


CASES = (
    Case("plain", lens=(100, 150), dims=(64, 64), heads=(1, 1)),
    Case("wide", lens=(70, 140), dims=(128, 128), heads=(1, 1), batch=1),
    Case("causal_fewer_queries", lens=(70, 260), dims=(64, 64), rules=(Causal(),), batch=1),
    Case("causal_fewer_keys", lens=(200, 70), dims=(64, 64), rules=(Causal(),), batch=1),
    Case("group", lens=(70, 140), dims=(64, 64), heads=(4, 1), rules=(Causal(),), batch=1),
    Case("window", lens=(150, 180), dims=(64, 64), heads=(1, 1), rules=(Window(40, 9),), batch=1),
    Case("few_rows", lens=(140, 70), dims=(64, 64), rules=(MASKS["few_rows"],), batch=1),
    Case("softcap", lens=(70, 140), dims=(64, 64), terms=(Softcap(2.0),), rules=(Causal(),), batch=1),
    Case("128_softcap", lens=(70, 140), dims=(128, 128), terms=(Softcap(2.0),), rules=(Causal(),), batch=1),
    Case("alibi", lens=(70, 140), dims=(64, 64), heads=(2, 1), terms=(Alibi(),), batch=1),
    Case("bias", lens=(70, 40), dims=(64, 64), terms=(Biases(("hqk",)),), batch=1),
    Case("sinks_no_key", lens=(130, 70), dims=(64, 64), sinks="randn", rules=(Causal(),), batch=1),
    Case("odd_dims", lens=(70, 140), dims=(96, 80), batch=1),
    Case("other_dims", lens=(70, 140), dims=(64, 128), batch=1),
    Case("negative_scale", lens=(70, 140), dims=(64, 64), scale=-0.3, batch=1),
    Case("large", lens=(70, 140), dims=(64, 64), data="large", batch=1),
    Case("packed", packed=LENGTHS, dims=(64, 64), heads=(2, 1)),
    Case("packed_causal", packed=LENGTHS, dims=(128, 128), heads=(1, 1), rules=(Causal(),)),
    Case("packed_window", packed=SPARE, dims=(64, 64), heads=(1, 1), rules=(Window(60, 2),)),
    Case("dropout", lens=(70, 140), dims=(64, 64), heads=(2, 1), dropout_p=0.3),
    Case("dropout_widest", lens=(70, 80), dims=(192, 160), heads=(1, 1), dropout_p=0.4, batch=1),
    Case("dropout_packed", packed=LENGTHS, dims=(128, 128), rules=(Causal(),), heads=(1, 1), dropout_p=0.5),
    Case("layout_heads_first", layouts=(Layout((0, 2, 1, 3)),), lens=(70, 140), dims=(64, 64), batch=1),
    Case("256", lens=(150, 100), dims=(256, 256), heads=(2, 1), rules=(Causal(),), batch=1),
    Case("96_window", lens=(150, 140), dims=(96, 96), rules=(Window(40, 9),), batch=1),
    Case("192_128", lens=(70, 140), dims=(192, 128), heads=(1, 1)),
    Case("192_large", lens=(70, 100), dims=(192, 192), data="large", rules=(Causal(),), heads=(1, 1)),
    Case("40_200", lens=(100, 70), dims=(40, 200), rules=(Window(40, 9),), batch=1),
    Case("256_softcap", lens=(70, 70), dims=(256, 136), terms=(Softcap(2.0),), rules=(Causal(),), batch=1),
    Case("256_packed", packed=LENGTHS, dims=(256, 256), heads=(2, 1), rules=(Causal(),)),
    Case("256_large", lens=(70, 100), dims=(256, 256), data="large", rules=(Causal(),), batch=1),
)  # fmt: skip
DTYPES = ("bfloat16", "float16")


def cases() -> list[Case]:
    return [
        replace(case, id=f"{DTYPES[i % 2]}-{case.id}", dtype=DTYPES[i % 2], data_seed=i)
        for i, case in enumerate(CASES)
    ]


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("case", cases()[::EVERY], ids=lambda case: case.id)
def test_contract(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = emulated.install(monkeypatch, seed=case.data_seed)
    report = run.run(case, "hopper", directions=("backward",))
    assert launched[:3] == summed(case)
    assert not report.failures, "\n".join(report.failures)


def add_up(patch: pytest.MonkeyPatch) -> None:
    """Calls need not be deterministic."""
    of_one_order = launch_backward.backward

    def backward(problem: Problem, *arguments: Any) -> None:
        program = replace(problem.program, deterministic=False)
        of_one_order(replace(problem, program=program), *arguments)

    patch.setattr(launch_backward, "backward", backward)


# With one block of keys the order of dq's sum is fixed, and runs can be compared bit by bit.
SHORT = [c for c in cases() if max(c.lens) <= 140 and max(c.dims) <= 128 and c.packed is None]


@pytest.mark.parametrize("case", SHORT[:: 3 * EVERY], ids=lambda case: case.id)
def test_contract_added_up(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = emulated.install(monkeypatch, seed=case.data_seed)
    add_up(monkeypatch)
    case = replace(case, lens=(case.lens[0], min(case.lens[1], 128)))
    report = run.run(case, "hopper", directions=("backward",))
    assert launched[:2] == ADDED
    assert not report.failures, "\n".join(report.failures)


def arrays(*shapes: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape).astype(np.float16) for shape in shapes]


def small(heads: int = 2) -> list[np.ndarray]:
    """q, k, v, dout"""
    keys = (1, 260, 1, 64)
    return arrays((1, 150, heads, 64), keys, keys, (1, 150, heads, 64))


def gradients(arrays: list[np.ndarray], **arguments: Any) -> list[np.ndarray]:
    q, k, v, dout = arrays
    found = direct.attend("hopper", q, k, v, dout=dout, causal=True, **arguments)
    return [found.dq, found.dk, found.dv]


@pytest.mark.parametrize("seed", range(1, 9, EVERY))
def test_every_schedule(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits whatever the order in which things complete."""
    found = []
    for this in (0, seed):
        emulated.install(monkeypatch, seed=this)
        found.append(gradients(small()))
    for mine, other in zip(*found, strict=True):
        assert mine.tobytes() == other.tobytes()


@pytest.mark.parametrize("seed", range(0, 9, 2 * EVERY))
def test_added_up_in_any_order(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of keys meet in dq; sums of the rest have one order."""
    emulated.install(monkeypatch, seed=0)
    wanted = gradients(small())
    launched = emulated.install(monkeypatch, seed=seed)
    found = gradients(small(), deterministic=False)
    assert launched == ADDED
    top = np.abs(wanted[0].astype(np.float64)).max()
    assert np.abs(found[0].astype(np.float64) - wanted[0]).max() <= 2 * np.finfo(np.float16).eps * top
    for mine, other in zip(found[1:], wanted[1:], strict=True):
        assert mine.tobytes() == other.tobytes()


@pytest.mark.parametrize("seed", range(1, 9, 2 * EVERY))
def test_wide_heads_have_one_order(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was asked for, and whatever the order in which things complete."""
    q, k, v, dout = arrays((1, 150, 2, 192), (1, 70, 1, 192), (1, 70, 1, 128), (1, 150, 2, 128))
    found = []
    for this in (0, seed):
        launched = emulated.install(monkeypatch, seed=this)
        found.append(gradients([q, k, v, dout], deterministic=not this))
        assert launched == ["forward", "backward_wide", "backward_dq"]
    for mine, other in zip(*found, strict=True):
        assert mine.tobytes() == other.tobytes()


@pytest.mark.parametrize("column", [5, 90])
def test_nan_in_one_column_of_a_masked_key(column: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that do not see the key have their dq, in both pieces of the head."""
    emulated.install(monkeypatch)
    q, k, v, dout = arrays(*[(1, 140, 1, 96)] * 4)
    clean = gradients([q, k, v, dout])[0]
    k[0, 100, 0, column] = np.nan
    dirty = gradients([q, k, v, dout])[0]
    top = np.abs(clean.astype(np.float64)).max()
    off = np.abs(dirty[:, :100].astype(np.float64) - clean[:, :100]).max()
    assert off <= 2 * np.finfo(np.float16).eps * top
    assert np.isnan(dirty[:, 100:]).any(-1).all()


def test_what_tma_cannot_move(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    launched = emulated.install(monkeypatch)
    q, k, v, dout = arrays(*[(1, 40, 1, 64)] * 3, (1, 40, 1, 65))
    with caplog.at_level(logging.INFO, "anyflash"):
        found = direct.attend("hopper", q, k, v, dout=dout[..., 1:])
    assert launched == ["forward"]
    assert "portable kernels, as dout does not start at a multiple of 16 bytes" in caplog.text
    assert np.isfinite(found.dq).all()


@pytest.mark.parametrize("deterministic", [True, False])
def test_keys_behind_the_last(deterministic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are zeros, with scores of 0: far above those of all keys here, beyond float32 as a probability."""
    emulated.install(monkeypatch)
    noise = arrays(*[(1, 70, 1, 64)] * 4)
    q, k = (sign * 4 + noise[i] / 8 for i, sign in enumerate((np.float16(1), np.float16(-1))))
    call = {"dout": noise[2], "deterministic": deterministic}
    found, wanted = (direct.attend(name, q, k, noise[3], **call) for name in ("hopper", "reference"))
    # What all keys, or all rows, have in common cancels in dq and dk: 32 times what is left.
    for name, cancelled in (("dq", 32), ("dk", 32), ("dv", 1)):
        mine, other = (getattr(each, name).astype(np.float64) for each in (found, wanted))
        bound = 8 * cancelled * np.finfo(np.float16).eps * np.abs(other).max()
        assert np.abs(mine - other).max() <= bound
