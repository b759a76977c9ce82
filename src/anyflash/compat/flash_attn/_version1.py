"""Version 1: `flash_attn_unpadded_*`, whose causal mask is aligned at the top left."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anyflash.compat import calls, mapping
from anyflash.compat.calls import Lengths, Terms
from anyflash.compat.flash_attn import _checks
from anyflash.semantics.mask import upper_left


def flash_attn_unpadded_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float | None = None,
    causal: bool = False,
    return_attn_probs: bool = False,
    deterministic: bool = False,
) -> Any:
    """Attention of packed sequences as version 1 defines it: q (total_q, H, D), k and v (total_k, H, D).

    A causal query i sees keys j <= i, whatever the lengths. With `return_attn_probs` the result is (out,
    softmax_lse (B, H, max_seqlen_q), S_dmask).
    """
    _checks.packed(q, k, v, cu_seqlens_q, cu_seqlens_k)
    lengths = Lengths(cu_seqlens_q, cu_seqlens_k, int(max_seqlen_q), int(max_seqlen_k))
    mask = upper_left() if causal else None
    what = Terms(
        scale=softmax_scale, dropout_p=float(dropout_p), mask=mask,
        deterministic=mapping.in_order(deterministic),
    )  # fmt: skip
    if not return_attn_probs:
        return calls.attend(q, k, v, what, lengths)[0]
    what = calls.drawn(what)
    out, lse = calls.attend(q, k, v, what, lengths)
    with torch.no_grad():
        s_dmask = calls.probabilities(q, k, what, lengths) if what.dropout_p else q.new_empty(0)
    padded = mapping.padded_lse(mapping.lse_of_empty_rows(lse), cu_seqlens_q, lengths.longest_q)
    return out, padded, s_dmask


def flash_attn_unpadded_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float | None = None,
    causal: bool = False,
    return_attn_probs: bool = False,
    deterministic: bool = False,
) -> Any:
    """`flash_attn_unpadded_func` of kv (total_k, 2, H, D)."""
    k, v = kv.unbind(1)
    packed = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    rest = (dropout_p, softmax_scale, causal, return_attn_probs, deterministic)
    return flash_attn_unpadded_func(q, k, v, *packed, *rest)


def flash_attn_unpadded_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float,
    softmax_scale: float | None = None,
    causal: bool = False,
    return_attn_probs: bool = False,
    deterministic: bool = False,
) -> Any:
    """`flash_attn_unpadded_func` of qkv (total, 3, H, D)."""
    q, k, v = qkv.unbind(1)
    rest = (dropout_p, softmax_scale, causal, return_attn_probs, deterministic)
    return flash_attn_unpadded_func(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, *rest)


def flash_attn_unpadded_qkvpacked_split_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen0: int,
    max_seqlen1: int,
    batch_size0: int,
    dropout_p: float,
    softmax_scale: float | None = None,
    causal: bool = False,
    return_attn_probs: bool = False,
    deterministic: bool = False,
) -> Any:
    """`flash_attn_unpadded_qkvpacked_func`. Upstream runs the first `batch_size0` sequences, of at most
    `max_seqlen0`, beside the others, for speed; the results are those of one call."""
    longest = max(int(max_seqlen0), int(max_seqlen1))
    rest = (dropout_p, softmax_scale, causal, return_attn_probs, deterministic)
    return flash_attn_unpadded_qkvpacked_func(qkv, cu_seqlens, longest, *rest)
