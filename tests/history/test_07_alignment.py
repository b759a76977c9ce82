"""A bias whose rows do not start at multiples of 16 bytes was an error or was read wrongly (xformers #813;
pytorch #121943, #134995; vllm #795), as were misaligned pointers.
"""

from __future__ import annotations

import numpy as np
import pytest

from anyflash.contract.direct import attend
from anyflash.contract.poison import Layout, Poisoned, numpy_dtype
from contract.calls import BITWISE, assert_same_bits, operands, results, run

each_backend = pytest.mark.parametrize("backend", BITWISE)
each_dtype = pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])


@each_backend
@each_dtype
@pytest.mark.parametrize("keys", [1, 3, 33, 97, 129])
def test_rows_of_odd_length(backend, dtype, keys):
    """A row of bias after an odd one starts anywhere; padding the rows must change nothing."""
    arrays = operands(dtype, (2, 40), (2, keys))
    bias = np.random.default_rng(0).standard_normal((2, 4, 40, keys)).astype(numpy_dtype(dtype))
    padded = np.zeros((2, 4, 40, -(-keys // 8) * 8 + 8), bias.dtype)
    padded[..., :keys] = bias
    assert_same_bits(run(backend, arrays, bias=bias), run(backend, arrays, bias=padded[..., :keys]))


@each_backend
@each_dtype
@pytest.mark.parametrize("shift", [1, 2, 3, 4, 7, 8, 12, 15])
def test_every_array_off_its_alignment(backend, dtype, shift):
    arrays = operands(dtype, (2, 40), (2, 50))
    rng = np.random.default_rng(0)
    others = {
        "bias": rng.standard_normal((1, 4, 40, 50)).astype(np.float32),
        "alibi_slopes": rng.uniform(0, 1, 4).astype(np.float32),
        "sinks": rng.standard_normal(4).astype(np.float32),
    }
    clean = run(backend, arrays, **others)
    moved = {
        name: Poisoned.of(a, a.dtype.name, Layout(shift=shift)).array for name, a in (arrays | others).items()
    }
    assert all(a.ctypes.data % 64 == shift for a in moved.values())
    assert_same_bits(clean, results(attend(backend, **moved)))


@each_backend
@pytest.mark.parametrize("shift", [1, 2, 3])
def test_integer_tables_off_their_alignment(backend, shift):
    from anyflash.semantics.expr import Table

    ids = np.arange(60, dtype=np.int32) // 13
    moved = Poisoned.of(ids, "int32", Layout(shift=shift)).array
    arrays = operands("float32", (1, 60), (1, 60))

    def documents(array):
        table = Table(array, "int")
        return lambda at: table[at.row] == table[at.k]

    assert_same_bits(run(backend, arrays, mask=documents(ids)), run(backend, arrays, mask=documents(moved)))
