"""Attention over any leading axes, with biases that each leave out some: how protein models call it.

q           (*, heads, q, dim); k, v (*, heads, k, dim)
biases      each broadcasts to (*, heads, q, k): of alignments a mask (1, rows, 1, 1, k) and a pair bias
            (1, 1, heads, q, k); read as they are, never stretched or added up, with gradients
result      (*, heads, q, dim)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from anyflash import api


def attend(q: Tensor, k: Tensor, v: Tensor, biases: Sequence[Tensor], scale: float) -> Tensor:
    lead = q.shape[:-3]
    q, k, v = (t.reshape(math.prod(lead), *t.shape[-3:]) for t in (q, k, v))

    def score(s: Any, at: Any) -> Any:
        for bias in biases:
            s = s + _read(bias, lead, at)
        return s

    out = api.attention(q, k, v, layout="bhsd", scale=scale, score=score if biases else None)
    return out.reshape(*lead, *out.shape[1:])


def _read(bias: Tensor, lead: Sequence[int], at: Any) -> Any:
    """The bias at a score's place; axes of extent 1 are left out."""
    inner = [at.head, at.row, at.k]
    places = []
    step = 1
    for size in reversed(lead):
        # A batch entry's number counts the leading axes together, the last one fastest.
        places.insert(0, at.batch if step == 1 and math.prod(lead) == size else at.batch // step % size)
        step *= size
    places += inner
    places = places[len(places) - bias.ndim :]
    varying = [i for i, extent in enumerate(bias.shape) if extent > 1]
    if not varying:
        return api.table(bias.reshape(1))[0]
    table = api.table(bias.reshape([bias.shape[i] for i in varying]))
    return table[tuple(places[i] for i in varying)]
