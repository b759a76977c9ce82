"""`flash_attn.ops.triton.rotary`: rotary position embedding, in torch operations that differentiate."""

from __future__ import annotations

import torch
from torch import Tensor


def apply_rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    interleaved: bool = False,
    inplace: bool = False,
    conjugate: bool = False,
) -> Tensor:
    """Turn pairs of x by the angle of their position.

    Args:
        x: (batch, seqlen, heads, D), or packed (total, heads, D) with `cu_seqlens` (sequences + 1,).
        cos, sin: (positions, rotary_dim / 2); rotary_dim <= D, and the rest of D is left as it is. A token
            whose position they do not reach is left too.
        seqlen_offsets: position of each sequence's first token, one for all or (batch,).
        max_seqlen: the longest length of packed sequences; not needed here.
        interleaved: pairs are neighbours (GPT-J); else they are the two halves of rotary_dim (NeoX).
        inplace: write into x and return it.
        conjugate: turn back.

    Angles and products are in float32 (float64 for float64); the result has the dtype of x.
    """
    if cos.shape != sin.shape or cos.ndim != 2 or 2 * cos.shape[1] > x.shape[-1]:
        raise ValueError(
            f"cos {tuple(cos.shape)}, sin {tuple(sin.shape)}: expected both (positions, rotary_dim / 2) with "
            f"rotary_dim at most {x.shape[-1]}, the head_dim of x"
        )
    position = _positions(x, seqlen_offsets, cu_seqlens)
    kind = torch.float64 if x.dtype is torch.float64 else torch.float32
    beyond = (position >= cos.shape[0])[..., None, None]
    reached = position.clamp_max(max(cos.shape[0] - 1, 0))
    cosines = cos.to(kind)[reached].unsqueeze(-2).masked_fill(beyond, 1)
    sines = sin.to(kind)[reached].unsqueeze(-2).masked_fill(beyond, 0)
    half = cos.shape[1]
    pairs = x[..., : 2 * half]
    wide = pairs.to(kind)
    first, second = (wide[..., 0::2], wide[..., 1::2]) if interleaved else wide.chunk(2, dim=-1)
    if conjugate:
        sines = -sines
    turned = (first * cosines - second * sines, first * sines + second * cosines)
    joined = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    joined = joined.to(x.dtype)
    if inplace:
        pairs.copy_(joined)
        return x
    return torch.cat((joined, x[..., 2 * half :]), dim=-1)


def _positions(x: Tensor, offsets: int | Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The position of each token: (seqlen,) or (batch, seqlen), or (total,) packed."""
    if cu_seqlens is None:
        row = torch.arange(x.shape[1], device=x.device)
        return row + (offsets.long()[:, None] if isinstance(offsets, Tensor) else offsets)
    token, starts = torch.arange(x.shape[0], device=x.device), cu_seqlens.long()
    sequence = torch.searchsorted(starts[1:], token, right=True).clamp_max(max(len(starts) - 2, 0))
    place = token - starts[sequence]
    return place + (offsets.long()[sequence] if isinstance(offsets, Tensor) else offsets)
