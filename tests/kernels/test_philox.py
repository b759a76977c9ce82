"""Dropout's random words in emitted code are those of `semantics.rng`."""

from __future__ import annotations

import numpy as np
import pytest

from anyflash.kernels.llvm import philox
from anyflash.kernels.llvm.ir import I32, Builder, vec
from anyflash.semantics import rng
from kernels.functions import compiled, pointer, usable


@pytest.mark.parametrize(
    ("target", "lanes"), [(t, n) for t, n in (("avx512", 16), ("avx2", 8), ("neon", 4)) if usable(t)]
)
def test_words(target: str, lanes: int) -> None:
    random = np.random.default_rng(0)
    # group, head, batch, seed low, seed high: small ones, and ones beyond 31 bits
    scalars = np.concatenate(
        [random.integers(0, 99, (8, 5)), random.integers(0, 2**32, (24, 5)), [[0] * 5, [2**32 - 1] * 5]]
    ).astype(np.uint32)
    rows = np.concatenate([np.arange(lanes), random.integers(0, 2**31, lanes)]).astype(np.uint32)
    out = np.zeros((len(scalars), 2, 4, lanes), np.uint32)

    def emit(b: Builder, w) -> None:
        given, row_at, out_at = (pointer(b, x) for x in w)
        with b.loop(0, len(scalars)) as i:
            group, head, batch, low, high = (b.load(I32, b.at(given, i * 20 + 4 * n)) for n in range(5))
            for half in range(2):
                vector = b.load(vec(I32, lanes), b.at(row_at, 4 * lanes * half))
                words = philox.words(b, group, vector, head, batch, (low, high))
                for n, word in enumerate(words):
                    b.store(
                        word, b.at(out_at, i * out.strides[0] + half * out.strides[1] + n * out.strides[2])
                    )

    compiled(target, 3, emit)(scalars, rows, out)
    for i, (group, head, batch, low, high) in enumerate(scalars):
        counter = [(group, row, head, batch) for row in rows]
        exact = rng.philox4x32(counter, (low, high)).reshape(2, lanes, 4).swapaxes(1, 2)
        assert np.array_equal(out[i], exact), scalars[i]


@pytest.mark.skipif(not usable("avx2"), reason="emits AVX2 code")
@pytest.mark.parametrize("threshold", [0, 1, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 1])
def test_kept_compares_without_sign(threshold: int) -> None:
    words = np.array([0, 1, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 2, 2**32 - 1, 5], np.uint32)
    out = np.zeros(8, np.int32)

    def emit(b: Builder, w) -> None:
        keep = philox.kept(b, b.load(vec(I32, 8), pointer(b, w[0])), b.to_int(w[1], I32))
        b.store(b.cast("zext", keep, I32), pointer(b, w[2]))

    compiled("avx2", 3, emit)(words, threshold, out)
    assert np.array_equal(out.astype(bool), words >= threshold)
