"""`flash_attn.modules.mlp`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anyflash.compat.flash_attn._parallel import absent
from anyflash.compat.flash_attn.ops.activations import swiglu
from anyflash.compat.flash_attn.ops.fused_dense import FusedMLP, ParallelFusedMLP

__all__ = [
    "FusedMLP",
    "GatedMlp",
    "Mlp",
    "ParallelFusedMLP",
    "ParallelGatedMlp",
    "ParallelMLP",
]

ParallelMLP = absent("ParallelMLP", "Mlp")
ParallelGatedMlp = absent("ParallelGatedMlp", "GatedMlp")
Activation = Callable[[Tensor], Tensor]


class Mlp(nn.Module):
    """fc2(activation(fc1(x))), or that and x."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        activation: Activation = F.gelu,
        bias1: bool = True,
        bias2: bool = True,
        return_residual: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden = 4 * in_features if hidden_features is None else hidden_features
        out = in_features if out_features is None else out_features
        self.return_residual, self.activation = return_residual, activation
        self.fc1 = nn.Linear(in_features, hidden, bias=bias1, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden, out, bias=bias2, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Any:
        out = self.fc2(self.activation(self.fc1(x)))
        return (out, x) if self.return_residual else out


class GatedMlp(nn.Module):
    """fc2(y * activation(gate)), y and gate being the halves of fc1(x). The hidden width is `hidden_features`
    or 8 / 3 of in_features, rounded up to `multiple_of`."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        activation: Activation = F.sigmoid,
        bias1: bool = True,
        bias2: bool = True,
        multiple_of: int = 128,
        return_residual: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden = int(8 * in_features / 3) if hidden_features is None else hidden_features
        hidden = -(-hidden // multiple_of) * multiple_of
        out = in_features if out_features is None else out_features
        self.return_residual, self.activation = return_residual, activation
        self.fc1 = nn.Linear(in_features, 2 * hidden, bias=bias1, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden, out, bias=bias2, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Any:
        both = self.fc1(x)
        if self.activation is F.sigmoid:
            gated = F.glu(both, dim=-1)
        else:
            y, gate = both.chunk(2, dim=-1)
            gated = swiglu(gate, y) if self.activation is F.silu else y * self.activation(gate)
        out = self.fc2(gated)
        return (out, x) if self.return_residual else out
