"""A JIT engine that several threads entered at once crashed or gave one's kernel to another (tvm PR 3158;
llvmlite PR 1421).
"""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from anyflash.contract.direct import attend
from anyflash.semantics.expr import where
from contract.calls import BITWISE, operands

THREADS, KERNELS = 16, 24
each_backend = pytest.mark.parametrize("backend", BITWISE)


def softmax_picks(backend, i):
    """The one key that a score function of its own leaves; v counts keys."""
    arrays = operands("float32", (1, 8), (1, 9))
    v = np.broadcast_to(np.arange(9, dtype=np.float32)[None, :, None, None], (1, 9, 2, 4))
    score = lambda s, at: where(at.k == i % 9, s + float(i), float("-inf"))
    found = attend(backend, arrays["q"], arrays["k"], v, score=score)
    return np.unique(found.out).tolist()


@each_backend
def test_different_kernels_at_once(backend):
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(lambda i: softmax_picks(backend, i), range(KERNELS)))
    assert found == [[float(i % 9)] for i in range(KERNELS)]


@each_backend
def test_the_same_kernel_at_once(backend):
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(lambda _: softmax_picks(backend, 100), range(KERNELS)))
    assert found == [[float(100 % 9)]] * KERNELS


@each_backend
def test_kernels_outlive_what_made_them(backend):
    assert softmax_picks(backend, 200) == [2.0]
    gc.collect()
    assert softmax_picks(backend, 200) == [2.0]
