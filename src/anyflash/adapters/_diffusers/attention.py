"""The backend function registered with diffusers.

query, key, value  (batch, tokens, heads, head_dim)
attn_mask          bool, True = attend, or additive: (batch, keys), or what broadcasts to (batch, heads, q, k)
is_causal          upper-left, as torch's
result             (batch, tokens, heads, head_dim); with `return_lse` also lse (batch, tokens, heads)
"""

from __future__ import annotations

from typing import Any

import torch

from anyflash import api
from anyflash.adapters._pytorch.functional import program
from anyflash.core.errors import InvalidCall, Unsupported


def attention_for_diffusers(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    _parallel_config: Any = None,
) -> Any:
    """Attention of one diffusers layer; diffusers passes the arguments that are named here."""
    if _parallel_config is not None:
        raise Unsupported(
            "diffusers' context parallelism",
            {"anyflash": ["it has no backend for rings and all-to-all exchanges here"]},
            'Call model.set_attention_backend("native")',
        )
    if not enable_gqa and query.shape[2] != key.shape[2]:
        raise InvalidCall("key", f"{key.shape[2]} heads", f"{query.shape[2]}, or enable_gqa=True")
    if attn_mask is not None and attn_mask.shape == (query.shape[0], key.shape[1]):
        attn_mask = attn_mask[:, None, None]
    keywords = program(query.shape[1], key.shape[1], attn_mask, is_causal)
    out, lse = api.attention(query, key, value, scale=scale, dropout_p=dropout_p, return_lse=True, **keywords)
    return (out, lse.transpose(1, 2)) if return_lse else out
