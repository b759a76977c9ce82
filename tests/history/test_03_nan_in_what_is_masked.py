"""NaN or infinity in keys and values that a mask hides reached results as 0 * NaN (pytorch #101967;
flash-attention #1745, #2374; vllm PR 936, #47305).
"""

from __future__ import annotations

import numpy as np
import pytest

from anyflash.contract.direct import attend
from contract.calls import BITWISE, assert_same_bits, operands, results, run

BAD = (np.nan, np.inf, -np.inf)
each_backend = pytest.mark.parametrize("backend", BITWISE)
each_value = pytest.mark.parametrize("value", BAD, ids=["nan", "inf", "minus_inf"])


def spoiled(arrays, value, **parts):
    """Copies of the arrays with `value` in the given parts."""
    made = dict(arrays)
    for name, part in parts.items():
        made[name] = arrays[name].copy()
        made[name][part] = value
    return made


def finite(found):
    return all(np.isfinite(a[a != -np.inf].astype(np.float64)).all() for a in found.values())


@each_backend
@each_value
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_keys_that_nobody_sees(backend, value, dtype):
    arrays = operands(dtype, (2, 70), (2, 150))
    hidden = np.s_[:, 37:111]
    mask = lambda at: (at.k < 37) | (at.k >= 111)
    clean = run(backend, arrays, mask=mask)
    assert_same_bits(clean, run(backend, spoiled(arrays, value, k=hidden, v=hidden), mask=mask))


@each_backend
@each_value
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "window"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_later_keys_do_not_reach_earlier_queries(backend, value, causal, dtype):
    """A spoiled value that some queries of a tile see and others do not."""
    n, at = 130, 70
    keywords = {"causal": True} if causal else {"window": (200, 0)}
    arrays = operands(dtype, (1, n), (1, n))
    clean = attend(backend, **arrays, **keywords)
    for name in "kv":
        dirty = attend(backend, **spoiled(arrays, value, **{name: np.s_[:, at]}), **keywords)
        assert dirty.out[:, :at].tobytes() == clean.out[:, :at].tobytes(), name
        assert np.array_equal(dirty.lse[..., :at], clean.lse[..., :at]), name
        assert dirty.dq[:, :at].tobytes() == clean.dq[:, :at].tobytes(), name
        assert not np.isfinite(dirty.out[:, at:].astype(np.float64)).all(axis=-1).any(), name


@each_backend
@each_value
def test_queries_that_see_nothing(backend, value):
    """Padding rows of q and of the incoming gradients."""
    arrays = operands("float32", (2, 70), (2, 90))
    rows = np.s_[:, 20:45]
    mask = lambda at: (at.row < 20) | (at.row >= 45)
    clean = run(backend, arrays, mask=mask)
    dirty = spoiled(arrays, value, q=rows, dout=rows, dlse=np.s_[..., 20:45])
    assert_same_bits(clean, run(backend, dirty, mask=mask))


@each_backend
@each_value
def test_values_under_a_bias_of_minus_infinity(backend, value):
    arrays = operands("float32", (2, 70), (2, 90))
    bias = np.zeros((1, 1, 1, 90), np.float32)
    bias[..., 30:50] = -np.inf
    clean = run(backend, arrays, bias=bias)
    assert finite(clean)
    assert_same_bits(clean, run(backend, spoiled(arrays, value, v=np.s_[:, 30:50]), bias=bias))


@each_backend
@each_value
def test_bias_under_a_mask(backend, value):
    arrays = operands("float32", (1, 70), (1, 70))
    bias = np.random.default_rng(0).standard_normal((1, 4, 70, 70)).astype(np.float32)
    clean = run(backend, arrays, bias=bias, causal=True)
    above = np.triu(np.ones((70, 70), bool), 1)
    dirty = np.where(above, np.float32(value), bias)
    again = run(backend, arrays, bias=dirty, causal=True)
    assert_same_bits(clean, again)


@each_backend
@each_value
def test_keys_past_their_number(backend, value):
    """seqused_k, and rows behind the last sequence."""
    arrays = operands("float32", (75,), (150,))
    lengths = {
        "cu_seqlens_q": np.array([0, 30, 70], np.int32),
        "cu_seqlens_k": np.array([0, 60, 140], np.int32),
        "seqused_k": np.array([41, 80], np.int32),
    }
    clean = run(backend, arrays, **lengths, causal=True)
    dirty = arrays
    for part in (slice(41, 60), slice(140, 150)):
        dirty = spoiled(dirty, value, k=part, v=part)
    dirty = spoiled(dirty, value, q=slice(70, 75), dout=slice(70, 75))
    again = run(backend, dirty, **lengths, causal=True)
    assert finite(results(attend(backend, **dirty, **lengths)))
    assert_same_bits(clean, again)
