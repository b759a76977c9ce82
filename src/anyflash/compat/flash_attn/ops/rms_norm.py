"""`flash_attn.ops.rms_norm`: `ops.layer_norm` with the root mean square for the deviation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from anyflash.compat.flash_attn.ops._norm import normalized, wide
from anyflash.compat.flash_attn.ops.layer_norm import DropoutAddLayerNorm, _add_norm, _parallel


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / rms * weight over the last axis."""
    return normalized(wide(x), weight, None, epsilon, True, x.dtype)


def dropout_add_rms_norm(
    x0: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    epsilon: float,
    rowscale: Tensor | None = None,
    layerscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Any:
    """As `dropout_add_layer_norm`."""
    return _add_norm(
        x0, residual, weight, bias, dropout_p, epsilon, rowscale, layerscale, prenorm, residual_in_fp32,
        return_dropout_mask, True,
    )  # fmt: skip


def dropout_add_rms_norm_parallel_residual(
    x0: Tensor,
    x1: Tensor | None,
    residual: Tensor | None,
    weight0: Tensor,
    bias0: Tensor | None,
    weight1: Tensor | None,
    bias1: Tensor | None,
    dropout_p: float,
    epsilon: float,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Any:
    """As `dropout_add_layer_norm_parallel_residual`."""
    return _parallel(
        x0, x1, residual, (weight0, bias0), (weight1, bias1), dropout_p, epsilon, prenorm, residual_in_fp32,
        return_dropout_mask, True,
    )  # fmt: skip


class RMSNorm(nn.Module):
    """`rms_norm` with its weight."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class DropoutAddRMSNorm(DropoutAddLayerNorm):
    """`dropout_add_rms_norm` with its weight; dropout acts in training only."""

    rms = True
