"""What one case of the contract is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import Field, dataclass, fields, replace
from typing import Literal

from anyflash.contract.poison import CONTIGUOUS, Layout
from anyflash.contract.rules import Rule
from anyflash.contract.terms import Sizes, Term
from anyflash.core.dtypes import FLOATS, FLOATS8

Data = Literal["randn", "integers", "large", "constant", "tiny"]
Sinks = Literal["randn", "large", "none"]
Factors = Literal["numbers", "arrays", "mixed"]


@dataclass(frozen=True, slots=True)
class Packed:
    """Lengths of a packed call. `used_k` says how many keys of each sequence exist; `slack_*` are rows of the
    arrays behind the last sequence."""

    lens_q: tuple[int, ...]
    lens_k: tuple[int, ...]
    used_k: tuple[int, ...] | None = None
    slack_q: int = 0
    slack_k: int = 0


@dataclass(frozen=True, slots=True)
class Case:
    """One attention call: geometry, program, data, and how the arrays lie.

    heads      (query heads, key heads)
    lens       (queries, keys); ignored with `packed`
    dims       (head_dim, head_dim_v)
    sinks      "none" are sinks of -inf, which change nothing; None is a call without sinks
    layouts    of q, k, v and the results, in canonical axes; reused in turn by what else there is
    table_dtype   of float tables; None is that of q
    table_layout  of all tables
    descale       the factors of 8-bit q, k and v; "mixed": one for all, one by batch entry, one by key head
    dtype_cache   of k and v in a cache, if it is not that of q
    """

    id: str
    dtype: str = "float32"
    batch: int = 2
    heads: tuple[int, int] = (2, 2)
    lens: tuple[int, int] = (33, 50)
    dims: tuple[int, int] = (16, 16)
    terms: tuple[Term, ...] = ()
    rules: tuple[Rule, ...] = ()
    scale: float | None = None
    dropout_p: float = 0.0
    sinks: Sinks | None = None
    packed: Packed | None = None
    data: Data = "randn"
    layouts: tuple[Layout, ...] = (CONTIGUOUS,)
    table_dtype: str | None = None
    table_layout: Layout = CONTIGUOUS
    data_seed: int = 0
    descale: Factors | None = None
    dtype_cache: str | None = None

    def __str__(self) -> str:
        """What is not as in a plain case."""
        said = (
            f"{field.name}={getattr(self, field.name)!r}" for field in fields(self) if self.differs(field)
        )
        return f"Case({', '.join(said)})"

    def differs(self, field: Field[object]) -> bool:
        return getattr(self, field.name) != field.default

    @property
    def sizes(self) -> Sizes:
        if self.packed is None:
            return Sizes(self.batch, self.heads[0], *self.lens)
        packed = self.packed
        keys = packed.used_k if packed.used_k is not None else packed.lens_k
        return Sizes(len(packed.lens_q), self.heads[0], max(packed.lens_q, default=0), max(keys, default=0))

    @property
    def differentiable(self) -> bool:
        """8-bit floats have a forward only."""
        return (self.dtype_cache or self.dtype) not in FLOATS8

    @property
    def effective_scale(self) -> float:
        return self.dims[0] ** -0.5 if self.scale is None else self.scale

    def layout(self, i: int) -> Layout:
        """Of q, k, v or the results (0 to 3), in the axes that the array has."""
        chosen = self.layouts[i % len(self.layouts)]
        return chosen if self.packed is None else chosen.without_first_axis()


def each_dtype(cases: Sequence[Case], dtypes: Sequence[str] = FLOATS) -> list[Case]:
    return [replace(case, dtype=dtype) for case in cases for dtype in dtypes]
