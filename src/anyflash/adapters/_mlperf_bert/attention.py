"""Attention of sequences that lie end to end, without padding.

qkv         (total, 3, heads, dim); sequences are cu_seqlens[i] to cu_seqlens[i + 1] - 1
cu_seqlens  (sequences + 1,) int32
max_s       the longest length, which is read off cu_seqlens here
result      (total, heads, dim)
"""

from __future__ import annotations

from torch import Tensor

from anyflash import api
from anyflash.core.errors import Unsupported


def stream_attn_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    dropout_p: float,
    max_s: int,
    softmax_scale: float | None = None,
    causal: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:
    """In the place of `model.ops.stream_attn_interface.stream_attn_func`."""
    if return_attn_probs:
        raise Unsupported(
            "return_attn_probs=True",
            {"anyflash": ["the probabilities are never formed"]},
            "flash_attn_unpadded_qkvpacked_func of anyflash.compat computes them for tests",
        )
    q, k, v = qkv.unbind(1)
    return api.attention_varlen(
        q,
        k,
        v,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        scale=softmax_scale,
        causal=causal,
        dropout_p=dropout_p,
    )
