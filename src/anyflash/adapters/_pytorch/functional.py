"""`scaled_dot_product_attention` by `anyflash.attention`."""

from __future__ import annotations

from typing import Any

import torch

from anyflash import api
from anyflash.core.log import logger
from anyflash.semantics.mask import upper_left

# What has the name without us; activation takes it anew.
torchs_own = torch.nn.functional.scaled_dot_product_attention


def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, computed by `anyflash.attention`.

    query      (..., heads, q, head_dim); key, value (..., kv heads, k, dim); leading axes broadcast
    attn_mask  bool, True = attend, or additive; broadcastable to (..., heads, q, k)
    is_causal  key <= query row, both counted from 0: torch's upper-left convention; and-ed with a mask

    Returns (..., heads, q, value dim). Rows without a key are 0. What we have no form for (nested tensors,
    heads that torch would broadcast without `enable_gqa`) goes to torch's own function, and the log says so.
    """
    reason = _not_ours(query, key, value, attn_mask, enable_gqa)
    if reason is not None:
        logger.info("scaled_dot_product_attention left to torch: %s", reason)
        return torchs_own(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    lead = query.shape[:-3]
    q, k, v = (_to_four_axes(t) for t in (query, key, value))
    if attn_mask is not None and attn_mask.ndim > 4:
        attn_mask = attn_mask.flatten(0, -4)
    out = api.attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        scale=scale,
        dropout_p=dropout_p,
        **program(q.shape[2], k.shape[2], attn_mask, is_causal),
    ).transpose(1, 2)
    if query.ndim == 4:
        return out
    return out[0] if query.ndim == 3 else out[0, 0] if query.ndim == 2 else out.unflatten(0, lead)


def program(rows: int, keys: int, attn_mask: torch.Tensor | None, is_causal: bool) -> dict[str, Any]:
    """torch's mask and its upper-left `is_causal` as our keywords."""
    mask: Any = None
    bias: Any = None
    if attn_mask is not None:
        mask, bias = (None, [attn_mask]) if attn_mask.is_floating_point() else (attn_mask, None)
    bottom_right = is_causal and rows == keys
    if is_causal and not bottom_right:
        mask = upper_left() if mask is None else upper_left() & mask
    return {"causal": bottom_right, "mask": mask, "bias": bias}


def _to_four_axes(t: torch.Tensor) -> torch.Tensor:
    while t.ndim < 4:
        t = t[None]
    return t if t.ndim == 4 else t.flatten(0, -4)


def _not_ours(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    enable_gqa: bool,
) -> str | None:
    """Why torch's own function has to answer; None if ours can. Errors of a call are torch's to raise."""
    if any(t.is_nested or not t.is_floating_point() for t in (query, key, value)):
        return "nested or not floating point"
    if len({t.ndim for t in (query, key, value)}) != 1 or query.ndim < 2:
        return f"axes {query.ndim}, {key.ndim}, {value.ndim}"
    if query.shape[:-3] != key.shape[:-3] or query.shape[:-3] != value.shape[:-3]:
        return "leading axes to broadcast"
    if query.ndim > 2 and not (query.shape[-3] == key.shape[-3] == value.shape[-3]) and not enable_gqa:
        return "heads to broadcast"
    if attn_mask is not None and query.ndim > 4 and attn_mask.shape[:-3] != query.shape[:-3]:
        return "a mask to broadcast over more than one leading axis"
    return None
