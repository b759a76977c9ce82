"""`flash_attn.flash_attention`, of version 1: `FlashAttention` and `FlashMHA`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from anyflash.compat.errors import unsupported
from anyflash.compat.flash_attn._functional import flash_attn_qkvpacked_func, flash_attn_varlen_qkvpacked_func
from anyflash.compat.flash_attn.bert_padding import pad_input, unpad_input

_WEIGHTS = "the probabilities are never in memory"


class FlashAttention(nn.Module):
    """Self-attention of qkv: `forward` gives (out, None).

    softmax_scale      factor of the scores; None is D ** -0.5. May be set after construction.
    attention_dropout  acts in training only
    """

    def __init__(self, softmax_scale: float | None = None, attention_dropout: float = 0.0) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale
        self.dropout_p = attention_dropout

    def forward(
        self,
        qkv: Tensor,
        key_padding_mask: Tensor | None = None,
        causal: bool = False,
        cu_seqlens: Tensor | None = None,
        max_s: int | None = None,
        need_weights: bool = False,
    ) -> tuple[Tensor, None]:
        """qkv (batch, seqlen, 3, heads, D), with key_padding_mask (batch, seqlen) true for tokens to keep; or
        packed (total, 3, heads, D) with cu_seqlens and max_s. Padding has output 0."""
        if need_weights:
            raise unsupported("need_weights", "True", _WEIGHTS)
        call: dict[str, Any] = {
            "dropout_p": self.dropout_p if self.training else 0.0,
            "softmax_scale": self.softmax_scale,
            "causal": causal,
        }
        if cu_seqlens is not None:
            if max_s is None:
                raise ValueError("max_s is needed with cu_seqlens")
            return flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, max_s, **call), None
        if key_padding_mask is None:
            return flash_attn_qkvpacked_func(qkv, **call), None
        batch, seqlen = qkv.shape[:2]
        rows, indices, starts, longest, _ = unpad_input(qkv, key_padding_mask)
        out = flash_attn_varlen_qkvpacked_func(rows, starts, longest, **call)
        return pad_input(out, indices, batch, seqlen), None


class FlashMHA(nn.Module):
    """Projection, `FlashAttention`, projection: `forward` gives (out, None). x (batch, seqlen, embed_dim)."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        bias: bool = True,
        batch_first: bool = True,
        attention_dropout: float = 0.0,
        causal: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not batch_first or embed_dim % num_heads:
            raise ValueError(
                f"batch_first={batch_first}, embed_dim={embed_dim}, num_heads={num_heads}: expected "
                "batch_first=True and heads that divide embed_dim"
            )
        self.embed_dim, self.num_heads, self.causal = embed_dim, num_heads, causal
        self.head_dim = embed_dim // num_heads
        self.Wqkv = nn.Linear(embed_dim, 3 * embed_dim, bias=bias, device=device, dtype=dtype)
        self.inner_attn = FlashAttention(attention_dropout=attention_dropout)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)

    def forward(
        self, x: Tensor, key_padding_mask: Tensor | None = None, need_weights: bool = False
    ) -> tuple[Tensor, None]:
        qkv = self.Wqkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        context, _ = self.inner_attn(qkv, key_padding_mask, causal=self.causal, need_weights=need_weights)
        return self.out_proj(context.flatten(-2)), None
