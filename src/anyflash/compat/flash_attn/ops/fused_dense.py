"""`flash_attn.ops.fused_dense`: linear layers. Fused upstream; torch's own here, with the same results."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anyflash.compat.errors import refuse_given
from anyflash.compat.flash_attn._parallel import absent

ColumnParallelLinear = absent("ColumnParallelLinear", "FusedDense")
RowParallelLinear = absent("RowParallelLinear", "FusedDense")
ParallelFusedMLP = absent("ParallelFusedMLP", "FusedMLP")

_GROUP = "layers split over a process group are not provided"


def _square_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


_ACTIVATIONS = {
    "gelu_approx": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "sqrelu": _square_relu,
}


def fused_dense_func(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    return_residual: bool = False,
    process_group: Any = None,
    sequence_parallel: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """x @ weight.T + bias, or that and x."""
    refuse_given(_GROUP, process_group=process_group)
    out = F.linear(x, weight, bias)
    return (out, x) if return_residual else out


class FusedDense(nn.Linear):
    """A linear layer that may give (out, x)."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        return_residual: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.return_residual = return_residual

    def forward(self, x: Tensor, process_group: Any = None) -> Any:
        return fused_dense_func(x, self.weight, self.bias, self.return_residual, process_group)


def fused_mlp_func(
    x: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    bias1: Tensor | None = None,
    bias2: Tensor | None = None,
    activation: str = "gelu_approx",
    save_pre_act: bool = True,
    return_residual: bool = False,
    checkpoint_lvl: int = 0,
    heuristic: int = 0,
    process_group: Any = None,
    sequence_parallel: bool = True,
) -> Any:
    """linear, activation ("gelu_approx", "relu", "sqrelu"), linear. `checkpoint_lvl` and `heuristic` are of
    upstream's fused kernels."""
    refuse_given(_GROUP, process_group=process_group)
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation={activation!r}: expected one of {', '.join(_ACTIVATIONS)}")
    out = F.linear(_ACTIVATIONS[activation](F.linear(x, weight1, bias1)), weight2, bias2)
    return (out, x) if return_residual else out


class FusedMLP(nn.Module):
    """`fused_mlp_func` with its weights, `fc1` and `fc2`."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        bias1: bool = True,
        bias2: bool = True,
        activation: str = "gelu_approx",
        return_residual: bool = False,
        checkpoint_lvl: int = 0,
        heuristic: int | str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if activation not in _ACTIVATIONS:
            raise ValueError(f"activation={activation!r}: expected one of {', '.join(_ACTIVATIONS)}")
        hidden = 4 * in_features if hidden_features is None else hidden_features
        out = in_features if out_features is None else out_features
        self.activation, self.return_residual = activation, return_residual
        self.fc1 = nn.Linear(in_features, hidden, bias=bias1, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden, out, bias=bias2, device=device, dtype=dtype)

    def forward(self, x: Tensor, process_group: Any = None) -> Any:
        return fused_mlp_func(
            x,
            self.fc1.weight,
            self.fc2.weight,
            self.fc1.bias,
            self.fc2.bias,
            activation=self.activation,
            return_residual=self.return_residual,
            process_group=process_group,
        )
