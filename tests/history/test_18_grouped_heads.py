"""Gradients of shared key heads lost part of their group or were rounded before they were added (levanter PR
449; native-sparse-attention-triton #27; fla PR 384).
"""

from __future__ import annotations

import numpy as np
import pytest

from anyflash.contract.backends import present
from anyflash.contract.direct import attend
from anyflash.contract.poison import numpy_dtype

RATIOS = ((6, 2), (12, 4), (5, 1), (7, 7), (9, 3), (16, 1))
N, D = 50, 20


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", RATIOS, ids=str)
@pytest.mark.parametrize("backend", present())
def test_sum_over_the_group(backend, heads, causal, dtype):
    """As with a key head for each query head, added up."""
    rng = np.random.default_rng(0)
    kind, group = numpy_dtype(dtype), heads[0] // heads[1]
    make = lambda n: rng.standard_normal((2, N, n, D)).astype(kind)
    q, dout, k, v = make(heads[0]), make(heads[0]), make(heads[1]), make(heads[1])
    found = attend(backend, q, k, v, dout=dout, causal=causal)
    wide = [np.repeat(x, group, axis=2) for x in (k, v)]
    expected = attend(backend, q, *wide, dout=dout, causal=causal)
    eps = np.finfo(kind).eps
    assert np.abs(found.out - expected.out).max() <= 8 * eps * np.abs(v).max()
    assert np.abs(found.dq - expected.dq).max() <= 32 * eps * np.abs(expected.dq).max()
    for name in ("dk", "dv"):
        summed = getattr(expected, name).reshape(2, N, heads[1], group, D).sum(axis=3)
        assert np.abs(getattr(found, name) - summed).max() <= 32 * eps * np.abs(summed).max(), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("backend", present())
def test_sum_is_rounded_once(backend, dtype):
    """Sixteen query heads with the same rows: their sum is sixteen times one's, a power of two, so that
    adding rounded gradients would give exactly that, and adding before rounding is at least as close to the
    truth."""
    rng = np.random.default_rng(1)
    kind = numpy_dtype(dtype)
    make = lambda n: rng.standard_normal((1, N, n, D)).astype(kind)
    q, dout, k, v = make(16), make(16), make(1), make(1)
    found = attend(backend, q, k, v, dout=dout)
    wide = [x.astype(np.float64) for x in (q, k, v)]
    exact = attend("reference", *wide, dout=dout.astype(np.float64))
    for name in ("dk", "dv"):
        truth = getattr(exact, name)
        got = getattr(found, name).astype(np.float64)
        step = np.spacing(np.abs(truth).max().astype(kind)).astype(np.float64)
        assert np.abs(got - truth).max() <= 2 * step, name
