"""The `flash_attn_interface` module of generation 3, on anyflash.

Not call-compatible with generation 2: softmax_scale comes fourth, there is neither dropout nor ALiBi, lse is
-inf for a row without keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import anyflash
from anyflash.compat import calls, general, mapping
from anyflash.compat.calls import Lengths, Terms
from anyflash.compat.errors import refuse_given, unsupported
from anyflash.compat.flash_attn import _checks, _kvcache
from anyflash.compat.flash_attn.ops.triton.rotary import apply_rotary
from anyflash.compat.general import Places

__all__ = [
    "_flash_attn_backward",
    "_flash_attn_forward",
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
]

Window = Sequence[int]
Factors = tuple[Tensor | None, Tensor | None, Tensor | None]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Any:
    """Attention of q (B, Sq, Hq, D) over k (B, Sk, Hk, D) and v (B, Sk, Hk, Dv).

    Args:
        qv: (B, Sq, Hq, Dv): scores are q . k + qv . v, and the default scale (D + Dv) ** -0.5.
        q_descale, k_descale, v_descale: (B, Hk) factors of 8-bit floats; results are then bfloat16. Other
            dtypes have none, as upstream.
        attention_chunk: a query sees keys of its own chunk of so many positions; 0 for all.
        num_splits, pack_gqa, sm_margin: the same results.
        deterministic: as in flash_attn 2: False allows gradients whose last bits may differ on Hopper GPUs.
        return_attn_probs: give (out, softmax_lse (B, Hq, Sq)).
    """
    factors = (q_descale, k_descale, v_descale)
    what = _terms(softmax_scale, causal, window_size, attention_chunk, softcap, deterministic)
    out, lse = _attend(q, k, v, what, Places(), qv, factors)
    return (out, lse) if return_attn_probs else out


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    deterministic: bool = False,
    num_heads_q: int | None = None,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` of qkv (B, S, 3, H, D), or (B, S, Hq + 2 Hk, D) with `num_heads_q`."""
    if qkv.ndim == 5:
        q, k, v = qkv.unbind(2)
    elif num_heads_q is None:
        raise unsupported("qkv", f"shape {tuple(qkv.shape)}", "four axes need num_heads_q")
    else:
        heads_k = (qkv.shape[2] - num_heads_q) // 2
        q, k, v = qkv.split((num_heads_q, heads_k, heads_k), dim=2)
    return flash_attn_func(
        q, k, v, softmax_scale, causal, None, q_descale, k_descale, v_descale, window_size, attention_chunk,
        softcap, deterministic=deterministic, return_attn_probs=return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Any:
    """`flash_attn_func` of packed sequences. seqused_q, seqused_k (B,): only so many rows of each exist; rows
    of q behind it get 0. lse is (Hq, total_q)."""
    _checks.packed(q, k, v, cu_seqlens_q, cu_seqlens_k)
    _checks.lengths(seqused_q=seqused_q, seqused_k=seqused_k)
    factors = (q_descale, k_descale, v_descale)
    what = _terms(softmax_scale, causal, window_size, attention_chunk, softcap, deterministic)
    places = Places(cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k)
    out, lse = _attend(q, k, v, what, places, qv, factors)
    return (out, lse) if return_attn_probs else out


def flash_attn_combine(
    out_partial: Tensor,
    lse_partial: Tensor,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) over all keys from those over parts: (splits, B, S, H, D), (splits, B, S, H) float32."""
    whole, lse = general.combine(out_partial, lse_partial)
    whole = whole.to(out_dtype or out_partial.dtype)
    return (whole if out is None else out.copy_(whole)), lse


@torch.no_grad()
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    qv: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Tensor | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """As generation 2's, with `page_table` for block_table.

    Args:
        cu_seqlens_q: (B + 1,) int32, makes q packed (total_q, Hq, D); cu_seqlens_k_new the same for k and v.
        rotary_seqlens: (B,) int32, the position of the first new key where it is not cache_seqlens.

    Returns:
        out, or (out, softmax_lse, and two empty arrays for the partial results that upstream shows).

    Raises:
        Unsupported: qv; rotary embedding of 8-bit floats, and their "fnuz" formats.
    """
    refuse_given("scores with a second product over a cache are not provided", qv=qv)
    factors: Factors = (None, None, None)
    if q.dtype in mapping.FLOAT8:
        if q.dtype not in mapping.OWN_FLOAT8:
            raise unsupported("q", str(q.dtype), "a cache of these 8-bit floats is not provided")
        refuse_given("8-bit floats are turned before they are rounded", rotary_cos=rotary_cos)
        factors = (q_descale, k_descale, v_descale)
    lens = _kvcache.check(
        q, k_cache, v_cache, k, v, cache_seqlens, cache_batch_idx, cache_leftpad, page_table, cu_seqlens_q
    )
    _kvcache.check_rotary(q, k, rotary_cos, rotary_sin, _kvcache.room(k_cache, page_table))
    what = _terms(softmax_scale, causal, window_size, attention_chunk, softcap)
    what = replace(what, factors=factors)
    cache = anyflash.KVCache(k_cache, v_cache, lens, page_table, cache_leftpad, cache_batch_idx)
    if cu_seqlens_q is None and cu_seqlens_k_new is None and rotary_seqlens is None:
        out, lse = _kvcache.attend(q, cache, k, v, what, rotary_cos, rotary_sin, rotary_interleaved)
    else:
        out, lse = _packed_over_cache(
            q, cache, k, v, what, (rotary_cos, rotary_sin), cu_seqlens_q, cu_seqlens_k_new, rotary_seqlens,
            rotary_interleaved,
        )  # fmt: skip
    empty = q.new_empty(0, dtype=torch.float32)
    return (out, lse, empty, empty) if return_softmax_lse else out


def _packed_over_cache(
    q: Tensor,
    cache: anyflash.KVCache,
    k: Tensor | None,
    v: Tensor | None,
    what: Terms,
    rotary: tuple[Tensor | None, Tensor | None],
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    rotary_seqlens: Tensor | None,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """Over a cache with packed queries, packed new keys, or positions of their own."""
    dense = cu_q is None
    batch = q.shape[0] if cu_q is None else cu_q.shape[0] - 1
    rows, cu_q = general.packed(q, cu_q)
    new, cu_new = (None, None) if k is None else general.packed(k, cu_k)
    values = None if v is None else general.packed(v, cu_k)[0]
    cos, sin = rotary
    if cos is not None and sin is not None and new is not None and cu_new is not None:
        first = cache.seqlens if rotary_seqlens is None else rotary_seqlens
        each = what.causal or what.window is not None
        starts = cu_q if each else torch.arange(len(rows) + 1, device=q.device)
        at = first if each else first.repeat_interleave(cu_q.diff())
        rows = apply_rotary(rows, cos, sin, at, starts, interleaved=interleaved)
        new = apply_rotary(new, cos, sin, first, cu_new, interleaved=interleaved)
    out, lse = anyflash.attention_kvcache(
        rows, cache, new, values, cu_seqlens_q=cu_q, cu_seqlens_k=cu_new, return_lse=True,
        **calls.cache_keywords(what),
    )  # fmt: skip
    if not dense:
        return out, lse
    return out.unflatten(0, (batch, -1)), lse.unflatten(1, (batch, -1)).transpose(0, 1)


def get_scheduler_metadata(*args: Any, **kwargs: Any) -> Tensor:
    """What upstream prepares for its launch. Nothing needs preparing here: an empty int32 array."""
    return torch.empty(0, dtype=torch.int32)


@torch.no_grad()
def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_new: Tensor | None = None,
    v_new: Tensor | None = None,
    qv: Tensor | None = None,
    out_: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    page_table: Tensor | None = None,
    kv_batch_idx: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    seqlens_rotary: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Tensor | None = None,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, softmax_lse, and two empty arrays). `flash_attn_with_kvcache` appends to a cache."""
    refuse_given(
        "flash_attn_with_kvcache appends to a cache",
        k_new=k_new,
        v_new=v_new,
        cu_seqlens_k_new=cu_seqlens_k_new,
        kv_batch_idx=kv_batch_idx,
        leftpad_k=leftpad_k,
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        seqlens_rotary=seqlens_rotary,
    )
    sides = (window_size_left, window_size_right)
    what = _terms(softmax_scale, causal, sides, attention_chunk, softcap)
    places = Places(cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, page_table)
    out, lse = _attend(q, k, v, what, places, qv, (q_descale, k_descale, v_descale))
    empty = q.new_empty(0, dtype=torch.float32)
    return (out if out_ is None else out_.copy_(out)), lse, empty, empty


@torch.no_grad()
def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    sequed_q: Tensor | None = None,
    sequed_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dq: Tensor | None = None,
    dk: Tensor | None = None,
    dv: Tensor | None = None,
    softmax_scale: float | None = None,
    is_causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    deterministic: bool = False,
    sm_margin: int = 0,
) -> Tensor:
    """Write dq, dk and dv (those that are given); returns softmax_d."""
    refuse_given("rows that exist in part have no backward here", sequed_q=sequed_q)
    sides = (window_size_left, window_size_right)
    what = _terms(softmax_scale, is_causal, sides, 0, softcap, deterministic)
    lengths = None
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        lengths = Lengths(cu_seqlens_q, cu_seqlens_k, max_seqlen_q or 0, max_seqlen_k or 0, sequed_k)
    elif cu_seqlens_q is not None or cu_seqlens_k is not None or sequed_k is not None:
        raise unsupported("cu_seqlens", "one of the two", "queries and keys are both packed, or both dense")
    found = calls.gradients(dout, q, k, v, out, softmax_lse, what, lengths)
    for gradient, into in zip(found, (dq, dk, dv), strict=True):
        if into is not None:
            into.copy_(gradient)
    return calls.softmax_d(dout, out, lengths)


def _terms(
    softmax_scale: float | None,
    causal: bool,
    window_size: Window,
    attention_chunk: int,
    softcap: float,
    deterministic: bool = True,
) -> Terms:
    return Terms(
        softmax_scale,
        bool(causal),
        mapping.window(window_size),
        mapping.softcap(softcap),
        mask=mapping.chunked(attention_chunk) if attention_chunk else None,
        deterministic=mapping.in_order(deterministic),
    )


def _attend(
    q: Tensor, k: Tensor, v: Tensor, what: Terms, places: Places, qv: Tensor | None, factors: Factors
) -> tuple[Tensor, Tensor]:
    if q.dtype not in mapping.FLOAT8:
        return general.attend(q, k, v, what, places, qv)
    if q.requires_grad or k.requires_grad or v.requires_grad or qv is not None:
        raise unsupported("q", str(q.dtype), "8-bit floats have a forward only, without qv")
    if q.dtype in mapping.OWN_FLOAT8 and places.used_q is None:
        return general.attend(q, k, v, replace(what, factors=factors), places)
    group = q.shape[-2] // k.shape[-2]
    wide = (
        mapping.widened(q, factors[0], group, places.cu_q),
        mapping.widened(k, factors[1], 1, places.cu_k),
        mapping.widened(v, factors[2], 1, places.cu_k),
    )
    what = replace(what, scale=q.shape[-1] ** -0.5 if what.scale is None else what.scale)
    out, lse = general.attend(*wide, what, places)
    return out.to(torch.bfloat16), lse
