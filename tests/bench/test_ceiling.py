"""The ceilings do what they are named after."""

from __future__ import annotations

import numpy as np
import pytest

from anyflash.bench import ceiling
from anyflash.core import threads
from anyflash.kernels.llvm.target import host_target


def _words(seed: int, chunks: int) -> np.ndarray:
    """Random bytes at an address that vectors may be loaded from."""
    room = np.random.default_rng(seed).integers(0, 256, chunks * ceiling.CHUNK + ceiling.ALIGNMENT, np.uint8)
    first = -room.ctypes.data % ceiling.ALIGNMENT
    return room[first : first + chunks * ceiling.CHUNK]


@pytest.mark.parametrize("chunks", [1, 3])
def test_every_word_is_read(chunks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceiling, "num_threads", lambda: 1)
    array = _words(0, chunks)
    read, left = ceiling.reader(array)
    read()
    firsts = array.view(np.int64)[:: host_target().vector_bytes // 8].reshape(chunks, -1)
    assert left[0] == np.bitwise_xor.reduce(firsts[-1])


def test_threads_share_the_chunks() -> None:
    array = _words(1, 4)
    read, left = ceiling.reader(array)
    for _ in range(3):
        read()
    assert threads.num_threads() >= 1
    assert left[0] != 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_products(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceiling, "_SIZES", (64,))
    ceiling._products.cache_clear()
    limit = ceiling.products(dtype)
    ceiling._products.cache_clear()
    assert limit.amount == 2 * 64**3
    assert limit.name in {f"GEMM {dtype} 64", "GEMM float32 64"}
    limit.call()
