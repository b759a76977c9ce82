"""What stands for the extension module (`flash_attn_gpu`, `flash_attn_2_cuda`), called by position.

xformers looks for it when it is imported; older context-parallel libraries call it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anyflash.compat.errors import refuse_given
from anyflash.compat.flash_attn import _private

_GENERATOR = (
    "the RNG `generator` argument is no longer supported and must be None; torch.manual_seed sets the state"
)


def fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out_: Tensor | None,
    alibi_slopes_: Tensor | None,
    p_dropout: float,
    softmax_scale: float,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    return_softmax: bool,
    gen_: Any = None,
) -> list[Tensor]:
    """[out, softmax_lse, S_dmask, rng_state]; writes `out_` if it is given."""
    refuse_given(_GENERATOR, generator=gen_)
    terms = (p_dropout, softmax_scale, is_causal, window_size_left, window_size_right, softcap, alibi_slopes_)
    return _into(out_, _private._flash_attn_forward(q, k, v, *terms, return_softmax))


def varlen_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out_: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seqused_k: Tensor | None,
    leftpad_k_: Tensor | None,
    block_table_: Tensor | None,
    alibi_slopes_: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    p_dropout: float,
    softmax_scale: float,
    zero_tensors: bool,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    return_softmax: bool,
    gen_: Any = None,
    num_splits: int = 0,
) -> list[Tensor]:
    """[out, softmax_lse, S_dmask, rng_state]; writes `out_` if it is given."""
    refuse_given(_GENERATOR, generator=gen_)
    found = _private._flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, p_dropout, softmax_scale, is_causal,
        window_size_left, window_size_right, softcap, alibi_slopes_, return_softmax, block_table_, leftpad_k_,
        seqused_k, zero_tensors, num_splits,
    )  # fmt: skip
    return _into(out_, found)


def bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq_: Tensor | None,
    dk_: Tensor | None,
    dv_: Tensor | None,
    alibi_slopes_: Tensor | None,
    p_dropout: float,
    softmax_scale: float,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    deterministic: bool,
    gen_: Any = None,
    rng_state: Tensor | None = None,
) -> list[Tensor]:
    """[dq, dk, dv, softmax_d]; the first three are those given, or new."""
    refuse_given(_GENERATOR, generator=gen_)
    grads = _or_new((dq_, dk_, dv_), (q, k, v))
    terms = (p_dropout, softmax_scale, is_causal, window_size_left, window_size_right, softcap, alibi_slopes_)
    d = _private._flash_attn_backward(
        dout, q, k, v, out, softmax_lse, *grads, *terms, deterministic, rng_state
    )
    return [*grads, d]


def varlen_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq_: Tensor | None,
    dk_: Tensor | None,
    dv_: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    alibi_slopes_: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    p_dropout: float,
    softmax_scale: float,
    zero_tensors: bool,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    deterministic: bool,
    gen_: Any = None,
    rng_state: Tensor | None = None,
) -> list[Tensor]:
    """[dq, dk, dv, softmax_d]; the first three are those given, or new."""
    refuse_given(_GENERATOR, generator=gen_)
    grads = _or_new((dq_, dk_, dv_), (q, k, v))
    d = _private._flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, *grads, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        p_dropout, softmax_scale, is_causal, window_size_left, window_size_right, softcap, alibi_slopes_,
        deterministic, rng_state, zero_tensors,
    )  # fmt: skip
    return [*grads, d]


def _into(out_: Tensor | None, found: tuple[Tensor, ...]) -> list[Tensor]:
    if out_ is None:
        return list(found)
    return [out_.copy_(found[0]), *found[1:]]


def _or_new(given: tuple[Tensor | None, ...], like: tuple[Tensor, ...]) -> list[Tensor]:
    return [torch.empty_like(x) if g is None else g for g, x in zip(given, like, strict=True)]
