"""The question of one attention call, without its arrays: hashable, printable, complete.

`Program` is the part that does not depend on shapes; its text travels through framework op schemas. `Problem`
adds dtypes and dimensions and is the key of every plan. Expressions are held as text (`text.show`), so
equality and hashing are those of strings; `text.parse` is cached and gives the trees back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from anyflash.core.dtypes import result

Addressing = Literal["dense", "varlen", "paged"]


@dataclass(frozen=True, slots=True)
class Program:
    """What is computed from each score.

    `score`, `mask` and `factor` are expression texts or None; loads in them name slots of the call's tables.
    `scale` None means head_dim ** -0.5. `sinks` says that a per-head sink logit joins the denominator.
    `factor` is what out is multiplied by, of batch and head alone. `deterministic` False leaves gradients to
    be summed in any order, where that is faster.
    """

    score: str | None = None
    mask: str | None = None
    scale: float | None = None
    dropout_p: float = 0.0
    sinks: bool = False
    factor: str | None = None
    deterministic: bool = True

    def __str__(self) -> str:
        """`score|mask|scale|dropout_p|sinks|factor|deterministic`, empty where absent; `parse` inverts it."""
        scale = "" if self.scale is None else self.scale.hex()
        dropout_p = float(self.dropout_p).hex()
        sinks, deterministic = str(int(self.sinks)), str(int(self.deterministic))
        return "|".join(
            (self.score or "", self.mask or "", scale, dropout_p, sinks, self.factor or "", deterministic)
        )

    @classmethod
    def parse(cls, text: str) -> Program:
        score, mask, scale, dropout_p, sinks, factor, deterministic = text.split("|")
        return cls(
            score or None,
            mask or None,
            float.fromhex(scale) if scale else None,
            float.fromhex(dropout_p),
            sinks == "1",
            factor or None,
            deterministic == "1",
        )


@dataclass(frozen=True, slots=True)
class TableSpec:
    """One table of a program: its element type, shape, and whether its gradient is wanted."""

    dtype: str
    shape: tuple[int, ...]
    needs_grad: bool = False


@dataclass(frozen=True, slots=True)
class Problem:
    """All that decides which kernel runs and what it must produce.

    Dimensions are those of the canonical axes: q (batch, seqlen_q, heads_q, head_dim), k (batch, seqlen_k,
    heads_kv, head_dim), v (.., head_dim_v). With addressing "varlen" the arrays are packed, (total, heads,
    dim), `batch` counts sequences and `seqlen_*` are the longest lengths, or where those lie on a device,
    which nobody has read, the totals: a kernel may take them for bounds alone.

    With addressing "paged" k and v lie in pages, (num_pages, page_size, heads_kv, dim), and `Operands` says
    which pages are whose; a dense cache is one page a sequence. q is dense, or packed if `packed`.
    `seqlen_q` is the longest length of queries; `seqlen_k` is a power of two that no sequence's keys exceed
    (0 if there are none), so that the steps of a decoding are mostly one problem. On a device they are bounds
    again: the total of packed queries, and the slots of a sequence. Forward only.

    `dtype` is that of q, and of k and v but for a cache of 8-bit floats beside wider queries: `dtype_cache`.
    8-bit floats are forward only, too.
    """

    program: Program
    dtype: str
    batch: int
    heads_q: int
    heads_kv: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    head_dim_v: int
    tables: tuple[TableSpec, ...] = ()
    addressing: Addressing = "dense"
    total_q: int = 0
    total_k: int = 0
    seqused_k: bool = False
    packed: bool = False
    num_pages: int = 0
    page_size: int = 0
    leftpad_k: bool = False
    dtype_cache: str | None = None

    @property
    def dtype_kv(self) -> str:
        """Of k and v."""
        return self.dtype_cache or self.dtype

    @property
    def dtype_out(self) -> str:
        return result(self.dtype)

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5 if self.program.scale is None else self.program.scale

    @property
    def group(self) -> int:
        """Query heads that share one key head."""
        return self.heads_q // self.heads_kv

    @property
    def packed_q(self) -> bool:
        """Has q no batch axis?"""
        return self.packed or self.addressing == "varlen"

    @property
    def q_shape(self) -> tuple[int, ...]:
        return self._rows("q") + (self.heads_q, self.head_dim)

    @property
    def k_shape(self) -> tuple[int, ...]:
        return self._rows("k") + (self.heads_kv, self.head_dim)

    @property
    def v_shape(self) -> tuple[int, ...]:
        return self._rows("k") + (self.heads_kv, self.head_dim_v)

    @property
    def out_shape(self) -> tuple[int, ...]:
        return self._rows("q") + (self.heads_q, self.head_dim_v)

    @property
    def lse_shape(self) -> tuple[int, ...]:
        """(batch, heads, q), or (heads, total) packed."""
        if self.packed_q:
            return (self.heads_q, self.total_q)
        return (self.batch, self.heads_q, self.seqlen_q)

    def _rows(self, side: Literal["q", "k"]) -> tuple[int, ...]:
        if side == "q":
            return (self.total_q,) if self.packed_q else (self.batch, self.seqlen_q)
        if self.addressing == "paged":
            return (self.num_pages, self.page_size)
        return (self.total_k,) if self.addressing == "varlen" else (self.batch, self.seqlen_k)
