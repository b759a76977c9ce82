"""Attention whose masks are the finite -10000 of BERT: `SelfAttention` and `CrossAttention`.

A row that sees no key is the mean of v over what is masked, as with a matrix of scores; memory stays linear.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import anyflash

_MASKED = -10000.0


class SelfAttention(nn.Module):
    """Attention of qkv (batch, seqlen, 3, heads, D); `key_padding_mask` (batch, seqlen) is true for tokens to
    keep."""

    def __init__(
        self, causal: bool = False, softmax_scale: float | None = None, attention_dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.causal = causal
        self.softmax_scale = softmax_scale
        self.drop = nn.Dropout(attention_dropout)

    def forward(
        self, qkv: Tensor, causal: bool | None = None, key_padding_mask: Tensor | None = None
    ) -> Tensor:
        causal = self.causal if causal is None else causal
        q, k, v = qkv.unbind(2)

        def score(s: Any, at: Any) -> Any:
            return anyflash.where(at.k <= at.q, s, s + _MASKED)

        return anyflash.attention(
            q,
            k,
            v,
            scale=self.softmax_scale,
            bias=_padding(q, key_padding_mask),
            score=score if causal else None,
            dropout_p=self.drop.p if self.training else 0.0,
        )


class CrossAttention(nn.Module):
    """Attention of q (batch, seqlen_q, heads, D) over kv (batch, seqlen_k, 2, heads_k, D).

    Causal is aligned with the last key that `key_padding_mask` (batch, seqlen_k) keeps, taking padding to be
    behind the keys.
    """

    def __init__(
        self, causal: bool = False, softmax_scale: float | None = None, attention_dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.causal = causal
        self.softmax_scale = softmax_scale
        self.drop = nn.Dropout(attention_dropout)

    def forward(
        self,
        q: Tensor,
        kv: Tensor,
        causal: bool | None = None,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        causal = self.causal if causal is None else causal
        k, v = kv.unbind(2)
        padding = _padding(q, key_padding_mask)
        score = None
        if causal:
            if key_padding_mask is None:
                kept = torch.full((q.shape[0],), k.shape[1], device=q.device)
            else:
                kept = key_padding_mask.sum(-1)
            score, padding = _causal(kept, padding, q.shape[1]), None
        return anyflash.attention(
            q,
            k,
            v,
            scale=self.softmax_scale,
            bias=padding,
            score=score,
            dropout_p=self.drop.p if self.training else 0.0,
        )


def _padding(q: Tensor, key_padding_mask: Tensor | None) -> Tensor | None:
    if key_padding_mask is None:
        return None
    kept = key_padding_mask.bool()
    return torch.zeros_like(kept, dtype=q.dtype).masked_fill(~kept, _MASKED)[:, None, None]


def _causal(kept: Tensor, padding: Tensor | None, rows: int) -> Any:
    """The score of masked keys is -10000 itself, not a sum, so padding is added in here before."""
    ends = anyflash.table(kept)
    added = None if padding is None else anyflash.table(padding[:, 0, 0])

    def score(s: Any, at: Any) -> Any:
        padded = s if added is None else s + added[at.batch, at.k]
        return anyflash.where(at.k <= at.row + ends[at.batch] - rows, padded, _MASKED)

    return score
