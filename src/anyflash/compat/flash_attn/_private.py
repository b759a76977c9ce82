"""The functions with an underscore, which context-parallel and serving libraries import.

They compute without autograd: a forward that gives lse and the state of the dropout, and a backward that
takes out and lse, of these keys or of more, and writes into the arrays it is given.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anyflash.compat import calls, pages
from anyflash.compat.calls import Lengths, Terms
from anyflash.compat.errors import expect
from anyflash.compat.flash_attn import _checks

Forward = tuple[Tensor, Tensor, Tensor, Tensor]


@torch.no_grad()
def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> Forward:
    """(out, softmax_lse, S_dmask, rng_state) of a dense call."""
    _checks.dense(q, k, v, alibi_slopes)
    sides = (window_size_left, window_size_right)
    what = calls.terms(k.shape[1], dropout_p, softmax_scale, causal, sides, softcap, alibi_slopes)
    return _forward(q, k, v, what, None, return_softmax)


@torch.no_grad()
def _flash_attn_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
    num_splits: int = 0,
) -> Forward:
    """(out, softmax_lse, S_dmask, rng_state) of a packed call. Every row of `out` is written, so
    `zero_tensors` changes nothing; nor does `num_splits`."""
    _checks.packed(q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, block_table is not None)
    _checks.lengths(seqused_k=seqused_k, leftpad_k=leftpad_k)
    sides = (window_size_left, window_size_right)
    what = calls.terms(int(max_seqlen_k), dropout_p, softmax_scale, causal, sides, softcap, alibi_slopes)
    lengths = Lengths(cu_seqlens_q, cu_seqlens_k, int(max_seqlen_q), int(max_seqlen_k), seqused_k)
    if block_table is not None:
        expect(
            leftpad_k is None,
            "We don't support Paged KV and leftpad_k running at the same time yet",
            "both block_table and leftpad_k are given",
        )
        _checks.table(block_table)
    elif leftpad_k is not None:
        k, v, lengths = pages.without_left_padding(k, v, leftpad_k, lengths)
    return _forward(q, k, v, what, lengths, return_softmax, block_table)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    what: Terms,
    lengths: Lengths | None,
    return_softmax: bool,
    block_table: Tensor | None = None,
) -> Forward:
    what = calls.drawn(what)
    if lengths is None:
        out, lse = calls.attend(q, k, v, what)
    else:
        out, lse = pages.attend(q, k, v, what, lengths, block_table)
        if return_softmax and block_table is not None:
            k, v, lengths = pages.gathered(k, v, block_table, lengths)
    s_dmask = calls.probabilities(q, k, what, lengths) if return_softmax else q.new_empty(0)
    return out, calls.their_lse(q, k, lse, what, lengths), s_dmask, calls.rng_state(what, q)


@torch.no_grad()
def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
) -> Tensor:
    """Write dq, dk and dv (those that are given) of a dense call; returns softmax_d."""
    _checks.dense(q, k, v, alibi_slopes)
    seed = _seed(dropout_p, rng_state)
    sides = (window_size_left, window_size_right)
    what = calls.terms(
        k.shape[1], dropout_p, softmax_scale, causal, sides, softcap, alibi_slopes, seed, deterministic
    )
    _write(calls.gradients(dout, q, k, v, out, softmax_lse, what), (dq, dk, dv))
    return calls.softmax_d(dout, out)


@torch.no_grad()
def _flash_attn_varlen_backward(
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
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
    zero_tensors: bool = False,
) -> Tensor:
    """Write dq, dk and dv (those that are given) of a packed call; returns softmax_d."""
    _checks.packed(q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes)
    seed = _seed(dropout_p, rng_state)
    sides = (window_size_left, window_size_right)
    what = calls.terms(
        int(max_seqlen_k), dropout_p, softmax_scale, causal, sides, softcap, alibi_slopes, seed, deterministic
    )
    lengths = Lengths(cu_seqlens_q, cu_seqlens_k, int(max_seqlen_q), int(max_seqlen_k))
    _write(calls.gradients(dout, q, k, v, out, softmax_lse, what, lengths), (dq, dk, dv))
    return calls.softmax_d(dout, out, lengths)


def _seed(dropout_p: float, rng_state: Tensor | None) -> int | None:
    if dropout_p == 0.0:
        return None
    expect(
        rng_state is not None,
        "rng_state must be that of the forward when dropout_p > 0",
        f"rng_state=None with dropout_p={dropout_p}",
    )
    assert rng_state is not None
    return int(rng_state[0])


def _write(found: tuple[Tensor, ...], wanted: tuple[Tensor | None, ...]) -> None:
    for gradient, into in zip(found, wanted, strict=True):
        if into is not None:
            into.copy_(gradient)
