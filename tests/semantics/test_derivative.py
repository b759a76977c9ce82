"""Derivatives against central differences, and the form they come in."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from anyflash.semantics.derivative import derivative, table_derivatives
from anyflash.semantics.evaluate import clamped, evaluate
from anyflash.semantics.expr import At, Table, exp, log, maximum, minimum, tanh, var, where
from anyflash.semantics.text import bind, pretty, show
from semantics.expressions import ARRAYS, FLOATS, INT_VARIABLES, floats, slotted

AT = At()
S = var("score")
STEP = 1e-6

points = st.fixed_dictionaries(
    {"score": st.floats(-3, 3), **{name: st.integers(-4, 6) for name in INT_VARIABLES}}
)


def slope_of(f):
    """Central difference at 0, its error, and whether both one-sided slopes agree: no corner lies there."""
    low, mid, high = f(-STEP), f(0.0), f(STEP)
    central = (high - low) / (2 * STEP)
    error = 1e-4 * max(1.0, abs(central))
    smooth = abs((high - mid) / STEP - central) < error and abs((mid - low) / STEP - central) < error
    return central, error, smooth


@given(floats(4, extremes=False).map(slotted), points)
@settings(max_examples=300, deadline=None)
def test_by_score_equals_central_difference(e, env):
    def shifted(h):
        return float(evaluate(e, {**env, "score": env["score"] + h}, ARRAYS))

    central, error, smooth = slope_of(shifted)
    assume(smooth and abs(central) < 1e4)
    assert abs(float(evaluate(derivative(e), env, ARRAYS)) - central) < error


@given(floats(4, extremes=False).map(slotted), points, st.integers(0, len(FLOATS) - 1))
@settings(max_examples=300, deadline=None)
def test_by_table_element_equals_central_difference(e, env, element):
    def shifted(h):
        table = FLOATS.copy()
        table[element] += h
        return float(evaluate(e, env, (ARRAYS[0], table, ARRAYS[2])))

    central, error, smooth = slope_of(shifted)
    assume(smooth and abs(central) < 1e4)
    total = 0.0
    for slope, indices in table_derivatives(e, 1):
        (at,) = clamped([evaluate(i, env, ARRAYS) for i in indices], FLOATS.shape)
        if at == element:
            total += float(evaluate(slope, env, ARRAYS))
    assert abs(total - central) < error


@pytest.mark.parametrize(
    ("e", "text"),
    [
        (S, "1.0"),
        (S + AT.k, "1.0"),
        (AT.q - AT.k + 0.0, "0.0"),
        (S * 2.0 * 3.0, "6.0"),
        (30.0 * tanh(S / 30.0), "1.0 - tanh(score / 30.0) * tanh(score / 30.0)"),
        (where(AT.k < 3, S, -np.inf), "where(k < 3, 1.0, 0.0)"),
        (where(S > 0.0, log(S), S), "where(0.0 < score, 1.0 / score, 1.0)"),
        (minimum(S, 2.0), "where(score <= 2.0, 1.0, 0.0)"),
        (maximum(S, 2.0), "where(2.0 <= score, 1.0, 0.0)"),
        (exp(-S), "-exp(-score)"),
        (1.0 - S, "-1.0"),
    ],
)
def test_simplified_form(e, text):
    assert pretty(derivative(e)) == text


def test_the_branch_not_taken_leaves_no_trace():
    e = where(S > 0.0, log(S) / S, 0.0)
    assert float(evaluate(derivative(e), {"score": 0.0})) == 0.0


def test_equal_loads_are_one_entry_and_unequal_ones_their_own():
    t = Table(np.zeros((4, 4)), "float")
    load = t[AT.head, AT.k]
    (e,), _ = bind([S * load + load + t[AT.head, AT.row]])
    entries = table_derivatives(e, 0)
    assert [(show(slope), [show(i) for i in indices]) for slope, indices in entries] == [
        ("(add score 1.0)", ["head", "k"]),
        ("1.0", ["head", "row"]),
    ]


def test_a_table_used_in_a_condition_only_has_no_derivative():
    t = Table(np.zeros(4), "float")
    (e,), _ = bind([where(t[AT.k] > 0.0, S, 0.0)])
    assert table_derivatives(e, 0) == []
