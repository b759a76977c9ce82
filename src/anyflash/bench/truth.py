"""Plain attention, forward and backward, in any arithmetic: the truth in float64, and what plain attention in
the cell's own dtype makes of it.

It runs over blocks of queries, so that no more than a block of scores is in memory; torch differentiates it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from anyflash.bench.arithmetic import allowed, places
from anyflash.bench.inputs import Inputs, Results

_SCORES_AT_ONCE = 1 << 24


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """Compute in `work`; round what comes out of each step to `kept`."""

    work: torch.dtype
    kept: torch.dtype

    def __call__(self, x: Tensor) -> Tensor:
        return x if self.kept is self.work else x.to(self.kept).to(self.work)


EXACT = Arithmetic(torch.float64, torch.float64)


def plain(dtype: str) -> Arithmetic:
    """Of plain attention in `dtype`: narrow types are multiplied in float32 and rounded after every step."""
    kept = getattr(torch, dtype)
    return Arithmetic(torch.float64 if kept is torch.float64 else torch.float32, kept)


def attention(inputs: Inputs, a: Arithmetic, keep: Tensor | None = None) -> Results:
    """Output and gradients, all in `a.work`. `keep` (B, H, Tq, Tk) bool says what dropout keeps."""
    if inputs.starts is None:
        return _dense(inputs, a, keep)
    parts = [_dense(_sequence(inputs, i), a, None) for i in range(len(inputs.cell.lengths))]
    # (1, heads, rows, dim) of each sequence, packed again as (total, heads, dim)
    return {name: torch.cat([part[name][0].transpose(0, 1) for part in parts]) for name in parts[0]}


def _sequence(inputs: Inputs, i: int) -> Inputs:
    """Sequence `i` of a packed call as a dense one."""
    n = inputs.cell.lengths[i]
    start = sum(inputs.cell.lengths[:i])

    def rows(x: Tensor) -> Tensor:
        return x.detach()[start : start + n].transpose(0, 1).unsqueeze(0)

    return replace(
        inputs,
        cell=replace(inputs.cell, batch=1, seqlen_q=n, seqlen_k=n, lengths=()),
        q=rows(inputs.q),
        k=rows(inputs.k),
        v=rows(inputs.v),
        dout=None if inputs.dout is None else rows(inputs.dout),
        starts=None,
    )


def _dense(inputs: Inputs, a: Arithmetic, keep: Tensor | None) -> Results:
    cell = inputs.cell
    leaves = {
        name: leaf.detach().to(a.work).requires_grad_(cell.backward) for name, leaf in inputs.leaves.items()
    }
    step = max(1, _SCORES_AT_ONCE // (cell.batch * cell.heads * cell.seqlen_k))
    outs: list[Tensor] = []
    for first in range(0, cell.seqlen_q, step):
        rows = torch.arange(first, min(first + step, cell.seqlen_q))
        out = _block(inputs, leaves, a, rows, None if keep is None else keep[:, :, rows])
        if inputs.dout is not None:
            out.backward(inputs.dout[:, :, rows].to(a.work))
        outs.append(out.detach())
    found = {"out": torch.cat(outs, dim=2)}
    if cell.backward:
        found |= {f"d{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return found


def _block(
    inputs: Inputs, leaves: dict[str, Tensor], a: Arithmetic, rows: Tensor, keep: Tensor | None
) -> Tensor:
    cell, variant = inputs.cell, inputs.variant
    group = cell.heads // cell.heads_kv
    by_key_head = (cell.batch, cell.heads_kv, group * len(rows), -1)
    by_head = (cell.batch, cell.heads, len(rows), -1)
    q = a(leaves["q"][:, :, rows] * cell.head_dim**-0.5)
    s = a((q.reshape(by_key_head) @ leaves["k"].transpose(2, 3)).view(by_head))
    if variant.score is not None:
        tables = {name: t.to(a.work) if t.is_floating_point() else t for name, t in inputs.tables.items()}
        s = a(variant.score(tables)(s, *places(inputs, rows)))
    for name in variant.biases:
        bias = leaves[name]
        s = a(s + (bias if bias.shape[2] == 1 else bias[:, :, rows]))
    mask = allowed(inputs, rows)
    if mask is not None:
        s = s.masked_fill(~mask, -torch.inf)
    p = a(torch.softmax(s, dim=-1))
    if keep is not None:
        p = a(p * keep / (1 - inputs.dropout_p))
    return a((p.view(by_key_head) @ leaves["v"]).view(by_head))
