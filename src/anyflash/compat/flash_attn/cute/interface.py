"""`flash_attn.cute.interface`: generation 4. Results are (out, lse); None is a window without bound."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from anyflash.compat import calls, general, mapping
from anyflash.compat.calls import Lengths, Terms
from anyflash.compat.errors import refuse_given, unsupported
from anyflash.compat.general import Places

Window = Sequence[int | None]
Mod = Callable[..., Any] | None
_SPARSE = "blocks are skipped where the mask says so: give mask_mod, and no block_sparse_tensors"
_GATHERED = "keys gathered one query at a time are not provided"
_SCALARS = "close over the numbers in score_mod or mask_mod"


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Tensor | None = None,
    gather_kv_indices: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (None, None),
    learnable_sink: Tensor | None = None,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    score_mod: Mod = None,
    score_mod_bwd: Mod = None,
    mask_mod: Mod = None,
    aux_tensors: Sequence[Tensor] | None = None,
    aux_scalars: Any = None,
    block_sparse_tensors: Any = None,
    block_sparse_tensors_bwd: Any = None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(out, lse) of attention of q (B, Sq, Hq, D) over k (B, Sk, Hk, D), v (B, Sk, Hk, Dv).

    Args:
        qv: (B, Sq, Hq, Dv): scores are q . k + qv . v, and the default scale (D + Dv) ** -0.5.
        window_size: (left, right); None has no bound, a negative side is an offset.
        learnable_sink: (Hq,), one logit more in each head's denominator; has a gradient.
        score_mod: (score, batch, head, row, key, lengths, aux_tensors) to the new score. It is called once,
            with symbols: operators and anyflash's functions work, those of cutlass do not. Its derivative is
            found, so score_mod_bwd is not needed.
        mask_mod: (batch, head, row, key, lengths, aux_tensors) to a condition. It takes the place of causal
            and window_size.
        num_splits, pack_gqa: the same results.
        deterministic: as in flash_attn 2: False allows gradients whose last bits may differ on Hopper GPUs.

    Returns:
        lse (B, Hq, Sq) float32 is None unless return_lse or a gradient is required; with qv (B, Sq, Hq). It
        is differentiable.
    """
    _refuse(gather_kv_indices, aux_scalars, block_sparse_tensors, block_sparse_tensors_bwd)
    what = _terms(
        softmax_scale, causal, window_size, learnable_sink, softcap, score_mod, mask_mod, aux_tensors,
        deterministic,
    )  # fmt: skip
    found = general.attend(q, k, v, what, Places(), qv)
    return _give(*found, return_lse, q, k, v, qv, learnable_sink)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    min_seqlen_k: int | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    gather_kv_indices: Tensor | None = None,
    page_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (None, None),
    learnable_sink: Tensor | None = None,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    score_mod: Mod = None,
    score_mod_bwd: Mod = None,
    mask_mod: Mod = None,
    block_sparse_tensors: Any = None,
    aux_tensors: Sequence[Tensor] | None = None,
    aux_scalars: Any = None,
    return_lse: bool = False,
    scheduler_metadata: Any = None,
    seqlen_k_per_split: int | None = None,
    disable_scheduler_metadata: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`flash_attn_func` where q, k and v may each be packed (total, heads, D) with cu_seqlens, or dense; used
    in part (seqused_q, seqused_k, (B,)); and keys in pages (blocks, page, Hk, D) of page_table (B, pages).

    lse is (Hq, total_q) where q is packed, (total_q, Hq) with qv.
    """
    _refuse(gather_kv_indices, aux_scalars, block_sparse_tensors, None)
    what = _terms(
        softmax_scale, causal, window_size, learnable_sink, softcap, score_mod, mask_mod, aux_tensors,
        deterministic,
    )  # fmt: skip
    places = Places(cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, page_table)
    if page_table is not None and qv is not None:
        raise unsupported("qv", f"shape {tuple(qv.shape)}", "not together with page_table")
    found = general.attend(q, k, v, what, places, qv)
    return _give(*found, return_lse, q, k, v, qv, learnable_sink)


def flash_attn_combine(
    out_partial: Tensor,
    lse_partial: Tensor,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    cu_seqlens: Tensor | None = None,
    seqused: Tensor | None = None,
    virtual_batch_idx: Tensor | None = None,
    return_lse: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """(out, lse) over all keys from results over parts: (splits, B, S, H, D) and (splits, B, S, H), or packed
    (splits, total, H, D) and (splits, total, H)."""
    refuse_given(
        "every row is combined, in its own place", seqused=seqused, virtual_batch_idx=virtual_batch_idx
    )
    whole, lse = general.combine(out_partial, lse_partial)
    whole = whole.to(out_dtype or out_partial.dtype)
    return (whole if out is None else out.copy_(whole)), (lse if return_lse else None)


def get_scheduler_metadata(*args: Any, **kwargs: Any) -> None:
    """What upstream prepares for its launch. Nothing needs preparing here."""


@torch.no_grad()
def _flash_attn_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    min_seqlen_k: int | None = None,
    page_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    softcap: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    learnable_sink: Tensor | None = None,
    *,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    score_mod: Mod = None,
    mask_mod: Mod = None,
    block_sparse_tensors: Any = None,
    return_lse: bool = False,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    aux_tensors: Sequence[Tensor] | None = None,
    aux_scalars: Any = None,
) -> tuple[Tensor, Tensor | None]:
    """The forward that torch and serving libraries call: (out, lse), into `out` and `lse` where given."""
    _refuse(None, aux_scalars, block_sparse_tensors, None)
    sides = (window_size_left, window_size_right)
    what = _terms(
        softmax_scale, causal, sides, learnable_sink, softcap or 0.0, score_mod, mask_mod, aux_tensors
    )
    places = Places(cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, page_table)
    found_out, found_lse = general.attend(q, k, v, what, places, qv)
    if lse is not None:
        lse.copy_(found_lse)
    kept = found_lse if return_lse or lse is not None else None
    return (found_out if out is None else out.copy_(found_out)), kept


@torch.no_grad()
def _flash_attn_bwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    dout: Tensor,
    lse: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    softcap: float = 0.0,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    *,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    deterministic: bool = False,
    dq: Tensor | None = None,
    dk: Tensor | None = None,
    dv: Tensor | None = None,
    score_mod: Mod = None,
    score_mod_bwd: Mod = None,
    mask_mod: Mod = None,
    aux_tensors: Sequence[Tensor] | None = None,
    aux_scalars: Any = None,
    block_sparse_tensors: Any = None,
    dlse: Tensor | None = None,
    learnable_sink: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) from out and lse."""
    _refuse(None, aux_scalars, block_sparse_tensors, None)
    given = {"dlse": dlse, "seqused_q": seqused_q, "learnable_sink": learnable_sink}
    refuse_given("this backward does not take it; that of flash_attn_func does", **given)
    sides = (window_size_left, window_size_right)
    what = _terms(
        softmax_scale, causal, sides, learnable_sink, softcap, score_mod, mask_mod, aux_tensors, deterministic
    )
    lengths = None
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        lengths = Lengths(cu_seqlens_q, cu_seqlens_k, max_seqlen_q or 0, max_seqlen_k or 0, seqused_k)
    elif cu_seqlens_q is not None or cu_seqlens_k is not None or seqused_k is not None:
        raise unsupported("cu_seqlens", "one of the two", "queries and keys are both packed, or both dense")
    found = calls.gradients(dout, q, k, v, out, lse, what, lengths)
    dq, dk, dv = (
        gradient if into is None else into.copy_(gradient)
        for gradient, into in zip(found, (dq, dk, dv), strict=True)
    )
    return dq, dk, dv


def _refuse(gather_kv_indices: Any, aux_scalars: Any, blocks: Any, blocks_bwd: Any) -> None:
    refuse_given(_GATHERED, gather_kv_indices=gather_kv_indices)
    refuse_given(_SCALARS, aux_scalars=aux_scalars or None)
    refuse_given(_SPARSE, block_sparse_tensors=blocks, block_sparse_tensors_bwd=blocks_bwd)


def _terms(
    softmax_scale: float | None,
    causal: bool,
    window_size: Window,
    learnable_sink: Tensor | None,
    softcap: float,
    score_mod: Mod,
    mask_mod: Mod,
    aux_tensors: Sequence[Tensor] | None,
    deterministic: bool = True,
) -> Terms:
    if score_mod is not None and softcap != 0.0:
        raise unsupported("score_mod", "a function", "upstream allows score_mod or softcap, not both")
    if mask_mod is not None:
        if causal or tuple(window_size) not in ((None, None), (-1, -1)):
            warnings.warn(
                "mask_mod takes the place of causal and window_size, as in flash_attn.cute; say in mask_mod "
                "what else is meant",
                stacklevel=4,
            )
        causal, window_size = False, (None, None)
    our_causal, window, shifted = mapping.offset_window(causal, window_size)
    return Terms(
        softmax_scale,
        our_causal,
        window,
        mapping.softcap(softcap),
        score=general.score_function(score_mod, aux_tensors),
        mask=mapping.join(shifted, general.mask_function(mask_mod, aux_tensors)),
        sinks=learnable_sink,
        deterministic=mapping.in_order(deterministic),
    )


def _give(
    out: Tensor,
    lse: Tensor,
    return_lse: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Tensor | None,
    learnable_sink: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    inputs = [t for t in (q, k, v, qv, learnable_sink) if t is not None]
    if not return_lse and not any(t.requires_grad for t in inputs):
        return out, None
    return out, lse if qv is None else lse.transpose(-1, -2)
