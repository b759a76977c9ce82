"""Masks against their plain spelling in numpy, their combinations, and what they refuse."""

from __future__ import annotations

import doctest

import numpy as np
import pytest

import anyflash as af
from anyflash.core.errors import InvalidCall
from anyflash.semantics import lse, mask
from anyflash.semantics.expr import At
from anyflash.semantics.mask import Mask, as_mask, causal, dense, documents, prefix, tree, window
from anyflash.semantics.text import bind

BATCH, HEADS = 2, 3
SIZES = [(1, 1), (4, 4), (3, 6), (6, 3), (1, 5), (5, 1)]
R = np.random.default_rng(0)


def positions(n_q, n_k):
    return np.arange(n_q)[:, None] + n_k - n_q, np.arange(n_k)


def plain(name, n_q, n_k):
    """(mask, the same as a boolean array of (batch, heads, q, k) or broadcasting to it)."""
    q, k = positions(n_q, n_k)
    ids_q, ids_k = R.integers(-1, 3, (BATCH, n_q)), R.integers(-1, 3, n_k)
    per_batch = np.array([1, 3])
    full = R.random((BATCH, 1, n_q, n_k)) < 0.5
    keys = R.random((BATCH, 1, 1, n_k)) < 0.5
    heads = np.array([True, False, True])
    nodes = R.random((BATCH, n_q, n_q)) < 0.5
    rows, columns = np.arange(n_q)[:, None], np.clip(k - (n_k - n_q), 0, None)
    same = np.arange(n_k) // 2 - 1
    spans = same[np.clip(q, 0, None)]
    cases = {
        "causal": (causal(), k <= q),
        "window": (window(2, 1), (k >= q - 2) & (k <= q + 1)),
        "left": (window(2), k >= q - 2),
        "right": (window(right=0), k <= q),
        "no window": (window(), k >= 0),
        "prefix": (prefix(2), k < 2),
        "prefix each": (prefix(per_batch), k < per_batch[:, None, None, None]),
        "prefix of one": (prefix(per_batch[:1]), k < 1),
        "documents": (documents(same), (spans == same) & (spans >= 0)),
        "two documents": (
            documents(ids_q, ids_k),
            ((ids_q[:, :, None] == ids_k) & (ids_k >= 0))[:, None],
        ),
        "dense": (dense(full), full),
        "dense keys": (dense(keys), keys),
        "dense heads": (dense(heads[:, None, None]), heads[:, None, None]),
        "dense number": (dense(np.array(True)), np.array(True)),
        "tree": (tree(nodes[0]), (k < n_k - n_q) | nodes[0][rows, columns]),
        "tree each": (tree(nodes), ((k < n_k - n_q) | nodes[:, rows, columns])[:, None]),
        "function": (Mask(lambda at: (at.q + at.k) % 2 == 0), (q + k) % 2 == 0),
        "constant": (Mask(lambda at: False), np.array(False)),
    }
    return cases if name is None else cases[name]


NAMES = list(plain(None, 2, 2))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_equals_its_plain_spelling(name, size):
    m, expected = plain(name, *size)
    got = m.allowed(*size, batch=BATCH, heads=HEADS)
    np.testing.assert_array_equal(got, np.broadcast_to(expected, (BATCH, HEADS, *size)))


@pytest.mark.parametrize("other", NAMES)
@pytest.mark.parametrize("name", ["causal", "documents", "dense"])
def test_combinations(name, other):
    size = (3, 5)
    (a, x), (b, y) = plain(name, *size), plain(other, *size)

    def values(m):
        return m.allowed(*size, batch=BATCH, heads=HEADS)

    def wide(expected):
        return np.broadcast_to(expected, (BATCH, HEADS, *size))

    np.testing.assert_array_equal(values(a & b), wide(x & y))
    np.testing.assert_array_equal(values(a | b), wide(x | y))
    np.testing.assert_array_equal(values(~a & ~b), wide(~x & ~y))
    np.testing.assert_array_equal(values(~(a | b)), wide(~(x | y)))


def test_functions_and_arrays_combine_from_either_side():
    array = np.array([True, False, True])
    near = lambda at: at.k >= at.q - 1
    expected = (causal() & dense(array)).allowed(3, 3)
    for m in (causal() & array, array & causal()):
        np.testing.assert_array_equal(m.allowed(3, 3), expected)
    for m in (causal() & near, near & causal()):
        np.testing.assert_array_equal(m.allowed(3, 3), window(1, 0).allowed(3, 3))
    np.testing.assert_array_equal((array | causal()).allowed(3, 3), (causal() | array).allowed(3, 3))


@pytest.mark.parametrize(
    ("m", "text"),
    [
        (causal() & window(128, 0), "causal() & window(128, 0)"),
        ((causal() | prefix(4)) & ~window(1), "(causal() | prefix(4)) & ~window(1, None)"),
        (causal() | prefix(4) & causal(), "causal() | prefix(4) & causal()"),
        (~(causal() & causal()), "~(causal() & causal())"),
        (documents(np.zeros((2, 5), np.int32)), "documents(<int (2, 5)>)"),
        (dense(np.ones((1, 5), bool)), "dense(<bool (1, 5)>)"),
    ],
)
def test_repr(m, text):
    assert repr(m) == text


def test_stretched_axes_are_not_read():
    load = dense(np.ones((2, 1, 1, 5), bool))(At())
    assert load.value.shape == (2, 5)
    assert [a.value for a in load.args] == ["batch", "k"]


def test_one_array_of_documents_is_one_table():
    ids = np.zeros((1, 5), np.int64)
    assert len(bind([documents(ids)(At())])[1]) == 1
    assert len(bind([documents(ids, ids)(At())])[1]) == 2


REFUSED = {
    "float documents": (lambda: documents(np.zeros(3)), "an integer array"),
    "documents of three axes": (lambda: documents(np.zeros((1, 2, 3), int)), r"\(batch, token\)"),
    "number mask": (lambda: dense(np.zeros(3)), "bias="),
    "negative window": (lambda: window(-1, 0), "not -1"),
    "window of a float": (lambda: window(1.5), "whole number"),
    "prefix of a float": (lambda: prefix(1.5), "an integer array"),
    "an expression": (lambda: as_mask(At().k < 3), "lambda at"),
    "a number returned": (lambda: Mask(lambda at: at.k)(At()), "a number"),
    "nothing returned": (lambda: Mask(lambda at: None)(At()), "NoneType"),
    "documents of another length": (lambda: documents(np.zeros(4, int)).allowed(3, 5), r"\(k\) = \(5\)"),
    "documents of other queries": (
        lambda: documents(np.zeros(4, int), np.zeros(5, int)).allowed(3, 5),
        r"\(q\) = \(3\)",
    ),
    "dense of other heads": (lambda: dense(np.ones((4, 1, 1), bool)).allowed(3, 5, heads=3), "heads"),
    "prefix of another batch": (lambda: (prefix(np.ones(3, int)) & causal()).allowed(3, 5, batch=2), "batch"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    make, message = REFUSED[name]
    with pytest.raises(InvalidCall, match=message):
        make()


@pytest.mark.parametrize("module", [mask, lse, af.masks])
def test_drawn_examples(module):
    found = doctest.testmod(module)
    assert found.attempted > 0
    assert found.failed == 0


def test_public_masks_pass_through_a_call():
    q = R.normal(size=(2, 6, 2, 4))
    ids = np.array([[0, 0, 1, 1, 1, -1], [3, 3, 3, 3, 7, 7]])
    m = af.masks.documents(ids) & af.masks.causal()
    out = af.attention(q, q, q, mask=m, backend="reference")
    expected = af.attention(q, q, q, mask=m.allowed(6, 6, batch=2), backend="reference")
    np.testing.assert_array_equal(out, expected)
    assert not out[0, 5].any()
    with pytest.raises(InvalidCall, match="documents"):
        af.attention(q, q[:, :5], q[:, :5], mask=m, backend="reference")
