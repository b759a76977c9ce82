"""torch's own attention operators on the CPU, below autograd, which torch differentiates by itself.

    _scaled_dot_product_flash_attention_for_cpu   for C++ callers, for code that imported the function before
                                                  it was replaced, and for attention that Inductor recognises
    _flash_attention_forward                      for torch.nn.attention.varlen, whose CPU kernel torch lacks

Compiled graphs hold results to the strides that torch's fakes say, so those are reproduced.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from anyflash import KVCache, attention_kvcache
from anyflash.adapters._pytorch.functional import program
from anyflash.core.errors import Unsupported
from anyflash.frontends import torch_explicit as explicit
from anyflash.frontends.torch_explicit import Lengths

_SDPA = "_scaled_dot_product_flash_attention_for_cpu"
_VARLEN = "_flash_attention"


def register() -> torch.library.Library:
    """Put the operators in place, for as long as the library that is returned lives."""
    library = torch.library.Library("aten", "IMPL")
    for name, kernel in {
        _SDPA: _forward,
        f"{_SDPA}_backward": _backward,
        f"{_VARLEN}_forward": _varlen_forward,
        f"{_VARLEN}_forward_no_dropout_inplace": _varlen_forward_into,
        f"{_VARLEN}_backward": _varlen_backward,
    }.items():
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
            library.impl(name, kernel, "CPU")
    return library


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    _no_dropout(dropout_p)
    keywords = program(query.shape[2], key.shape[2], attn_mask, is_causal)
    out, lse, _ = explicit.forward(*(t.transpose(1, 2) for t in (query, key, value)), scale=scale, **keywords)
    return _as_strided_like(out.transpose(1, 2), query), lse.transpose(1, 2).contiguous().transpose(1, 2)


def _backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    _no_dropout(dropout_p)
    keywords = program(query.shape[2], key.shape[2], attn_mask, is_causal)
    bias = keywords.pop("bias") or []
    dout, q, k, v, o = (t.transpose(1, 2) for t in (grad_out, query, key, value, out))
    found = explicit.backward(dout, q, k, v, o, logsumexp, bias=bias, scale=scale, **keywords)
    return found.dq.transpose(1, 2), found.dk.transpose(1, 2), found.dv.transpose(1, 2)


def _varlen_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(out, lse, rng_state, unused, debug mask). Results do not depend on `num_splits`."""
    _no_dropout(dropout_p)
    keywords = {
        "causal": is_causal,
        "window": _window(window_size_left, window_size_right),
        "scale": scale,
        "alibi_slopes": alibi_slopes,
    }
    if block_table is not None:
        cache = KVCache(key, value, seqlens=seqused_k, block_table=block_table)
        out, lse = attention_kvcache(query, cache, cu_seqlens_q=cum_seq_q, return_lse=True, **keywords)
    else:
        lengths = _lengths(cum_seq_q, cum_seq_k, seqused_k)
        out, lse, _ = explicit.forward(query, key, value, lengths=lengths, **keywords)
    state, unused = query.new_zeros(2, dtype=torch.uint64), query.new_zeros((), dtype=torch.uint64)
    return out, lse, state, unused, query.new_empty(0)


def _varlen_forward_into(out: Tensor, query: Tensor, *args: Any, **keywords: Any) -> Tensor:
    found, lse, *_ = _varlen_forward(query, *args, **keywords)
    out.copy_(found)
    return lse


def _varlen_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor,
    cum_seq_k: Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    _no_dropout(dropout_p)
    found = explicit.backward(
        grad_out,
        query,
        key,
        value,
        out,
        logsumexp,
        lengths=_lengths(cum_seq_q, cum_seq_k, None),
        causal=is_causal,
        window=_window(window_size_left, window_size_right),
        scale=scale,
    )
    return found.dq, found.dk, found.dv


def _lengths(cum_seq_q: Tensor | None, cum_seq_k: Tensor | None, used: Tensor | None) -> Lengths | None:
    if cum_seq_q is None:
        return None
    return Lengths(cum_seq_q, cum_seq_q if cum_seq_k is None else cum_seq_k, used)


def _window(left: int | None, right: int | None) -> tuple[int | None, int | None] | None:
    """torch's sides are inclusive, as ours; below 0 is unbounded."""
    sides = tuple(None if side is None or side < 0 else int(side) for side in (left, right))
    return None if sides == (None, None) else sides  # type: ignore[return-value]


def _as_strided_like(found: Tensor, like: Tensor) -> Tensor:
    """`found` with the strides of `torch.empty_like(like)`."""
    strides = torch.empty_like(like, device="meta").stride()
    if found.stride() == strides:
        return found
    return torch.empty_strided(found.shape, strides, dtype=found.dtype, device=found.device).copy_(found)


def _no_dropout(dropout_p: float) -> None:
    if dropout_p:
        raise Unsupported(
            f"dropout_p={dropout_p} in an operator that hands no random state to its backward",
            {"torch": ["scaled_dot_product_attention sends dropout elsewhere, and so does varlen_attn"]},
            "Call torch.nn.functional.scaled_dot_product_attention, or anyflash.attention with dropout_p",
        )
