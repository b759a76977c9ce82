"""The forward of Megatron's core attention.

query            (rows, batch, heads, dim), or (total, heads, dim) packed; key, value with their own, fewer
                 heads, which are never repeated
attention_mask   bool, broadcasts to (batch, heads, rows, keys), True = its score becomes -10000. A row that
                 is masked as a whole gets the mean of the values, as in Megatron
no mask          causal layers are causal where there is more than one row; one row decodes
window_size      the layer's (left, right), both included, below 0 unbounded; in place of any mask
packed           `cu_seqlens_*_padded` say where sequences lie, `cu_seqlens_*` how long they are; upper-left
softmax_offset   (heads,) logits that join the denominator
result           (rows, batch, heads x dim), or (total, heads x dim)
"""

from __future__ import annotations

import functools
import operator
from typing import Any

from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from anyflash import api
from anyflash.semantics.expr import where
from anyflash.semantics.mask import Mask, upper_left

_MASKED = -10000.0
_CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal, AttnMaskType.causal_bottom_right)


def forward(
    self: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    attn_mask_type: AttnMaskType | None = None,
    attention_bias: Tensor | None = None,
    packed_seq_params: Any = None,
) -> Tensor:
    """Of a `DotProductAttention`. Also takes what Megatron's own refuses: packed sequences, and a bias."""
    inner = self.scale_mask_softmax
    window = inner.window_size
    call: dict[str, Any] = {
        "scale": self.softmax_scale * (1.0 if inner.scale is None else inner.scale),
        "sinks": self.softmax_offset,
        "dropout_p": self.attention_dropout.p if self.training else 0.0,
    }
    causal = (attn_mask_type or self.attn_mask_type) in _CAUSAL
    if packed_seq_params is not None and packed_seq_params.qkv_format == "thd":
        call["mask"] = _upper_left(causal, window)
        return _packed(query, key, value, packed_seq_params, **call).flatten(-2)
    if window is not None:
        call["window"] = tuple(None if side < 0 else side for side in window)
    elif attention_mask is not None:
        call["score"] = _masked(attention_mask)
    else:
        call["causal"] = causal and query.shape[0] > 1
    q, k, v = (t.transpose(0, 1) for t in (query, key, value))
    out = api.attention(q, k, v, bias=attention_bias, **call)
    return out.transpose(0, 1).flatten(2)


def _masked(attention_mask: Tensor) -> Any:
    """The mask is read along the axes on which it differs only."""
    shape = attention_mask.shape
    axes = [axis for axis in range(4) if shape[axis] > 1]
    masked = api.table(attention_mask.squeeze() if axes else attention_mask.reshape(1))

    def score(s: Any, at: Any) -> Any:
        places = (at.batch, at.head, at.row, at.k)
        return where(masked[tuple(places[axis] for axis in axes) or (0,)], _MASKED, s)

    return score


def _upper_left(causal: bool, window: tuple[int, int] | None) -> Mask | None:
    """Rows and keys of a packed sequence are both counted from its start: it may end before its room does."""
    left, right = window or (-1, -1)
    parts = [upper_left()] if causal else []
    if left >= 0:
        parts.append(Mask(lambda at: at.k >= at.row - left))
    if right >= 0:
        parts.append(Mask(lambda at: at.k <= at.row + right))
    return functools.reduce(operator.and_, parts) if parts else None


def _packed(query: Tensor, key: Tensor, value: Tensor, where_: Any, **call: Any) -> Tensor:
    starts = [
        exact if padded is None else padded
        for exact, padded in (
            (where_.cu_seqlens_q, where_.cu_seqlens_q_padded),
            (where_.cu_seqlens_kv, where_.cu_seqlens_kv_padded),
        )
    ]
    return api.attention_varlen(
        query,
        key,
        value,
        cu_seqlens_q=starts[0],
        cu_seqlens_k=starts[1],
        seqused_k=None if starts[1] is where_.cu_seqlens_kv else where_.cu_seqlens_kv.diff(),
        **call,
    )
