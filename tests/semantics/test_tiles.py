"""Tile classes against the mask written out: always sound, and exact for masks that promise to skip."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anyflash.semantics.evaluate import evaluate
from anyflash.semantics.expr import At, Table
from anyflash.semantics.mask import Mask, causal, dense, documents, prefix, window
from anyflash.semantics.text import bind
from anyflash.semantics.tiles import EMPTY, FULL, PARTIAL, Dims, tile_classes
from semantics.expressions import ARRAYS, bools, slotted

SORTED = np.repeat([0, 1, 2, 5], [3, 4, 2, 8])


def classes_of(m, dims, block_q, block_k):
    (expr,), tables = bind([m(At())])
    return tile_classes(expr, dims, [t.array for t in tables], block_q, block_k)


def written_out(allowed, block_q, block_k):
    """The true classes of (batch, heads, q, k) booleans; a tile that runs past the keys is not full."""
    *_, n_q, n_k = allowed.shape
    shape = (*allowed.shape[:2], -(-n_q // block_q), -(-n_k // block_k))
    found = np.zeros(shape, np.int8)
    for i, j in itertools.product(range(shape[2]), range(shape[3])):
        tile = allowed[:, :, i * block_q : (i + 1) * block_q, j * block_k : (j + 1) * block_k]
        any_, all_ = tile.any((2, 3)), tile.all((2, 3)) & ((j + 1) * block_k <= n_k)
        found[:, :, i, j] = np.where(all_, FULL, np.where(any_, PARTIAL, EMPTY))
    return found


EXACT = {
    "causal": lambda n_k: causal(),
    "window": lambda n_k: window(3, 1),
    "causal window": lambda n_k: causal() & window(5),
    "prefix": lambda n_k: prefix(5),
    "prefix or causal": lambda n_k: prefix(5) | causal(),
    "not causal": lambda n_k: ~causal(),
    "ascending documents": lambda n_k: documents(SORTED[:n_k]),
    "nothing": lambda n_k: Mask(lambda at: False),
}


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("size", [(17, 17), (9, 17), (17, 9), (1, 13), (13, 1), (16, 16)], ids=str)
def test_exact(name, size):
    m = EXACT[name](size[1])
    for block in [(1, 1), (4, 4), (8, 2), (3, 5), (32, 32)]:
        got = classes_of(m, Dims(1, 1, *size), *block)
        np.testing.assert_array_equal(got, written_out(m.allowed(*size), *block), err_msg=str(block))


@given(bools(3).map(slotted), st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(1, 4))
@settings(max_examples=200, deadline=None)
def test_sound_for_any_condition(expr, n_q, n_k, block_q, block_k):
    dims = Dims(2, 3, n_q, n_k)
    rows = np.arange(n_q)[:, None]
    env = {
        "batch": np.arange(2)[:, None, None, None],
        "head": np.arange(3)[:, None, None],
        "row": rows,
        "q": rows + n_k - n_q,
        "k": np.arange(n_k),
        "q_len": n_q,
        "k_len": n_k,
        "score": np.random.default_rng(0).normal(size=(n_q, n_k)),
    }
    allowed = np.broadcast_to(evaluate(expr, env, ARRAYS), (2, 3, n_q, n_k))
    truth = written_out(allowed, block_q, block_k)
    got = np.broadcast_to(tile_classes(expr, dims, ARRAYS, block_q, block_k), truth.shape)
    assert ((got == PARTIAL) | (got == truth)).all()


def test_sequences_of_their_own_lengths():
    q_len, k_len = np.array([9, 0, 4, 3]), np.array([9, 5, 6, 0])
    m = documents(SORTED[:9]) & causal()
    got = classes_of(m, Dims(4, 1, q_len, k_len), 2, 2)
    assert got.shape == (4, 1, 5, 5)
    for b in range(4):
        if q_len[b] and k_len[b]:
            alone = classes_of(m, Dims(1, 1, q_len[b], k_len[b]), 2, 2)[0]
            rows, keys = alone.shape[1:]
            np.testing.assert_array_equal(got[b, :, :rows, :keys], alone)
            assert not got[b, :, rows:].any()
            assert not got[b, :, :, keys:].any()
        else:
            assert not got[b].any()


@pytest.mark.parametrize(
    ("m", "shape"),
    [
        (causal(), (1, 1)),
        (documents(np.stack([SORTED, SORTED])), (2, 1)),
        (prefix(np.array([2, 9])), (2, 1)),
        (Mask(lambda at: (at.head > 0) | (at.k <= at.q)), (1, 3)),
        (dense(np.ones((2, 3, 17, 17), bool)), (2, 3)),
    ],
    ids=lambda x: repr(x) if isinstance(x, Mask) else "",
)
def test_axes_on_which_nothing_depends_are_collapsed(m, shape):
    assert classes_of(m, Dims(2, 3, 17, 17), 4, 4).shape == (*shape, 5, 5)


def test_no_mask_is_full_up_to_the_ragged_edge():
    got = tile_classes(None, Dims(2, 3, 5, 7), (), 2, 2)
    np.testing.assert_array_equal(got, np.tile([FULL, FULL, FULL, PARTIAL], (3, 1))[None, None])


def test_documents_skip_work():
    ids = np.repeat(np.arange(16), 64)
    got = classes_of(documents(ids) & causal(), Dims(1, 1, 1024, 1024), 64, 64)[0, 0]
    np.testing.assert_array_equal(got, np.eye(16, dtype=np.int8))


def test_nan_in_a_table_makes_no_false_promise():
    table = np.array([0.0, np.nan, 1.0, 1.0])
    got = classes_of(Mask(lambda at: Table(table, "float")[at.k] <= np.inf), Dims(1, 1, 4, 4), 2, 2)
    np.testing.assert_array_equal(got[0, 0, 0, 0], PARTIAL)
