"""Layer and RMS normalisation of a sum of branches, in torch operations: what the modules of `ops` share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Branch = tuple[Tensor, Tensor | None]


def wide(x: Tensor) -> Tensor:
    """In the type that sums are kept in."""
    return x if x.dtype is torch.float64 else x.float()


def dropped(x: Tensor, p: float) -> Branch:
    """(x with elements dropped and the others scaled up, the mask of those kept or None)."""
    if p == 0.0:
        return x, None
    kept = torch.rand(x.shape, device=x.device) >= p
    return x * kept / (1 - p), kept


def branches_sum(
    branches: Sequence[Tensor], residual: Tensor | None, dropout_p: float
) -> tuple[Tensor, list[Tensor | None]]:
    """(sum of the branches after dropout, and of the residual; masks of those kept). All are wide."""
    masks: list[Tensor | None] = []
    total = None if residual is None else wide(residual)
    for branch in branches:
        kept_branch, mask = dropped(branch, dropout_p)
        masks.append(mask)
        total = kept_branch if total is None else total + kept_branch
    assert total is not None
    return total, masks


def normalized(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    dtype: torch.dtype,
    zero_centered_weight: bool = False,
) -> Tensor:
    """x (..., D) wide; over its last axis: (x - mean) / std, or x / rms; times weight, plus bias."""
    centered = x if rms else x - x.mean(-1, keepdim=True)
    scaled = centered * torch.rsqrt(centered.square().mean(-1, keepdim=True) + eps)
    factor = wide(weight) + 1 if zero_centered_weight else wide(weight)
    out = scaled * factor
    return (out if bias is None else out + wide(bias)).to(dtype)


def residual_dtype(x: Tensor, residual: Tensor | None, residual_in_fp32: bool) -> torch.dtype:
    if residual is not None:
        return residual.dtype
    return torch.float32 if residual_in_fp32 and x.dtype is not torch.float64 else x.dtype
