"""Attention over a KV cache: the keys of earlier calls, and those that come with this one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from anyflash.api import Score, Window
from anyflash.core.errors import InvalidCall
from anyflash.frontends import registry
from anyflash.frontends.base import Frontend
from anyflash.frontends.cache import CacheRequest
from anyflash.semantics.checks import pages_layout
from anyflash.semantics.descale import descale_of
from anyflash.semantics.describe import describe_program


@dataclass(frozen=True, slots=True)
class KVCache:
    """Arrays that hold the keys and values of B sequences, and where.

    All arrays lie where q does. Values of integers are checked where they lie in host memory. On a device
    only shapes are, and nothing waits for it: a call can be captured in a CUDA graph and run again with other
    lengths and pages. Wrong ones give a wrong result there; no access leads outside the arrays, and what has
    no slot or no page is not written.

    Dense, with room for S keys a sequence, or in pages of P slots. A slot is a place for one key; the slots
    of a sequence are numbered from 0, and those from `leftpad` to `seqlens` - 1 hold its keys. Pages that
    hold no key of the call's sequences are not read, and may hold anything.

    Args:
        k: (B, S, Hkv, D), or (pages, P, Hkv, D) with `block_table`; P is at least 1. Any strides.
        v: the same with Dv.
        seqlens: (B,) int32 or int64, slots in use before the call; None for all, which leaves no room.
        block_table: (B, n) int32 or int64: slot s of sequence b is slot s % P of page
            block_table[b, s // P]. Only entries that hold a key are looked at.
        leftpad: (B,) int32 or int64, slots at the front that hold no key; None for 0. Positions are counted
            from the first key.
        batch_idx: (B,) int32 or int64, the entry of a dense cache with more than B entries that is sequence
            b's; not with `block_table`.

    With layout "bhsd" k is (B, Hkv, S, D) or (pages, Hkv, P, D), and v is alike.
    """

    k: Any
    v: Any
    seqlens: Any = None
    block_table: Any = None
    leftpad: Any = None
    batch_idx: Any = None


def attention_kvcache(
    q: Any,
    cache: KVCache | tuple[Any, Any],
    k: Any = None,
    v: Any = None,
    *,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    rotary: tuple[Any, Any] | None = None,
    rotary_interleaved: bool = False,
    rotary_positions: Any = None,
    layout: str | None = None,
    causal: bool = False,
    window: Window = None,
    scale: float | None = None,
    softcap: float | None = None,
    score: Score = None,
    mask: Any = None,
    bias: Any = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    descale_q: Any = None,
    descale_k: Any = None,
    descale_v: Any = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """Attention over a KV cache, to which new keys and values are appended first, in place.

    Query row i of Tq sits at key position i + Tk - Tq, where Tk counts the sequence's keys, those of this
    call included: one query is a step of decoding, several are speculation or a chunk of a prompt. A result
    depends on its own sequence only, bit for bit, not on what else is in the batch. There is no gradient.

    Args:
        q: (B, Tq, Hq, D), or (total_q, Hq, D) with `cu_seqlens_q`.
        cache: a `KVCache`, or (k, v) whose slots are all in use. `anyflash.kvcache.PagedCache` makes them.
        k: (B, Tn, Hkv, D) new keys, written to the slots from cache.seqlens on, which is left as it is: the
            next call gets the lengths with Tn added. None if there is nothing to append.
        v: (B, Tn, Hkv, Dv) new values.
        cu_seqlens_q: (B + 1,) int32 or int64, makes q packed: sequence b has the rows cu_seqlens_q[b] to
            cu_seqlens_q[b + 1] - 1.
        cu_seqlens_k: the same for k and v; where q is packed, None is `cu_seqlens_q`.
        rotary: (cos, sin), each (positions, n): new keys and the queries are turned by rotary embedding in
            their first 2 n elements. A key's position is the number of its slot, and queries end at the
            position of the last key.
        rotary_interleaved: pair i is elements (2 i, 2 i + 1), not (i, i + n).
        rotary_positions: (B, Tn), or (total,) packed, int32 or int64: positions of the new keys that are
            not their slots, such as depths in a tree. Queries have those of the last new keys. Where
            nothing is appended they are positions of the queries.
        layout: "bshd" as above, "bhsd" with heads before rows in q, k, v, out and the cache, or "thd" for
            packed q, whose cache is as for "bshd"; None is "bshd" or "thd".

    The cache may hold 8-bit floats, beside q of the same dtype or of float16, bfloat16 or float32, which out
    then has, too; `descale_k` and `descale_v` are its factors, and new keys and values come as it holds them.

    The other arguments are those of `attention`. A tree of speculated tokens is a `mask`:
    `anyflash.masks.tree(ancestors)`.

    Returns:
        out (B, Tq, Hq, Dv) or (total_q, Hq, Dv), or (out, lse) with lse (B, Hq, Tq) or (Hq, total_q).

    Raises:
        InvalidCall: besides what `attention` refuses, in host memory, an entry of the page table that is no
            page, a length beyond the capacity, no room for the new keys, or a slot to be written that another
            sequence uses. Nothing was computed or written.
        Unsupported, BackendBroken: as `attention`; Unsupported comes before anything is written.

    Example:
        >>> import numpy as np, anyflash as af
        >>> cache = af.KVCache(*np.zeros((2, 1, 64, 2, 16), np.float32), seqlens=np.array([10]))
        >>> new = np.ones((1, 1, 2, 16), np.float32)
        >>> af.attention_kvcache(new, cache, new, new, causal=True).shape
        (1, 1, 2, 16)
        >>> cache.k[0, 10].any()
        np.True_

        A cache in 8-bit floats, with a factor for each sequence and key head:

        >>> import ml_dtypes
        >>> pair = np.ones((2, 1, 64, 2, 16), ml_dtypes.float8_e4m3fn)
        >>> factors = np.full((1, 2), 0.25, np.float32)
        >>> out = af.attention_kvcache(new, tuple(pair), descale_k=factors, descale_v=factors)
        >>> out.dtype, float(out[0, 0, 0, 0])
        (dtype('float32'), 0.25)
    """
    frontend = registry.of("q", q)
    if not isinstance(cache, KVCache):
        cache = _cache_of(cache)
    if cu_seqlens_k is None and k is not None:
        cu_seqlens_k = cu_seqlens_q
    if (k is None) != (v is None):
        raise InvalidCall("v" if v is None else "k", "None", "an array", "Keys and values come together")
    arrays = {
        "cache.k": cache.k,
        "cache.v": cache.v,
        "k": k,
        "v": v,
        "sinks": sinks,
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "cache.seqlens": cache.seqlens,
        "cache.block_table": cache.block_table,
        "cache.leftpad": cache.leftpad,
        "cache.batch_idx": cache.batch_idx,
        "rotary_positions": rotary_positions,
    }
    rotary = _rotary(rotary, arrays)
    for argument, array in arrays.items():
        if array is not None or argument in ("cache.k", "cache.v"):
            registry.same(frontend, argument, array)
    if backend is not None and not isinstance(backend, str):
        raise InvalidCall("backend", repr(backend), "None or the name of a backend")
    if layout is None:
        layout = "bshd" if cu_seqlens_q is None else "thd"
    descale, factors = None, (descale_q, descale_k, descale_v)
    if any(factor is not None for factor in factors):
        dtypes = (frontend.dtype(q), frontend.dtype(cache.k))
        descale = descale_of(factors, cache.k.shape, pages_layout(layout), *dtypes)
    program, tables, names = describe_program(
        q.shape,
        None,
        _dtype_of(frontend),
        layout=layout,
        sequences=None if cu_seqlens_q is None else _sequences(cu_seqlens_q),
        causal=causal,
        window=window,
        scale=scale,
        softcap=softcap,
        score=score,
        mask=mask,
        bias=bias,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        descale=descale,
    )
    for name, array in zip(names, tables, strict=True):
        registry.same(frontend, name, array)
    integers = (
        cu_seqlens_q, cu_seqlens_k, cache.seqlens, cache.block_table, cache.leftpad, cache.batch_idx,
        rotary_positions,
    )  # fmt: skip
    request = CacheRequest(
        program, q, cache.k, cache.v, k, v, integers, rotary, bool(rotary_interleaved), layout, tables, names,
        sinks, backend,
    )  # fmt: skip
    out, lse = frontend.attend_cache(request)
    return (out, lse) if return_lse else out


def _cache_of(pair: Any) -> KVCache:
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise InvalidCall("cache", f"type {type(pair).__name__}", "an anyflash.KVCache, or (k, v)")
    return KVCache(*pair)


def _sequences(cu_seqlens_q: Any) -> int:
    shape = tuple(cu_seqlens_q.shape)
    if len(shape) != 1 or not shape[0]:
        raise InvalidCall("cu_seqlens_q", f"shape {shape}", "(sequences + 1,)")
    return shape[0] - 1


def _rotary(rotary: Any, arrays: dict[str, Any]) -> tuple[Any, Any] | None:
    """The pair (cos, sin), which joins the arrays of the call."""
    if rotary is None:
        if arrays["rotary_positions"] is not None:
            raise InvalidCall("rotary_positions", "an array", "None where there is no rotary=(cos, sin)")
        return None
    if not isinstance(rotary, (tuple, list)) or len(rotary) != 2:
        raise InvalidCall("rotary", f"type {type(rotary).__name__}", "None or (cos, sin)")
    arrays["rotary cos"], arrays["rotary sin"] = rotary
    return rotary[0], rotary[1]


def _dtype_of(frontend: Frontend) -> Callable[[str, Any], str]:
    def dtype(argument: str, array: Any) -> str:
        registry.same(frontend, argument, array)
        return frontend.dtype(array)

    return dtype
