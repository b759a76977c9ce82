"""The attention of Uni-Fold's rows, columns and triangles, and of Uni-Core's encoders and decoders.

Uni-Fold's Attention          q, k, v (*, rows, width); mask (*, 1, 1, rows), 0 or -3e4, and bias
                              (1, 1, heads, rows, rows), both added to the scores, neither to the other; gives
                              (*, rows, width) without the last layer's bias, which the caller adds
Uni-Core's multihead classes  (batch, rows, width); key_padding_mask (batch, keys), True = masked; attn_bias
                              (batch * heads, rows, keys), or what broadcasts to it, with gradient. A query
                              whose keys are all masked gets 0, where Uni-Core gives NaN
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from anyflash import api
from anyflash.adapters._torch.leading import attend

_Forward = Callable[..., Any]


def attention(
    self: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Of `unifold.modules.attentions.Attention`."""
    gate = None if self.linear_g is None else torch.sigmoid(self.linear_g(q))
    q, k, v = (
        projection(t).unflatten(-1, (self.num_heads, -1)).transpose(-2, -3)
        for projection, t in ((self.linear_q, q), (self.linear_k, k), (self.linear_v, v))
    )
    given = [b for b in (mask, bias) if b is not None]
    out = attend(q, k, v, given, self.norm).transpose(-2, -3).flatten(-2)
    return torch.nn.functional.linear(out if gate is None else gate * out, self.linear_o.weight)


def self_attention(theirs: _Forward) -> _Forward:
    """Takes the place of `unicore.modules.SelfMultiheadAttention.forward`, which is `theirs`."""

    def forward(
        self: Any,
        query: Tensor,
        key_padding_mask: Tensor | None = None,
        attn_bias: Tensor | None = None,
        return_attn: bool = False,
    ) -> Any:
        if return_attn:
            # The weights themselves are asked for.
            return theirs(self, query, key_padding_mask, attn_bias, return_attn)
        q, k, v = self.in_proj(query).chunk(3, dim=-1)
        return _multihead(self, q, k, v, key_padding_mask, attn_bias)

    return forward


def cross_attention(
    self: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    attn_bias: Tensor | None = None,
) -> Tensor:
    """Of `unicore.modules.CrossMultiheadAttention`."""
    projected = self.q_proj(query), self.k_proj(key), self.v_proj(value)
    return _multihead(self, *projected, key_padding_mask, attn_bias)


def _multihead(
    self: Any, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, bias: Tensor | None
) -> Tensor:
    q, k, v = (t.unflatten(-1, (self.num_heads, -1)) for t in (q, k, v))
    kept = None if padding is None or padding.ndim == 0 else ~padding.to(torch.bool)[:, None, None]
    if bias is not None:
        apart = bias.ndim == 3 and bias.shape[0] == q.shape[0] * self.num_heads
        bias = bias.unflatten(0, (q.shape[0], self.num_heads)) if apart else bias[None]
    out = api.attention(
        q,
        k,
        v,
        scale=self.scaling,
        mask=kept,
        bias=bias,
        dropout_p=self.dropout if self.training else 0.0,
    )
    return self.out_proj(out.flatten(2))
