"""Sequences without queries or keys hung, read out of bounds or left lse and gradients uninitialised
(flash-attention #1537, #2562, PR 1155; tilelang PR 2461).
"""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from anyflash.contract.backends import present
from anyflash.contract.direct import attend
from contract.calls import operands, results

pytestmark = pytest.mark.timeout(120)
each_backend = pytest.mark.parametrize("backend", present())
LENGTHS = list(product((0, 1, 40), repeat=3))


def cumulative(lens):
    return np.cumsum((0, *lens)).astype(np.int32)


@each_backend
@pytest.mark.parametrize("causal", [False, True])
def test_every_place_of_an_empty_sequence(backend, causal):
    """All triples of no, one and many queries, against all of keys."""
    for lens_q in LENGTHS:
        for lens_k in LENGTHS[:: 1 if causal else 3]:
            arrays = operands("float32", (sum(lens_q),), (sum(lens_k),))
            starts_q, starts_k = cumulative(lens_q), cumulative(lens_k)
            found = attend(backend, **arrays, causal=causal, cu_seqlens_q=starts_q, cu_seqlens_k=starts_k)
            for name, array in results(found).items():
                assert not np.isnan(array).any(), (lens_q, lens_k, name)
            for i, (n_q, n_k) in enumerate(zip(lens_q, lens_k, strict=True)):
                rows, keys = slice(*starts_q[i : i + 2]), slice(*starts_k[i : i + 2])
                if not n_k:
                    assert (found.out[rows] == 0).all()
                    assert (found.dq[rows] == 0).all()
                    assert (found.lse[:, rows] == -np.inf).all()
                if not n_q:
                    assert (found.dk[keys] == 0).all()
                    assert (found.dv[keys] == 0).all()


@each_backend
@pytest.mark.parametrize("shape", list(product((0, 2), (0, 5), (0, 7))), ids=str)
def test_dense_arrays_without_elements(backend, shape):
    batch, q_len, k_len = shape
    sinks = np.ones(4, np.float32)
    bias = np.zeros((1, 4, 1, 1), np.float32)
    arrays = operands("float32", (batch, q_len), (batch, k_len))
    found = attend(backend, **arrays, bias=bias, sinks=sinks)
    for name, array in results(found).items():
        assert np.isfinite(array).all(), name
    assert found.out.shape == (batch, q_len, 4, 24)
    if not (batch and q_len and k_len):
        assert (found.tables[0] == 0).all()
    if not k_len:
        assert (found.out == 0).all()
        assert (found.lse == sinks[:, None]).all()
    if not q_len:
        assert (found.dk == 0).all()
        assert (found.dsinks == 0).all()


@each_backend
def test_no_sequence_at_all(backend):
    none = np.zeros(1, np.int32)
    found = attend(backend, **operands("float32", (0,), (0,)), cu_seqlens_q=none, cu_seqlens_k=none)
    assert found.out.shape == (0, 4, 24)
    assert found.lse.shape == (4, 0)
