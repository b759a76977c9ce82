"""The numbers of a case, drawn from its data seed and rounded to the types they are stored in."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from anyflash.contract.cases import Case, Packed
from anyflash.contract.plain import OneSequence
from anyflash.contract.poison import CONTIGUOUS, Layout, numpy_dtype
from anyflash.core.dtypes import FLOATS8, accumulate
from anyflash.semantics.descale import FACTORS

_LARGE = {
    "float8_e4m3fn": 96.0,
    "float8_e5m2": 4096.0,
    "float16": 200.0,
    "bfloat16": 133120.0,
    "float32": 133120.0,
    "float64": 133120.0,
}


@dataclass(frozen=True, slots=True)
class Span:
    """Where one sequence lies: `batch` counts sequences, the slices count tokens (keys that exist only)."""

    batch: int
    q: slice
    k: slice


@dataclass(frozen=True, slots=True)
class Values:
    """Arrays in canonical axes, without layout: q (batch, Tq, Hq, D) or (total, Hq, D) packed, ..

    dlse and lse have (batch, Hq, Tq) or (Hq, total).
    """

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    dout: np.ndarray
    dlse: np.ndarray
    tables: Mapping[str, np.ndarray]
    sinks: np.ndarray | None
    descale: Mapping[str, np.ndarray | float]

    def factors(self, heads: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Of scores and of out, each (batch or 1, query heads) in float64."""

        def spread(name: str) -> np.ndarray:
            factor = np.asarray(self.descale.get(name, 1.0), np.float64)
            factor = np.atleast_2d(factor)
            wide = np.broadcast_to(factor, (factor.shape[0], heads[1]))
            return np.repeat(wide, heads[0] // heads[1], axis=1)

        return spread("descale_q") * spread("descale_k"), spread("descale_v")


def spans(case: Case) -> Iterator[Span]:
    packed = case.packed
    if packed is None:
        for b in range(case.batch):
            yield Span(b, slice(0, case.lens[0]), slice(0, case.lens[1]))
        return
    used = packed.lens_k if packed.used_k is None else packed.used_k
    at_q = at_k = 0
    for b, (n_q, n_k) in enumerate(zip(packed.lens_q, packed.lens_k, strict=True)):
        yield Span(b, slice(at_q, at_q + n_q), slice(at_k, at_k + used[b]))
        at_q, at_k = at_q + n_q, at_k + n_k


def rows(case: Case) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Leading axes of q and of k."""
    packed = case.packed
    if packed is None:
        return (case.batch, case.lens[0]), (case.batch, case.lens[1])
    return (sum(packed.lens_q) + packed.slack_q,), (sum(packed.lens_k) + packed.slack_k,)


def lse_shape(case: Case) -> tuple[int, ...]:
    rows_q, _ = rows(case)
    return (*rows_q[:-1], case.heads[0], rows_q[-1])


def token(case: Case, array: np.ndarray, span: Span, part: slice) -> np.ndarray:
    """Rows of one sequence, (tokens, heads, dim), as a view into `array`."""
    return array[part] if case.packed is not None else array[span.batch, part]


def per_row(case: Case, array: np.ndarray, span: Span) -> np.ndarray:
    """The (heads, queries) part of an array of lse's shape."""
    return array[:, span.q] if case.packed is not None else array[span.batch]


def sequence(case: Case, values: Values, span: Span) -> OneSequence:
    """The operands of one sequence, heads first."""
    heads_first = lambda x, part: token(case, x, span, part).swapaxes(0, 1)
    return OneSequence(
        heads_first(values.q, span.q),
        heads_first(values.k, span.k),
        heads_first(values.v, span.k),
        values.tables,
        values.sinks,
        heads_first(values.dout, span.q),
        per_row(case, values.dlse, span),
    )


def draw(case: Case) -> Values:
    """The numbers of a case: the same for the same case, whatever was drawn before."""
    rows_q, rows_k = rows(case)
    (heads_q, heads_k), (dim, dim_v) = case.heads, case.dims
    kind, statistic = numpy_dtype(case.dtype), numpy_dtype(accumulate(case.dtype))
    kinds = dict.fromkeys("kv", numpy_dtype(case.dtype_cache or case.dtype))
    floats = numpy_dtype(case.table_dtype or ("float32" if case.dtype in FLOATS8 else case.dtype))
    stream = lambda name: np.random.default_rng([case.data_seed, zlib.crc32(name.encode())])

    def rounded(name: str, shape: tuple[int, ...], layout: Layout = CONTIGUOUS) -> np.ndarray:
        array = _numbers(case, name, shape, stream(name)).astype(kinds.get(name, kind))
        for axis in layout.expand:
            array = np.repeat(array.take([0], axis), shape[axis], axis) if shape[axis] else array
        return array

    tables: dict[str, np.ndarray] = {}
    for piece in (*case.terms, *case.rules):
        for name, shape in piece.shapes(case.sizes).items():
            made = piece.fill(name, shape, stream(name))
            tables[name] = made.astype(floats) if made.dtype.kind == "f" else made
    sinks = None
    if case.sinks is not None:
        shift = {"randn": 0.0, "large": 30.0, "none": -np.inf}[case.sinks]
        sinks = (stream("sinks").standard_normal(heads_q) + shift).astype(floats)
    return Values(
        rounded("q", (*rows_q, heads_q, dim), case.layout(0)),
        rounded("k", (*rows_k, heads_k, dim), case.layout(1)),
        rounded("v", (*rows_k, heads_k, dim_v), case.layout(2)),
        rounded("dout", (*rows_q, heads_q, dim_v)),
        stream("dlse").standard_normal(lse_shape(case)).astype(statistic),
        tables,
        sinks,
        _descale(case, stream("descale")),
    )


def _descale(case: Case, rng: np.random.Generator) -> dict[str, np.ndarray | float]:
    """float32, as wide apart as factors of rounded arrays may be."""
    batch, heads = case.sizes.batch, case.heads[1]
    shapes = {
        None: (),
        "numbers": (None, None, None),
        "arrays": ((batch, heads), (heads,), (batch, heads)),
        "mixed": ((), (batch, 1), (1, heads)),
    }[case.descale]
    made: dict[str, np.ndarray | float] = {}
    for name, shape in zip(FACTORS, shapes, strict=False):
        drawn = np.exp2(rng.uniform(-1, 1, shape)).astype(np.float32)
        if name != "descale_q" or case.dtype in FLOATS8:
            made[name] = float(drawn) if shape is None else np.asarray(drawn)
    return made


def _numbers(case: Case, name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    if case.data == "constant" and name in ("k", "v"):
        return np.full(shape, 0.5)
    if case.data == "integers":
        return rng.integers(-2, 3, shape) * (rng.random(shape) < 0.2).astype(np.float64)
    size = 1.0
    if name in ("q", "k"):
        size = {"large": _LARGE[case.dtype], "tiny": 1e-3}.get(case.data, 1.0)
    return size * rng.standard_normal(shape)


def cumulative(packed: Packed) -> tuple[np.ndarray, np.ndarray]:
    """(cu_seqlens_q, cu_seqlens_k)"""
    return np.cumsum((0, *packed.lens_q)), np.cumsum((0, *packed.lens_k))
