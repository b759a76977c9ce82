"""One cell of the grid: a problem, in which direction it runs, and who may take part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Frontend = Literal["torch", "numpy"]
Measure = Literal["compute", "memory", "call"]


@dataclass(frozen=True, slots=True)
class Cell:
    """A row of the grid.

    group      the part of the report it belongs to
    batch .. head_dim   q is (batch, heads, seqlen_q, head_dim), k and v (batch, heads_kv, seqlen_k, head_dim)
    dtype      of all arrays
    variant    a name of `variants.VARIANTS`: the mask, bias or formula
    backward   time forward and backward together, not the forward alone
    lengths    of packed sequences; batch is then their number, and seqlen_* the longest
    threads    that everybody uses; None for the run's
    cache      where k and v lie: in a KV cache, dense or in pages of so many slots, to which the call appends
               those of its queries; None for plain arrays
    frontend   whose arrays are given to anyflash
    measure    what the cell shows: GFLOP/s, GB/s of keys and values, or the time of one call
    """

    group: str
    batch: int
    heads: int
    seqlen_q: int
    head_dim: int
    dtype: str = "float32"
    variant: str = "full"
    backward: bool = False
    heads_kv: int = 0
    seqlen_k: int = 0
    lengths: tuple[int, ...] = ()
    threads: int | None = None
    cache: Literal["dense"] | int | None = None
    frontend: Frontend = "torch"
    measure: Measure = "compute"

    def __post_init__(self) -> None:
        object.__setattr__(self, "heads_kv", self.heads_kv or self.heads)
        object.__setattr__(self, "seqlen_k", self.seqlen_k or self.seqlen_q)

    @property
    def direction(self) -> str:
        return "fwd+bwd" if self.backward else "fwd"

    @property
    def shape(self) -> str:
        heads = str(self.heads) if self.heads_kv == self.heads else f"{self.heads}:{self.heads_kv}"
        length = str(self.seqlen_q) if self.seqlen_k == self.seqlen_q else f"{self.seqlen_q}x{self.seqlen_k}"
        if self.lengths:
            length = f"{min(self.lengths)}..{max(self.lengths)}"
        return f"{self.batch}x{heads}x{length}x{self.head_dim}"

    @property
    def name(self) -> str:
        """Unique in a grid: "float32 causal fwd+bwd 1x8x2048x64"; what `--only` is matched with."""
        parts = [self.dtype, self.variant, self.direction, self.shape]
        if self.cache is not None:
            parts.append("dense cache" if self.cache == "dense" else f"pages of {self.cache}")
        if self.frontend != "torch":
            parts.append(f"from {self.frontend}")
        if self.threads is not None:
            parts.append(f"on {self.threads} thread" + ("s" if self.threads > 1 else ""))
        return " ".join(parts)
