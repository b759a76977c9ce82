"""What `DS4Sci_EvoformerAttention` calls: the forward and the backward of its autograd function.

    q, k, v  (B, N, L, H, D), or (..., L, H, D) without biases
    bias1    (B, N, 1, 1, L), added to every query of a row; an empty tensor for none
    bias2    (B, 1, H, L, L), added to every row n; an empty tensor for none

The two are read as they are, never added up to B x N x H x L x L. What the forward hands to the backward as
its lse are our statistics, which keep the gradient right where a mask of -1e9 covers a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from anyflash.frontends import torch_explicit as explicit


def attention(q: Tensor, k: Tensor, v: Tensor, bias1: Tensor, bias2: Tensor) -> tuple[Tensor, Tensor]:
    """(out, statistics (entries, 2, N, H, L))."""
    made = [
        explicit.forward(*arrays, bias=_given(biases) or None)
        for arrays, biases in zip(_entries(q, k, v), _biases(q, bias1, bias2), strict=True)
    ]
    return _stacked([m.out for m in made]).view(q.shape), _stacked([m.stats for m in made])


def attention_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    stats: Tensor,
    bias1: Tensor,
    bias2: Tensor,
    bias1_grad: bool,
    bias2_grad: bool,
) -> tuple[Tensor, ...]:
    """(dq, dk, dv, dbias1, dbias2); an empty tensor for a bias that wants none."""
    found: list[tuple[Tensor, ...]] = []
    wanted = [bias1_grad, bias2_grad]
    for arrays, biases, kept in zip(
        _entries(dout, q, k, v, out), _biases(q, bias1, bias2), stats, strict=True
    ):
        wants = [w for w, b in zip(wanted, biases, strict=True) if b is not None]
        made = explicit.backward(*arrays, None, stats=kept, bias=_given(biases), wanted=wants)
        grads = iter(made.biases)
        dbias = [None if b is None else next(grads) for b in biases]
        empty = q.new_empty(0, dtype=torch.float32)
        found.append((made.dq, made.dk, made.dv, *(empty if g is None else g for g in dbias)))
    shapes = (
        q.shape,
        k.shape,
        v.shape,
        bias1.shape if bias1_grad else (0,),
        bias2.shape if bias2_grad else (0,),
    )
    parts = [_stacked(part) for part in zip(*found, strict=True)]
    return tuple(
        part.reshape(shape) if 0 not in shape else part.new_empty(shape)
        for part, shape in zip([*parts[:3], *(p.to(dout.dtype) for p in parts[3:])], shapes, strict=True)
    )


def _entries(*arrays: Tensor) -> list[tuple[Tensor, ...]]:
    """Each of the B entries by itself, (N, L, H, D): bias2 is one array for all rows of an entry."""
    whole = [t if t.ndim == 5 else t.flatten(0, -4)[None] if t.ndim > 3 else t[None, None] for t in arrays]
    return list(zip(*(t.unbind(0) for t in whole), strict=True))


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    return parts[0][None] if len(parts) == 1 else torch.stack(list(parts))


def _biases(q: Tensor, bias1: Tensor, bias2: Tensor) -> list[list[Tensor | None]]:
    entries = q.shape[0] if q.ndim == 5 else 1
    return [[b[i] if b.numel() else None for b in (bias1, bias2)] for i in range(entries)]


def _given(biases: list[Tensor | None]) -> list[Tensor]:
    return [b for b in biases if b is not None]
