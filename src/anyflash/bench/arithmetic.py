"""How much a cell computes and reads: what its time is divided into."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from anyflash.bench.inputs import Inputs
from anyflash.core.dtypes import ITEMSIZE

_PAIRS_AT_ONCE = 1 << 24
# Products of two matrices over the pairs: q k and p v forward; of these the first again, dout v, and the
# three gradients backward.
_FORWARD, _BACKWARD = 2, 5


def flops(inputs: Inputs) -> int:
    """Operations of the matrix products over allowed pairs: a multiplication and an addition for each.

    Masked pairs are not counted whether or not they are computed, nor is the softmax: 2 products forward and
    5 backward, so that a backward counts as 2.5 forwards.
    """
    products = _FORWARD + (_BACKWARD if inputs.cell.backward else 0)
    return 2 * products * inputs.cell.head_dim * pairs(inputs)


def nbytes(inputs: Inputs) -> int:
    """Bytes of q, k, v and out, each counted once."""
    elements = 2 * math.prod(inputs.q.shape) + 2 * math.prod(inputs.k.shape)
    return ITEMSIZE[inputs.cell.dtype] * elements


def pairs(inputs: Inputs) -> int:
    """(batch, query head, query, key) whose score is used."""
    cell = inputs.cell
    if inputs.starts is not None:
        assert not inputs.variant.mask
        return cell.heads * sum(n * (n + 1) // 2 if inputs.variant.causal else n * n for n in cell.lengths)
    step = max(1, _PAIRS_AT_ONCE // cell.seqlen_k)
    total = 0
    for first in range(0, cell.seqlen_q, step):
        rows = torch.arange(first, min(first + step, cell.seqlen_q))
        mask = allowed(inputs, rows)
        count = len(rows) * cell.seqlen_k if mask is None else int(mask.sum())
        same = 1 if mask is None else mask.shape[0] * mask.shape[1]
        total += count * cell.batch * cell.heads // same
    return total


def allowed(inputs: Inputs, rows: Tensor) -> Tensor | None:
    """(batch or 1, heads or 1, rows, keys) bool: which pairs the mask lets through; None for all."""
    variant = inputs.variant
    if not variant.causal and variant.mask is None:
        return None
    b, h, q, k = places(inputs, rows)
    mask = torch.ones((1, 1, len(rows), inputs.cell.seqlen_k), dtype=torch.bool)
    if variant.causal:
        mask = mask & (k <= q)
    if variant.mask is not None:
        mask = mask & variant.mask(inputs.tables)(b, h, q, k)
    return mask


def places(inputs: Inputs, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Index tensors (batch, head, query position, key) that broadcast to (batch, heads, rows, keys).

    A query's position among the keys is its row + keys - queries.
    """
    cell = inputs.cell
    b = torch.arange(cell.batch).view(-1, 1, 1, 1)
    h = torch.arange(cell.heads).view(-1, 1, 1)
    q = rows.view(-1, 1) + (cell.seqlen_k - cell.seqlen_q)
    return b, h, q, torch.arange(cell.seqlen_k)
