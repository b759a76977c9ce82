"""The Hopper backend's forward under the emulator: cases of the contract, judged as every backend's are.

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

import anyflash as af
from anyflash.backends.hopper import BACKEND
from anyflash.contract import direct, run
from anyflash.contract.cases import Case, Packed
from anyflash.contract.poison import Layout
from anyflash.contract.rules import MASKS, Causal, Dense, Window
from anyflash.contract.terms import SCORES, Alibi, Biases, Softcap
from anyflash.kernels.gluon import launch, schedule
from anyflash.kernels.gluon.versions import unsupported
from anyflash.kernels.triton import launch as portable
from anyflash.semantics import rng
from gpu import emulated, emulated_kernels
from gpu.emulator import emulate

LENGTHS = Packed((70, 0, 200, 3), (70, 33, 150, 0))
SPARE = Packed((130, 40), (260, 70), used_k=(190, 0), slack_q=9, slack_k=33)

CASES = (
    Case("plain", lens=(100, 300), dims=(64, 64)),
    Case("wide", lens=(70, 300), dims=(128, 128)),
    Case("widest", lens=(100, 130), dims=(256, 256), heads=(1, 1)),
    Case("causal", lens=(300, 300), dims=(128, 128), rules=(Causal(),)),
    Case("causal_fewer_queries", lens=(70, 300), dims=(64, 64), rules=(Causal(),), batch=1),
    Case("causal_fewer_keys", lens=(300, 70), dims=(64, 64), rules=(Causal(),), batch=1),
    Case("group", lens=(70, 260), dims=(64, 64), heads=(6, 2), rules=(Causal(),), batch=1),
    Case("window", lens=(300, 330), dims=(64, 64), rules=(Window(40, 9),), batch=1),
    Case("few_rows", lens=(140, 150), dims=(64, 64), rules=(MASKS["few_rows"],), batch=1),
    Case("documents", lens=(200, 200), dims=(64, 64), rules=(MASKS["documents_by_batch"],)),
    Case("by_head", lens=(200, 300), dims=(64, 64), rules=(MASKS["by_head"],), batch=1),
    Case("dense_mask", lens=(70, 300), dims=(64, 64), rules=(Dense("bhqk", 0.4),), batch=1),
    Case("softcap", lens=(70, 260), dims=(64, 64), terms=(Softcap(2.0),), rules=(Causal(),), batch=1),
    Case("alibi", lens=(70, 260), dims=(64, 64), terms=(Alibi(),), rules=(Causal(),), batch=1),
    Case("bias", lens=(70, 260), dims=(64, 64), terms=(Biases(("hqk", "bk")),), batch=1),
    Case("program", lens=(70, 140), dims=(64, 64), terms=(SCORES["relative"],), batch=1),
    Case("sinks", lens=(70, 260), dims=(64, 64), sinks="randn", rules=(Causal(),), batch=1),
    Case("sinks_no_key", lens=(130, 70), dims=(64, 64), sinks="randn", rules=(Causal(),), batch=1),
    Case("pieces", lens=(70, 300), dims=(96, 96), rules=(Causal(),)),
    Case("pieces_not_full", lens=(70, 140), dims=(96, 80), batch=1),
    Case("pieces_of_v", lens=(130, 140), dims=(64, 192), terms=(Softcap(2.0),), batch=1),
    Case("pieces_wide", lens=(130, 140), dims=(192, 192), rules=(Causal(),), heads=(2, 1), batch=1),
    Case("pieces_packed", packed=SPARE, dims=(192, 96), rules=(Window(60, 2),)),
    Case("latent", lens=(130, 140), dims=(192, 128), rules=(Causal(),), heads=(2, 1), batch=1),
    Case("short_rows", lens=(70, 140), dims=(40, 136), batch=1),
    Case("negative_scale", lens=(70, 140), dims=(64, 64), scale=-0.3, batch=1),
    Case("large", lens=(70, 260), dims=(64, 64), data="large", batch=1),
    Case("constant", lens=(70, 260), dims=(64, 64), data="constant", batch=1),
    Case("packed", packed=LENGTHS, dims=(64, 64), heads=(4, 2)),
    Case("packed_causal", packed=LENGTHS, dims=(128, 128), rules=(Causal(),)),
    Case("packed_window", packed=SPARE, dims=(64, 64), rules=(Window(60, 2),)),
    Case("packed_score", packed=SPARE, dims=(64, 128), terms=(SCORES["distance"],)),
    Case("dropout", lens=(70, 260), dims=(64, 64), heads=(4, 2), dropout_p=0.3),
    Case("dropout_causal", lens=(200, 300), dims=(128, 128), rules=(Causal(),), dropout_p=0.5, batch=1),
    Case("dropout_packed", packed=SPARE, dims=(256, 256), heads=(1, 1), dropout_p=0.2),
    Case("members", lens=(40, 140), dims=(64, 64), heads=(8, 1), batch=1),
    Case("members_causal", lens=(70, 150), dims=(128, 128), heads=(8, 2), rules=(Causal(),), batch=1),
    Case("members_window", lens=(20, 200), dims=(96, 64), heads=(4, 1), rules=(Window(60, 2),), batch=1),
    Case("members_of_group", lens=(30, 140), dims=(64, 64), heads=(12, 1), rules=(Causal(),), batch=1),
    Case("members_alibi", lens=(33, 90), dims=(64, 64), heads=(8, 2), terms=(Alibi(),), rules=(Causal(),)),
    Case("members_sinks", lens=(40, 70), dims=(64, 64), heads=(4, 1), sinks="randn", rules=(Causal(),)),
    Case("members_bias", lens=(20, 90), dims=(64, 64), heads=(8, 2), terms=(Biases(("hqk", "bk")),), batch=1),
    Case("members_16", lens=(20, 140), dims=(256, 256), heads=(32, 2), rules=(MASKS["few_rows"],), batch=1),
    Case("one_query", lens=(1, 300), dims=(64, 64), heads=(4, 1)),
    Case("layout_heads_first", layouts=(Layout((0, 2, 1, 3)),), lens=(70, 140), dims=(64, 64)),
    Case("layout_gaps", layouts=(Layout(gap=8),), lens=(70, 140), dims=(64, 64), batch=1),
    Case("layout_columns", layouts=(Layout((0, 2, 3, 1)),), lens=(40, 50), dims=(64, 64), batch=1),
    Case("layout_broadcast", layouts=(Layout(expand=(2,)),), lens=(40, 50), dims=(64, 64), batch=1),
)  # fmt: skip
DTYPES = ("bfloat16", "float16")
# The same kernels: the older Triton is asked for fewer.
EVERY = 1 if triton.__version__ >= "3.9" else 5


def cases() -> list[Case]:
    return [
        replace(case, id=f"{dtype}-{case.id}", dtype=dtype, data_seed=i)
        for i, case in enumerate(CASES)
        for dtype in DTYPES[i % 2 : i % 2 + 1]
    ][::EVERY]


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.id)
def test_contract(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    emulated.install(monkeypatch, seed=case.data_seed)
    report = run.run(case, "hopper", directions=("forward",))
    assert not report.failures, "\n".join(report.failures)


def arrays(*shapes: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape).astype(np.float16) for shape in shapes]


def close(found: np.ndarray, wanted: np.ndarray) -> bool:
    top = np.abs(wanted.astype(np.float64)).max()
    return bool(np.abs(found.astype(np.float64) - wanted).max() <= 4 * np.finfo(np.float16).eps * top)


@pytest.mark.parametrize("seed", range(6))
def test_every_schedule(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits whatever the order in which things complete."""
    q, k, v = arrays((1, 200, 2, 64), (1, 330, 1, 64), (1, 330, 1, 64))
    found = []
    for this in (0, seed):
        emulated.install(monkeypatch, seed=this)
        found.append(direct.attend("hopper", q, k, v, causal=True))
    assert found[0].out.tobytes() == found[1].out.tobytes()
    assert found[0].lse.tobytes() == found[1].lse.tobytes()


@pytest.mark.parametrize("transposed", [False, True])
def test_words_are_those_of_the_definition(transposed: bool) -> None:
    first_row, first_k, batch, head, seed, least = 96, 64, 3, 5, 2**63 + 2**31 + 9, 2**32 - 2**30
    found = torch.zeros(64, 32)
    halves = [np.uint32(word).view(np.int32).item() for word in (seed & 0xFFFFFFFF, seed >> 32, least)]
    emulate(
        emulated_kernels.dropped_ones, (1,), found, first_row, first_k, batch, head, *halves, transposed, True
    )
    rows, keys = (32, 64) if transposed else (64, 32)
    stays = rng.words(seed, batch, head, first_row + rows, first_k + keys)[first_row:, first_k:] >= least
    np.testing.assert_array_equal((found.T if transposed else found).numpy(), np.where(stays, 1.0, -1.0))


@pytest.mark.parametrize(("dropout_p", "seed"), [(0.4, 2**63 + 2**31 + 5), (1 - 2**-40, 16), (1e-12, 1)])
def test_dropped_as_everywhere(dropout_p: float, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the halves of the seed, and at both ends of the range of probabilities."""
    launched = emulated.install(monkeypatch)
    q, k, v, dout = arrays((1, 70, 2, 64), (1, 90, 1, 64), (1, 90, 1, 64), (1, 70, 2, 64))
    call = {"dout": dout, "dropout_p": dropout_p, "seed": seed}
    found, wanted = (direct.attend(name, q, k, v, **call) for name in ("hopper", "reference"))
    assert launched == ["forward", "backward", "backward_dq"]
    for name in ("out", "dq", "dk", "dv"):
        assert close(getattr(found, name), getattr(wanted, name))


def test_slices_of_a_packed_projection(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = emulated.install(monkeypatch)
    (qkv,) = arrays((2, 70, 3, 2, 64))
    q, k, v = (qkv[:, :, i] for i in range(3))
    found = direct.attend("hopper", q, k, v)
    assert launched == ["forward"]
    assert close(found.out, direct.attend("reference", q, k, v).out)


def test_what_tma_cannot_move(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    launched = emulated.install(monkeypatch)
    q, k, v = arrays((1, 40, 2, 65), (1, 50, 2, 65), (1, 50, 2, 65))
    with caplog.at_level(logging.INFO, "anyflash"):
        found = direct.attend("hopper", q, k, v)
    assert not launched
    assert "portable kernels, as q has rows 260 bytes apart" in caplog.text
    assert close(found.out, direct.attend("reference", q, k, v).out)


def test_stats_serve_the_portable_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    emulated.install(monkeypatch)
    q, k, v, dout = arrays((1, 70, 2, 64), (1, 140, 1, 64), (1, 140, 1, 64), (1, 70, 2, 64))
    found, wanted = (direct.attend(name, q, k, v, dout=dout, causal=True) for name in ("hopper", "reference"))
    for name in ("dq", "dk", "dv"):
        assert close(getattr(found, name), getattr(wanted, name))


def test_nan_in_what_is_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key that some rows see and others do not: only the former may learn of its NaN, and only blocks that
    such a key reaches are computed again, not those of rows without keys."""
    emulated.install(monkeypatch)
    repaired: list[np.ndarray] = []
    own = portable.forward

    def noted(problem: Any, operands: Any, results: Any, tiles: Any, odd: Any) -> None:
        repaired.append(odd.numpy().copy())
        own(problem, operands, results, tiles, odd)

    monkeypatch.setattr(portable, "forward", noted)
    q, k, v = arrays((1, 300, 1, 64), (1, 200, 1, 64), (1, 200, 1, 64))
    clean = direct.attend("hopper", q, k, v, causal=True)
    k[0, 150] = v[0, 150] = np.nan
    dirty = direct.attend("hopper", q, k, v, causal=True)
    np.testing.assert_array_equal(dirty.out[:, :128], clean.out[:, :128])
    assert close(dirty.out[:, 128:250], clean.out[:, 128:250])
    assert np.isnan(dirty.out[:, 250:]).all()
    # The last rows first, as the careful launch has them: from row 128 on blocks read key 150.
    assert [odd.tolist() for odd in repaired] == [[0, 0, 0, 0, 0], [1, 1, 1, 0, 0]]


@pytest.mark.parametrize("column", [3, 80])
def test_nan_in_one_column_of_v_that_is_masked(column: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Either piece of a head shows that a block must be computed again."""
    emulated.install(monkeypatch)
    q, k, v = arrays((1, 100, 1, 96), (1, 100, 1, 96), (1, 100, 1, 96))
    clean = direct.attend("hopper", q, k, v, causal=True).out
    v[0, 60, 0, column] = np.nan
    dirty = direct.attend("hopper", q, k, v, causal=True).out
    assert np.isnan(dirty[:, 60:, :, column]).all()
    assert np.isnan(dirty).sum() == 40
    assert close(np.where(np.isnan(dirty), clean, dirty), clean)


@pytest.mark.parametrize(
    ("group", "rows", "together"),
    [
        (8, 40, 8),
        (8, 128, 1),
        (8, 250, 1),
        (8, 140, 8),
        (6, 40, 2),
        (7, 40, 1),
        (1, 40, 1),
        (128, 3, 64),
        (8, 0, 1),
    ],
)
def test_heads_together(group: int, rows: int, together: int) -> None:
    assert schedule.members(group, rows, 128) == together


@pytest.mark.parametrize(
    ("call", "together"),
    [({}, 4), ({"causal": True}, 4), ({"dropout_p": 0.1}, 1), ({"mask": lambda at: at.k > at.head}, 1)],
)
def test_who_takes_heads_together(call: dict[str, Any], together: int) -> None:
    q, k = np.ones((1, 40, 8, 64), np.float16), np.ones((1, 50, 2, 64), np.float16)
    problem, _ = direct.prepare(q, k, k, **call)
    assert launch.heads_together(problem) == together


def test_nan_in_what_is_masked_of_heads_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """As above. Here a tile has 16 tokens of four heads; a block that is computed again has 64 of one."""
    emulated.install(monkeypatch)
    repaired: list[list[int]] = []
    own = portable.forward

    def noted(problem: Any, operands: Any, results: Any, tiles: Any, odd: Any) -> None:
        repaired.append(odd.tolist())
        own(problem, operands, results, tiles, odd)

    monkeypatch.setattr(portable, "forward", noted)
    q, k, v = arrays((1, 70, 4, 64), (1, 130, 1, 64), (1, 130, 1, 64))
    clean = direct.attend("hopper", q, k, v, causal=True)
    k[0, 129] = v[0, 129] = np.nan
    dirty = direct.attend("hopper", q, k, v, causal=True)
    np.testing.assert_array_equal(dirty.out[:, :64], clean.out[:, :64])
    assert close(dirty.out[:, 64:69], clean.out[:, 64:69])
    assert np.isnan(dirty.out[:, 69:]).all()
    assert repaired == [[0, 0] * 4, [1, 0] * 4]


def test_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    emulated.install(monkeypatch)
    q, k, v = arrays((1, 70, 2, 96), (1, 140, 1, 96), (1, 140, 1, 96))
    said = str(af.explain(q, k, v, causal=True, backend="hopper"))
    assert "128 x 128, 2 consumers, 3 stages" in said
    assert "go to the portable kernels" in said and "heads of a group" not in said
    q, k, v = arrays((1, 70, 8, 64), (1, 140, 1, 64), (1, 140, 1, 64))
    assert "8 heads of a group in a tile" in str(af.explain(q, k, v, backend="hopper"))
    assert "of 128 keys by 64 rows" in said
    said = str(af.explain(*arrays(*[(1, 70, 2, 192)] * 3), backend="hopper", deterministic=False))
    assert "of 64 keys by 64 rows" in said
    assert "dq by 64 keys" in said


USUAL = {"dim": 64, "keys": 4, "dtype": np.float16}
DECLINED = (
    ({"dtype": np.float32}, "the arrays are float32"),
    ({"dim": 32}, "head dims are from 33 to 256, here 32 and 32"),
    ({"dim": 264}, "here 264 and 264"),
)


@pytest.mark.parametrize(("call", "why"), DECLINED)
def test_declines(call: dict[str, Any], why: str) -> None:
    keywords = dict(call)
    dim, keys, dtype = (keywords.pop(name, usual) for name, usual in USUAL.items())
    q, k = np.ones((1, 4, 1, dim), dtype), np.ones((1, keys, 1, dim), dtype)
    problem, _ = direct.prepare(q, k, k, **keywords)
    assert any(why in reason for reason in BACKEND.lacks(problem))


@pytest.mark.parametrize(
    ("version", "fits"),
    [("3.5.1", False), ("3.6.0", True), ("3.9.1+git1", True), ("3.10.0", False), ("4.0", False)],
)
def test_versions(version: str, fits: bool) -> None:
    why = unsupported(version)
    assert (why is None) is fits
    if why:
        assert "needs triton 3.6 to 3.9" in why and version in why
