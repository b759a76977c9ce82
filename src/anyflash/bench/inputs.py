"""The arrays of a cell, the same for everybody who takes part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anyflash.bench.cells import Cell
from anyflash.bench.variants import VARIANTS, Variant

Results = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Inputs:
    """q, dout (B, H, Tq, D) and k, v (B, Hkv, Tk, D), row-major; or packed, (total, H, D) with `starts`.

    `starts` (sequences + 1,) int32 serves queries and keys. `tables` are those of the variant. With
    `backward`, q, k, v and the variant's biases require gradients.
    """

    cell: Cell
    variant: Variant
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor | None
    tables: Mapping[str, Tensor]
    starts: Tensor | None
    dropout_p: float

    @property
    def leaves(self) -> dict[str, Tensor]:
        """What gradients are taken of, by name."""
        return {
            "q": self.q,
            "k": self.k,
            "v": self.v,
            **{name: self.tables[name] for name in self.variant.biases},
        }

    def named(self, arrays: Tensor | Sequence[Tensor]) -> Results:
        """What a step gave: the output, or the output and the gradients of `leaves`."""
        if isinstance(arrays, Tensor):
            return {"out": arrays.detach()}
        out, *grads = arrays
        return {
            "out": out.detach(),
            **{f"d{name}": grad for name, grad in zip(self.leaves, grads, strict=True)},
        }


def make(cell: Cell, seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, cell.dtype)
    variant = VARIANTS[cell.variant]
    if cell.lengths:
        total = sum(cell.lengths)
        q_shape, k_shape = (total, cell.heads, cell.head_dim), (total, cell.heads_kv, cell.head_dim)
    else:
        q_shape = (cell.batch, cell.heads, cell.seqlen_q, cell.head_dim)
        k_shape = (cell.batch, cell.heads_kv, cell.seqlen_k, cell.head_dim)

    def normal(shape: Sequence[int]) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    q, k, v = normal(q_shape), normal(k_shape), normal(k_shape)
    tables = variant.make(cell, generator)
    dout = normal(q_shape) if cell.backward else None
    starts = (
        torch.tensor([0, *cell.lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        if cell.lengths
        else None
    )
    made = Inputs(cell, variant, q, k, v, dout, tables, starts, variant.dropout_p)
    for leaf in made.leaves.values():
        leaf.requires_grad_(cell.backward)
    return made
