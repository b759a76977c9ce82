"""How the keys of a decode step were split followed from the batch, and so did the rounding of its result
(flash-attention #1897, PR 2450; flashinfer PR 1675).
"""

from __future__ import annotations

import numpy as np
import pytest

from anyflash.contract.direct import attend
from contract.calls import BITWISE, operands

each_backend = pytest.mark.parametrize("backend", BITWISE)


@each_backend
@pytest.mark.parametrize("queries", [1, 2, 4])
@pytest.mark.parametrize("keys", [100, 1023, 5000])
def test_alone_as_in_any_batch_with_any_threads(backend, queries, keys, monkeypatch):
    arrays = operands("float32", (7, queries), (7, keys))
    q, k, v = (arrays[name] for name in "qkv")
    monkeypatch.setenv("ANYFLASH_NUM_THREADS", "1")
    alone = [attend(backend, q[b : b + 1], k[b : b + 1], v[b : b + 1], causal=True) for b in range(7)]
    for threads in (1, 2, 5, 16):
        monkeypatch.setenv("ANYFLASH_NUM_THREADS", str(threads))
        together = attend(backend, q, k, v, causal=True)
        for b in range(7):
            assert together.out[b].tobytes() == alone[b].out[0].tobytes(), (threads, b)
            assert together.lse[b].tobytes() == alone[b].lse[0].tobytes(), (threads, b)


@each_backend
def test_packed_beside_longer_sequences(backend):
    """The split of a sequence follows from its own keys."""
    lens_k = (300, 4000, 1, 1500)
    starts = np.cumsum((0, *lens_k)).astype(np.int32)
    arrays = operands("float32", (4,), (sum(lens_k),))
    one = np.arange(5, dtype=np.int32)
    together = attend(backend, **{n: arrays[n] for n in "qkv"}, cu_seqlens_q=one, cu_seqlens_k=starts)
    for b in range(4):
        keys = slice(*starts[b : b + 2])
        own = {"q": arrays["q"][b : b + 1], "k": arrays["k"][keys], "v": arrays["v"][keys]}
        lengths = {"cu_seqlens_q": one[:2], "cu_seqlens_k": np.array([0, lens_k[b]], np.int32)}
        alone = attend(backend, **own, **lengths)
        assert together.out[b].tobytes() == alone.out[0].tobytes(), b
        assert together.lse[:, b].tobytes() == alone.lse[:, 0].tobytes(), b
