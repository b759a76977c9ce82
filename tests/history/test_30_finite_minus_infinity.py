"""Hosts mask with large negative numbers. If all keys of a row carry one, the row is not empty: it is uniform
(onnxruntime #28904). lse then rounds the logarithm of the number of keys away, and a backward that takes
probabilities from lse alone is too large by that number: 8 times for 8 keys at -1e9 in one trusted kernel.

The four values in use: -1e4 (Megatron, BERT), -1e6, -1e9 (OpenFold), and the least float (Hugging Face).
"""

from __future__ import annotations

import numpy as np
import pytest
from ml_dtypes import finfo

from anyflash.contract.backends import present
from anyflash.contract.direct import attend
from anyflash.contract.poison import numpy_dtype
from contract.calls import operands

VALUES = {"1e4": -1e4, "1e6": -1e6, "1e9": -1e9, "least": None}
KEYS = (1, 8, 50, 300)
each_backend = pytest.mark.parametrize("backend", present())
each_value = pytest.mark.parametrize("value", VALUES)
each_dtype = pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])


def level(value, dtype):
    """The value as an entry of a bias in this dtype; -1e6 and -1e9 are out of float16's range."""
    least = float(finfo(numpy_dtype(dtype)).min)
    return max(least, VALUES[value]) if VALUES[value] is not None else least


def bounded(found, expected, dtype, names):
    eps = float(finfo(numpy_dtype(dtype)).eps)
    for name in names:
        a, b = (getattr(x, name).astype(np.float64) for x in (found, expected))
        assert np.abs(a - b).max() <= 16 * eps * max(np.abs(b).max(), 1e-3), name


@each_backend
@each_value
@each_dtype
@pytest.mark.parametrize("keys", KEYS)
def test_rows_of_equal_scores_are_uniform(backend, keys, dtype, value):
    """q = 0, so that the bias alone decides: the results are those without it, but for lse."""
    arrays = operands(dtype, (2, 20), (2, keys))
    arrays["q"][...] = 0
    bias = np.full((1, 1, 20, keys), level(value, dtype), numpy_dtype(dtype))
    found = attend(backend, **arrays, bias=bias)
    expected = attend(backend, **arrays)
    bounded(found, expected, dtype, ("out", "dq", "dk", "dv"))
    mean = np.repeat(arrays["v"].astype(np.float64).mean(axis=1, keepdims=True), 2, axis=2)
    eps = float(finfo(numpy_dtype(dtype)).eps)
    largest = np.abs(arrays["v"].astype(np.float64)).max()
    assert np.abs(found.out.astype(np.float64) - mean).max() <= 4 * eps * largest


@each_backend
@each_value
@each_dtype
def test_some_keys_of_a_row(backend, dtype, value):
    """Beside visible keys, a large negative number hides as a boolean mask does."""
    arrays = operands(dtype, (2, 40), (2, 90))
    hidden = np.zeros((1, 1, 1, 90), bool)
    hidden[..., 25:70] = True
    bias = np.where(hidden, level(value, dtype), 0.0).astype(numpy_dtype(dtype))
    found = attend(backend, **arrays, bias=bias)
    expected = attend(backend, **arrays, mask=~hidden)
    bounded(found, expected, dtype, ("out", "lse", "dq", "dk", "dv"))
    assert (found.dv[:, 25:70] == 0).all()


@each_backend
@each_value
def test_rows_that_are_all_hidden_beside_others(backend, value):
    """Padding queries of a padded batch: some rows carry the number everywhere, and their gradients add to
    the same keys as everybody's."""
    arrays = operands("float32", (2, 40), (2, 60))
    arrays["q"][:, ::2] = 0
    bias = np.zeros((1, 1, 40, 60), np.float32)
    bias[..., ::2, :] = level(value, "float32")
    found = attend(backend, **arrays, bias=bias)
    expected = attend(backend, **arrays)
    bounded(found, expected, "float32", ("out", "dq", "dk", "dv"))


@each_backend
@each_value
def test_gradient_of_such_a_bias(backend, value):
    arrays = operands("float32", (1, 20), (1, 50))
    arrays["q"][...] = 0
    full = np.full((1, 4, 20, 50), level(value, "float32"), np.float32)
    found = attend(backend, **arrays, bias=full)
    expected = attend(backend, **arrays, bias=np.zeros_like(full))
    a, b = found.tables[0], expected.tables[0]
    assert np.abs(a - b).max() <= 16 * np.finfo(np.float32).eps * np.abs(b).max()
