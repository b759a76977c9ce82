"""anyflash's part in a cell over a KV cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import anyflash as af
from anyflash.bench.inputs import Inputs
from anyflash.bench.peers.base import Step, torch_step


def prepare(inputs: Inputs) -> Step:
    """One layer's step of decoding: the keys and values of the queries are appended, then all are attended
    to. A call finds the cache as long as the one before did, and writes the same slots again."""
    cell = inputs.cell
    q, *kv = (x.transpose(1, 2).contiguous() for x in (inputs.q, inputs.k, inputs.v))
    before = cell.seqlen_k - cell.seqlen_q
    new = [x[:, before:].clone() for x in kv]
    held = torch.full((cell.batch,), before, dtype=torch.int32)
    if cell.cache == "dense":
        cache = af.KVCache(*kv, seqlens=held)
    else:
        assert cell.cache is not None
        table = _places(cell.batch, -(-cell.seqlen_k // cell.cache))
        cache = af.KVCache(*(_in_pages(x, table, cell.cache) for x in kv), held, table)
    keywords: dict[str, Any] = inputs.variant.keywords(inputs.tables)
    step = torch_step(inputs, lambda: af.attention_kvcache(q, cache, *new, **keywords))
    return Step(step.call, lambda out: inputs.named(out.transpose(1, 2)), step.context)


def _places(sequences: int, each: int) -> Tensor:
    """(sequences, each) int32: pages in no order, as a server's are after a while."""
    order = torch.randperm(sequences * each, generator=torch.Generator().manual_seed(0))
    return order.view(sequences, each).to(torch.int32)


def _in_pages(x: Tensor, table: Tensor, size: int) -> Tensor:
    """x (B, S, H, D) as (pages, size, H, D): slot s of sequence b is slot s % size of page
    table[b, s // size]."""
    batch, slots, heads, dim = x.shape
    padded = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, table.shape[1] * size - slots))
    pages = torch.empty((table.numel(), size, heads, dim), dtype=x.dtype)
    pages[table.flatten().long()] = padded.view(batch * table.shape[1], size, heads, dim)
    return pages
