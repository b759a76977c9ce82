"""The formulas of the grid, each in two spellings: anyflash's keywords, and functions of torch tensors.

The torch spelling has FlexAttention's signatures, score(score, b, h, q, k) and mask(b, h, q, k) on index
tensors. The float64 truth, the dense masks of scaled_dot_product_attention and FlexAttention itself are all
made from it, so that everybody but us computes from one text, and we from another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import anyflash as af
from anyflash.bench.cells import Cell

Tables = Mapping[str, Tensor]
ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
WINDOW = 256
SOFTCAP = 30.0


@dataclass(frozen=True, slots=True)
class Variant:
    """One formula.

    keywords   (tables, as arrays of the frontend) -> arguments of anyflash.attention
    make       (cell, generator) -> tables by name, what the formula reads beside q, k and v
    causal     every query sees keys up to its own position, beside `mask`
    mask       tables -> which pairs are allowed
    score      tables -> new score from old; None where `biases` say all
    additive   the score function adds something that does not depend on the score
    biases     names of tables, broadcastable to (batch, heads, q, k), that are added to the scores; each has
               a gradient
    dropout_p  chance that a probability is dropped
    """

    title: str
    keywords: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda tables: {}
    make: Callable[[Cell, torch.Generator], dict[str, Tensor]] = lambda cell, generator: {}
    causal: bool = False
    mask: Callable[[Tables], MaskMod] | None = None
    score: Callable[[Tables], ScoreMod] | None = None
    additive: bool = False
    biases: tuple[str, ...] = ()
    dropout_p: float = 0.0


def _slopes(cell: Cell, generator: torch.Generator) -> dict[str, Tensor]:
    """Those of the ALiBi paper: a geometric sequence that ends with 2 ** -8."""
    exponents = -8.0 / cell.heads * torch.arange(1, cell.heads + 1)
    return {"slopes": 2.0**exponents}


def _documents(cell: Cell, generator: torch.Generator) -> dict[str, Tensor]:
    """Which document each token is of: as many as there are 512s, cut at random places."""
    cuts = torch.randperm(cell.seqlen_k - 1, generator=generator)[: max(cell.seqlen_k // 512 - 1, 0)] + 1
    starts = torch.zeros(cell.seqlen_k, dtype=torch.int32)
    starts[cuts] = 1
    return {"documents": starts.cumsum(0, dtype=torch.int32)}


def _dense_bias(cell: Cell, generator: torch.Generator) -> dict[str, Tensor]:
    return {"bias": _normal(cell, generator, 1, cell.heads, cell.seqlen_q, cell.seqlen_k)}


def _evoformer(cell: Cell, generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "rows": _normal(cell, generator, cell.batch, 1, 1, cell.seqlen_k),
        "pairs": _normal(cell, generator, 1, cell.heads, cell.seqlen_q, cell.seqlen_k),
    }


def _rates(cell: Cell, generator: torch.Generator) -> dict[str, Tensor]:
    return {"rates": torch.rand(cell.heads, generator=generator) / 64}


def _normal(cell: Cell, generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator).to(getattr(torch, cell.dtype))


def _fading(tables: Mapping[str, Any]) -> dict[str, Any]:
    rates = af.table(tables["rates"])
    return {"causal": True, "score": lambda s, at: s / (1 + rates[at.head] * (at.q - at.k))}


def _same_document(tables: Mapping[str, Any]) -> dict[str, Any]:
    documents = af.table(tables["documents"])
    return {"causal": True, "mask": lambda at: documents[at.q] == documents[at.k]}


VARIANTS: dict[str, Variant] = {
    "full": Variant("no mask"),
    "causal": Variant("causal", lambda t: {"causal": True}, causal=True),
    "window": Variant(
        f"causal, the last {WINDOW} keys",
        lambda t: {"causal": True, "window": (WINDOW - 1, 0)},
        causal=True,
        mask=lambda t: lambda b, h, q, k: q - k < WINDOW,
    ),
    "documents": Variant(
        "causal within documents of random lengths, 512 on average",
        _same_document,
        _documents,
        causal=True,
        mask=lambda t: lambda b, h, q, k: t["documents"][q] == t["documents"][k],
    ),
    "alibi": Variant(
        "causal with ALiBi slopes",
        lambda t: {"causal": True, "alibi_slopes": t["slopes"]},
        _slopes,
        causal=True,
        score=lambda t: lambda s, b, h, q, k: s - t["slopes"][h] * (q - k).abs(),
        additive=True,
    ),
    "softcap": Variant(
        f"causal, scores capped at {SOFTCAP:g}",
        lambda t: {"causal": True, "softcap": SOFTCAP},
        causal=True,
        score=lambda t: lambda s, b, h, q, k: SOFTCAP * torch.tanh(s / SOFTCAP),
    ),
    "bias": Variant(
        "a dense bias with gradient",
        lambda t: {"bias": t["bias"]},
        _dense_bias,
        biases=("bias",),
    ),
    "evoformer": Variant(
        "two biases with gradients: (batch, 1, 1, keys) and (1, heads, queries, keys)",
        lambda t: {"bias": [t["rows"], t["pairs"]]},
        _evoformer,
        biases=("rows", "pairs"),
    ),
    "dropout": Variant("causal, dropout 0.1", lambda t: {"causal": True}, causal=True, dropout_p=0.1),
    "function": Variant(
        "causal, a user's function: scores fade with distance, s / (1 + rate[head] * (q - k))",
        _fading,
        _rates,
        causal=True,
        score=lambda t: lambda s, b, h, q, k: s / (1 + t["rates"][h] * (q - k)),
    ),
}
