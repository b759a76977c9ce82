"""Page tables were trusted: an entry out of range was read out of bounds (flash-attention #2709; onnxruntime
PR 32391), and pages or tails that belong to nobody reached results.

That results are right in every form of cache is tested in tests/kvcache; here, what nobody may read.
"""

from __future__ import annotations

import numpy as np
import pytest

import anyflash as af
from anyflash.contract.backends import present

PAGES, SIZE, HEADS, D = 14, 8, 2, 16
LENGTHS = (0, 1, 8, 19, 24)
TABLE = np.array([[9, 9, 9], [3, 9, 9], [5, 9, 9], [0, 7, 2], [11, 1, 6]], np.int32)
"""Page 9 stands where no page is needed; 4, 8, 10, 12 and 13 belong to nobody."""

each_backend = pytest.mark.parametrize("backend", present())


def pages(dtype, outside):
    """A cache whose keys are drawn, with `outside` wherever there is none."""
    rng = np.random.default_rng(0)
    made = np.full((2, PAGES, SIZE, HEADS, D), outside, dtype)
    for row, length in zip(TABLE, LENGTHS, strict=True):
        for slot in range(length):
            made[:, row[slot // SIZE], slot % SIZE] = rng.standard_normal((2, HEADS, D))
    return made


def call(backend, made, table=TABLE, lengths=LENGTHS, queries=2, **keywords):
    q = np.random.default_rng(1).standard_normal((len(lengths), queries, 4, D)).astype(made.dtype)
    cache = af.KVCache(*made, seqlens=np.array(lengths, np.int32), block_table=table)
    return af.attention_kvcache(q, cache, return_lse=True, backend=backend, **keywords)


@each_backend
@pytest.mark.parametrize("outside", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("queries", [1, 2, 20])
@pytest.mark.parametrize("causal", [False, True])
def test_unused_pages_and_tails(backend, outside, queries, causal):
    clean = call(backend, pages(np.float32, 0), queries=queries, causal=causal)
    dirty = call(backend, pages(np.float32, outside), queries=queries, causal=causal)
    for a, b in zip(clean, dirty, strict=True):
        assert a.tobytes() == b.tobytes()
    assert (clean[0][0] == 0).all()
    assert (clean[1][0] == -np.inf).all()


@each_backend
@pytest.mark.parametrize("entry", [-1, PAGES, PAGES + 1000, -(2**31), 2**31 - 1])
def test_entry_that_is_no_page(backend, entry):
    table = TABLE.copy()
    table[3, 1] = entry
    with pytest.raises(af.InvalidCall, match="block_table"):
        call(backend, pages(np.float32, 0), table)


@each_backend
def test_full_to_the_last_slot_and_one_beyond(backend):
    """A positive control at exact capacity, and the refusal behind it."""
    made = pages(np.float32, 0)
    out, _ = call(backend, made, lengths=(24, 24, 24, 24, 24))
    assert np.isfinite(out).all()
    with pytest.raises(af.InvalidCall, match="seqlens"):
        call(backend, made, lengths=(0, 1, 8, 19, 25))
