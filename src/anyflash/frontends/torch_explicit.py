"""Attention as two calls, for callers below autograd: they keep its results and ask for gradients themselves.

Where a row's scores are all huge negatives, an lse in float32 has rounded away what they differ by. A door
that lets us keep `stats` has the right gradient there too; one that carries no more than lse cannot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anyflash.dispatch import plan
from anyflash.frontends import base
from anyflash.frontends.base import Request
from anyflash.frontends.torch_ import FRONTEND
from anyflash.frontends.torch_arrays import dtype_name, statistic, view
from anyflash.semantics.keywords import describe_program


@dataclass(frozen=True, slots=True)
class Lengths:
    """Where packed sequences lie: `cu_*` (sequences + 1,), `used_k` (sequences,) or None for all keys."""

    cu_q: Tensor
    cu_k: Tensor
    used_k: Tensor | None = None


class Gradients(NamedTuple):
    """`biases[i]` has the shape of bias i and is in the accumulator's type; None where none was asked for."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    biases: tuple[Tensor | None, ...]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lengths: Lengths | None = None,
    seed: int | None = None,
    **keywords: Any,
) -> base.Forward:
    """(out, lse, stats) of `anyflash.attention`, or of `attention_varlen` with `lengths`; no autograd.

    q, k, v    (B, T, H, D), or (total, H, D) packed
    seed       needed with dropout
    keywords   those of the public call that make up its program
    """
    return base.forward(FRONTEND, _request(q, k, v, lengths, seed, keywords))


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    *,
    stats: Tensor | None = None,
    lengths: Lengths | None = None,
    seed: int | None = None,
    bias: Sequence[Tensor] = (),
    wanted: Sequence[bool] = (),
    **keywords: Any,
) -> Gradients:
    """Gradients of the call of `forward` that gave `out` and `lse`, or `stats`; of `bias[i]` where
    `wanted[i]`."""
    request = _request(q, k, v, lengths, seed, {**keywords, "bias": list(bias) or None})
    places = [request.names.index(f"bias[{i}]") for i in range(len(bias))]
    wants = [False] * len(request.names)
    for place, want in zip(places, wanted, strict=False):
        wants[place] = want
    if stats is None:
        assert lse is not None
        stats = _restated(request, lse.to(statistic(q)).contiguous())
    found = base.backward(FRONTEND, request, out, stats, dout, needs_grad=tuple(wants))
    grads = [found.tables[place] for place in places]
    shaped = [g if g is None else g.reshape(b.shape) for g, b in zip(grads, bias, strict=True)]
    return Gradients(found.dq, found.dk, found.dv, tuple(shaped))


def _restated(request: Request, lse: Tensor) -> Tensor:
    problem, operands = base.describe_request(FRONTEND, request)
    stats = lse.new_empty((2, *lse.shape))
    plan.restate(problem, operands.q.device, view(lse), view(stats))
    return stats


def draw_seed() -> int:
    """One from torch's CPU generator, as a call without a seed draws it."""
    return int(torch.randint(2**63 - 1, (), dtype=torch.int64))


def _request(
    q: Tensor, k: Tensor, v: Tensor, lengths: Lengths | None, seed: int | None, keywords: dict[str, Any]
) -> Request:
    layout = "bshd" if lengths is None else "thd"
    program, tables, names = describe_program(
        q.shape,
        k.shape,
        lambda _, array: dtype_name(array),
        layout=layout,
        sequences=None if lengths is None else lengths.cu_q.shape[0] - 1,
        **keywords,
    )
    packed = (None, None, None) if lengths is None else (lengths.cu_q, lengths.cu_k, lengths.used_k)
    dropout = keywords.get("dropout_p", 0.0) != 0.0
    arrays = (q, k, v, layout, tables, names, keywords.get("sinks"), *packed)
    return Request(program, *arrays, dropout, seed)
