"""The forwards of the two attentions of `ldm`, the code that Stable Diffusion was published with.

CrossAttention  x (batch, rows, width); context (batch, keys, context width), None for x itself; mask
                (batch, ...) with one bool a key, True = attend. A query without a key gets the mean of all
AttnBlock       x (batch, channels, height, width), one head of all channels
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anyflash import api
from anyflash.semantics.expr import where


def cross_attention(
    self: Any, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """Of `ldm.modules.attention.CrossAttention`."""
    source = x if context is None else context
    q, k, v = (
        projection(t).unflatten(-1, (self.heads, -1))
        for projection, t in ((self.to_q, x), (self.to_k, source), (self.to_v, source))
    )
    score = None if mask is None else _kept(mask.flatten(1), -torch.finfo(q.dtype).max)
    return self.to_out(api.attention(q, k, v, scale=self.scale, score=score).flatten(2))


def _kept(mask: Tensor, masked: float) -> Any:
    kept = api.table(mask)
    return lambda s, at: where(kept[at.batch, at.k], s, masked)


def attention_block(self: Any, x: Tensor) -> Tensor:
    """Of `ldm.modules.diffusionmodules.model.AttnBlock`."""
    normal = self.norm(x)
    q, k, v = (conv(normal).flatten(2).transpose(1, 2)[:, :, None] for conv in (self.q, self.k, self.v))
    out = api.attention(q, k, v)[:, :, 0].transpose(1, 2)
    return x + self.proj_out(out.reshape(x.shape))
