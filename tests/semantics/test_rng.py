"""Philox against published vectors, and dropout's place in its counters."""

from __future__ import annotations

import numpy as np
import pytest

from anyflash.semantics.rng import dropout_factors, philox4x32, threshold, words

ONES = "ffffffff"
PI = ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0")

# Counter, key and result from `kat_vectors` of the authors' library Random123.
VECTORS = [
    (7, " ".join(["00000000"] * 4), "00000000 00000000", "5f6fb709 0d893f64 4f121f81 4f730a48"),
    (7, " ".join([ONES] * 4), f"{ONES} {ONES}", "5207ddc2 45165e59 4d8ee751 8c52f662"),
    (7, *PI, "4dfccaba 190a87f0 c47362ba b6b5242a"),
    (10, " ".join(["00000000"] * 4), "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    (10, " ".join([ONES] * 4), f"{ONES} {ONES}", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (10, *PI, "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def read(text):
    return np.array([int(word, 16) for word in text.split()], np.uint32)


@pytest.mark.parametrize(("rounds", "counter", "key", "expected"), VECTORS)
def test_published_vectors(rounds, counter, key, expected):
    np.testing.assert_array_equal(philox4x32(read(counter), read(key), rounds), read(expected))


def test_an_element_depends_on_its_place_and_the_seed_alone():
    seed = 2**40 + 3
    all_words = words(seed, batch=2, head=5, rows=9, keys=11)
    np.testing.assert_array_equal(words(seed, 2, 5, 4, 6), all_words[:4, :6])
    row, k = 7, 10
    alone = philox4x32([k >> 2, row, 5, 2], [seed & 0xFFFFFFFF, seed >> 32])[k & 3]
    assert all_words[row, k] == alone
    for other in (words(seed + 1, 2, 5, 9, 11), words(seed, 3, 5, 9, 11), words(seed, 2, 4, 9, 11)):
        assert (other != all_words).mean() > 0.99


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9])
def test_share_of_kept_elements(p):
    factors = dropout_factors(p, 7, 0, 0, 300, 301)
    kept = factors > 0
    sigma = np.sqrt(p * (1 - p) / kept.size)
    assert abs(kept.mean() - (1 - p)) <= 5 * sigma
    assert np.unique(factors[kept]).tolist() == [1 / (1 - p)]


def test_edges():
    assert threshold(0.0) == 0
    assert threshold(1.0) == 2**32
    assert not dropout_factors(1.0, 7, 0, 0, 3, 5).any()
    assert words(-1, 0, 0, 1, 4).tolist() == words(2**64 - 1, 0, 0, 1, 4).tolist()
    assert words(1, 0, 0, 0, 4).shape == (0, 4)
    assert words(1, 0, 0, 3, 0).shape == (3, 0)
