"""The text form: exact round trips, sharing, binding, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings

from anyflash.core.errors import InvalidCall
from anyflash.semantics.expr import At, Table, const, tanh, var, where
from anyflash.semantics.text import MAX_NODES, bind, parse, pretty, show
from semantics.expressions import any_kind

AT = At()
S = var("score")


@given(any_kind(4))
@settings(max_examples=200, deadline=None)
def test_parse_inverts_show(e):
    text = show(e)
    again = parse(text)
    assert show(again) == text
    assert again.kind == e.kind
    assert "|" not in text


@pytest.mark.parametrize(
    "value", [0.1, -0.0, 1e-310, 1.7976931348623157e308, math.inf, -math.inf, math.nan, 1e16]
)
def test_float_constants_round_trip_bit_for_bit(value):
    again = parse(show(const(value)))
    assert again.kind == "float"
    assert float(again.value).hex() == value.hex()


@pytest.mark.parametrize(
    ("value", "text"),
    [(3, "3"), (-3, "-3"), (True, "true"), (False, "false"), (3.0, "3.0"), (np.float64(0.5), "0.5")],
)
def test_constants_keep_their_kind(value, text):
    assert show(const(value)) == text
    assert parse(text).kind == const(value).kind


def test_text_of_a_softcap_with_slopes():
    slopes = Table(np.zeros(4, np.float32), "float")
    score, mask = bind([30.0 * tanh(S / 30.0) - slopes[AT.head] * (AT.q - AT.k), AT.k <= AT.q])[0]
    expected = "(sub (mul 30.0 (tanh (div score 30.0))) (mul (load 0:f head) (float (sub q k))))"
    assert show(score) == expected
    assert show(mask) == "(le k q)"


def test_bind_numbers_distinct_arrays_by_first_appearance():
    a, b = np.zeros(3), np.zeros(3, np.int32)
    score = S + Table(a, "float")[AT.k]
    mask = Table(b, "int")[AT.k] == Table(a, "float")[AT.q]
    (bound_score, none, bound_mask), tables = bind([score, None, mask])
    assert none is None
    assert [t.array is x for t, x in zip(tables, (a, b), strict=True)] == [True, True]
    assert show(bound_score) == "(add score (load 0:f k))"
    assert show(bound_mask) == "(eq (float (load 1:i k)) (load 0:f q))"


def test_equal_subtrees_are_one_object_after_parsing():
    e = parse("(add (tanh score) (mul (tanh score) (tanh score)))")
    assert e.args[0] is e.args[1].args[0]
    assert e.args[0] is e.args[1].args[1]


@pytest.mark.parametrize(
    "text",
    ["", "(", ")", "(add 1)", "(add 1 2", "1 2", "(nothing 1)", "word", "(load x:f k)", "(load 0:z k)"],
)
def test_bad_text_is_refused(text):
    with pytest.raises(ValueError):
        parse(text)


def test_show_refuses_arrays():
    with pytest.raises(ValueError, match="bind"):
        show(Table(np.zeros(3), "float")[AT.k])


def test_a_tree_that_explodes_is_refused_quickly():
    e = S
    for _ in range(100):
        e = e * e
    with pytest.raises(InvalidCall, match=f"at most {MAX_NODES} operations"):
        bind([e])


@pytest.mark.parametrize(
    ("e", "text"),
    [
        ((AT.k <= AT.q) & (AT.q - AT.k < 128), "(k <= q) & (q - k < 128)"),
        (~((AT.k <= AT.q) | (AT.k < 4)), "~((k <= q) | (k < 4))"),
        (S - (S - 1.0) * 2.0, "score - (score - 1.0) * 2.0"),
        (-(S + 1.0), "-(score + 1.0)"),
        (S * -2.0, "score * -2.0"),
        (where(AT.k < 3, S, -math.inf), "where(k < 3, score, -inf)"),
        (Table(np.zeros((2, 2)), "float")[AT.head, AT.k // 2], "table[head, k // 2]"),
        ((AT.q - AT.k) % 2 == 0, "(q - k) % 2 == 0"),
    ],
)
def test_pretty(e, text):
    assert pretty(e) == text
