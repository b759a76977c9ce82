"""`torch.ops.flash_attn._flash_attn_*`: the private functions as operators of torch, with fakes.

Like upstream's they have no autograd of their own: libraries call them inside theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from anyflash.compat import mapping
from anyflash.compat.flash_attn import _private

_QKV = "Tensor q, Tensor k, Tensor v, "
_LENGTHS = "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, "
_TERMS = "float dropout_p, float softmax_scale, bool causal, "
_WINDOW = "SymInt window_size_left, SymInt window_size_right, float softcap, Tensor? alibi_slopes, "
_GRADIENTS = (
    "Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, "
    "Tensor(a!)? dq, Tensor(b!)? dk, Tensor(c!)? dv, "
)
_RESULT = " -> (Tensor, Tensor, Tensor, Tensor)"

_LIBRARY = torch.library.Library("flash_attn", "FRAGMENT")


def _statistic(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype is torch.float64 else torch.float32


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
    batch, rows, heads, _ = q.shape
    *_, return_softmax = rest
    s_dmask = (batch, heads, mapping.round_up(rows), mapping.round_up(k.shape[1]))
    return (
        q.new_empty((batch, rows, heads, v.shape[-1])),
        q.new_empty((batch, heads, rows), dtype=_statistic(q)),
        q.new_empty(s_dmask if return_softmax else (0,)),
        q.new_empty((2,), dtype=torch.int64),
    )


def _varlen_forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *rest: Any,
    return_softmax: bool = False,
    **named: Any,
) -> Any:
    # Positions behind max_seqlen_k: dropout_p .. alibi_slopes are seven, then return_softmax.
    asked = rest[7] if len(rest) > 7 else return_softmax
    total, heads, _ = q.shape
    s_dmask = (
        cu_seqlens_q.shape[0] - 1,
        heads,
        mapping.round_up(max_seqlen_q),
        mapping.round_up(max_seqlen_k),
    )
    return (
        q.new_empty((total, heads, v.shape[-1])),
        q.new_empty((heads, total), dtype=_statistic(q)),
        q.new_empty(s_dmask if asked else (0,)),
        q.new_empty((2,), dtype=torch.int64),
    )


def _backward_fake(dout: Tensor, q: Tensor, *rest: Any, **named: Any) -> Any:
    batch, rows, heads, _ = q.shape
    return q.new_empty((batch, heads, mapping.round_up(rows)), dtype=_statistic(q))


def _varlen_backward_fake(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    cu_seqlens_q: Tensor,
    *rest: Any,
    **named: Any,
) -> Any:
    total, heads, _ = q.shape
    return q.new_empty((heads, total + 128 * (cu_seqlens_q.shape[0] - 1)), dtype=_statistic(q))


def _register(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    name = schema[: schema.index("(")]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"flash_attn::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.flash_attn, name)


wrapped_flash_attn_forward = _register(
    "_flash_attn_forward(" + _QKV + _TERMS + _WINDOW + "bool return_softmax)" + _RESULT,
    _private._flash_attn_forward,
    _forward_fake,
)
wrapped_flash_attn_varlen_forward = _register(
    "_flash_attn_varlen_forward("
    + _QKV
    + _LENGTHS
    + _TERMS
    + "SymInt window_size_left=-1, SymInt window_size_right=-1, float softcap=0.0, "
    + "Tensor? alibi_slopes=None, bool return_softmax=False, Tensor? block_table=None, "
    + "Tensor? leftpad_k=None, Tensor? seqused_k=None, "
    + "bool zero_tensors=False, SymInt num_splits=0)"
    + _RESULT,
    _private._flash_attn_varlen_forward,
    _varlen_forward_fake,
)
wrapped_flash_attn_backward = _register(
    "_flash_attn_backward("
    + _GRADIENTS
    + _TERMS
    + _WINDOW
    + "bool deterministic, Tensor? rng_state=None) -> Tensor",
    _private._flash_attn_backward,
    _backward_fake,
)
wrapped_flash_attn_varlen_backward = _register(
    "_flash_attn_varlen_backward("
    + _GRADIENTS
    + _LENGTHS
    + _TERMS
    + _WINDOW
    + "bool deterministic, Tensor? rng_state=None, bool zero_tensors=False) -> Tensor",
    _private._flash_attn_varlen_backward,
    _varlen_backward_fake,
)
