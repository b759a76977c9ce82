"""The attention of Hazy Research's diffusers, which it takes to flash_attn on a GPU and in half precision.

CrossAttention._attention  query, key, value (batch, rows, heads x head_dim), projected; gives the same shape
AttentionBlock             hidden_states (batch, channels, height, width), as does what it gives
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from anyflash import api


def attention(self: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Of `diffusers.models.attention.CrossAttention`."""
    q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in (query, key, value))
    return api.attention(q, k, v, scale=self.scale).flatten(2)


def sliced_attention(
    self: Any, query: Tensor, key: Tensor, value: Tensor, sequence_length: int, dim: int
) -> Tensor:
    """The same: slices of the batch save memory of scores, and there are none."""
    return attention(self, query, key, value)


def attention_block(self: Any, hidden_states: Tensor) -> Tensor:
    """Of `diffusers.models.attention.AttentionBlock`."""
    x = self.group_norm(hidden_states).flatten(2).transpose(1, 2)
    projected = self.query(x), self.key(x), self.value(x)
    q, k, v = (t.unflatten(-1, (self.num_heads, -1)) for t in projected)
    out = self.proj_attn(api.attention(q, k, v).flatten(2)).transpose(1, 2)
    return (out.reshape(hidden_states.shape) + hidden_states) / self.rescale_output_factor
