"""lse came out in base 2, off by a factor of log 2 (pytorch #181645; attention-gym PR 205)."""

from __future__ import annotations

import numpy as np
import pytest

from anyflash.contract.backends import present
from anyflash.contract.direct import attend


@pytest.mark.parametrize("keys", [1, 2, 3, 10, 64, 1000])
@pytest.mark.parametrize("queries", [1, 20])
@pytest.mark.parametrize("backend", present())
def test_equal_scores(backend, queries, keys):
    """The logarithm of a sum of n equal exponentials is their exponent plus log n."""
    for level in (0.0, 2.5, -40.0):
        q = np.ones((1, queries, 1, 1), np.float32)
        k = np.full((1, keys, 1, 1), level, np.float32)
        found = attend(backend, q, k, k, scale=1.0)
        expected = level + np.log(keys)
        bound = 4 * np.spacing(np.float32(max(abs(level), abs(expected), 1)))
        assert np.abs(found.lse - expected).max() <= bound


@pytest.mark.parametrize("backend", present())
def test_gradient_through_lse_sums_to_one(backend):
    """d lse / d score is the probability: over a row's keys they add to 1 in any base but only e's without a
    factor."""
    rng = np.random.default_rng(0)
    q, dlse = np.ones((1, 7, 1, 1)), np.ones((1, 1, 7))
    k, zero = rng.standard_normal((1, 50, 1, 1)), np.zeros((1, 50, 1, 1))
    found = attend(backend, q, k, zero, dout=np.zeros((1, 7, 1, 1)), dlse=dlse, scale=1.0)
    assert abs(found.dk.sum() - 7) <= 100 * np.finfo(np.float64).eps
