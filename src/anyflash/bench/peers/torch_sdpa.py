"""torch.nn.functional.scaled_dot_product_attention, by each of its CPU backends.

What it has no argument for is given as a mask: a boolean one for windows and documents, a floating one for
ALiBi. Both are built before the call; a bias that needs a gradient is added up inside it. A formula that
depends on the score goes by the same steps written out, which is what its math backend does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from anyflash.bench.arithmetic import allowed, places
from anyflash.bench.cells import Cell
from anyflash.bench.inputs import Inputs, Results
from anyflash.bench.peers.base import Step, torch_step
from anyflash.bench.variants import VARIANTS
from anyflash.core.dtypes import ITEMSIZE

# Scores, probabilities, and their gradients.
_SCORE_ARRAYS = 5


class Flash:
    """Its flash kernel. Packed sequences go through it one by one."""

    name = "torch flash"
    family = "torch flash"
    package = "torch"

    def lacks(self, cell: Cell) -> str | None:
        variant = VARIANTS[cell.variant]
        if cell.cache is not None:
            return "no KV cache"
        if variant.dropout_p:
            return "no dropout"
        if variant.score is not None and not variant.additive:
            return "no formula"
        return "no gradient of a bias" if variant.biases and cell.backward else None

    def prepare(self, inputs: Inputs) -> Step:
        forward = _loop(inputs) if inputs.starts is not None else _dense(inputs)
        return torch_step(inputs, forward, lambda: sdpa_kernel(SDPBackend.FLASH_ATTENTION))


class Padded:
    """The flash kernel on packed sequences padded to the longest, with a mask. The padding is not timed."""

    name = "torch flash, padded"
    family = "torch flash"
    package = "torch"

    def lacks(self, cell: Cell) -> str | None:
        return None if cell.lengths else "for packed sequences"

    def prepare(self, inputs: Inputs) -> Step:
        n = inputs.cell.seqlen_q
        q, k, v = (
            _pad(x.detach(), inputs).requires_grad_(inputs.cell.backward)
            for x in (inputs.q, inputs.k, inputs.v)
        )
        keys = torch.arange(n)
        mask = (keys < torch.tensor(inputs.cell.lengths)[:, None])[:, None, None, :]
        if inputs.variant.causal:
            mask = mask & (keys <= keys[:, None])
        grouped = inputs.cell.heads != inputs.cell.heads_kv
        forward = lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
        step = torch_step(inputs, forward, lambda: sdpa_kernel(SDPBackend.FLASH_ATTENTION))
        if inputs.dout is None:
            return Step(step.call, lambda out: _unpad({"out": out}, inputs), step.context)
        dout = _pad(inputs.dout, inputs)

        def both() -> tuple[Tensor, ...]:
            out = forward()
            return (out, *torch.autograd.grad(out, (q, k, v), dout))

        return Step(both, lambda arrays: _unpad(inputs.named(arrays), inputs), step.context)


class Math:
    """Its math backend, which keeps every score; formulas are written out."""

    name = "torch math"
    family = "torch math"
    package = "torch"

    def lacks(self, cell: Cell) -> str | None:
        if cell.cache is not None:
            return "no KV cache"
        longest = (
            max(1, sum(n * n for n in cell.lengths))
            if cell.lengths
            else cell.batch * cell.seqlen_q * cell.seqlen_k
        )
        needed = _SCORE_ARRAYS * longest * cell.heads * max(4, ITEMSIZE[cell.dtype])
        if cell.heads != cell.heads_kv:
            needed += 2 * cell.batch * cell.heads * cell.seqlen_k * cell.head_dim * ITEMSIZE[cell.dtype]
        total = psutil.virtual_memory().total
        return f"needs {needed >> 30} of {total >> 30} GiB" if 2 * needed > total else None

    def prepare(self, inputs: Inputs) -> Step:
        context = lambda: sdpa_kernel(SDPBackend.MATH)
        if inputs.starts is not None:
            return torch_step(inputs, _loop(inputs), context)
        if inputs.variant.score is not None and not inputs.variant.additive:
            return torch_step(inputs, _written_out(inputs))
        return torch_step(inputs, _dense(inputs), context)


def _dense(inputs: Inputs) -> Callable[[], Tensor]:
    variant, cell = inputs.variant, inputs.cell
    q, k, v = inputs.q, inputs.k, inputs.v
    options: dict[str, Any] = {"dropout_p": inputs.dropout_p, "enable_gqa": cell.heads != cell.heads_kv}
    if variant.biases:
        first, *others = (inputs.tables[name] for name in variant.biases)
        shape = (1, 1, cell.seqlen_q, 1)

        def with_biases() -> Tensor:
            mask = first if others else first.expand(torch.broadcast_shapes(first.shape, shape))
            for other in others:
                mask = mask + other
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)

        return with_biases
    if variant.mask is None and variant.score is None:
        options["is_causal"] = variant.causal
    else:
        options["attn_mask"] = dense_mask(inputs)
    return lambda: F.scaled_dot_product_attention(q, k, v, **options)


def dense_mask(inputs: Inputs) -> Tensor:
    """Mask and additive score function of the whole problem as one array: boolean without a score
    function."""
    rows = torch.arange(inputs.cell.seqlen_q)
    mask = allowed(inputs, rows)
    if inputs.variant.score is None:
        assert mask is not None
        return mask
    score = inputs.variant.score(inputs.tables)(torch.zeros(()), *places(inputs, rows))
    score = score if mask is None else score.masked_fill(~mask, -torch.inf)
    return score.to(inputs.q.dtype)


def _written_out(inputs: Inputs) -> Callable[[], Tensor]:
    assert inputs.variant.score is not None
    cell, q, k, v = inputs.cell, inputs.q, inputs.k, inputs.v
    rows = torch.arange(cell.seqlen_q)
    score, where = inputs.variant.score(inputs.tables), places(inputs, rows)
    mask = allowed(inputs, rows)
    hidden = None if mask is None else ~mask
    group = cell.heads // cell.heads_kv

    def forward() -> Tensor:
        keys, values = (x.repeat_interleave(group, 1) if group > 1 else x for x in (k, v))
        s = score((q @ keys.transpose(2, 3)) * cell.head_dim**-0.5, *where)
        s = s if hidden is None else s.masked_fill(hidden, -torch.inf)
        return torch.softmax(s, dim=-1).to(values.dtype) @ values

    return forward


def _loop(inputs: Inputs) -> Callable[[], Tensor]:
    cell, q, k, v = inputs.cell, inputs.q, inputs.k, inputs.v
    options = {"is_causal": inputs.variant.causal, "enable_gqa": cell.heads != cell.heads_kv}
    lengths = list(cell.lengths)

    def forward() -> Tensor:
        parts = zip(*(x.transpose(0, 1).unsqueeze(0).split(lengths, dim=2) for x in (q, k, v)), strict=True)
        outs = [F.scaled_dot_product_attention(*part, **options) for part in parts]
        return torch.cat(outs, dim=2).squeeze(0).transpose(0, 1)

    return forward


def _pad(packed: Tensor, inputs: Inputs) -> Tensor:
    """(total, heads, dim) as (sequences, heads, longest, dim), zero past each length."""
    return torch.nn.utils.rnn.pad_sequence(packed.split(inputs.cell.lengths), batch_first=True).transpose(
        1, 2
    )


def _unpad(arrays: Results, inputs: Inputs) -> Results:
    return {
        name: torch.cat(
            [rows[:, :n].transpose(0, 1) for rows, n in zip(array, inputs.cell.lengths, strict=True)]
        )
        for name, array in arrays.items()
    }


PEERS = (Flash(), Padded(), Math())
