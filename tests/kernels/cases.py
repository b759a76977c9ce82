"""One attention call to try on a kernel: its shape, its program, its numbers."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from anyflash.core.dtypes import accumulate
from anyflash.core.view import View
from anyflash.frontends.numpy_ import FRONTEND
from anyflash.semantics.arrays import numpy_dtype
from anyflash.semantics.describe import describe, describe_program
from anyflash.semantics.operands import Operands
from anyflash.semantics.problem import Problem

Array = np.ndarray[Any, Any]
Program = Callable[[np.random.Generator], Mapping[str, Any]]
"""Makes the keyword arguments of `describe_program`, with the arrays of its tables."""


def plain_program(rng: np.random.Generator) -> Mapping[str, Any]:
    return {}


@dataclass(frozen=True, eq=False)
class Case:
    """`lens` (queries, keys) of every batch entry; or `packed`, those of each sequence, of whose keys
    `used` exist. `edit` changes the numbers after they are drawn. `slack` tokens belong to no sequence."""

    name: str
    dtype: str = "float32"
    dims: tuple[int, int] = (16, 16)
    heads: tuple[int, int] = (1, 1)
    batch: int = 1
    lens: tuple[int, int] = (33, 70)
    packed: tuple[tuple[int, int], ...] | None = None
    used: tuple[int, ...] | None = None
    slack: int = 0
    program: Program = plain_program
    dlse: bool = True
    amplitude: float = 1.0
    edit: Callable[[dict[str, Array]], None] | None = None

    @property
    def id(self) -> str:
        return f"{self.name}-{self.dtype}"


@dataclass(frozen=True, eq=False)
class Given:
    """The numbers of a case, in canonical axes, and its problem. `tables` are in slot order."""

    case: Case
    problem: Problem
    arrays: Mapping[str, Array]
    tables: tuple[Array, ...]
    sinks: Array | None
    lengths: Mapping[str, Array] = field(default_factory=dict)
    seed: int = 0

    def operands(self, view: Callable[[str, Array], View]) -> Operands:
        """The inputs as views; `view` places q, k and v in memory."""
        of = FRONTEND.view
        return Operands(
            *(view(name, self.arrays[name]) for name in "qkv"),
            tuple(of(t) for t in self.tables),
            None if self.sinks is None else of(self.sinks),
            **{name: of(a) for name, a in self.lengths.items()},
            seed=self.seed,
        )

    @property
    def reference_arguments(self) -> tuple[Any, ...]:
        lengths = (self.lengths.get(n) for n in ("cu_seqlens_q", "cu_seqlens_k", "seqused_k"))
        return (
            self.problem, *(self.arrays[n] for n in "qkv"), self.tables, self.sinks, *lengths, self.seed,
        )  # fmt: skip


SEED = 0x1234_5678_9ABC_DEF0


@lru_cache(maxsize=64)
def draw(case: Case) -> Given:
    """The same numbers for the same name, whatever was drawn before."""
    rng = np.random.default_rng(zlib.crc32(case.name.encode()))
    (heads_q, heads_kv), (dim, dim_v) = case.heads, case.dims
    if case.packed is None:
        rows_q, rows_k = (case.batch, case.lens[0]), (case.batch, case.lens[1])
    else:
        lens = np.array(case.packed).reshape(-1, 2)
        rows_q, rows_k = ((int(n) + case.slack,) for n in lens.sum(axis=0))
    kind, statistic = numpy_dtype(case.dtype), numpy_dtype(accumulate(case.dtype))
    normal = lambda shape, size=1.0: (size * rng.standard_normal(shape)).astype(kind)
    lse_shape = (*rows_q[:-1], heads_q, rows_q[-1])
    arrays = {
        "q": normal((*rows_q, heads_q, dim), case.amplitude),
        "k": normal((*rows_k, heads_kv, dim), case.amplitude),
        "v": normal((*rows_k, heads_kv, dim_v)),
        "dout": normal((*rows_q, heads_q, dim_v)),
        "dlse": rng.standard_normal(lse_shape).astype(statistic),
    }
    if case.edit is not None:
        case.edit(arrays)
    options = dict(case.program(rng))
    lengths: dict[str, Array] = {}
    if case.packed is not None:
        for column, side in enumerate("qk"):
            lengths[f"cu_seqlens_{side}"] = np.cumsum([0, *lens[:, column]]).astype(np.int32)
        if case.used is not None:
            lengths["seqused_k"] = np.array(case.used, np.int32)
    layout = "bshd" if case.packed is None else "thd"
    made = describe_program(
        arrays["q"].shape, arrays["k"].shape, lambda _, a: FRONTEND.dtype(a), layout=layout,
        sequences=None if case.packed is None else len(case.packed), **options,
    )  # fmt: skip
    sinks = options.get("sinks")
    of = FRONTEND.view
    problem, _ = describe(
        made.program, *(of(arrays[n]) for n in "qkv"), layout=layout,
        tables=tuple(of(t) for t in made.tables), names=made.names,
        needs_grad=tuple(t.dtype.kind in "fV" for t in made.tables),
        sinks=None if sinks is None else of(sinks), **{n: of(a) for n, a in lengths.items()}, seed=SEED,
    )  # fmt: skip
    return Given(case, problem, arrays, tuple(made.tables), sinks, lengths, SEED)
