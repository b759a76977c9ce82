"""The public functions over dense and packed arrays, differentiable through anyflash."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from anyflash.compat import calls, pages
from anyflash.compat.calls import Lengths, Terms
from anyflash.compat.errors import unsupported
from anyflash.compat.flash_attn import _checks

Result = Tensor | tuple[Tensor, Tensor, Tensor]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """Attention of q (B, Sq, Hq, D) over k, v (B, Sk, Hk, D), as flash_attn 2.8 defines it.

    Args:
        dropout_p: chance that a probability is dropped, from torch's CPU generator.
        softmax_scale: factor of the scores; None is D ** -0.5.
        causal: key j is visible to query i if j <= i + Sk - Sq.
        window_size: (left, right): i + Sk - Sq - left <= j <= i + Sk - Sq + right; -1 for no bound.
        softcap: scores become softcap * tanh(s / softcap); 0 for none.
        alibi_slopes: (Hq,) or (B, Hq) float32; subtracts slope * |i + Sk - Sq - j|.
        deterministic: the same bits every time. False allows what is faster on Hopper GPUs, where the last
            bits of dq may then differ, unless torch.use_deterministic_algorithms asks for them, too.
        return_attn_probs: give (out, softmax_lse, S_dmask), softmax_lse (B, Hq, Sq). S_dmask, for tests, is
            (B, Hq, Sq, Sk) rounded up to multiples of 128 with dropout, else empty.

    Returns:
        out (B, Sq, Hq, D), or the three. A query without a key gets 0, and +inf in softmax_lse.

    Raises:
        Refused: (ValueError and RuntimeError) arguments contradict each other; the text is flash_attn's.

    Example:
        >>> import torch
        >>> from anyflash.compat.flash_attn import flash_attn_func
        >>> q = torch.randn(1, 16, 4, 64, dtype=torch.bfloat16)
        >>> flash_attn_func(q, q[:, :, :2], q[:, :, :2], causal=True, window_size=(8, 0)).shape
        torch.Size([1, 16, 4, 64])
    """
    _checks.dense(q, k, v, alibi_slopes)
    what = calls.terms(
        k.shape[1], dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        deterministic=deterministic,
    )  # fmt: skip
    return _give(q, k, v, what, None, return_attn_probs)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_func` of kv (B, Sk, 2, Hk, D)."""
    k, v = kv.unbind(2)
    rest = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    return flash_attn_func(q, k, v, *rest, return_attn_probs)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_func` of qkv (B, S, 3, H, D)."""
    q, k, v = qkv.unbind(2)
    rest = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    return flash_attn_func(q, k, v, *rest, return_attn_probs)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Result:
    """Attention of packed sequences: q (total_q, Hq, D), k and v (total_k, Hk, D), each sequence on its own.

    Args:
        cu_seqlens_q, cu_seqlens_k: (B + 1,) int32, where each sequence starts, and the total.
        max_seqlen_q, max_seqlen_k: the longest lengths. They decide the shape of S_dmask and nothing else.
        block_table: (B, blocks) int32: k and v are pages (blocks, page, Hk, D) of any size, and sequence b
            has cu_seqlens_k[b + 1] - cu_seqlens_k[b] keys in the pages of row b.

    The others are those of `flash_attn_func`; softmax_lse is (Hq, total_q).
    """
    _checks.packed(q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, block_table is not None)
    longest_k = _number(max_seqlen_k)
    what = calls.terms(
        longest_k, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        deterministic=deterministic,
    )  # fmt: skip
    lengths = Lengths(cu_seqlens_q, cu_seqlens_k, _number(max_seqlen_q), longest_k)
    if block_table is not None:
        _checks.table(block_table)
        if return_attn_probs:
            k, v, lengths = pages.gathered(k, v, block_table, lengths)
        else:
            return pages.attend(q, k, v, what, lengths, block_table)[0]
    return _give(q, k, v, what, lengths, return_attn_probs)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_varlen_func` of kv (total_k, 2, Hk, D)."""
    k, v = kv.unbind(1)
    packed = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    rest = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    return flash_attn_varlen_func(q, k, v, *packed, *rest, return_attn_probs)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_varlen_func` of qkv (total, 3, H, D)."""
    q, k, v = qkv.unbind(1)
    packed = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    rest = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    return flash_attn_varlen_func(q, k, v, *packed, *rest, return_attn_probs)


def _give(
    q: Tensor, k: Tensor, v: Tensor, what: Terms, lengths: Lengths | None, return_attn_probs: bool
) -> Result:
    if not return_attn_probs:
        return calls.attend(q, k, v, what, lengths)[0]
    what = calls.drawn(what)
    out, lse = calls.attend(q, k, v, what, lengths)
    with torch.no_grad():
        s_dmask = calls.probabilities(q, k, what, lengths) if what.dropout_p else q.new_empty(0)
    return out, calls.their_lse(q, k, lse, what, lengths), s_dmask


def _number(length: Any) -> int:
    """A length that some callers hold in a tensor. Under torch.compile it stays symbolic."""
    if isinstance(length, Tensor):
        return length.item()  # type: ignore[return-value]
    if length is None:
        raise unsupported("max_seqlen", "None", "flash_attn 2 needs both longest lengths")
    return length
