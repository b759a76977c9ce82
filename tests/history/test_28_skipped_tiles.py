"""A block mask that skipped too much gave wrong gradients (pytorch flex #136232, #141126, #158212).

Tiles are skipped here by bounds on the mask's expression. The same mask as a dense array skips nothing:
results must be the same but for the order of sums, in which skipped tiles have no part.
"""

from __future__ import annotations

import numpy as np
import pytest

from anyflash.contract.direct import attend
from anyflash.semantics.expr import Table, maximum
from contract.calls import BITWISE, operands, results

N = 330
IDS = np.cumsum(np.random.default_rng(0).random(N) < 0.02).astype(np.int32)
SHUFFLED = np.random.default_rng(1).integers(0, 4, N).astype(np.int32)
LIMITS = np.random.default_rng(2).integers(0, N, N).astype(np.int32)


def table(array):
    return Table(array, "int")


MASKS = {
    "causal": lambda at: at.k <= at.q,
    "window": lambda at: (at.q - 40 <= at.k) & (at.k <= at.q + 3),
    "far": lambda at: (at.q - at.k > 100) | (at.k - at.q > 100),
    "documents": lambda at: table(IDS)[at.row] == table(IDS)[at.k],
    "documents_causal": lambda at: (table(IDS)[at.row] == table(IDS)[at.k]) & (at.k <= at.q),
    "unsorted_documents": lambda at: table(SHUFFLED)[at.row] == table(SHUFFLED)[at.k],
    "limits_by_row": lambda at: at.k < table(LIMITS)[at.row],
    "blocks": lambda at: (at.row // 32 + at.k // 32) % 3 == 0,
    "dilated": lambda at: ((at.q - at.k) % 50 == 0) & (at.k <= at.q),
    "by_head": lambda at: (at.k <= at.q) & (at.q - at.k < 30 * (1 + at.head)),
    "not_a_band": lambda at: ~((at.k > at.q - 70) & (at.k < at.q + 70)),
    "sinks_and_window": lambda at: (at.k < 4) | (abs(at.q - at.k) < 20),
    "square": lambda at: at.k * at.k <= at.q * 40,
    "shifted": lambda at: table(IDS)[maximum(at.row - 9, 0)] == table(IDS)[at.k],
}


def dense(mask):
    """By Python's own integers, one pair after the other."""
    from anyflash.semantics.evaluate import evaluate
    from anyflash.semantics.expr import At
    from anyflash.semantics.text import bind

    (bound,), tables = bind([mask(At())])
    env = {
        "batch": 0,
        "head": np.arange(4)[:, None, None],
        "row": np.arange(N)[:, None],
        "q": np.arange(N)[:, None],
        "k": np.arange(N),
        "q_len": N,
        "k_len": N,
    }
    return np.broadcast_to(evaluate(bound, env, [t.array for t in tables]), (4, N, N))[None]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("backend", BITWISE)
def test_function_as_dense_array(backend, name, dtype):
    arrays = operands(dtype, (1, N), (1, N))
    skipping = attend(backend, **arrays, mask=MASKS[name])
    whole = attend(backend, **arrays, mask=np.ascontiguousarray(dense(MASKS[name])))
    eps = np.finfo(np.float32).eps if dtype == "float32" else 2.0**-8
    expected = results(whole)
    for which, got in results(skipping).items():
        a, b = got.astype(np.float64), expected[which].astype(np.float64)
        assert (np.isinf(a) == np.isinf(b)).all(), which
        assert ((a == 0) == (b == 0)).all(), which
        seen = np.isfinite(b)
        assert np.abs(a - b)[seen].max() <= 16 * eps * np.abs(b[seen]).max(), which
