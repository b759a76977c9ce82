"""Gradients of a bias that spans fewer axes than the scores were overwritten instead of added up
(flash-sparse-attention PR 194, #193). All 16 ways to span (batch, heads, q, k), one bias or two.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from anyflash.contract.backends import present
from anyflash.contract.direct import attend
from contract.calls import operands

FULL = (3, 4, 40, 70)
SPANS = list(product((False, True), repeat=4))
NAMES = ["".join(axis for axis, on in zip("bhqk", span, strict=True) if on) or "one" for span in SPANS]
each_backend = pytest.mark.parametrize("backend", present())


def spanned(span, seed=0):
    shape = tuple(extent if on else 1 for extent, on in zip(FULL, span, strict=True))
    return np.random.default_rng(seed).standard_normal(shape)


def added(full, shape):
    over = tuple(axis for axis, extent in enumerate(shape) if extent == 1)
    return full.sum(axis=over).reshape(shape)


def close(a, b):
    return np.abs(a.reshape(b.shape) - b).max() <= 1e3 * np.finfo(np.float64).eps * np.abs(b).max()


@pytest.fixture(scope="module")
def arrays():
    return operands("float64", (3, 40), (3, 70))


@each_backend
@pytest.mark.parametrize("span", SPANS, ids=NAMES)
def test_gradient_is_that_of_the_full_bias_added_up(backend, span, arrays):
    bias = spanned(span)
    found = attend(backend, **arrays, bias=bias, causal=True)
    full = np.ascontiguousarray(np.broadcast_to(bias, FULL))
    expected = attend(backend, **arrays, bias=full, causal=True)
    assert close(found.out, expected.out)
    assert close(found.tables[0], added(expected.tables[0], bias.shape))


@each_backend
@pytest.mark.parametrize("span", SPANS, ids=NAMES)
def test_beside_another_bias(backend, span, arrays):
    """Two biases keep their own gradients; each is that of their sum, added up over its own axes."""
    one, two = spanned(span), spanned((False, True, True, True), seed=1)
    found = attend(backend, **arrays, bias=[one, two])
    expected = attend(backend, **arrays, bias=np.ascontiguousarray(np.broadcast_to(one + two, FULL)))
    assert close(found.tables[0], added(expected.tables[0], one.shape))
    assert close(found.tables[1], added(expected.tables[0], two.shape))


@each_backend
def test_a_stretched_view_has_the_gradient_of_each_element(backend, arrays):
    """A bias expanded with stride 0 is a full bias: its gradient is full, nothing is added up."""
    row = spanned((False, False, False, True))
    stretched = np.broadcast_to(row, FULL)
    found = attend(backend, **arrays, bias=stretched)
    expected = attend(backend, **arrays, bias=np.ascontiguousarray(stretched))
    assert found.tables[0].shape == FULL
    assert close(found.tables[0], expected.tables[0])
