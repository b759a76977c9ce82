"""`flash_attn.ops.activations`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def gelu_fwd(x: Tensor) -> Tensor:
    """GELU by tanh."""
    return F.gelu(x, approximate="tanh")


def gelu_bwd(g: Tensor, x: Tensor) -> Tensor:
    """The gradient of `gelu_fwd` at x, times g."""
    return torch.ops.aten.gelu_backward(g, x, approximate="tanh").to(x.dtype)


fast_gelu_impl = gelu_fwd


def bias_gelu(y: Tensor, bias: Tensor) -> Tensor:
    return gelu_fwd(bias + y)


def bias_gelu_back(g: Tensor, y: Tensor, bias: Tensor) -> Tensor:
    """The gradient of `bias_gelu` with respect to y, times g."""
    return gelu_bwd(g, bias + y).to(y.dtype)


bias_gelu_impl = bias_gelu


def relu_bwd(g: Tensor, x: Tensor) -> Tensor:
    return torch.where(x >= 0, g, 0.0).to(x.dtype)


def sqrelu_fwd(x: Tensor) -> Tensor:
    """relu(x) squared, in the dtype of x."""
    return F.relu(x.float() if x.dtype is not torch.float64 else x).square().to(x.dtype)


def sqrelu_bwd(g: Tensor, x: Tensor) -> Tensor:
    return (2.0 * g * F.relu(x.float() if x.dtype is not torch.float64 else x)).to(x.dtype)


def swiglu(x: Tensor, y: Tensor) -> Tensor:
    """silu(x) * y, in the dtype of x."""
    if x.dtype is torch.float64:
        return F.silu(x) * y
    return (F.silu(x.float()) * y.float()).to(x.dtype)


swiglu_fwd = swiglu


def swiglu_bwd(x: Tensor, y: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of `swiglu` with respect to x and y, times g."""
    kind = torch.float64 if x.dtype is torch.float64 else torch.float32
    wide_x, wide_y, wide_g = (t.to(kind) for t in (x, y, g))
    sigmoid = wide_x.sigmoid()
    dx = sigmoid * (1 + wide_x * (1 - sigmoid)) * wide_g * wide_y
    return dx.to(x.dtype), (wide_x * sigmoid * wide_g).to(y.dtype)
