"""Gradients of the real kernel in float64 against central differences of its own forward, element by
element."""

from __future__ import annotations

import numpy as np
import pytest

from anyflash.contract.backends import present
from anyflash.contract.direct import attend
from anyflash.semantics import expr
from anyflash.semantics.expr import Table

STEP = 1e-6
each_backend = pytest.mark.parametrize("backend", present())

CALLS = {
    "plain": {},
    "causal": {"causal": True},
    "window_softcap": {"window": (2, 1), "softcap": 1.5},
    "function": {
        "score": lambda s, at: (
            expr.log(1 + expr.exp(s)) * (1 + at.head) - expr.tanh(s) / (1 + abs(at.q - at.k))
        ),
        "mask": lambda at: (at.k % 3 != 1) | (at.q < at.k),
    },
    "dropout": {"dropout_p": 0.3, "seed": 11},
}
TABLES = {
    "bias": ({"bias": (2, 2, 5, 6)}, lambda t: {"bias": t["bias"]}),
    "two_biases": (
        {"one": (2, 1, 1, 6), "two": (1, 2, 5, 6)},
        lambda t: {"bias": [t["one"], t["two"]], "causal": True},
    ),
    "alibi": ({"slopes": (2, 2)}, lambda t: {"alibi_slopes": t["slopes"], "softcap": 2.0}),
    "sinks": ({"sinks": (2,)}, lambda t: {"sinks": t["sinks"], "causal": True}),
    "table": (
        {"far": (2, 4)},
        lambda t: {
            "score": lambda s, at: s * Table(t["far"], "float")[at.head, expr.minimum(abs(at.q - at.k), 3)]
        },
    ),
}


def check(backend, arrays, keywords):
    """`arrays` are what is differentiated; `keywords(arrays)` the rest of the call."""
    rng = np.random.default_rng(1)
    shape = (2, 5, 2, 4)
    dout, dlse = rng.standard_normal(shape), rng.standard_normal((2, 2, 5))

    def run(**more):
        return attend(backend, arrays["q"], arrays["k"], arrays["v"], **more, **keywords(arrays))

    def loss():
        found = run()
        seen = np.isfinite(found.lse)
        return (found.out * dout).sum() + (found.lse[seen] * dlse[seen]).sum()

    found = run(dout=dout, dlse=dlse)
    grads = {"q": found.dq, "k": found.dk, "v": found.dv, "sinks": found.dsinks}
    by_slot = iter(found.tables)
    grads |= {name: next(by_slot) for name in arrays if name not in grads}
    for name, array in arrays.items():
        grad = grads[name].reshape(array.shape)
        numeric = np.empty_like(array)
        for index in np.ndindex(*array.shape):
            kept = array[index]
            array[index] = kept + STEP
            above = loss()
            array[index] = kept - STEP
            numeric[index] = (above - loss()) / (2 * STEP)
            array[index] = kept
        # Central differences err by step ** 2, and by the rounding of a loss of this size over the step.
        bound = np.finfo(np.float64).eps * abs(loss()) / STEP + 1e2 * STEP**2 + 1e-8 * np.abs(grad).max()
        assert np.abs(grad - numeric).max() <= bound, name


def inputs(**shapes):
    rng = np.random.default_rng(0)
    base = {"q": (2, 5, 2, 3), "k": (2, 6, 1, 3), "v": (2, 6, 1, 4)}
    return {name: rng.standard_normal(shape) for name, shape in (base | shapes).items()}


@each_backend
@pytest.mark.parametrize("name", CALLS)
def test_gradients_of_q_k_v(backend, name):
    check(backend, inputs(), lambda arrays: CALLS[name])


@each_backend
@pytest.mark.parametrize("name", TABLES)
def test_gradients_of_tables_and_sinks(backend, name):
    shapes, keywords = TABLES[name]
    check(backend, inputs(**shapes), keywords)
