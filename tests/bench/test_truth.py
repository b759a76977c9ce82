"""The bench's own attention against the definition, which shares no line with it, and in blocks against
whole."""

from __future__ import annotations

import pytest
import torch

import anyflash as af
from anyflash.bench import inputs, ours, truth
from anyflash.bench.cells import Cell
from anyflash.bench.variants import VARIANTS
from bench import tiny

CELLS = [
    *(tiny.cell(variant, "float64", backward=True) for variant in VARIANTS),
    tiny.cell("causal", "float64", backward=True, heads_kv=2),
    tiny.cell("full", "float64", backward=True, seqlen_k=80),
    Cell("tiny", 3, 2, 9, 8, "float64", "causal", True, lengths=(9, 1, 4)),
    *(
        tiny.cell("causal", "float64", heads_kv=2, seqlen_q=queries, seqlen_k=80, cache=cache)
        for queries in (1, 3)
        for cache in ("dense", 1, 16, 256)
    ),
]


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_agrees_with_the_definition(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    made = inputs.make(cell)
    for name in ("attention", "attention_varlen", "attention_kvcache"):
        call = getattr(af, name)
        monkeypatch.setattr(af, name, lambda *a, call=call, **kw: call(*a, backend="reference", **kw))
    step = ours.prepare(made)
    defined = step.results(step.call())
    found = truth.attention(made, truth.EXACT, ours.kept(made))
    assert found.keys() == defined.keys()
    for name, array in found.items():
        # Both sum at most thousands of float64 terms of size 1.
        torch.testing.assert_close(
            array, defined[name], rtol=1e-11, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("variant", ["causal", "evoformer", "bias"])
def test_blocks_change_nothing(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = inputs.make(tiny.cell(variant, backward=True))
    whole = truth.attention(made, truth.EXACT)
    monkeypatch.setattr(truth, "_SCORES_AT_ONCE", 7 * 2 * 4 * 48)
    for name, array in truth.attention(made, truth.EXACT).items():
        torch.testing.assert_close(array, whole[name])


def test_plain_rounds_every_step() -> None:
    made = inputs.make(tiny.cell(dtype="bfloat16"))
    out = truth.attention(made, truth.plain("bfloat16"))["out"]
    assert out.dtype is torch.float32
    assert torch.equal(out, out.to(torch.bfloat16).float())
    assert not torch.equal(out, truth.attention(made, truth.plain("float32"))["out"])
