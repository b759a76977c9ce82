"""anyflash's part in a cell."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from torch import Tensor

import anyflash as af
from anyflash.bench import caches
from anyflash.bench.inputs import Inputs
from anyflash.bench.peers.base import Step, torch_step
from anyflash.semantics import rng

NAME = "anyflash"
_SEED = 1


def prepare(inputs: Inputs) -> Step:
    """The public call on arrays of the cell's framework."""
    if inputs.cell.cache is not None:
        return caches.prepare(inputs)
    torch_arrays = inputs.cell.frontend == "torch"
    array = (lambda x: x) if torch_arrays else (lambda x: x.detach().numpy())
    q, k, v = (array(x) for x in (inputs.q, inputs.k, inputs.v))
    keywords: dict[str, Any] = inputs.variant.keywords({name: array(x) for name, x in inputs.tables.items()})
    if inputs.dropout_p:
        keywords |= {"dropout_p": inputs.dropout_p, "seed": _SEED}
    if inputs.starts is not None:
        starts = array(inputs.starts)
        forward = lambda: af.attention_varlen(q, k, v, cu_seqlens_q=starts, cu_seqlens_k=starts, **keywords)
    else:
        forward = lambda: af.attention(q, k, v, layout="bhsd", **keywords)
    if torch_arrays:
        return torch_step(inputs, forward)
    return Step(forward, lambda out: {"out": torch.from_numpy(out)})


def kept(inputs: Inputs) -> Tensor | None:
    """(B, H, Tq, Tk) bool: what our dropout keeps; None without dropout."""
    cell, p = inputs.cell, inputs.dropout_p
    if not p:
        return None
    found = torch.empty((cell.batch, cell.heads, cell.seqlen_q, cell.seqlen_k), dtype=torch.bool)
    for b, h in product(range(cell.batch), range(cell.heads)):
        factors = rng.dropout_factors(p, _SEED, b, h, cell.seqlen_q, cell.seqlen_k)
        found[b, h] = torch.from_numpy(factors != 0)
    return found
