"""torch.compile(flex_attention). On a CPU it has no backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from anyflash.bench.cells import Cell
from anyflash.bench.inputs import Inputs
from anyflash.bench.peers.base import Step, torch_step
from anyflash.bench.variants import VARIANTS, MaskMod, ScoreMod


class Flex:
    name = "torch flex"
    family = "torch flex"
    package = "torch"

    def __init__(self) -> None:
        self._compiled: tuple[Cell, Any] | None = None

    def lacks(self, cell: Cell) -> str | None:
        if cell.backward:
            return "no backward on CPU"
        if cell.cache is not None:
            return "no KV cache"
        return "no dropout" if VARIANTS[cell.variant].dropout_p else None

    def prepare(self, inputs: Inputs) -> Step:
        compiled = self._compile(inputs.cell)
        q, k, v = inputs.q, inputs.k, inputs.v
        packed = inputs.starts is not None
        if packed:
            q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        grouped = inputs.cell.heads != inputs.cell.heads_kv
        score, mask = _score(inputs), _block_mask(inputs, q.shape[2], k.shape[2])
        step = torch_step(
            inputs, lambda: compiled(q, k, v, score_mod=score, block_mask=mask, enable_gqa=grouped)
        )
        if not packed:
            return step
        return Step(step.call, lambda out: inputs.named(out.squeeze(0).transpose(0, 1)), step.context)

    def _compile(self, cell: Cell) -> Any:
        """One function for all arrays of a cell, and a fresh start for the next cell: what is compiled too
        often runs uncompiled from then on, in silence."""
        if self._compiled is None or self._compiled[0] != cell:
            torch._dynamo.reset()
            self._compiled = cell, torch.compile(flex_attention, dynamic=False)
        return self._compiled[1]


def _score(inputs: Inputs) -> ScoreMod | None:
    variant = inputs.variant
    if variant.score is not None:
        return variant.score(inputs.tables)
    if not variant.biases:
        return None
    cell = inputs.cell
    whole = (cell.batch, cell.heads, cell.seqlen_q, cell.seqlen_k)
    biases = [inputs.tables[name].expand(whole) for name in variant.biases]

    def add(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        for bias in biases:
            score = score + bias[b, h, q, k]
        return score

    return add


def _block_mask(inputs: Inputs, queries: int, keys: int) -> BlockMask | None:
    rules: list[MaskMod] = []
    if inputs.variant.causal:
        rules.append(lambda b, h, q, k: k <= q)
    if inputs.variant.mask is not None:
        rules.append(inputs.variant.mask(inputs.tables))
    if inputs.starts is not None:
        lengths = torch.tensor(inputs.cell.lengths)
        owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        rules.append(lambda b, h, q, k: owner[q] == owner[k])
    if not rules:
        return None

    def mask(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        allowed = rules[0](b, h, q, k)
        for rule in rules[1:]:
            allowed = allowed & rule(b, h, q, k)
        return allowed

    return create_block_mask(mask, None, None, queries, keys, device="cpu")


PEERS = (Flex(),)
