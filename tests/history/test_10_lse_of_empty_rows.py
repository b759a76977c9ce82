"""lse of a row without keys was +inf or 0, and merging it gave NaN (flash-attention PR 978; FlashMLA PR 77;
flashinfer #4051, #4484). (0, -inf) is the neutral element of merging.
"""

from __future__ import annotations

import numpy as np
import pytest

from anyflash.contract.backends import present
from anyflash.contract.direct import attend
from anyflash.semantics.lse import merge
from contract.calls import operands

each_backend = pytest.mark.parametrize("backend", present())


@each_backend
@pytest.mark.parametrize("empty", ["no_keys", "masked"])
def test_merging_with_nothing_changes_nothing(backend, empty):
    arrays = operands("float32", (2, 30), (2, 40))
    q, k, v = (arrays[name] for name in "qkv")
    some = attend(backend, q, k, v)
    if empty == "no_keys":
        none = attend(backend, q, k[:, :0], v[:, :0])
    else:
        none = attend(backend, q, k, v, mask=lambda at: at.k < 0)
    assert (none.out == 0).all()
    assert (none.lse == -np.inf).all()
    for a, b in ((some, none), (none, some)):
        out, lse = merge(a.out, a.lse, b.out, b.lse)
        assert out.tobytes() == some.out.tobytes()
        assert lse.tobytes() == some.lse.tobytes()
    out, lse = merge(none.out, none.lse, none.out, none.lse)
    assert (out == 0).all()
    assert (lse == -np.inf).all()


@each_backend
def test_halves_of_a_causal_mask_merge(backend):
    """The second half of the keys is empty for the first queries."""
    arrays = operands("float32", (1, 60), (1, 60))
    q, k, v = (arrays[name] for name in "qkv")
    whole = attend(backend, q, k, v, causal=True)
    halves = [attend(backend, q, k[:, part], v[:, part], mask=mask) for part, mask in (
        (slice(0, 30), lambda at: at.k <= at.row),
        (slice(30, 60), lambda at: at.k + 30 <= at.row),
    )]  # fmt: skip
    out, lse = merge(halves[0].out, halves[0].lse, halves[1].out, halves[1].lse)
    eps = np.finfo(np.float32).eps
    assert np.isfinite(out).all()
    assert np.abs(out - whole.out).max() <= 8 * eps * np.abs(v).max()
    assert np.abs(lse - whole.lse).max() <= 8 * eps * np.abs(whole.lse).max()


@each_backend
@pytest.mark.parametrize("sink", [-3.0, 0.0, 5.0])
def test_with_a_sink_an_empty_row_has_its_logarithm(backend, sink):
    arrays = operands("float32", (1, 20), (1, 30))
    sinks = np.full(4, sink, np.float32)
    found = attend(backend, **arrays, sinks=sinks, mask=lambda at: at.row % 2 == 0)
    assert (found.out[:, 1::2] == 0).all()
    assert np.abs(found.lse[..., 1::2] - sink).max() <= 2 * np.spacing(np.float32(max(abs(sink), 1)))
    assert (found.dq[:, 1::2] == 0).all()
    assert np.isfinite(found.dsinks).all()
