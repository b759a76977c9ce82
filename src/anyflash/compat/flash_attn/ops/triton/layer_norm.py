"""`flash_attn.ops.triton.layer_norm`: normalisation with dropout, residual and a second branch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anyflash.compat.flash_attn.ops._norm import branches_sum, normalized, residual_dtype, wide


def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    zero_centered_weight: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> Any:
    """Normalise dropout(x * rowscale) + dropout(x1) + residual over the last axis.

    Args:
        x: (..., D); x1 and residual the same shape, rowscale (...).
        weight, bias: (D,). weight1, bias1: of a second normalisation of the same sum.
        prenorm: also give the sum, in residual's dtype (float32 with residual_in_fp32, else that of x).
        zero_centered_weight: the factor is weight + 1.
        return_dropout_mask: also give the masks of x and x1, true where kept; None without dropout.
        out, residual_out: written, where given.

    Returns:
        y in the dtype of x or `out_dtype`; with more asked for (y, y1, sum, mask, mask1), in this order.
    """
    if x1 is not None and rowscale is not None:
        raise ValueError("rowscale is not supported with parallel LayerNorm")
    first = wide(x) if rowscale is None else wide(x) * wide(rowscale).unsqueeze(-1)
    branches = [first] if x1 is None else [first, wide(x1)]
    total, masks = branches_sum(branches, residual, dropout_p)
    dtype = x.dtype if out_dtype is None else out_dtype
    y = normalized(total, weight, bias, eps, is_rms_norm, dtype, zero_centered_weight)
    results: list[Any] = [y if out is None else out.copy_(y)]
    if weight1 is not None:
        results.append(normalized(total, weight1, bias1, eps, is_rms_norm, dtype, zero_centered_weight))
    if prenorm or residual_out is not None:
        summed = total.to(residual_dtype(x, residual, residual_in_fp32))
        summed = summed if residual_out is None else residual_out.copy_(summed)
        if prenorm:
            results.append(summed)
    if return_dropout_mask:
        results += [masks[0], masks[1] if len(masks) > 1 else None]
    return results[0] if len(results) == 1 else tuple(results)


def rms_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    zero_centered_weight: bool = False,
    return_dropout_mask: bool = False,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> Any:
    """`layer_norm_fn` with the root mean square for the deviation."""
    return layer_norm_fn(
        x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm, residual_in_fp32,
        zero_centered_weight, True, return_dropout_mask, out_dtype, out, residual_out,
    )  # fmt: skip


class RMSNorm(nn.Module):
    """`rms_norm_fn` with its weight; dropout acts in training only."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        dropout_p: float = 0.0,
        zero_centered_weight: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.drop = nn.Dropout(dropout_p) if dropout_p > 0.0 else None
        self.zero_centered_weight = zero_centered_weight
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 0.0 if self.zero_centered_weight else 1.0)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
    ) -> Any:
        return rms_norm_fn(
            x,
            self.weight,
            self.bias,
            residual=residual,
            eps=self.eps,
            dropout_p=self.drop.p if self.drop is not None and self.training else 0.0,
            prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
            zero_centered_weight=self.zero_centered_weight,
        )


def layer_norm_linear_fn(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
) -> Any:
    """A linear layer behind `layer_norm_fn`: its result, or (result, sum) with prenorm."""
    y, summed = layer_norm_fn(
        x,
        norm_weight,
        norm_bias,
        residual,
        eps=eps,
        prenorm=True,
        residual_in_fp32=residual_in_fp32,
        is_rms_norm=is_rms_norm,
    )
    out = F.linear(y.to(linear_weight.dtype), linear_weight, linear_bias)
    return (out, summed) if prenorm else out
