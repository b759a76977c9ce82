"""`flash_attn_with_kvcache`: append to a cache in place, and attend over it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import anyflash
from anyflash.compat import calls, mapping
from anyflash.compat.calls import Terms
from anyflash.compat.errors import expect
from anyflash.compat.flash_attn import _checks
from anyflash.compat.flash_attn.ops.triton.rotary import apply_rotary


@torch.no_grad()
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Attention of q (B, Sq, Hq, D) over a cache, to which k and v (B, new, Hk, D) are appended first.

    Args:
        k_cache, v_cache: (B_cache, S_cache, Hk, D); or pages (blocks, page, Hk, D) with block_table.
            Written in place, from cache_seqlens on.
        cache_seqlens: keys that each sequence has before the call, one number or (B,) int32; None for the
            whole cache. It is not advanced.
        rotary_cos, rotary_sin: (positions, rotary_dim / 2): k is turned as it is appended, at its place in
            the cache; q at the same places if causal or windowed, else at the first of them.
        cache_batch_idx: (B,) int32, the cache row of each sequence.
        cache_leftpad: (B,) int32: keys before it do not exist.
        block_table: (B, pages of a sequence) int32; pages of any size.
        num_splits: of upstream's kernel; the same results.

    Returns:
        out (B, Sq, Hq, D), or (out, softmax_lse (B, Hq, Sq)). No gradient.
    """
    lens = check(q, k_cache, v_cache, k, v, cache_seqlens, cache_batch_idx, cache_leftpad, block_table)
    _checks.slopes(q, alibi_slopes, q.shape[0])
    capacity = room(k_cache, block_table)
    what = calls.terms(capacity, 0.0, softmax_scale, causal, window_size, softcap, alibi_slopes)
    check_rotary(q, k, rotary_cos, rotary_sin, capacity)
    cache = anyflash.KVCache(k_cache, v_cache, lens, block_table, cache_leftpad, cache_batch_idx)
    out, lse = attend(q, cache, k, v, what, rotary_cos, rotary_sin, rotary_interleaved)
    if not return_softmax_lse:
        return out
    if what.shifted:
        assert alibi_slopes is not None
        keys = lens + (0 if k is None else k.shape[1]) - (0 if cache_leftpad is None else cache_leftpad)
        position = torch.arange(q.shape[1], device=q.device) + (keys - q.shape[1])[:, None, None]
        lse = lse + mapping.alibi_shift(alibi_slopes.to(lse.dtype), position)
    return out, mapping.lse_of_empty_rows(lse)


def attend(
    q: Tensor,
    cache: anyflash.KVCache,
    k: Tensor | None,
    v: Tensor | None,
    what: Terms,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """(out, lse) in our conventions, of dense q (B, Sq, Hq, D); k and v are turned and appended."""
    rotary = None
    if cos is not None and sin is not None and k is not None:
        each = what.causal or what.window is not None
        if q.shape[1] == k.shape[1] and (each or q.shape[1] == 1):
            rotary = (cos, sin)
        else:  # Ours turns queries to the places of the last new keys.
            q = turned_queries(q, cos, sin, cache.seqlens, each, interleaved)
            k = apply_rotary(k, cos, sin, cache.seqlens, interleaved=interleaved)
    if cache.block_table is None and cache.batch_idx is None:
        # Upstream takes the first entries of a cache with more of them.
        cache = replace(cache, k=cache.k[: q.shape[0]], v=cache.v[: q.shape[0]])
    keywords = {"rotary": rotary, "rotary_interleaved": interleaved, **calls.cache_keywords(what)}
    return anyflash.attention_kvcache(q, cache, k, v, return_lse=True, **keywords)


def check(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cache_seqlens: int | Tensor | None,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    block_table: Tensor | None,
    cu_seqlens_q: Tensor | None = None,
) -> Tensor:
    """Raises Refused, before anything is written; returns the length of each sequence (B,) int64. Values on
    a device are not checked."""
    expect(k_cache.dtype is q.dtype, "query and key must have the same dtype", f"{q.dtype}, {k_cache.dtype}")
    expect(
        v_cache.dtype is q.dtype, "query and value must have the same dtype", f"{q.dtype}, {v_cache.dtype}"
    )
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        expect(
            cache.stride(-1) == 1 or cache.shape[-1] == 1,
            f"{name} must have contiguous last dimension",
            f"strides {cache.stride()}",
        )
    expect(k is None or v is not None, "If key is supplied, value must also be passed in", "v is None")
    expect(
        k is None or cache_seqlens is not None,
        "If key is supplied, seqlens_k must also be passed in",
        "cache_seqlens is None",
    )
    if block_table is not None:
        _checks.table(block_table)
        expect(
            cache_batch_idx is None,
            "Paged KVcache does not support cache_batch_idx",
            "both block_table and cache_batch_idx are given",
        )
        expect(
            cache_leftpad is None,
            "We don't support Paged KV and leftpad_k running at the same time yet",
            "both block_table and cache_leftpad are given",
        )
    _checks.lengths(cache_batch_idx=cache_batch_idx, leftpad_k=cache_leftpad, cu_seqlens_q=cu_seqlens_q)
    batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    capacity = room(k_cache, block_table)
    if isinstance(cache_seqlens, Tensor):
        _checks.lengths(seqlens_k=cache_seqlens)
        lens = cache_seqlens.long()
    else:
        lens = torch.full((batch,), capacity if cache_seqlens is None else cache_seqlens, device=q.device)
    new = 0 if k is None or k.ndim == 3 else k.shape[1]
    too_long = "If key is supplied, it must have seqlen <= the seqlen of the KV cache"
    if _checks.readable(lens):
        expect(
            new <= capacity and bool((lens >= 0).all()) and bool((lens + new <= capacity).all()),
            too_long,
            f"{new} new keys, lengths {lens.tolist()}, room for {capacity}",
        )
    else:
        expect(new <= capacity, too_long, f"{new} new keys, room for {capacity}")
    return lens


def room(k_cache: Tensor, block_table: Tensor | None) -> int:
    """Keys that a sequence may have."""
    return k_cache.shape[1] if block_table is None else k_cache.shape[1] * block_table.shape[1]


def check_rotary(q: Tensor, k: Tensor | None, cos: Tensor | None, sin: Tensor | None, capacity: int) -> None:
    """Raises Refused unless the tables go with q and a cache of this capacity."""
    if cos is None or sin is None:
        expect(cos is sin, "rotary_cos and rotary_sin must be provided together", "one of them is None")
        return
    expect(
        k is not None,
        "If rotary cos/sin are provided, new key / value to be appended to KV cache must also be provided",
        "k is None",
    )
    expect(2 * cos.shape[-1] <= q.shape[-1], "rotary_dim must be <= headdim", f"{2 * cos.shape[-1]}")
    expect(
        cos.shape[0] >= capacity,
        "cos/sin seqlen must be at least the seqlen of KV cache",
        f"{cos.shape[0]} positions for {capacity}",
    )
    expect(cos.dtype is q.dtype, "rotary_cos must have the same dtype as query", f"{cos.dtype} for {q.dtype}")


def turned_queries(
    q: Tensor, cos: Tensor, sin: Tensor, lens: Tensor, each_at_its_place: bool, interleaved: bool
) -> Tensor:
    """q turned at lens + row, or all rows at lens."""
    if each_at_its_place:
        return apply_rotary(q, cos, sin, lens, interleaved=interleaved)
    batch, rows = q.shape[:2]
    alone = apply_rotary(
        q.flatten(0, 1).unsqueeze(1), cos, sin, lens.repeat_interleave(rows), interleaved=interleaved
    )
    return alone.squeeze(1).unflatten(0, (batch, rows))
