"""`flash_attn.ops.layer_norm`: normalisation of dropout(x0) + residual."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from anyflash.compat.flash_attn.ops._norm import branches_sum, normalized, residual_dtype, wide


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
    """(x - mean) / std * weight + bias over the last axis."""
    return normalized(wide(x), weight, bias, epsilon, False, x.dtype)


def dropout_add_layer_norm(
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
    """Normalise dropout(x0 * rowscale * layerscale) + residual.

    x0 (..., D), rowscale (...), layerscale (D,). Returns y, or of (y, sum, mask) what `prenorm` and
    `return_dropout_mask` ask for; the mask is uint8, 1 where kept.
    """
    return _add_norm(
        x0, residual, weight, bias, dropout_p, epsilon, rowscale, layerscale, prenorm, residual_in_fp32,
        return_dropout_mask, False,
    )  # fmt: skip


def dropout_add_layer_norm_parallel_residual(
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
    """Two normalisations of dropout(x0) + dropout(x1) + residual: (y0, y1), then the sum with `prenorm`, then
    the masks with `return_dropout_mask`. y1 is None without weight1."""
    return _parallel(
        x0, x1, residual, (weight0, bias0), (weight1, bias1), dropout_p, epsilon, prenorm, residual_in_fp32,
        return_dropout_mask, False,
    )  # fmt: skip


class DropoutAddLayerNorm(nn.Module):
    """`dropout_add_layer_norm` with its weights; dropout acts in training only."""

    rms = False

    def __init__(
        self,
        hidden_size: int,
        prenorm: bool = False,
        p: float = 0.0,
        eps: float = 1e-5,
        residual_in_fp32: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.prenorm, self.p, self.eps, self.residual_in_fp32 = prenorm, p, eps, residual_in_fp32
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        if self.rms:
            self.register_parameter("bias", None)
        else:
            self.bias = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x0: Tensor, residual: Tensor | None = None) -> Any:
        dropout_p = self.p if self.training else 0.0
        return _add_norm(
            x0, residual, self.weight, self.bias, dropout_p, self.eps, None, None, self.prenorm,
            self.residual_in_fp32, False, self.rms,
        )  # fmt: skip


def _add_norm(
    x0: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    epsilon: float,
    rowscale: Tensor | None,
    layerscale: Tensor | None,
    prenorm: bool,
    residual_in_fp32: bool,
    return_dropout_mask: bool,
    rms: bool,
) -> Any:
    branch = wide(x0)
    if rowscale is not None:
        branch = branch * wide(rowscale).unsqueeze(-1)
    if layerscale is not None:
        branch = branch * wide(layerscale)
    total, masks = branches_sum([branch], residual, dropout_p)
    results: list[Any] = [normalized(total, weight, bias, epsilon, rms, x0.dtype)]
    if prenorm:
        results.append(total.to(residual_dtype(x0, residual, residual_in_fp32)))
    if return_dropout_mask:
        results.append(_mask(masks[0], x0))
    return results[0] if len(results) == 1 else tuple(results)


def _parallel(
    x0: Tensor,
    x1: Tensor | None,
    residual: Tensor | None,
    first: tuple[Tensor, Tensor | None],
    second: tuple[Tensor | None, Tensor | None],
    dropout_p: float,
    epsilon: float,
    prenorm: bool,
    residual_in_fp32: bool,
    return_dropout_mask: bool,
    rms: bool,
) -> Any:
    branches = [wide(x) for x in (x0, x1) if x is not None]
    total, masks = branches_sum(branches, residual, dropout_p)
    results: list[Any] = [
        None if weight is None else normalized(total, weight, bias, epsilon, rms, x0.dtype)
        for weight, bias in (first, second)
    ]
    if prenorm:
        results.append(total.to(residual_dtype(x0, residual, residual_in_fp32)))
    if return_dropout_mask:
        results += [_mask(masks[0], x0), None if x1 is None else _mask(masks[1], x1)]
    return tuple(results)


def _mask(kept: Tensor | None, x: Tensor) -> Tensor:
    return torch.ones(x.shape, dtype=torch.uint8, device=x.device) if kept is None else kept.to(torch.uint8)
