"""What stands in a rewritten graph in the place of attention.

q       (..., q, dim); keys (..., dim, k), as the product of a graph takes them; v (..., k, value dim)
steps   on the scores, of `graph.Found`; their tensors broadcast to (..., q, k) and are read along the axes on
        which they differ only, with gradients
result  (..., q, value dim)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from anyflash import api
from anyflash.adapters._kernl.graph import Step
from anyflash.semantics.expr import Expr, tanh, where
from anyflash.semantics.mask import upper_left

_APPLY: dict[str, Callable[..., Any]] = {
    "add": lambda s, x: s + x,
    "sub": lambda s, x: s - x,
    "mul": lambda s, x: s * x,
    "div": lambda s, x: s / x,
    "tanh": tanh,
    "fill": lambda s, condition, value: where(condition, value, s),
    "keep": lambda s, condition, value: where(condition, s, value),
}


def attention(q: Tensor, keys: Tensor, v: Tensor, steps: Sequence[Step], dropout_p: float) -> Tensor:
    """softmax(steps(q @ keys)) @ v."""
    lead = torch.broadcast_shapes(q.shape[:-2], keys.shape[:-2], v.shape[:-2])
    q, k, v = (_to_four_axes(t, lead) for t in (q, keys.mT, v))
    scale = 1.0
    while steps and steps[0][0] in ("mul", "div") and isinstance(steps[0][1], int | float):
        (what, factor), *steps = steps
        scale = scale * factor if what == "mul" else scale / factor

    def score(s: Expr, at: Any) -> Expr:
        for what, *operands in steps:
            s = _APPLY[what](s, *[_read(each, lead, at) for each in operands])
        return s

    out = api.attention(
        q, k, v, layout="bhsd", scale=scale, score=score if steps else None, dropout_p=dropout_p
    )
    return out.reshape(*lead, *out.shape[-2:])


def attention_of_kernl(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
    sm_scale: float,
    is_causal: bool,
    attention_mask: Tensor | None,
) -> Tensor:
    """In the place of Kernl's `attention_wrapper`: q (..., q, dim), k and v (..., k, dim), an additive mask
    that broadcasts to (..., q, k), and causal upper-left. `output`, room for the result, stays unused."""
    lead = q.shape[:-2]
    q, k, v = (_to_four_axes(t, lead) for t in (q, k, v))
    score = None if attention_mask is None else lambda s, at: s + _read(attention_mask, lead, at)
    out = api.attention(
        q, k, v, layout="bhsd", scale=sm_scale, score=score, mask=upper_left() if is_causal else None
    )
    return out.reshape(*lead, *out.shape[-2:])


def _to_four_axes(t: Tensor, lead: Sequence[int]) -> Tensor:
    """(batch, heads, rows, dim). The last of several leading axes is that of heads, one is the batch."""
    t = t.expand(*lead, *t.shape[-2:])
    if len(lead) == 1:
        return t[:, None]
    return t.reshape(math.prod(lead[:-1]), *t.shape[-3:]) if lead else t[None, None]


def _read(operand: Any, lead: Sequence[int], at: Any) -> Any:
    """A number as it is; a tensor at the place of a score."""
    if not isinstance(operand, Tensor):
        return float(operand)
    places: list[Any] = [at.row, at.k]
    outer = lead[:-1] if len(lead) > 1 else lead
    if len(lead) > 1:
        places.insert(0, at.head)
    step = 1
    for size in reversed(outer):
        places.insert(0, at.batch if len(outer) == 1 else at.batch // step % size)
        step *= size
    places = places[len(places) - operand.ndim :]
    # An axis that is stretched in memory holds one value only.
    varying = [i for i in range(operand.ndim) if operand.shape[i] > 1 and operand.stride(i) != 0]
    for axis in reversed(range(operand.ndim)):
        if axis not in varying:
            operand = operand.select(axis, 0)
    if not varying:
        return api.table(operand.reshape(1))[0]
    return api.table(operand)[tuple(places[i] for i in varying)]
