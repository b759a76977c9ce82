"""A GPT's layers on FasterTransformer's weights; attention is the caller's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from anyflash.core.errors import Unsupported

# (tokens, heads, head_dim) for q, k and v to the same.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
    "silu": functional.silu,
}
_TENSORS_PER_LAYER = 12


@dataclass(frozen=True, slots=True)
class Norm:
    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor, eps: float) -> Tensor:
        return functional.layer_norm(x, x.shape[-1:], self.weight, self.bias, eps)


@dataclass(frozen=True, slots=True)
class Linear:
    """The weight is (in, out)."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


@dataclass(frozen=True, slots=True)
class Layer:
    """In FasterTransformer's order. `first` and `second` are its norms."""

    first: Norm
    qkv: Linear
    dense: Linear
    second: Norm
    up: Linear
    down: Linear


class Stack:
    """The layers of one operator. The arguments are those of FasterTransformer's constructors.

    weights  12 tensors a layer, the first of all layers, then the second of all, and so on; (in, out)

    Raises Unsupported for what FasterTransformer distributes, quantises or adds: parallel groups, int8
    weights, adapters, other activations.
    """

    def __init__(
        self,
        num_heads: int,
        size_per_head: int,
        num_layers: int,
        parallel: int,
        layernorm_eps: float,
        layernorm_type: str,
        activation_type: str,
        has_adapters: bool,
        int8_mode: int,
        weights: Sequence[Tensor],
    ) -> None:
        activation = _ACTIVATIONS.get(activation_type.lower())
        reasons = [
            reason
            for reason, holds in (
                (f"{parallel} processes", parallel != 1),
                (f"int8_mode {int8_mode}", int8_mode != 0),
                ("adapters", has_adapters),
                (f"activation {activation_type!r}; there are {', '.join(_ACTIVATIONS)}", activation is None),
            )
            if holds
        ]
        if reasons or activation is None:
            raise Unsupported("FasterTransformer's GPT with these settings", {"anyflash": reasons})
        self.num_heads = num_heads
        self.size_per_head = size_per_head
        self.chunk = 16 // weights[0].element_size()
        self._eps = layernorm_eps
        self._norm_comes_first = layernorm_type == "pre_layernorm"
        self._activation = activation
        self.layers = [
            _layer([weights[n * num_layers + i] for n in range(_TENSORS_PER_LAYER)])
            for i in range(num_layers)
        ]

    def run(self, layer: Layer, x: Tensor, attend: Attend) -> Tensor:
        """One layer on tokens (tokens, hidden)."""
        before = layer.first(x, self._eps) if self._norm_comes_first else x
        qkv = layer.qkv(before).view(len(x), 3, self.num_heads, self.size_per_head)
        x = x + layer.dense(attend(*qkv.unbind(1)).reshape(len(x), -1))
        if self._norm_comes_first:
            return x + self._feed_forward(layer, layer.second(x, self._eps))
        x = layer.first(x, self._eps)
        return layer.second(x + self._feed_forward(layer, x), self._eps)

    def _feed_forward(self, layer: Layer, x: Tensor) -> Tensor:
        return layer.down(self._activation(layer.up(x)))


def _layer(tensors: Sequence[Any]) -> Layer:
    norms = Norm(*tensors[0:2]), Norm(*tensors[6:8])
    linears = [Linear(*tensors[i : i + 2]) for i in (2, 4, 8, 10)]
    return Layer(norms[0], linears[0], linears[1], norms[1], linears[2], linears[3])
