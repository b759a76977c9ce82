"""8-bit floats under Triton's interpreter: as tensor cores take them, widened, over a cache; how far off.

In a process of its own, as test_interpreted.py.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

pytest.importorskip("triton", reason="needs triton: nox -s 'systems(triton39)'")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1: nox -s 'systems(triton39)'", allow_module_level=True)

import ml_dtypes
import numpy as np
import torch
import triton
import triton.language as tl

import anyflash as af
from anyflash.contract.cases import Case
from anyflash.contract.run import assess, known, run
from anyflash.contract.table import table
from anyflash.core.errors import Unsupported
from anyflash.kernels.triton import narrow
from anyflash.kernels.triton.interpreter import mend
from kvcache.cases import EIGHT_BITS
from kvcache.laying import FORMS, Form, lay_out

NEW = triton.__version__ >= "3.9"
NARROW = [case for case in table() if not case.differentiable]
KINDS = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}


def sample(cases: list[Any], every: int, older: int) -> list[Any]:
    return cases[:: every if NEW else older]


@pytest.mark.parametrize("case", sample(NARROW, 4, 13), ids=lambda case: case.id)
def test_multiplied_as_they_are(case: Case) -> None:
    report = run(case, "triton")
    assert not report.failures, "\n".join(report.failures)


@pytest.mark.parametrize("case", sample(NARROW[1:], 7, 20), ids=lambda case: case.id)
def test_widened(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where tensor cores do not take them. p is then in float16, and the bounds are the CPU's."""
    monkeypatch.setattr(narrow, "multiplies", lambda arch: False)
    monkeypatch.setattr("anyflash.contract.run.WEIGHTS", {})
    report = run(case, "triton")
    assert not report.failures, "\n".join(report.failures)


PAIRS = [
    pytest.param(case, FORMS[(2 * i) % len(FORMS)], i % 2, id=f"{case.id}-{FORMS[(2 * i) % len(FORMS)].id}")
    for i, case in enumerate(EIGHT_BITS)
]


@pytest.mark.parametrize(("case", "form", "new"), sample(PAIRS, 3, 10))
def test_over_a_cache(case: Case, form: Form, new: int) -> None:
    values, truth = known(case)
    lens = tuple(map(min, case.packed.lens_q, case.packed.lens_k)) if new else None
    laid = lay_out(case, values, form, lens)
    verdicts = assess(case, laid.canonical(*laid.run("triton")), truth, ("forward",))
    assert not [v.complaint for v in verdicts if v.complaint]
    for found, expected in ((laid.cache["k"], laid.after_k), (laid.cache["v"], laid.after_v)):
        assert found.tobytes() == expected.tobytes()


def test_few_queries_over_many_keys() -> None:
    """A dense call that the cache's kernel serves."""
    rng = np.random.default_rng(0)
    q, k, v = (
        rng.standard_normal((2, n, h, 32)).astype(KINDS["e4m3"]) for n, h in ((1, 4), (1100, 2), (1100, 2))
    )
    factors = {"descale_k": np.array([[0.5, 2.0], [1.0, 0.25]], np.float32), "descale_v": 3.0}
    wanted, wanted_lse = af.attention(q, k, v, return_lse=True, backend="cpu", **factors)
    out, lse = af.attention(q, k, v, return_lse=True, backend="triton", **factors)
    eps = float(ml_dtypes.finfo(ml_dtypes.bfloat16).eps)
    wide, top = wanted.astype(np.float32), np.abs(wanted.astype(np.float32)).max()
    assert np.abs(out.astype(np.float32) - wide).max() <= 2 * eps * top
    assert np.abs(lse - wanted_lse).max() <= 16 * np.finfo(np.float32).eps * np.abs(wanted_lse).max()


@pytest.mark.parametrize(("cached", "rows"), [(False, 40), (True, 40), (True, 140)])
def test_nan_in_what_is_masked(cached: bool, rows: int) -> None:
    """Blocks that it spoils are computed again, in float16, and give the bits that they gave without it."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, n, 2, 16)).astype(KINDS["e4m3"]) for n in (rows, 150, 150))
    call = {"mask": lambda at: at.k != 5, "descale_v": 0.5, "return_lse": True, "backend": "triton"}
    attend = (
        (lambda: af.attention_kvcache(q, (k, v), **call))
        if cached
        else (lambda: af.attention(q, k, v, **call))
    )
    clean = [x.tobytes() for x in attend()]
    v[0, 5] = np.nan
    assert [x.tobytes() for x in attend()] == clean


def quantised(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(B, T, H, D) as e4m3 with a factor for each (batch, head), as large as leaves nothing outside."""
    factor = (np.abs(x).max(axis=(1, 3)) / 448).astype(np.float32)
    return (x / factor[:, None, :, None]).astype(KINDS["e4m3"]), factor


def test_outliers() -> None:
    """Data of N(0, 1) + N(0, 100) with a chance of 1 in 1000, as the field measures.

    The error of 8-bit attention against float64 on the same data comes from rounding q, k and v, which no
    kernel can help, and from p. The second is bounded by that of plain attention with p in e4m3.
    """
    rng = np.random.default_rng(0)
    draw = lambda: (
        rng.standard_normal((1, 256, 2, 64))
        + 10 * rng.standard_normal((1, 256, 2, 64)) * (rng.random((1, 256, 2, 64)) < 0.001)
    )
    exact = [draw() for _ in range(3)]
    (q, fq), (k, fk), (v, fv) = map(quantised, exact)
    factors = {"descale_q": fq, "descale_k": fk, "descale_v": fv}
    rms = lambda x, y: float(np.sqrt(np.mean((x.astype(np.float64) - y.astype(np.float64)) ** 2)))
    truth = af.attention(*exact, backend="reference")
    rounded = af.attention(
        *(x.astype(np.float64) * f[:, None, :, None] for x, f in ((q, fq), (k, fk), (v, fv))),
        backend="reference",
    )
    found = af.attention(q, k, v, backend="triton", **factors)
    s = np.einsum(
        "bihd,bjhd->bhij", *(x.astype(np.float64) * f[:, None, :, None] for x, f in ((q, fq), (k, fk)))
    )
    e = np.exp(s / 8 - (s / 8).max(-1, keepdims=True))
    p = (256 * e).astype(np.float32).astype(KINDS["e4m3"]).astype(np.float64) / 256 / e.sum(-1, keepdims=True)
    plain = np.einsum("bhij,bjhd->bihd", p, v.astype(np.float64) * fv[:, None, :, None])
    own, bound = rms(found, rounded), rms(plain.astype(ml_dtypes.bfloat16), rounded)
    assert own <= 2 * bound
    # What the kernel adds to the rounding of its arrays is less than that rounding.
    assert own < rms(rounded, truth)
    half = af.attention(*(x.astype(np.float16) for x in exact), backend="triton")
    assert rms(half, truth) < rms(found, truth) <= rms(rounded, truth) + 2 * bound


@triton.jit
def widen_all(bits, out, FORMAT: tl.constexpr):
    at = tl.arange(0, 256)
    tl.store(out + at, narrow.widened(tl.load(bits + at), FORMAT).to(tl.float32))


@triton.jit
def round_all(values, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, tl.load(values + at).to(tl.float8e4nv).to(tl.float32))


@pytest.mark.parametrize("name", KINDS)
def test_every_number(name: str) -> None:
    every = np.arange(256, dtype=np.uint8)
    out = torch.empty(256)
    widen_all[(1,)](torch.from_numpy(every), out, name)
    np.testing.assert_array_equal(out.numpy(), every.view(KINDS[name]).astype(np.float32))


def test_interpreter_rounds() -> None:
    """To nearest even, beyond the range to its end."""
    mend()
    every = np.arange(0x7F, dtype=np.uint8).view(KINDS["e4m3"]).astype(np.float32)
    between = (every[1:] + every[:-1]) / 2
    values = np.concatenate([every, between, -between, [500.0, 1e9, 0.0]]).astype(np.float32)
    values = np.concatenate([values, np.zeros(512 - len(values), np.float32)])
    out = torch.empty(512)
    round_all[(1,)](torch.from_numpy(values), out, 512)
    with np.errstate(all="ignore"):
        wanted = np.minimum(values, 448).astype(KINDS["e4m3"]).astype(np.float32)
    np.testing.assert_array_equal(out.numpy(), wanted)


def test_keys_of_8_bits_are_not_turned() -> None:
    x = np.ones((1, 1, 1, 16), KINDS["e4m3"])
    cache = af.KVCache(*np.zeros((2, 1, 8, 1, 16), KINDS["e4m3"]), seqlens=np.array([3]))
    before, angle = cache.k.tobytes(), np.zeros((16, 4), np.float32)
    with pytest.raises(Unsupported, match="before they are rounded"):
        af.attention_kvcache(x, cache, x, x, rotary=(angle, angle), backend="triton")
    assert cache.k.tobytes() == before


def test_explained() -> None:
    x = np.ones((1, 40, 2, 64), KINDS["e4m3"])
    assert "multiplied as they are" in str(af.explain(x, x, x, backend="triton"))
