"""The forward of the cross attention of labml.ai's Stable Diffusion.

x     (batch, rows, width)
cond  (batch, keys, width of the condition), None for x itself
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from anyflash import api


def cross_attention(self: Any, x: Tensor, cond: Tensor | None = None) -> Tensor:
    """Of `labml_nn.diffusion.stable_diffusion.model.unet_attention.CrossAttention`."""
    source = x if cond is None else cond
    q, k, v = (
        projection(t).unflatten(-1, (self.n_heads, -1))
        for projection, t in ((self.to_q, x), (self.to_k, source), (self.to_v, source))
    )
    return self.to_out(api.attention(q, k, v, scale=self.scale).flatten(2))
