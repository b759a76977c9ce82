"""The Hopper backend's calls over a cache under the emulator, and its dense calls of few rows over many keys.

Whatever of a cache holds no key is NaN, and page tables hold nonsense where nobody has a page.
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
from anyflash.contract.rules import MASKS, Causal, Dense, Window
from anyflash.contract.run import assess, known
from anyflash.contract.terms import SCORES, Alibi, Biases, Softcap
from anyflash.kernels.gluon import launch_decode, schedule_decode
from anyflash.kernels.triton import launch_decode as portable
from anyflash.kernels.triton.schedule import DECODE_KEYS
from gpu import emulated
from kvcache.cases import Tree
from kvcache.laying import Form, lay_out
from kvcache.test_independence import each

# The same kernel: the older Triton is asked for fewer.
NEW = triton.__version__ >= "3.9"
DIM = (64, 64)
DECODE = Packed((1,) * 5, (1, 63, 64, 65, 700))
SPECULATIVE = Packed((4,) * 3, (33, 4, 600))
CHUNKS = Packed((16, 5, 1, 30), (16, 70, 0, 600))
FORMS = {form.id: form for form in (
    Form("dense"),
    Form("dense_heads_first", heads_first=True, index="int64"),
    Form("dense_padded", leftpad=(3, 0, 17)),
    Form("pages_of_16", page_size=16),
    Form("pages_of_8", page_size=8, index="int64"),
    Form("pages_of_64", page_size=64),
    Form("pages_heads_first", page_size=64, heads_first=True),
    Form("pages_of_256", page_size=256, index="int64"),
)}  # fmt: skip


def case(name: str, packed: Packed, group: int, heads_kv: int = 2, **more: Any) -> Case:
    return Case(name, packed=packed, heads=(group * heads_kv, heads_kv), **{"dims": DIM} | more)


CASES = (
    (case("group_1", DECODE, 1, rules=(Causal(),)), "dense"),
    (case("group_3", DECODE, 3), "pages_of_64"),
    (case("group_4", DECODE, 4, dims=(128, 128)), "dense_heads_first"),
    (case("group_8", DECODE, 8), "pages_of_256"),
    (case("group_100", replace(DECODE, lens_k=(700, 5, 64, 0, 200)), 100, 1), "pages_of_64"),
    (case("dims_96_80", DECODE, 2, dims=(96, 80), sinks="randn"), "dense"),
    (case("dims_256", DECODE, 4, 1, dims=(256, 256)), "pages_heads_first"),
    (case("dims_192_128", DECODE, 16, 1, dims=(192, 128)), "pages_of_64"),
    (case("window", DECODE, 2, rules=(Window(90, 0),)), "pages_of_64"),
    (case("softcap", DECODE, 2, terms=(Softcap(2.0),)), "dense"),
    (case("alibi", DECODE, 2, terms=(Alibi(per_batch=True),)), "pages_of_256"),
    (case("bias", DECODE, 2, terms=(Biases(("bk", "h")),)), "pages_of_8"),
    (case("mask", DECODE, 2, rules=(Dense("bk", 0.6),)), "pages_of_64"),
    (case("sinks", DECODE, 2, sinks="randn"), "pages_of_16"),
    (case("sinks_no_key", Packed((1, 1), (0, 3)), 2, sinks="randn"), "dense"),
    (case("scale", DECODE, 2, scale=-0.5), "dense_padded"),
    (case("speculative", SPECULATIVE, 2, rules=(Causal(),)), "pages_of_64"),
    (case("speculative_window", SPECULATIVE, 4, rules=(Causal(), Window(40, None)), sinks="randn"), "dense"),
    (case("speculative_tree", SPECULATIVE, 4, rules=(Tree(),)), "pages_of_64"),  # type: ignore[arg-type]
    (case("two_consumers", Packed((11, 11), (11, 600)), 8, rules=(Causal(),)), "dense"),
    (case("packed", CHUNKS, 4, rules=(Causal(),)), "pages_of_16"),
    (case("packed_by_head", CHUNKS, 2, rules=(MASKS["by_head"],)), "dense"),
    (case("packed_documents", CHUNKS, 2, rules=(MASKS["documents_by_batch"],)), "pages_of_256"),
    (case("packed_score", CHUNKS, 2, terms=(SCORES["relative"], Softcap(3.0)), rules=(Causal(),)), "dense"),
    (case("packed_and_many", Packed((70, 1, 9), (300, 129, 600)), 2, rules=(Causal(),)), "pages_of_64"),
    (case("more_queries", Packed((7, 7), (3, 12)), 1, rules=(Causal(),)), "dense"),
)  # fmt: skip
DTYPES = ("bfloat16", "float16")


def pairs() -> list[Any]:
    return [
        pytest.param(replace(one, dtype=DTYPES[i % 2], data_seed=i), FORMS[form], id=f"{one.id}-{form}")
        for i, (one, form) in enumerate(CASES)
    ][:: 1 if NEW else 6]


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def as_on_a_device(monkeypatch: pytest.MonkeyPatch, form: Form) -> None:
    """On a device a dense cache comes without a page table; here everybody has one."""
    own = BACKEND.forward

    def forward(problem: Any, config: str, operands: Any, results: Any) -> None:
        if form.page_size is None and not form.chosen:
            operands = replace(operands, block_table=None)
        own(problem, config, operands, results)

    monkeypatch.setattr(BACKEND, "forward", forward)


@pytest.mark.parametrize(("case", "form"), pairs())
def test_over_a_cache(case: Case, form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = emulated.install(monkeypatch, seed=case.data_seed, resident=3)
    as_on_a_device(monkeypatch, form)
    values, truth = known(case)
    laid = lay_out(case, values, form)
    verdicts = assess(case, laid.canonical(*laid.run("hopper")), truth, ("forward",))
    assert not [v.complaint for v in verdicts if v.complaint]
    # Sequences of many rows have the forward.
    assert set(launched) - {"forward"} == {"decode"}


@pytest.mark.parametrize("dtype", DTYPES[: 1 + NEW])
def test_batch_does_not_matter(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One, few and some rows beside each other, alone, and in another order, through other pages."""
    emulated.install(monkeypatch, resident=2)
    lens = Packed((1, 9, 20, 1, 0), (700, 129, 600, 0, 40))
    mixed = case("mixed", lens, 4, 1, rules=(Causal(), Window(500, None)), sinks="randn", dtype=dtype)
    values, _ = known(mixed)
    whole = each(mixed, values, "hopper", FORMS["pages_of_16"], (0, 1, 2, 3, 4), seed=0)
    tried = (("pages_of_8", (4, 2, 1, 0)), ("pages_of_256", (0,)), ("pages_of_64", (1, 3)))
    for seed, (form, pick) in enumerate(tried, 1):
        for sequence, bits in each(mixed, values, "hopper", FORMS[form], pick, seed).items():
            assert bits == whole[sequence], (form, pick, sequence)


@pytest.mark.parametrize("seed", range(5 if NEW else 1))
def test_every_schedule(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever segment comes last adds the others up, to the same bits, and leaves the counters at zero."""
    kept = torch.zeros(64, dtype=torch.int32)
    monkeypatch.setattr(launch_decode, "counters", lambda count, device: kept)
    one = case("schedule", Packed((2, 2), (1500, 700)), 3, 1, rules=(Causal(),), dtype="float16")
    values, _ = known(one)
    found = []
    for this, resident in ((0, 1), (seed, 6)):
        emulated.install(monkeypatch, seed=this, resident=resident)
        as_on_a_device(monkeypatch, FORMS["dense"])
        out, lse = lay_out(one, values, FORMS["dense"]).run("hopper")
        found.append(out.tobytes() + lse.tobytes())
        assert not kept.any()
    assert found[0] == found[1]


DENSE = (
    Case("one_query", lens=(1, DECODE_KEYS + 10), heads=(4, 2), dims=DIM),
    Case(
        "few",
        lens=(3, DECODE_KEYS),
        heads=(6, 2),
        dims=DIM,
        batch=1,
        rules=(Window(300, 0),),
        terms=(Softcap(5.0),),
    ),
    Case(
        "some", lens=(20, DECODE_KEYS + 63), heads=(6, 1), dims=DIM, batch=1, rules=(Causal(),), sinks="randn"
    ),
)


@pytest.mark.parametrize("one", DENSE[:: 1 if NEW else 2], ids=lambda one: one.id)
def test_dense_calls_of_few_rows(one: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = emulated.install(monkeypatch, resident=2)
    report = run.run(replace(one, dtype="bfloat16"), "hopper", directions=("forward",))
    assert not report.failures, "\n".join(report.failures)
    assert set(launched) == {"decode"}


@pytest.mark.parametrize("rows", ["few", "some"])
def test_nan_in_what_a_row_does_not_see(rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the key heads and the 64 rows that a NaN reached are computed again, by the portable kernel."""
    emulated.install(monkeypatch, resident=2)
    repaired: list[list[int]] = []
    own = portable.launch

    def noted(call: Any, kind: str, results: Any, odd: Any = None) -> None:
        # One consumer has one number for each key head.
        repaired.append([int(n != 0) for n in odd[:: 1 if rows == "some" else 2]])
        own(call, kind, results, odd)

    monkeypatch.setattr(portable, "launch", noted)
    q_len, length = (3, 300) if rows == "few" else (20, 300)
    one = case("nan", Packed((q_len,), (length,)), 4, 2, rules=(Causal(),), dtype="float16")
    values, _ = known(one)
    as_on_a_device(monkeypatch, FORMS["dense"])
    laid = lay_out(one, values, FORMS["dense"])
    clean, clean_lse = laid.run("hopper")
    # Seen by the last two rows of the first key head alone.
    laid.cache["v"][0, length - 2, 0] = np.nan
    out, lse = laid.run("hopper")
    mine = slice(0, 4)
    np.testing.assert_array_equal(out[0, :, 4:], clean[0, :, 4:])
    assert np.isnan(out[0, -2:, mine]).all()
    error = np.abs(out[0, :-2, mine].astype(np.float64) - clean[0, :-2, mine])
    assert error.max() <= 4 * np.finfo(np.float16).eps * np.abs(clean).max()
    np.testing.assert_allclose(lse, clean_lse, rtol=1e-6)
    assert repaired == ([[0, 0], [1, 0]] if rows == "few" else [[0, 0, 0, 0], [1, 1, 0, 0]])


@pytest.mark.parametrize("wrong", [10**8, -5])
def test_integers_that_are_wrong(wrong: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A length and pages outside the cache, which nobody has looked at: nothing outside it is read, and other
    sequences are right."""
    emulated.install(monkeypatch, resident=2)
    one = case("wrong", Packed((1, 1, 1), (150, 70, 33)), 2, dtype="float16")
    values, _ = known(one)
    right, _ = lay_out(one, values, FORMS["pages_of_16"]).run("hopper")
    own = BACKEND.forward

    def forward(problem: Any, config: str, operands: Any, results: Any) -> None:
        used, table = (emulated.memory(view) for view in (operands.seqused_k, operands.block_table))
        used[1] = wrong
        table.view(3, -1)[1, ::2] = 10**9
        table.view(3, -1)[1, 1::2] = -(10**9)
        own(problem, config, operands, results)

    monkeypatch.setattr(BACKEND, "forward", forward)
    found, _ = lay_out(one, values, FORMS["pages_of_16"]).run("hopper")
    for sequence in (0, 2):
        np.testing.assert_array_equal(found[sequence], right[sequence])
    assert (found[1] == 0).all() == (wrong < 0)


def test_what_tma_cannot_move(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    launched = emulated.install(monkeypatch)
    one = case("unfit", Packed((1,), (40,)), 2, 1, dims=(65, 65), dtype="float16")
    values, truth = known(one)
    laid = lay_out(one, values, FORMS["dense"])
    with caplog.at_level(logging.INFO, "anyflash"):
        found = laid.canonical(*laid.run("hopper"))
    assert not launched
    assert "portable kernels, as k has rows 130 bytes apart" in caplog.text
    assert not [v.complaint for v in assess(one, found, truth, ("forward",)) if v.complaint]


def test_shared_memory() -> None:
    """Every configuration fits, with what Triton keeps for itself; two blocks of a processor together."""
    for dims in [(a, b) for a in (64, 128, 256) for b in (64, 128, 256)]:
        of_one, of_two = (schedule_decode.tiles(*dims, rows) for rows in (64, 128))
        assert of_one.block_n == of_two.block_n
        for tiles in (of_one, of_two):
            room = schedule_decode.SHARED_BYTES[tiles.blocks]
            assert schedule_decode.shared_bytes(tiles, *dims) + 512 <= room, (dims, tiles)


def test_stats_serve_the_portable_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    emulated.install(monkeypatch)
    rng = np.random.default_rng(0)
    shapes = (1, 2, 4, 64), (1, DECODE_KEYS, 2, 64), (1, DECODE_KEYS, 2, 64), (1, 2, 4, 64)
    q, k, v, dout = (rng.standard_normal(shape).astype(np.float16) for shape in shapes)
    found, wanted = (direct.attend(name, q, k, v, dout=dout, causal=True) for name in ("hopper", "reference"))
    for name in ("dq", "dk", "dv"):
        mine, other = (getattr(x, name).astype(np.float64) for x in (found, wanted))
        assert np.abs(mine - other).max() <= 4 * np.finfo(np.float16).eps * np.abs(other).max()


def test_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    emulated.install(monkeypatch)
    q, k = np.ones((1, 1, 4, 128), np.float16), np.ones((1, DECODE_KEYS, 2, 128), np.float16)
    said = str(af.explain(q, k, k, backend="hopper"))
    assert "64 rows x 64, 1 consumer, 3 stages" in said
    assert "at most 32 segments" in said
