"""`deterministic=True` was not, above all in gradients that many rows add to: dq, bias, sinks
(flash-attention #414, #746, #988, #2244; cuDNN's sink gradient). On the CPU it is so without asking.
"""

from __future__ import annotations

import numpy as np
import pytest

from anyflash.semantics.expr import Table, maximum, minimum
from contract.calls import BITWISE, assert_same_bits, operands, run

RUNS = 25
N = 200
RNG = np.random.default_rng(0)


def relative(shape):
    table = Table(RNG.standard_normal(shape).astype(np.float32), "float")
    return {"score": lambda s, at: s + table[at.head, minimum(maximum(at.k - at.q, -5), 5) + 5]}


CALLS = {
    "bias_over_all": {"bias": RNG.standard_normal((1, 1, 1, 1)).astype(np.float32)},
    "bias_over_batch": {"bias": RNG.standard_normal((1, 4, N, N)).astype(np.float32)},
    "bias_over_queries": {"bias": RNG.standard_normal((3, 1, 1, N)).astype(np.float32)},
    "two_biases": {"bias": [RNG.standard_normal(s).astype(np.float32) for s in ((3, 1, 1, N), (1, 4, N, N))]},
    "slopes": {"alibi_slopes": RNG.uniform(0, 1, 4).astype(np.float32)},
    "sinks": {"sinks": RNG.standard_normal(4).astype(np.float32)},
    "relative_positions": relative((4, 11)),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("backend", BITWISE)
def test_same_bits_with_any_number_of_threads(backend, name, dtype, monkeypatch):
    arrays = operands(dtype, (3, N), (3, N))
    monkeypatch.setenv("ANYFLASH_NUM_THREADS", "1")
    first = run(backend, arrays, causal=True, **CALLS[name])
    for i in range(RUNS):
        monkeypatch.setenv("ANYFLASH_NUM_THREADS", str(1 + i % 7))
        assert_same_bits(first, run(backend, arrays, causal=True, **CALLS[name]), f"in run {i}")
