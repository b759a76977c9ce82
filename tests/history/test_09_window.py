"""Sliding windows were off by one, or their sides were swapped (transformers #29176, #29623, #39408; vllm
#3385; xformers #923; Megatron-Bridge PR 2656; flash-attention #1133).

(left, right) are counts of keys before and after the query's position, both included: left = 0 is the query's
own.
"""

from __future__ import annotations

import numpy as np
import pytest

from anyflash.contract.backends import present
from anyflash.contract.direct import attend

DRAWN = {
    (0, 0): ["1000", "0100", "0010", "0001"],
    (1, 0): ["1000", "1100", "0110", "0011"],
    (0, 1): ["1100", "0110", "0011", "0001"],
    (2, None): ["1111", "1111", "1111", "0111"],
    (None, 0): ["1000", "1100", "1110", "1111"],
    (None, None): ["1111", "1111", "1111", "1111"],
}
WIDTHS = (1, 2, 7, 8, 9, 47, 48, 49, 63, 64, 65, 127, 128, 129)


def weights(backend, q_len, k_len, **keywords):
    q, k = np.zeros((1, q_len, 1, 4), np.float32), np.zeros((1, k_len, 1, 4), np.float32)
    v = np.eye(k_len, dtype=np.float32)[None, :, None]
    return attend(backend, q, k, v, **keywords).out[0, :, 0]


@pytest.mark.parametrize("window", DRAWN, ids=str)
@pytest.mark.parametrize("backend", present())
def test_as_drawn(backend, window):
    expected = np.array([[c == "1" for c in row] for row in DRAWN[window]])
    assert ((weights(backend, 4, 4, window=window) != 0) == expected).all()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("backend", present())
def test_a_causal_window_of_n_tokens(backend, width):
    """Hosts say "the last n tokens, the query's own included": that is (n - 1, 0), n keys once there are
    n."""
    found = weights(backend, 200, 200, window=(width - 1, 0))
    assert (found != 0).sum(axis=1).tolist() == [min(i + 1, width) for i in range(200)]
    assert np.flatnonzero(found[150]).tolist() == list(range(max(0, 151 - width), 151))


@pytest.mark.parametrize("backend", present())
def test_sides_are_not_swapped(backend):
    found = weights(backend, 100, 100, window=(30, 2)) != 0
    assert np.flatnonzero(found[50]).tolist() == list(range(20, 53))


@pytest.mark.parametrize("backend", present())
def test_position_counts_from_the_last_key(backend):
    """With more keys than queries, row i is at key i + 60."""
    found = weights(backend, 40, 100, window=(3, 1)) != 0
    assert np.flatnonzero(found[0]).tolist() == [57, 58, 59, 60, 61]


@pytest.mark.parametrize("backend", present())
def test_causal_takes_the_right_side_away(backend):
    a = weights(backend, 50, 60, window=(5, 9), causal=True)
    b = weights(backend, 50, 60, window=(5, 0))
    assert ((a != 0) == (b != 0)).all()
