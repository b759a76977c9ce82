"""The laws of merging partial results."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anyflash.semantics.lse import merge

ROWS, DIM = 5, 3
BOUND = 1e-12


@st.composite
def partials(draw):
    """(1, ROWS, 1, DIM) and (1, 1, ROWS), some rows without a key: what out holds there is arbitrary."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    lse = rng.normal(scale=draw(st.sampled_from([1.0, 30.0, 1e4])), size=(1, 1, ROWS))
    empty = np.array(draw(st.lists(st.booleans(), min_size=ROWS, max_size=ROWS)))
    out = rng.normal(size=(1, ROWS, 1, DIM))
    out[0, empty] = draw(st.sampled_from([0.0, np.nan, np.inf]))
    return out, np.where(empty, -np.inf, lse)


def close(a, b):
    np.testing.assert_allclose(a[0], b[0], rtol=BOUND, atol=BOUND)
    np.testing.assert_allclose(a[1], b[1], rtol=BOUND, atol=BOUND)


def clean(part):
    return np.where(np.swapaxes(part[1], 1, 2)[..., None] == -np.inf, 0.0, part[0]), part[1]


NEUTRAL = np.zeros((1, ROWS, 1, DIM)), np.full((1, 1, ROWS), -np.inf)


@given(partials(), partials(), partials())
@settings(max_examples=100, deadline=None)
def test_laws(a, b, c):
    close(merge(*a, *b), merge(*b, *a))
    close(merge(*merge(*a, *b), *c), merge(*a, *merge(*b, *c)))
    close(merge(*a, *NEUTRAL), clean(a))
    close(merge(*NEUTRAL, *a), clean(a))


@given(st.integers(0, 2**32), st.integers(0, 8), st.sampled_from(["bshd", "bhsd", "thd"]))
@settings(max_examples=60, deadline=None)
def test_merging_halves_gives_the_whole(seed, cut, layout):
    rng = np.random.default_rng(seed)
    scores, v = rng.normal(scale=5, size=(2, ROWS, 8)), rng.normal(size=(2, 8, DIM))

    def part(keys):
        s = scores[..., keys]
        with np.errstate(divide="ignore"):
            lse = np.log(np.exp(s).sum(-1))
        out = np.exp(s - np.where(lse == -np.inf, 0, lse)[..., None]) @ v[:, keys]
        if layout == "thd":
            return out.swapaxes(0, 1), lse
        return (out if layout == "bhsd" else out.swapaxes(0, 1))[None], lse[None]

    close(merge(*part(slice(cut)), *part(slice(cut, 8)), layout), part(slice(8)))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_dtypes_are_kept(dtype):
    out, lse = np.ones((1, 2, 1, 3), dtype), np.zeros((1, 1, 2), np.float32)
    merged = merge(out, lse, out, lse)
    assert merged[0].dtype == dtype
    assert merged[1].dtype == np.float32


def test_nan_in_a_row_with_keys_propagates():
    out, lse = np.full((1, 1, 1, 1), np.nan), np.zeros((1, 1, 1))
    assert np.isnan(merge(out, lse, np.zeros((1, 1, 1, 1)), lse)[0]).all()
