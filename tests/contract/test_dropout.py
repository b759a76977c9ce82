"""Which elements dropout keeps: those that Philox says, in every backend, layout and direction."""

from __future__ import annotations

import numpy as np
import pytest

from anyflash.contract.backends import present
from anyflash.contract.direct import attend
from anyflash.contract.philox import kept
from contract.calls import BITWISE, assert_same_bits, operands, run

BATCH, HEADS, Q, K = 2, 4, 70, 90
SEEDS = (0, 1, 12345, 2**32 - 1, 2**32, 2**63 - 1)
each_backend = pytest.mark.parametrize("backend", present())


def expected(seed, dropout_p, q_len=Q, k_len=K):
    """(batch, head, row, k) bool"""
    head, row, k = np.arange(HEADS)[:, None, None], np.arange(q_len)[:, None], np.arange(k_len)
    return np.stack([kept(seed, dropout_p, b, head, row, k) for b in range(BATCH)])


def one_hot(rows, columns, heads):
    return np.broadcast_to(
        np.eye(rows, columns, dtype=np.float32)[None, :, None], (BATCH, rows, heads, columns)
    )


@each_backend
@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("seed", SEEDS)
def test_forward_and_backward_keep_what_philox_says(backend, seed, dropout_p):
    """With q = k = 0 and one-hot v, out shows the kept elements; with one-hot dout, so does dv."""
    q = np.zeros((BATCH, Q, HEADS, 1), np.float32)
    k = np.zeros((BATCH, K, HEADS, 1), np.float32)
    found = attend(
        backend, q, k, one_hot(K, K, HEADS), dout=one_hot(Q, K, HEADS), dropout_p=dropout_p, seed=seed
    )
    keep = expected(seed, dropout_p)
    assert ((found.out != 0) == keep.transpose(0, 2, 1, 3)).all()
    assert ((found.dv[..., :Q] != 0) == keep.transpose(0, 3, 1, 2)).all()
    weight = found.out[found.out != 0] * K
    assert np.abs(weight - 1 / (1 - dropout_p)).max() <= 8 * np.finfo(np.float32).eps * weight.max()


@each_backend
def test_gradient_of_scores_uses_the_same_elements(backend):
    """A key whose element is dropped gets no gradient from dout but its share of the rest."""
    rng = np.random.default_rng(0)
    q = np.zeros((BATCH, Q, HEADS, K), np.float32)
    v = rng.standard_normal((BATCH, K, HEADS, 5)).astype(np.float32)
    dout = rng.standard_normal((BATCH, Q, HEADS, 5)).astype(np.float32)
    found = attend(backend, q, one_hot(K, K, HEADS), v, dout=dout, dropout_p=0.4, seed=3, scale=1.0)
    dp = np.einsum("bqhd,bkhd->bhqk", dout.astype(float), v.astype(float)) * expected(3, 0.4) / 0.6
    ds = (dp - dp.mean(axis=-1, keepdims=True)) / K
    difference = np.abs(found.dq.transpose(0, 2, 1, 3) - ds)
    assert difference.max() <= 64 * np.finfo(np.float32).eps * np.abs(ds).max()


@each_backend
def test_packed_counts_sequences_as_batch(backend):
    lens_q, lens_k = (30, 50), (64, 26)
    starts = [np.cumsum((0, *lens)).astype(np.int32) for lens in (lens_q, lens_k)]
    q, k = np.zeros((80, HEADS, 1), np.float32), np.zeros((90, HEADS, 1), np.float32)
    v = np.zeros((90, HEADS, 64), np.float32)
    for b in range(BATCH):
        v[starts[1][b] : starts[1][b + 1]] = np.eye(lens_k[b], 64)[:, None]
    found = attend(backend, q, k, v, dropout_p=0.3, seed=9, cu_seqlens_q=starts[0], cu_seqlens_k=starts[1])
    for b in range(BATCH):
        rows = found.out[starts[0][b] : starts[0][b + 1], :, : lens_k[b]]
        keep = expected(9, 0.3, lens_q[b], lens_k[b])[b]
        assert ((rows != 0) == keep.transpose(1, 0, 2)).all()


def test_rate_is_within_four_sigma():
    for dropout_p in (0.1, 0.5, 0.9):
        keep = expected(77, dropout_p)
        sigma = np.sqrt(dropout_p * (1 - dropout_p) / keep.size)
        assert abs(keep.mean() - (1 - dropout_p)) <= 4 * sigma


@pytest.mark.parametrize("backend", BITWISE)
def test_none_is_identical_to_no_dropout(backend):
    arrays = operands("float32", (2, 40), (2, 60))
    assert_same_bits(run(backend, arrays), run(backend, arrays, dropout_p=0.0, seed=4))


@pytest.mark.parametrize("backend", BITWISE)
def test_lse_is_that_of_all_elements(backend):
    arrays = operands("float32", (2, 40), (2, 60))
    plain, dropped = run(backend, arrays), run(backend, arrays, dropout_p=0.7, seed=4)
    assert plain["lse"].tobytes() == dropped["lse"].tobytes()
