"""Masks exactly, with no tolerance: what is not zero is what the mask allows.

The reference keeps whole score matrices and walks over sequences in Python, so it gets a sample.
"""

from __future__ import annotations

import numpy as np
import pytest

from anyflash import masks
from anyflash.contract.backends import present
from anyflash.contract.direct import attend
from anyflash.contract.exact import (
    MOST,
    UNBOUNDED,
    by_tables,
    check,
    check_backward,
    edge_cells,
    every_cell,
    plain_cells,
)

BACKENDS = present()
CELLS = every_cell()
CHUNK = 8000
SAMPLED = {"reference": 100}

KEYWORDS = {
    "none": ((None, None, 0), {}),
    "causal": ((None, 0, 0), {"causal": True}),
    "window_both_open": ((None, None, 0), {"window": (None, None)}),
    **{
        f"window_{left}_{right}": ((left, right, 0), {"window": (left, right)})
        for left in (None, 0, 1, 4, 16)
        for right in (None, 0, 1, 4, 16)
        if (left, right) != (None, None)
    },
    "window_causal": ((3, 0, 0), {"window": (3, 5), "causal": True}),
    "causal_left": ((6, 0, 0), {"window": (6, None), "causal": True}),
    "prefix": ((None, 0, 5), {"mask": masks.prefix(5) | masks.causal()}),
    "prefix_window": ((2, 3, 4), {"mask": masks.window(2, 3) | masks.prefix(4)}),
    "not_causal": ((-1, UNBOUNDED, 0), {"mask": ~masks.causal()}),
    "prefix_function": ((None, 0, 3), {"mask": lambda at: (at.k <= at.q) | (at.k < 3)}),
    "window_function": ((4, 4, 0), {"mask": lambda at: abs(at.q - at.k) <= 4}),
}


def sample(backend, cells, also=1):
    return cells[:: SAMPLED.get(backend, 1) * also]


def failures(complaints):
    return f"{len(complaints)} cells, among them: " + "; ".join(complaints[:5])


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_window_and_prefix_forward(backend):
    cells = sample(backend, CELLS)
    wrong = [
        said for i in range(0, len(cells), CHUNK) for said in check(backend, cells[i : i + CHUNK], by_tables)
    ]
    assert not wrong, failures(wrong)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_window_and_prefix_backward(backend):
    cells = sample(backend, CELLS)
    wrong = [
        said
        for i in range(0, len(cells), CHUNK)
        for said in check_backward(backend, cells[i : i + CHUNK], by_tables)
    ]
    assert not wrong, failures(wrong)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sample_in_other_dtypes(backend, dtype):
    cells = sample(backend, CELLS, also=29)
    wrong = check(backend, cells, by_tables, dtype) + check_backward(backend, cells, by_tables, dtype)
    assert not wrong, failures(wrong)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths_at_the_edges_of_tiles(backend):
    count = 10 if backend in SAMPLED else 300
    wrong = check(backend, edge_cells(count, 290, seed=1), by_tables)
    wrong += check_backward(backend, edge_cells(count // 2, 290, seed=2), by_tables)
    assert not wrong, failures(wrong)


@pytest.mark.parametrize("form", KEYWORDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_keyword_forms_packed(backend, form):
    bounds, keywords = KEYWORDS[form]
    cells = plain_cells(*bounds).sorted()
    wrong = check(backend, cells, lambda _: keywords) + check_backward(backend, cells, lambda _: keywords)
    assert not wrong, failures(wrong)


@pytest.mark.parametrize("form", ["causal", "window_4_1", "window_None_4", "prefix", "window_causal"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_keyword_forms_dense(backend, form):
    """The same in arrays with a batch axis, one call for each pair of lengths."""
    bounds, keywords = KEYWORDS[form]
    cells = sample(backend, plain_cells(*bounds).sorted())
    for part, allowed in cells.allowed():
        q_len, k_len = int(cells.q_len[part][0]), int(cells.k_len[part][0])
        q, k = (np.zeros((1, n, 1, 1), np.float32) for n in (q_len, k_len))
        v = np.eye(MOST, dtype=np.float32)[None, :k_len, None, :]
        found = attend(backend, q, k, v, **keywords)
        weights, count = found.out[0, :, 0, :k_len], allowed[0].sum(axis=1)
        assert ((weights != 0) == allowed[0]).all(), (q_len, k_len)
        assert (np.rint(weights * count[:, None]) == allowed[0]).all(), (q_len, k_len)
        assert (np.rint(np.exp(found.lse[0, 0])) == count).all(), (q_len, k_len)


def test_cells_are_all_there():
    """18 x 18 lengths with 19 x 19 windows, and with 18 causal prefixes."""
    assert len(CELLS) == 18 * 18 * (19 * 19 + 18)
    assert sum(len(allowed) for _, allowed in CELLS.allowed()) == len(CELLS)
