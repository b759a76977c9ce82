"""A whole block of keys was masked for a row that sees other blocks, and its running maximum of -inf made NaN
(pytorch #127055 in the CPU flash kernel, #109517 with finfo.min).
"""

from __future__ import annotations

import numpy as np
import pytest
from ml_dtypes import finfo

from anyflash.contract.backends import present
from anyflash.contract.direct import attend
from anyflash.contract.poison import numpy_dtype
from contract.calls import operands

Q, K = 40, 330
HIDDEN = {
    "first_block": slice(0, 64),
    "first_blocks": slice(0, 256),
    "middle_blocks": slice(64, 192),
    "last_blocks": slice(192, K),
    "all_but_one": slice(0, K - 1),
    "odd_edges": slice(1, 307),
}


def spelled(kind, part, dtype):
    hidden = np.zeros(K, bool)
    hidden[part] = True
    if kind == "dense":
        return {"mask": ~hidden[None, None, None]}
    if kind == "function":
        return {"mask": lambda at: (at.k < part.start) | (at.k >= part.stop)}
    own = numpy_dtype(dtype)
    least = {"minus_infinity": -np.inf, "finfo_min": float(finfo(own).min)}[kind]
    return {"bias": np.where(hidden, least, 0.0).astype(own)[None, None, None]}


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["dense", "function", "minus_infinity", "finfo_min"])
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("backend", present())
def test_as_if_the_keys_were_not_there(backend, hidden, kind, dtype):
    part = HIDDEN[hidden]
    arrays = operands(dtype, (1, Q), (1, K))
    found = attend(backend, **arrays, **spelled(kind, part, dtype))
    kept = np.delete(np.arange(K), np.arange(K)[part])
    without = {name: np.ascontiguousarray(a[:, kept]) if name in "kv" else a for name, a in arrays.items()}
    expected = attend(backend, **without)
    eps = float(finfo(numpy_dtype(dtype)).eps)
    for name in ("out", "lse", "dq", "dk", "dv"):
        got, want = (getattr(x, name).astype(np.float64) for x in (found, expected))
        if name in ("dk", "dv"):
            assert (got[:, part] == 0).all(), name
            got = got[:, kept]
        assert np.isfinite(got).all(), name
        # Other cuts into blocks, another order of at most K sums.
        assert np.abs(got - want).max() <= 16 * eps * np.abs(want).max(), name
