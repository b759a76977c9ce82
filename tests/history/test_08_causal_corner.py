"""Causal masks were aligned to the top left where the bottom right was meant, or a verifier shared the error
(flash-attention #282, #517; cutlass #2336; onnxruntime #28904; ROCm/flash-attention #158).

Query row i sits at key position i + keys - queries, so the last query sees every key.
"""

from __future__ import annotations

import numpy as np
import pytest

from anyflash.contract.backends import present
from anyflash.contract.direct import attend

DRAWN = {
    (2, 5): ["11110", "11111"],
    (5, 2): ["00", "00", "00", "10", "11"],
    (3, 3): ["100", "110", "111"],
    (1, 4): ["1111"],
    (4, 1): ["0", "0", "0", "1"],
}
CORNERS = [(q, k) for q in (1, 2, 47, 64, 100) for k in (1, 3, 48, 65, 130)]


def seen(backend, q_len, k_len, **keywords):
    q, k = np.zeros((1, q_len, 1, 4), np.float32), np.zeros((1, k_len, 1, 4), np.float32)
    v = np.eye(k_len, dtype=np.float32)[None, :, None]
    return attend(backend, q, k, v, **keywords).out[0, :, 0] != 0


@pytest.mark.parametrize("lens", DRAWN, ids=str)
@pytest.mark.parametrize("backend", present())
def test_as_drawn(backend, lens):
    expected = np.array([[c == "1" for c in row] for row in DRAWN[lens]])
    assert (seen(backend, *lens, causal=True) == expected).all()


@pytest.mark.parametrize("lens", CORNERS, ids=str)
@pytest.mark.parametrize("backend", present())
def test_last_query_sees_all_and_each_earlier_one_less(backend, lens):
    q_len, k_len = lens
    counts = seen(backend, q_len, k_len, causal=True).sum(axis=1)
    assert counts.tolist() == [max(0, k_len - (q_len - 1 - i)) for i in range(q_len)]


@pytest.mark.parametrize("backend", present())
def test_top_left_can_be_asked_for(backend):
    """The other corner is a mask over rows."""
    found = seen(backend, 3, 5, mask=lambda at: at.k <= at.row)
    assert found.astype(int).tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]


@pytest.mark.parametrize("backend", present())
def test_packed_sequences_each_have_their_corner(backend):
    lens_q, lens_k = (2, 4, 3), (5, 2, 3)
    starts = [np.cumsum((0, *lens)).astype(np.int32) for lens in (lens_q, lens_k)]
    q, k = np.zeros((9, 1, 4), np.float32), np.zeros((10, 1, 4), np.float32)
    v = np.eye(10, dtype=np.float32)[:, None]
    found = attend(backend, q, k, v, causal=True, cu_seqlens_q=starts[0], cu_seqlens_k=starts[1])
    counts = (found.out[:, 0] != 0).sum(axis=1)
    assert counts.tolist() == [4, 5, 0, 0, 1, 2, 1, 2, 3]


@pytest.mark.parametrize("backend", present())
def test_keys_in_use_move_the_corner(backend):
    """seqused_k shortens the sequence: the last query sits at the last key in use."""
    q, k = np.zeros((2, 1, 4), np.float32), np.zeros((6, 1, 4), np.float32)
    v = np.eye(6, dtype=np.float32)[:, None]
    found = attend(
        backend, q, k, v, causal=True, cu_seqlens_q=np.array([0, 2]), cu_seqlens_k=np.array([0, 6]),
        seqused_k=np.array([4]),
    )  # fmt: skip
    assert (found.out[:, 0] != 0).astype(int).tolist() == [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0]]
