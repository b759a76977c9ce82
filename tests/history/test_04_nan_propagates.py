"""NaN in a valid element became 0 (pytorch #141128, CPU in 2.5). It must show, and only where it is seen."""

from __future__ import annotations

import numpy as np
import pytest

from anyflash.contract.backends import present
from anyflash.contract.direct import attend
from anyflash.core.dtypes import FLOATS
from anyflash.semantics.expr import where
from contract.calls import operands

N, AT = 100, 40
each_backend = pytest.mark.parametrize("backend", present())
each_dtype = pytest.mark.parametrize("dtype", FLOATS)


def nan_rows(array):
    return np.isnan(array.astype(np.float64)).all(axis=-1)


def any_nan(array):
    return np.isnan(array.astype(np.float64)).any(axis=-1)


@each_backend
@each_dtype
def test_query(backend, dtype):
    arrays = operands(dtype, (2, N), (2, N))
    arrays["q"][0, AT, 1, 3] = np.nan
    found = attend(backend, **arrays)
    expected = np.zeros((2, N, 4), bool)
    expected[0, AT, 1] = True
    assert (nan_rows(found.out) == expected).all()
    assert (np.isnan(found.lse) == expected.transpose(0, 2, 1)).all()
    assert nan_rows(found.dq)[0, AT, 1]
    assert not any_nan(found.dq)[~expected].any()
    assert any_nan(found.dk)[0, :, 0].all(), "every key of the query's head was seen by it"
    assert not any_nan(found.dk)[0, :, 1].any()


@each_backend
@each_dtype
def test_key(backend, dtype):
    arrays = operands(dtype, (1, N), (1, N))
    arrays["k"][0, AT, 0, 0] = np.nan
    found = attend(backend, **arrays, causal=True)
    expected = np.zeros((1, N, 4), bool)
    expected[0, AT:, :2] = True
    assert (nan_rows(found.out) == expected).all()
    assert (any_nan(found.out) == expected).all()
    assert (np.isnan(found.lse) == expected.transpose(0, 2, 1)).all()
    assert (any_nan(found.dq) == expected).all()


@each_backend
@each_dtype
def test_value(backend, dtype):
    """One element of v spoils its column of the rows that see it, and neither lse nor the other columns."""
    arrays = operands(dtype, (1, N), (1, N))
    arrays["v"][0, AT, 1, 5] = np.nan
    found = attend(backend, **arrays, causal=True)
    expected = np.zeros(found.out.shape, bool)
    expected[0, AT:, 2:, 5] = True
    assert (np.isnan(found.out.astype(np.float64)) == expected).all()
    assert np.isfinite(found.lse).all()


@each_backend
@pytest.mark.parametrize("which", ["bias", "score"])
def test_score(backend, which):
    arrays = operands("float32", (1, N), (1, N))
    bias = np.zeros((1, 1, N, N), np.float32)
    bias[0, 0, AT, 7] = np.nan
    if which == "bias":
        found = attend(backend, **arrays, bias=bias)
    else:
        nan = float("nan")
        found = attend(backend, **arrays, score=lambda s, at: where((at.row == AT) & (at.k == 7), nan, s))
    rows = nan_rows(found.out)
    assert rows[0, AT].all()
    assert rows.sum() == rows[0, AT].size
    assert not any_nan(found.out)[~rows].any()


@each_backend
def test_incoming_gradient(backend):
    arrays = operands("float32", (1, N), (1, N))
    arrays["dout"][0, AT, 0] = np.nan
    found = attend(backend, **arrays, causal=True)
    assert nan_rows(found.dq)[0, AT, 0]
    assert any_nan(found.dv)[0, : AT + 1, 0].all()
    assert not any_nan(found.dv)[0, AT + 1 :].any()
