"""8-bit floats by the public calls: what they stand for, what comes out, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import anyflash as af
from anyflash.core.errors import InvalidCall
from anyflash.kernels.llvm.layout import ELEMENT
from anyflash.semantics.problem import Program

Array = np.ndarray[Any, Any]
DTYPES = {"float8_e4m3fn": ml_dtypes.float8_e4m3fn, "float8_e5m2": ml_dtypes.float8_e5m2}
B, T, S, HQ, HK, D = 2, 7, 40, 4, 2, 16
RNG = np.random.default_rng(0)
Q, K, V = (RNG.standard_normal(shape) for shape in ((B, T, HQ, D), (B, S, HK, D), (B, S, HK, D)))
Q8, K8, V8 = (x.astype(ml_dtypes.float8_e4m3fn) for x in (Q, K, V))
FACTORS = np.array([[0.5, 2.0], [1.5, 0.25]], np.float32)


def wide(x: Array, factor: Any, group: int = 1) -> Array:
    """x in float64, times its factor for (batch, key head)."""
    by_head = np.broadcast_to(np.asarray(factor, np.float64), (B, HK)).repeat(group, axis=1)
    return x.astype(np.float64) * by_head[:, None, :, None]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(
    "factors",
    [
        (None, None, None),
        (0.5, np.float32(3.0), 2),
        (FACTORS, FACTORS[:1], FACTORS[:, :1]),
        (FACTORS[0], np.array(0.5, np.float32), FACTORS.astype(np.float64)),
        (2.0, FACTORS.astype(np.float16), None),
    ],
    ids=["none", "numbers", "arrays", "broadcast", "mixed"],
)
def test_stands_for_the_product_with_its_factor(dtype: str, backend: str, factors: tuple[Any, ...]) -> None:
    arrays = [x.astype(DTYPES[dtype]) for x in (Q, K, V)]
    keywords = dict(zip(("descale_q", "descale_k", "descale_v"), factors, strict=True))
    out, lse = af.attention(*arrays, causal=True, softcap=3.0, return_lse=True, backend=backend, **keywords)
    groups = (HQ // HK, 1, 1)
    exact = [wide(x, 1.0 if f is None else f, g) for x, f, g in zip(arrays, factors, groups, strict=True)]
    wanted, wanted_lse = af.attention(*exact, causal=True, softcap=3.0, return_lse=True, backend="reference")
    assert out.dtype == ml_dtypes.bfloat16
    # One rounding of out; the CPU may round probabilities, too, whose errors add up to less than one more.
    eps = float(ml_dtypes.finfo(ml_dtypes.bfloat16).eps)
    assert np.abs(out.astype(np.float64) - wanted).max() <= eps * np.abs(wanted).max()
    assert np.abs(lse - wanted_lse).max() <= 16 * np.finfo(np.float32).eps * np.abs(wanted_lse).max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number(dtype: str) -> None:
    """Of the 256 that there are, each comes out as it went in: one key, whose value it is."""
    every = np.arange(256, dtype=np.uint8).view(DTYPES[dtype])
    v = every.reshape(4, 1, 1, 64)
    q = np.zeros((4, 1, 1, 64), DTYPES[dtype])
    for backend in ("reference", "cpu"):
        out = af.attention(q, q, v, backend=backend).astype(np.float32)
        np.testing.assert_array_equal(out.reshape(-1), every.astype(np.float32), backend)


@pytest.mark.parametrize("layout", ["bshd", "bhsd", "thd"])
def test_layouts(layout: str) -> None:
    wanted = af.attention(Q8, K8, V8, descale_k=FACTORS, descale_v=FACTORS)
    if layout == "thd":
        rows = [x.reshape(-1, *x.shape[2:]) for x in (Q8, K8, V8)]
        starts = {"cu_seqlens_q": np.arange(3) * T, "cu_seqlens_k": np.arange(3) * S}
        out = af.attention_varlen(*rows, **starts, descale_k=FACTORS, descale_v=FACTORS)
        np.testing.assert_array_equal(out.reshape(wanted.shape), wanted)
    else:
        swap: Callable[[Array], Array] = lambda x: x if layout == "bshd" else x.swapaxes(1, 2)
        out = af.attention(*map(swap, (Q8, K8, V8)), layout=layout, descale_k=FACTORS, descale_v=FACTORS)
        np.testing.assert_array_equal(swap(out), wanted)


def test_factors_come_before_all_else() -> None:
    """A score function gets scores that are descaled already."""
    capped = {"score": lambda s, at: af.minimum(s, 1.0), "backend": "reference"}
    found = af.attention(Q8, K8, V8, descale_q=4.0, **capped)
    wanted = af.attention(4.0 * Q8.astype(np.float64), *(x.astype(np.float64) for x in (K8, V8)), **capped)
    np.testing.assert_array_equal(found, wanted.astype(ml_dtypes.bfloat16))


def cached(**keywords: Any) -> Any:
    return af.attention_kvcache(Q8.astype(np.float16), (K8, V8), **keywords)


REFUSED: list[tuple[str, Callable[[], Any]]] = [
    ("k: dtype float16; expected float8_e4m3fn", lambda: af.attention(Q8, K8.astype(np.float16), V8)),
    ("v: dtype float8_e5m2", lambda: af.attention(Q8, K8, V8.astype(ml_dtypes.float8_e5m2))),
    ("k: dtype float8_e4m3fn; expected float16", lambda: af.attention(Q8.astype(np.float16), K8, V8)),
    ("cache.v: dtype float16", lambda: af.attention_kvcache(Q8, (K8, V8.astype(np.float16)))),
    (
        "cache.k: dtype float8_e4m3fn; expected float64",
        lambda: af.attention_kvcache(Q, (K8, V8)),
    ),
    ("k: dtype float16; expected float8_e4m3fn", lambda: af.attention_kvcache(
        Q8.astype(np.float16), af.KVCache(K8.copy(), V8.copy(), np.array([3, 4])),
        np.ones((B, 1, HK, D), np.float16), np.ones((B, 1, HK, D), np.float16),
    )),
    ("descale_q: given for float16", lambda: cached(descale_q=2.0)),
    ("descale_v: given for float64", lambda: af.attention(Q, K, V, descale_v=2.0)),
    ("descale_k: shape (3,)", lambda: af.attention(Q8, K8, V8, descale_k=np.ones(3, np.float32))),
    ("descale_k: shape (2, 4)", lambda: af.attention(Q8, K8, V8, descale_k=np.ones((2, 4), np.float32))),
    ("descale_q: shape (1, 2, 2)", lambda: af.attention(Q8, K8, V8, descale_q=FACTORS[None])),
    ("descale_q: dtype int64", lambda: af.attention(Q8, K8, V8, descale_q=np.ones(2, np.int64))),
    ("descale_q: nan", lambda: af.attention(Q8, K8, V8, descale_q=float("nan"))),
    ("descale_v: 'two'", lambda: af.attention(Q8, K8, V8, descale_v="two")),
    ("array: dtype float8_e4m3fn", lambda: af.table(Q8)),
    ("bias: dtype float8_e4m3fn", lambda: af.attention(Q8, K8, V8, bias=K8[0, 0, 0, :1])),
]  # fmt: skip


@pytest.mark.parametrize(("said", "call"), REFUSED, ids=[said for said, _ in REFUSED])
def test_refused(said: str, call: Callable[[], Any]) -> None:
    with pytest.raises(InvalidCall) as error:
        call()
    assert str(error.value).startswith(said)


def test_program_text() -> None:
    program = Program("(mul score 2.0)", None, 0.5, 0.0, False, "(load 0:f batch (floordiv head 2))")
    assert Program.parse(str(program)) == program


def test_explained() -> None:
    said = str(af.explain(Q8, K8, V8, descale_v=FACTORS))
    assert "8-bit floats" in said
    assert "factor of out" in said
    assert "float8_e4m3fn" in said


def test_elements_are_known() -> None:
    assert set(DTYPES) <= set(ELEMENT)
