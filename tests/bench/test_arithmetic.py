"""Operations and bytes of a cell, against counting every pair."""

from __future__ import annotations

import numpy as np
import pytest

from anyflash.bench import arithmetic, inputs
from anyflash.bench.cells import Cell
from anyflash.bench.variants import VARIANTS, WINDOW
from bench import tiny

N = 600  # longer than the window


def allowed(variant: str, documents: np.ndarray) -> np.ndarray:
    """(N, N) bool, spelled with numpy."""
    q, k = np.ogrid[:N, :N]
    if variant in ("full", "bias", "evoformer"):
        return np.ones((N, N), bool)
    causal = k <= q
    if variant == "window":
        return causal & (k > q - WINDOW)
    return causal & (documents[q] == documents[k]) if variant == "documents" else causal


@pytest.mark.parametrize("variant", VARIANTS)
def test_pairs_are_those_that_the_mask_allows(variant: str) -> None:
    made = inputs.make(tiny.cell(variant, seqlen_q=N, batch=2, heads=4))
    documents = made.tables["documents"].numpy() if "documents" in made.tables else np.zeros(N)
    assert arithmetic.pairs(made) == 2 * 4 * allowed(variant, documents).sum()


@pytest.mark.parametrize("at_once", [1, 1000, 1 << 30])
def test_pairs_do_not_depend_on_the_block(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(arithmetic, "_PAIRS_AT_ONCE", at_once)
    assert arithmetic.pairs(inputs.make(tiny.cell("causal", seqlen_q=50))) == 2 * 4 * 50 * 51 // 2


@pytest.mark.parametrize(("variant", "pairs"), [("full", 9 + 0 + 25), ("causal", 6 + 0 + 15)])
def test_pairs_of_packed_sequences(variant: str, pairs: int) -> None:
    packed = Cell("tiny", 3, 2, 5, 8, variant=variant, lengths=(3, 0, 5))
    assert arithmetic.pairs(inputs.make(packed)) == 2 * pairs


@pytest.mark.parametrize(("backward", "products"), [(False, 2), (True, 7)])
def test_flops_are_two_for_each_pair_and_element(backward: bool, products: int) -> None:
    made = inputs.make(tiny.cell(backward=backward, seqlen_q=32, seqlen_k=64))
    assert arithmetic.flops(made) == 2 * products * (2 * 4 * 32 * 64) * 16


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2), ("float16", 2)])
def test_bytes_of_grouped_heads(dtype: str, size: int) -> None:
    made = inputs.make(tiny.cell(dtype=dtype, heads=8, heads_kv=2, seqlen_q=1, seqlen_k=100))
    queries, keys = 2 * 1 * 8 * 16, 2 * 100 * 2 * 16
    assert arithmetic.nbytes(made) == size * 2 * (queries + keys)
