"""Many rows over a cache on the backend hopper, under the emulator: cases of the contract in every form of a
cache, whose free slots, pages and entries of the page table hold NaN and nonsense.

Needs TRITON_INTERPRET=1: sequences of few rows, and what a mask hides, are the portable kernel's.
"""

from __future__ import annotations

import os
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("triton", reason="needs triton: nox -s 'systems(triton39)'")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1: nox -s 'systems(triton39)'", allow_module_level=True)

import logging

import numpy as np
import torch
import triton

from anyflash.backends.hopper import BACKEND
from anyflash.contract.cases import Case, Packed
from anyflash.contract.rules import MASKS, Causal, Dense, Window
from anyflash.contract.run import assess, known
from anyflash.contract.terms import SCORES, Alibi, Biases, Softcap
from anyflash.core.errors import BackendBroken
from anyflash.kernels.gluon import pages, schedule
from anyflash.kernels.triton import launch_decode as portable
from gpu import emulated, test_interpreted_decode
from gpu.emulator.errors import EmulationError
from gpu.emulator.mutations import CALLS, mutations, noticed
from gpu.test_emulated_mutations import functions
from gpu.test_interpreted_decode import Cached
from kvcache.laying import Form, lay_out
from kvcache.test_independence import each

EVEN = Packed((140, 140), (300, 150))
SHORT = Packed((130,), (210,))
MIXED = Packed((1, 70, 0, 150, 9), (300, 129, 40, 260, 0))
WIDE, DEEP = (128, 128), (192, 128)
DENSE = Form("dense")
PADDED = Form("dense_padded", leftpad=(3, 17))
PAGES = Form("pages_of_16", page_size=16, index="int64")

# What lies where, and how many keys come with the call.
CASES: tuple[tuple[Case, Form, int], ...] = (
    (Case("plain", packed=EVEN, dims=(64, 64)), DENSE, 0),
    (Case("causal", packed=EVEN, dims=WIDE, rules=(Causal(),)), PAGES, 0),
    (Case("group", packed=EVEN, dims=(64, 64), heads=(4, 2), rules=(Causal(),)), PAGES, 40),
    (Case("padded", packed=EVEN, dims=(64, 64), rules=(Causal(),)), PADDED, 30),
    (Case("chosen", packed=EVEN, dims=(64, 64)), Form("chosen", chosen=True, leftpad=(0, 2)), 0),
    (Case("heads_first", packed=SHORT, dims=WIDE), Form("first", page_size=48, heads_first=True), 0),
    (Case("large_pages", packed=SHORT, dims=(64, 64)), Form("pages_of_256", page_size=256), 0),
    (Case("small_pages", packed=SHORT, dims=(64, 64), rules=(Causal(),)), Form("of_8", page_size=8), 0),
    (Case("two_pieces", packed=SHORT, dims=DEEP, heads=(1, 1), rules=(Causal(),)), PAGES, 0),
    (Case("odd_dims", packed=SHORT, dims=(96, 80), heads=(1, 1)), PAGES, 0),
    (Case("widest", packed=Packed((130,), (140,)), dims=(256, 256), heads=(1, 1)), PAGES, 0),
    (Case("window", packed=SHORT, dims=(64, 64), rules=(Window(40, 9),)), PAGES, 0),
    (Case("softcap", packed=SHORT, dims=(64, 64), terms=(Softcap(2.0),), rules=(Causal(),)), PAGES, 0),
    (Case("alibi", packed=EVEN, dims=(64, 64), terms=(Alibi(),), rules=(Causal(),)), DENSE, 0),
    (Case("bias", packed=SHORT, dims=(64, 64), terms=(Biases(("bk", "h")),)), PAGES, 0),
    (Case("dense_mask", packed=SHORT, dims=(64, 64), rules=(Dense("bk", 0.6),)), PAGES, 0),
    (Case("sinks", packed=SHORT, dims=(64, 64), sinks="randn", rules=(Causal(),)), PAGES, 0),
    (Case("members", packed=SHORT, dims=(64, 64), heads=(8, 1), rules=(Causal(),)), PAGES, 0),
    (Case("packed", packed=MIXED, dims=(64, 64), heads=(4, 2)), PAGES, 0),
    (Case("packed_causal", packed=MIXED, dims=(64, 64), heads=(4, 2), rules=(Causal(),)), DENSE, 0),
    (Case("packed_score", packed=MIXED, dims=WIDE, terms=(SCORES["relative"],)), PAGES, 0),
    (Case("packed_documents", packed=MIXED, dims=(64, 64), rules=(MASKS["documents_by_batch"],)), PAGES, 0),
)  # fmt: skip
EVERY = 1 if triton.__version__ >= "3.9" else 5


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device a dense cache comes without a page table; in host memory everybody has one."""
    own = BACKEND.forward

    def forward(problem: Any, config: str, operands: Any, results: Any) -> None:
        if problem.num_pages == problem.batch:
            operands = replace(operands, block_table=None)
        own(problem, config, operands, results)

    monkeypatch.setattr(BACKEND, "forward", forward)


@pytest.mark.parametrize(
    ("case", "form", "new"),
    [
        pytest.param(replace(case, dtype=("bfloat16", "float16")[i % 2], data_seed=i), form, new, id=case.id)
        for i, (case, form, new) in enumerate(CASES)
    ][::EVERY],
)
def test_contract(
    case: Case, form: Form, new: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    launched = emulated.install(monkeypatch, seed=case.data_seed)
    if form in (DENSE, PADDED):
        as_on_a_device(monkeypatch)
    values, truth = known(case)
    assert case.packed is not None
    lens = tuple(min(new, n) for n in case.packed.lens_k) if new else None
    laid = lay_out(case, values, form, lens)
    with caplog.at_level(logging.INFO, "anyflash"):
        found = laid.canonical(*laid.run("hopper"))
    assert "forward" in launched, caplog.text
    verdicts = assess(case, found, truth, ("forward",))
    assert not [v.complaint for v in verdicts if v.complaint]


@pytest.mark.parametrize(
    ("form", "why"),
    [
        (Form("of_12", page_size=12), "pages of 12 slots are no multiple of 8"),
        (Form("padded", page_size=64, leftpad=(3,)), "left padding moves keys"),
    ],
    ids=lambda x: x.id if isinstance(x, Form) else "",
)
def test_what_boxes_cannot_reach(
    form: Form, why: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    launched = emulated.install(monkeypatch)
    one = Case("one", packed=SHORT, heads=(1, 1), dims=(64, 64), dtype="float16")
    values, truth = known(one)
    laid = lay_out(one, values, form)
    with caplog.at_level(logging.INFO, "anyflash"):
        found = laid.canonical(*laid.run("hopper"))
    assert not launched and why in caplog.text
    assert not [v.complaint for v in assess(one, found, truth, ("forward",)) if v.complaint]


def test_batch_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many rows beside few, alone, in another order, and through other pages: the same bits."""
    emulated.install(monkeypatch)
    lens = Packed((150, 1, 70), (260, 129, 200))
    mixed = Case("mixed", packed=lens, heads=(2, 1), dims=(64, 64), rules=(Causal(),), dtype="bfloat16")
    values, _ = known(mixed)
    whole = each(mixed, values, "hopper", PAGES, (0, 1, 2), seed=0)
    tried = ((Form("of_48", page_size=48), (2, 0)), (DENSE, (0,)), (PAGES, (1,)))
    for seed, (form, pick) in enumerate(tried, 1):
        for sequence, bits in each(mixed, values, "hopper", form, pick, seed).items():
            assert bits == whole[sequence], (form.id, pick, sequence)


def test_pages_that_lie_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of k in one step, those of v in another, as where other arrays lie between them."""
    launched = emulated.install(monkeypatch)
    one = Case("apart", packed=SHORT, heads=(1, 1), dims=(64, 64), dtype="bfloat16")
    values, truth = known(one)
    laid = lay_out(one, values, PAGES)
    for name, times in (("k", 2), ("v", 3)):
        own = laid.cache[name]
        assert own is not None
        roomy = np.full((len(own), times * own.shape[1], *own.shape[2:]), np.nan, own.dtype)
        roomy[:, : own.shape[1]] = own
        laid.cache[name] = roomy[:, : own.shape[1]]
    found = laid.canonical(*laid.run("hopper"))
    assert launched == ["forward"]
    assert not [v.complaint for v in assess(one, found, truth, ("forward",)) if v.complaint]


def test_nan_in_what_a_row_does_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only blocks of 64 rows that a NaN reached are computed again, by the portable kernel."""
    emulated.install(monkeypatch)
    repaired: list[list[int]] = []
    own = portable.launch

    def noted(call: Any, rows: str, results: Any, odd: Any = None) -> None:
        repaired.append([int(n != 0) for n in odd[0]])
        own(call, rows, results, odd)

    monkeypatch.setattr(portable, "launch", noted)
    lens = Packed((140,), (140,))
    one = Case("nan", packed=lens, heads=(1, 1), dims=(64, 64), rules=(Causal(),), dtype="float16")
    values, _ = known(one)
    clean = lay_out(one, values, PAGES).run("hopper")[0]
    values.k[133] = values.v[133] = np.nan
    dirty = lay_out(one, values, PAGES).run("hopper")[0]
    np.testing.assert_array_equal(dirty[:, :128], clean[:, :128])
    eps = float(np.finfo(np.float16).eps)
    assert np.abs(dirty[:, 128:133] - clean[:, 128:133]).max() <= 4 * eps * np.abs(clean).max()
    assert np.isnan(dirty[:, 133:]).all()
    # The last rows first: from row 128 on blocks read key 133.
    assert repaired == [[0, 0, 0], [1, 0, 0]]


UNREAD = {
    "pages": Cached(page_size=64, lens=(200, 0, 177), q_lens=(140,) * 3, heads_kv=1, dim=64, dtype="float16"),
    "packed": Cached(
        lens=(200, 90, 40),
        q_lens=(140, 3, 70),
        packed=True,
        heads_kv=1,
        dim=64,
        dtype="float16",
        mask="(le k q)",
    ),
}


UNREAD["padded"] = Cached(
    page_size=512, lens=(200, 77), leftpad=(9, 3), q_lens=(140,) * 2, heads_kv=1, dim=64, dtype="float16"
)
# All of a sequence in one page.
UNREAD["padded"].table = UNREAD["padded"].table[:, :1]


def on_hopper(call: Cached, monkeypatch: pytest.MonkeyPatch) -> tuple[np.ndarray, np.ndarray]:
    launched = emulated.install(monkeypatch)
    monkeypatch.setattr(test_interpreted_decode, "BACKEND", BACKEND)
    found = call.run()
    assert "forward" in launched
    return found


@pytest.mark.parametrize("name", UNREAD)
def test_integers_that_nobody_has_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call = UNREAD[name]
    (out, lse), (want_out, want_lse) = on_hopper(call, monkeypatch), call.truth(call.mask is not None)
    eps = float(np.finfo(np.float16).eps)
    assert np.abs(out - want_out).max() <= 4 * eps * np.abs(want_out).max()
    np.testing.assert_allclose(lse, want_lse, rtol=4 * eps, atol=4 * eps)


@pytest.mark.parametrize("wrong", ["page", "length", "padding"])
def test_wrong_integers_lead_nowhere(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory around every array is poisoned, and the emulator knows where arrays end."""
    call = deepcopy(UNREAD["padded" if wrong == "padding" else "pages"])
    if wrong == "page":
        call.table[:, 0] = (-5, 10**6, 2**31 - 1)
    else:
        call.used[:] = (10**9, -3, 2**31 - 1)[: len(call.used)]
    if wrong == "padding":
        call.pad[:], call.table[:] = (400, 2**31 - 1), call.problem.num_pages - 1
    on_hopper(call, monkeypatch)


# Few keys in few stages, so that each stage is used several times; a head of two pieces, one of two panels.
MUTATED = Case("mutated", packed=Packed((129,), (130,)), heads=(1, 1), dims=(192, 64), dtype="float16")


def unharmed(seed: int, replaced: Any) -> bool:
    laid = lay_out(MUTATED, known(MUTATED)[0], PAGES)
    with pytest.MonkeyPatch.context() as patch:
        emulated.install(patch, seed, replaced)
        patch.setattr(schedule, "forward_tiles", lambda *_: schedule.Tiles(32, 2, 2, 240, 32, 1, True))
        try:
            found = laid.canonical(*laid.run("hopper"))
        except BackendBroken as broken:
            if isinstance(broken.__cause__, EmulationError):
                raise broken.__cause__ from None
            raise
    return not [v.complaint for v in assess(MUTATED, found, known(MUTATED)[1], ("forward",)) if v.complaint]


@pytest.mark.skipif(triton.__version__ < "3.9", reason="what is emulated is the same with the newer Triton")
def test_every_mutation_is_noticed() -> None:
    assert unharmed(0, None)
    helpers = dict.fromkeys(("await_empty", "_load_panels", "fill_pieces_from_pages"))
    # What decoding alone calls is mutated there.
    ours = [one for one in functions(pages) if one.fn.__name__ != "fill_from_pages"]
    tried = list(mutations(ours, CALLS | helpers))
    assert len(tried) > 5
    assert not [one.name for one in tried if noticed(unharmed, one, range(3)) is None]
