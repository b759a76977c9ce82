"""Philox4x32 with 7 rounds (Salmon, Moraes, Dror, Shaw 2011), vectorised, for checking which elements dropout
keeps."""

from __future__ import annotations

import numpy as np

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW, _32 = np.uint64(0xFFFFFFFF), np.uint64(32)


def philox(counter: tuple[np.ndarray, ...], key: tuple[int, int], rounds: int = 7) -> tuple[np.ndarray, ...]:
    """Four words of 32 bits, as uint64 arrays, for four counter words that broadcast together."""
    a, b, c, d = (np.asarray(word, np.uint64) for word in counter)
    x, y = key
    for _ in range(rounds):
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = (
            (second >> _32) ^ b ^ np.uint64(x),
            second & _LOW,
            (first >> _32) ^ d ^ np.uint64(y),
            first & _LOW,
        )
        x, y = (x + _WEYL[0]) & 0xFFFFFFFF, (y + _WEYL[1]) & 0xFFFFFFFF
    return a, b, c, d


def kept(
    seed: int, dropout_p: float, batch: int, head: np.ndarray, row: np.ndarray, k: np.ndarray
) -> np.ndarray:
    """Which (head, row, k) survive dropout."""
    batch_word = np.zeros_like(head) + batch
    words = np.broadcast_arrays(
        *philox((k >> 2, row, head, batch_word), (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF))
    )
    chosen = np.choose(np.broadcast_to(k & 3, words[0].shape), words)
    return chosen >= np.uint64(round(dropout_p * 2**32))
