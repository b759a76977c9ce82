"""Calls whose lengths lie on a device, where the host does not read them, under Triton's interpreter.

Arrays are on the CPU here, so `addressing.readable` is made to say no. What is asked: the results of lengths
that were read, bit for bit, and no access outside the arrays whatever the lengths say.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

pytest.importorskip("triton", reason="needs triton: nox -s 'systems(triton39)'")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1: nox -s 'systems(triton39)'", allow_module_level=True)

import numpy as np
import torch
import triton

import anyflash as af
from anyflash.contract import direct
from anyflash.contract.poison import Poisoned
from anyflash.contract.run import known
from anyflash.dispatch.plan import run_backward, run_forward
from anyflash.semantics import addressing
from anyflash.semantics.describe import describe
from anyflash.semantics.operands import Gradients, Results, Saved
from anyflash.semantics.problem import Program
from kvcache.cases import CASES
from kvcache.laying import FORMS as LAID
from kvcache.laying import lay_out

# The older Triton gets a few.
EVERY = 1 if triton.__version__ >= "3.9" else 4
HEADS, KV_HEADS, DIM = 2, 1, 16
LENS_Q, LENS_K = (3, 0, 40, 1, 7), (5, 4, 37, 0, 33)
TOTAL_Q, TOTAL_K = sum(LENS_Q) + 6, sum(LENS_K) + 3
USED = (5, 1, 20, 0, 33)


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host reads no lengths."""
    monkeypatch.setattr(addressing, "readable", lambda view: False)


def integers(values: Any, form: str) -> np.ndarray[Any, Any]:
    """As an array of int32 or int64, with gaps or backwards."""
    kind, _, order = form.partition("-")
    made = np.array(values, kind)
    if order == "gaps":
        wide = np.full((*made.shape[:-1], 3 * made.shape[-1]), -99, kind)
        wide[..., ::3] = made
        return wide[..., ::3]
    return made[::-1].copy()[::-1] if order == "backwards" else made


FORMS = ("int32", "int64", "int32-gaps", "int64-backwards")


def packed_call(form: str, dtype: Any = np.float32) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shapes = (TOTAL_Q, HEADS, DIM), (TOTAL_K, KV_HEADS, DIM), (TOTAL_K, KV_HEADS, DIM), (TOTAL_Q, HEADS, DIM)
    q, k, v, dout = (rng.standard_normal(shape).astype(dtype) for shape in shapes)
    starts_q, starts_k = (integers(np.cumsum([0, *lens]), form) for lens in (LENS_Q, LENS_K))
    return {"q": q, "k": k, "v": v, "dout": dout, "cu_seqlens_q": starts_q, "cu_seqlens_k": starts_k}


def table(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


RELATIVE = table(90)
# What a call adds, and whether its tables' gradients are sums whose order follows the bound of the lengths.
PACKED: dict[str, tuple[dict[str, Any], bool]] = {
    "plain": ({}, False),
    "causal": ({"causal": True}, False),
    "window": ({"window": (9, 4), "softcap": 3.0}, False),
    "sinks": ({"causal": True, "sinks": table(HEADS)}, False),
    "dropout": ({"dropout_p": 0.3, "seed": 5}, False),
    "slopes": ({"causal": True, "alibi_slopes": table(HEADS)}, True),
    "bias": ({"bias": table(5, HEADS, 40, 37)}, False),
    "bias of keys": ({"bias": table(5, 1, 1, 37)}, True),
    "relative": (
        {"score": lambda s, at: s + af.table(RELATIVE)[af.minimum(at.q - at.k + 45, 89)]},
        True,
    ),
}


@pytest.mark.parametrize("name", list(PACKED)[::EVERY])
def test_packed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    more, reordered = PACKED[name]
    index = list(PACKED).index(name)
    form = FORMS[index % len(FORMS)]
    call = packed_call(form) | more
    if index % 2:
        call["seqused_k"] = integers(USED, form)
    read = direct.attend("triton", **call)
    monkeypatch.setattr(addressing, "readable", lambda view: False)
    found = direct.attend("triton", **call)
    assert (found.problem.seqlen_q, found.problem.seqlen_k) == (TOTAL_Q, TOTAL_K)
    for part in ("out", "lse", "dq", "dk", "dv", "dsinks"):
        np.testing.assert_array_equal(getattr(found, part), getattr(read, part), err_msg=part)
    for mine, other in zip(found.tables, read.tables, strict=True):
        assert mine is not None and other is not None
        # Each element is a sum of at most all pairs, of terms that partly cancel.
        limit = 16 * np.finfo(np.float32).eps * np.abs(other).max() if reordered else 0
        assert np.abs(mine - other).max() <= limit


WRONG = {
    "descending": ((0, 30, 10, 20, 5, 40), (0, 50, 20, 60, 10, 82), None),
    "beyond": ((0, 3, 3, 43, 10**6, 2**31 - 1), (0, 5, 9, 46, 10**6, 2**31 - 1), (5, 4, 10**6, 9, 2**31 - 1)),
    "negative": ((-7, -3, 3, 43, 44, 51), (-(2**31), 5, 9, 46, 46, 79), (-1, 4, -(2**31), 0, 33)),
    "no rows": ((57, 57, 57, 57, 57, 57), (0, 5, 9, 46, 46, 79), (1, 1, 1, 1, 1)),
}


@pytest.mark.parametrize(
    ("name", "kind"), list(zip(WRONG, ("int32", "int64", "int64", "int32"), strict=True))[::EVERY]
)
def test_wrong_lengths_lead_nowhere(name: str, kind: str, unread: None) -> None:
    """Arrays stand in poisoned memory, and nothing around them is written; what is read from there is NaN,
    and would come out."""
    right = packed_call(kind)
    starts_q, starts_k, used = (None if x is None else np.array(x, kind) for x in WRONG[name])
    if kind == "int64":
        starts_q = np.where(starts_q > 10**5, 2**40, starts_q)
    arrays = {part: Poisoned.of(right[part], "float32") for part in ("q", "k", "v", "dout")}
    lengths = {
        part: Poisoned.of(values, kind)
        for part, values in (("cu_seqlens_q", starts_q), ("cu_seqlens_k", starts_k), ("seqused_k", used))
        if values is not None
    }
    bias = Poisoned.of(table(5, HEADS, 40, 37), "float32")
    problem, operands = describe(
        Program("(add score (load 0:f batch head row k))", "(le k q)"),
        *(arrays[part].view for part in "qkv"),
        layout="thd",
        tables=(bias.view,),
        needs_grad=(True,),
        **{part: made.view for part, made in lengths.items()},
    )
    new = lambda shape: Poisoned(shape, "float32", output=True)
    out, lse, stats = (new(s) for s in (problem.out_shape, problem.lse_shape, (2, *problem.lse_shape)))
    for made in (out, lse, stats):  # Rows of no sequence are not written, and the backward reads them.
        made.array[...] = 0
    run_forward(problem, operands, Results(out.view, lse.view, stats.view), "triton")
    dq, dk, dv, dbias = (
        new(s) for s in (problem.q_shape, problem.k_shape, problem.v_shape, bias.array.shape)
    )
    saved = Saved(out.view, stats.view, arrays["dout"].view)
    run_backward(problem, operands, saved, Gradients(dq.view, dk.view, dv.view, (dbias.view,)), "triton")
    for made in (*arrays.values(), *lengths.values(), bias, out, lse, stats, dq, dk, dv, dbias):
        assert made.damage() is None
    for made in (out, dq, dk, dv, dbias):
        assert np.isfinite(made.array).all()
    if name == "no rows":
        assert not any(made.array.any() for made in (out, dq, dk, dv, dbias))


# Cases of the cache's own tests, the form that the cache has, and whether the last keys come with the call.
CACHED = (
    ("decode", "pages_of_16", True),
    ("decode_alibi", "dense_chosen", True),
    ("speculative_tree", "pages_of_3", True),
    ("chunks_window", "pages_of_256", True),
    ("decode_bias", "pages_of_16", False),
    ("empty_sinks", "dense", False),
)


@pytest.mark.parametrize(("name", "form", "new"), CACHED[::EVERY])
def test_over_a_cache(name: str, form: str, new: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in CASES if case.id == name)
    values, _ = known(case)
    assert case.packed is not None
    lens = tuple(map(min, case.packed.lens_q, case.packed.lens_k)) if new else None
    laid = [lay_out(case, values, next(f for f in LAID if f.id == form), lens) for _ in range(2)]
    wrap = torch.from_numpy if name == "decode" else lambda array: array
    read = laid[0].run("triton", wrap)
    monkeypatch.setattr(addressing, "readable", lambda view: False)
    found = laid[1].run("triton", wrap)
    for mine, other in zip(found, read, strict=True):
        np.testing.assert_array_equal(np.asarray(mine), np.asarray(other))
    for part in ("k", "v"):
        assert laid[1].cache[part].tobytes() == laid[0].cache[part].tobytes()
