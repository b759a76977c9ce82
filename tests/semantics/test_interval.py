"""Bounds hold for every pair in the box, and are exact where tiles are skipped by them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from anyflash.semantics.evaluate import clamped, evaluate
from anyflash.semantics.expr import At, const, exp, var
from anyflash.semantics.interval import Numbers, bound
from semantics.expressions import ARRAYS, INT_VARIABLES, any_kind

NUMBERS = Numbers()
AT = At()
S = var("score")


@st.composite
def boxes(draw):
    box = {}
    for name in INT_VARIABLES:
        lo = draw(st.integers(-6, 6))
        box[name] = (lo, lo + draw(st.integers(0, 3)))
    lo = draw(st.floats(-3, 3))
    box["score"] = draw(st.sampled_from([(lo, lo + 1.5), (lo, lo), (-np.inf, np.inf), (lo, np.inf)]))
    return box


def samples(box, count, seed):
    """Corners and random points of a box, as one array a variable."""
    rng = np.random.default_rng(seed)
    env = {}
    for name, (lo, hi) in box.items():
        if name == "score":
            inner = rng.uniform(max(lo, -10), min(hi, 10), count)
            values = np.where(rng.random(count) < 0.6, rng.choice([lo, hi], count), inner)
            whole = np.isinf(lo) and np.isinf(hi)
            env[name] = np.where(whole & (rng.random(count) < 0.2), np.nan, values)
        else:
            env[name] = rng.integers(lo, hi + 1, count)
    return env


def load_bounds(node, indices):
    """The true range of a table over clamped index ranges."""
    table = ARRAYS[node.value]
    low = clamped([np.asarray(i[0]) for i in indices], table.shape)
    high = clamped([np.asarray(i[1]) for i in indices], table.shape)
    part = table[tuple(slice(a, b + 1) for a, b in zip(low, high, strict=True))]
    return part.min(), part.max()


@given(any_kind(3), boxes(), st.booleans(), st.integers(0, 1000))
@example(np.inf > 1.0 / S, {"score": (-1.0, 1.0)}, False, 0)
@example(const(np.inf) - S <= np.inf, {"score": (-np.inf, np.inf)}, False, 0)
@example(abs(S) <= np.inf, {"score": (-np.inf, np.inf)}, False, 0)
@example(exp(S) * 0.0 == 0.0, {"score": (0.0, np.inf)}, False, 0)
@settings(max_examples=600, deadline=None)
def test_every_value_lies_within_the_bound(e, box, loads_known, seed):
    lo, hi = bound(e, box, NUMBERS, load_bounds if loads_known else None)
    values = evaluate(e, samples(box, 200, seed), ARRAYS)
    if e.kind == "float":
        whole = np.isneginf(lo) and np.isposinf(hi)
        assert whole or not np.isnan(values).any()
        values = values[~np.isnan(values)]
    elif e.kind == "bool":
        assert hi or not values.any()
        assert not lo or values.all()
        return
    assert (lo <= values).all()
    assert (values <= hi).all()


@given(any_kind(3), boxes(), boxes())
@settings(max_examples=150, deadline=None)
def test_many_boxes_at_once_equal_one_at_a_time(e, a, b):
    both = {name: tuple(np.array([x, y]) for x, y in zip(a[name], b[name], strict=True)) for name in a}
    together = bound(e, both, NUMBERS)
    for i, box in enumerate((a, b)):
        alone = bound(e, box, NUMBERS)
        for joint, single in zip(together, alone, strict=True):
            np.testing.assert_array_equal(np.broadcast_to(joint, (2,))[i], single)


EXACT = {
    "causal": AT.k <= AT.q,
    "strictly below": AT.k < AT.q,
    "window": (AT.q - 3 <= AT.k) & (AT.k <= AT.q + 2),
    "right only": AT.k <= AT.q + 1,
    "prefix": AT.k < 5,
    "prefix or causal": (AT.k < 5) | (AT.k <= AT.q),
    "not prefix": ~(AT.k < 5),
    "chunks": AT.q // 4 == AT.k // 4,
}


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (4, 4), (8, 4)])
def test_position_masks_are_classed_exactly(name, shape):
    """Sizes that divide the chunks, that straddle them and that cover several."""
    mask = EXACT[name]
    n_q, n_k = shape
    for q0, k0 in itertools.product(range(0, 16, n_q), range(0, 16, n_k)):
        rows = np.arange(q0, q0 + n_q)[:, None]
        keys = np.arange(k0, k0 + n_k)
        values = np.broadcast_to(evaluate(mask, {"q": rows, "k": keys}), shape)
        sure, possible = bound(mask, {"q": (q0, q0 + n_q - 1), "k": (k0, k0 + n_k - 1)}, NUMBERS)
        assert bool(possible) == bool(values.any())
        assert bool(sure) == bool(values.all())


def test_unknown_ints_saturate_instead_of_wrapping():
    lo, hi = bound(AT.q * 4 + AT.k, {"k": (0, 3)}, NUMBERS)
    assert lo < -(2**61)
    assert hi > 2**61
