"""Rows that see no key gave NaN, forward or backward (pytorch #41508, #103963, #110213; mlx PR 2608).

Here they give out 0, lse -inf and gradients 0, whatever took their keys away, and leave the other rows alone.
"""

from __future__ import annotations

import numpy as np
import pytest

from anyflash.contract.backends import present
from anyflash.contract.direct import attend
from anyflash.core.dtypes import FLOATS
from anyflash.semantics.expr import where
from contract.calls import operands, results

Q, K = 70, 90
EMPTY = np.arange(Q) % 3 == 1
SHOWN = ~EMPTY[:, None] & np.ones((Q, K), bool)


def bias(value):
    return np.where(SHOWN, np.float32(0), np.float32(value))[None, None]


KINDS = {
    "dense": {"mask": SHOWN[None, None]},
    "rows_of_a_dense_mask": {"mask": ~EMPTY[None, None, :, None]},
    "function": {"mask": lambda at: at.row % 3 != 1},
    "bias_of_minus_infinity": {"bias": bias(-np.inf)},
    "score_of_minus_infinity": {"score": lambda s, at: where(at.row % 3 == 1, float("-inf"), s)},
    "function_with_softcap": {"mask": lambda at: at.row % 3 != 1, "softcap": 2.0},
}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", present())
def test_rows_without_keys(backend, kind, dtype):
    arrays = operands(dtype, (2, Q), (2, K))
    found = attend(backend, **arrays, **KINDS[kind])
    assert (found.out[:, EMPTY] == 0).all()
    assert (found.lse[..., EMPTY] == -np.inf).all()
    assert (found.dq[:, EMPTY] == 0).all()
    for name, array in results(found).items():
        assert name == "lse" or np.isfinite(array.astype(np.float64)).all(), name
    assert (found.out[:, ~EMPTY] != 0).any(axis=-1).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", present())
def test_empty_rows_do_not_reach_keys(backend, kind):
    """Gradients of k and v are those of a call without the empty rows; only the order of sums differs."""
    arrays = operands("float32", (2, Q), (2, K))
    found = attend(backend, **arrays, **KINDS[kind])
    kept = {name: a[:, ~EMPTY] for name, a in arrays.items() if name in ("q", "dout")}
    kept["dlse"] = np.ascontiguousarray(arrays["dlse"][..., ~EMPTY])
    softcap = {"softcap": 2.0} if "softcap" in kind else {}
    alone = attend(backend, **{**arrays, **kept}, **softcap)
    for name in ("dk", "dv"):
        a, b = getattr(found, name), getattr(alone, name)
        assert np.abs(a - b).max() <= Q * np.finfo(np.float32).eps * np.abs(b).max(), name


@pytest.mark.parametrize("lens", [(5, 3), (70, 20), (130, 1)])
@pytest.mark.parametrize("backend", present())
def test_causal_with_more_queries_than_keys(backend, lens):
    q_len, k_len = lens
    found = attend(backend, **operands("float32", (1, q_len), (1, k_len)), causal=True)
    empty = q_len - k_len
    assert (found.out[:, :empty] == 0).all()
    assert (found.lse[..., :empty] == -np.inf).all()
    assert (found.dq[:, :empty] == 0).all()
    assert np.isfinite(found.lse[..., empty:]).all()


@pytest.mark.parametrize("backend", present())
def test_window_beyond_the_last_key(backend):
    """Two keys, queries that are farther from them than the window reaches."""
    q_len, k_len = 40, 40
    found = attend(
        backend,
        **operands("float32", (1, q_len), (1, k_len)),
        window=(3, 0),
        mask=lambda at: at.k < 2,
    )
    assert (found.out[:, 5:] == 0).all()
    assert (found.lse[..., 5:] == -np.inf).all()
    assert (found.dk[:, 2:] == 0).all()
    assert np.isfinite(found.lse[..., :5]).all()


@pytest.mark.parametrize("backend", present())
def test_everything_masked(backend):
    found = attend(backend, **operands("float32", (2, Q), (2, K)), mask=lambda at: at.k < 0)
    for array in (found.out, found.dq, found.dk, found.dv):
        assert (array == 0).all()
    assert (found.lse == -np.inf).all()
