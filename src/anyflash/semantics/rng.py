"""Dropout's random numbers, a function of seed and place alone: the same on every device and tiling.

Philox4x32 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", 2011) is a keyed
bijection of 128-bit counters. Seven rounds pass BigCrush (their table 2). The key is the seed; the counter of
element (batch, head, row, k) is (k // 4, row, head, batch), and word k % 4 of the four it gives is the
element's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

ROUNDS = 7

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)

Words = NDArray[np.uint32]


def philox4x32(counter: ArrayLike, key: ArrayLike, rounds: int = ROUNDS) -> Words:
    """Four random words for each counter: (..., 4) and (..., 2) of 32-bit words to (..., 4) uint32."""
    c0, c1, c2, c3 = np.moveaxis(np.asarray(counter, np.uint64), -1, 0)
    k0, k1 = np.moveaxis(np.asarray(key, np.uint64), -1, 0)
    for _ in range(rounds):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (product1 >> _HALF) ^ c1 ^ k0,
            product1 & _LOW,
            (product0 >> _HALF) ^ c3 ^ k1,
            product0 & _LOW,
        )
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    return np.stack(np.broadcast_arrays(c0, c1, c2, c3), axis=-1).astype(np.uint32)


def words(seed: int, batch: int, head: int, rows: int, keys: int) -> Words:
    """(rows, keys) uint32: the number of every element of one (batch, head). `seed` counts modulo 2 ** 64."""
    groups = (keys + 3) // 4
    counter = np.zeros((rows, groups, 4), np.uint64)
    counter[..., 0] = np.arange(groups)
    counter[..., 1] = np.arange(rows)[:, None]
    counter[..., 2] = head
    counter[..., 3] = batch
    key = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    return philox4x32(counter, key).reshape(rows, groups * 4)[:, :keys]


def threshold(dropout_p: float) -> int:
    """An element is kept if its word is at least this, in 0 .. 2 ** 32."""
    return round(dropout_p * 2**32)


def dropout_factors(dropout_p: float, seed: int, batch: int, head: int, rows: int, keys: int) -> NDArray[Any]:
    """(rows, keys) float64: 1 / (1 - dropout_p) where an element is kept, 0 where it is dropped."""
    kept = words(seed, batch, head, rows, keys) >= np.uint64(threshold(dropout_p))
    return np.where(kept, 1 / (1 - dropout_p), 0.0) if dropout_p < 1 else np.zeros((rows, keys))
