"""xformers' bias classes in our terms.

A bias says where packed sequences lie and which pairs are masked. The first is `Lengths`; the second a
triangle or a window, from the first query and key of a sequence or from the last. Keys that are not in one
piece, in gaps or in pages, are gathered, which copies each key that is used once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from xformers.ops.fmha import attn_bias as theirs

from anyflash.frontends.torch_explicit import Lengths
from anyflash.semantics.mask import upper_left


@dataclass(frozen=True, slots=True)
class Meaning:
    """Of one bias. `keys` are the rows of k and v to gather, None for all as they are."""

    keywords: dict[str, Any] = field(default_factory=dict)
    lengths: Lengths | None = None
    keys: Tensor | None = None
    bias: Tensor | None = None


_CAUSAL = {"causal": True}


def _window(left: int, right: int) -> dict[str, Any]:
    return {"window": (left, right)}


def _causal_window(bias: Any) -> dict[str, Any]:
    """xformers' window counts keys, the query's own included."""
    return {"causal": True, "window": (bias._window_size - 1, None)}


def _upper_left_window(bias: Any) -> dict[str, Any]:
    size = bias._window_size
    return {"mask": upper_left() & (lambda at: at.k > at.row - size)}


# By exact type: a subclass that is not here means something else.
_MASKS: dict[type, Any] = {
    theirs.LowerTriangularMask: lambda b: {"mask": upper_left()},
    theirs.LowerTriangularMaskWithTensorBias: lambda b: {"mask": upper_left()},
    theirs.LowerTriangularFromBottomRightMask: lambda b: _CAUSAL,
    theirs.LowerTriangularFromBottomRightLocalAttentionMask: _causal_window,
    theirs.LocalAttentionFromBottomRightMask: lambda b: _window(b.window_left, b.window_right),
    theirs.BlockDiagonalMask: lambda b: {},
    theirs.BlockDiagonalCausalMask: lambda b: {"mask": upper_left()},
    theirs.BlockDiagonalCausalFromBottomRightMask: lambda b: _CAUSAL,
    theirs.BlockDiagonalCausalLocalAttentionMask: _upper_left_window,
    theirs.BlockDiagonalCausalLocalAttentionFromBottomRightMask: _causal_window,
    theirs.BlockDiagonalPaddedKeysMask: lambda b: {},
    theirs.BlockDiagonalCausalWithOffsetPaddedKeysMask: lambda b: _CAUSAL,
    theirs.BlockDiagonalLocalAttentionPaddedKeysMask: lambda b: _window(b.window_left, b.window_right),
    theirs.BlockDiagonalCausalLocalAttentionPaddedKeysMask: _causal_window,
    theirs.BlockDiagonalGappyKeysMask: lambda b: {},
    theirs.BlockDiagonalCausalWithOffsetGappyKeysMask: lambda b: _CAUSAL,
    theirs.PagedBlockDiagonalPaddedKeysMask: lambda b: {},
    theirs.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask: lambda b: _CAUSAL,
    theirs.PagedBlockDiagonalGappyKeysMask: lambda b: {},
    theirs.PagedBlockDiagonalCausalWithOffsetGappyKeysMask: lambda b: _CAUSAL,
}
TYPES = (type(None), Tensor, *_MASKS)
_PAGED = (theirs.PagedBlockDiagonalPaddedKeysMask, theirs.PagedBlockDiagonalGappyKeysMask)


def meaning(bias: Any) -> Meaning:
    """Of an `attn_bias` whose type is one of `TYPES`. An additive tensor becomes `bias`, with axes
    (B, heads, q, k)."""
    if bias is None:
        return Meaning()
    if isinstance(bias, Tensor):
        return Meaning(bias=_four_axes(bias))
    keywords = _MASKS[type(bias)](bias)
    if isinstance(bias, theirs.LowerTriangularMaskWithTensorBias):
        return Meaning(keywords, bias=_four_axes(bias._bias))
    if not hasattr(bias, "q_seqinfo"):
        return Meaning(keywords)
    cu_q, info = bias.q_seqinfo.seqstart, bias.k_seqinfo
    if isinstance(bias, _PAGED):
        rows = [_paged_rows(bias, i) for i in range(len(cu_q) - 1)]
    elif isinstance(bias, theirs.BlockDiagonalGappyKeysMask):
        rows = [torch.arange(first, last) for first, last in info.intervals()]
    elif isinstance(bias, theirs.BlockDiagonalPaddedKeysMask):
        return Meaning(keywords, Lengths(cu_q, info.seqstart, info.seqlen))
    else:
        return Meaning(keywords, Lengths(cu_q, info.seqstart))
    counts = torch.tensor([0, *(len(r) for r in rows)], dtype=torch.int32)
    keys = torch.cat(rows).to(cu_q.device)
    return Meaning(keywords, Lengths(cu_q, counts.cumsum(0, dtype=torch.int32).to(cu_q.device)), keys)


def _paged_rows(bias: Any, i: int) -> Tensor:
    """Rows of the pool that hold sequence i. In gappy pages `seqlen` is where a sequence ends in them."""
    gappy = isinstance(bias, theirs.PagedBlockDiagonalGappyKeysMask)
    first = bias.k_seqinfo.seqstart_py[i] if gappy else 0
    slots = torch.arange(first, bias.k_seqinfo.seqlen_py[i])
    pages = bias.block_tables[i].cpu().long()
    return pages[slots // bias.page_size] * bias.page_size + slots % bias.page_size


def _four_axes(bias: Tensor) -> Tensor:
    """(B, groups, heads, q, k) has one axis of heads for us."""
    return bias.flatten(1, 2) if bias.ndim == 5 else bias
