"""The factors of 8-bit floats.

    s   = scale * descale_q * descale_k * (q . k)
    out = descale_v * (p . v)

A factor is a number, which joins the scale or is a constant, or an array over (batch, key heads), which the
program reads as it reads any table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, NamedTuple

from anyflash.core.dtypes import FLOATS, FLOATS8
from anyflash.core.errors import InvalidCall
from anyflash.semantics.addressing import to_canonical
from anyflash.semantics.checks import check_rank
from anyflash.semantics.expr import Kind

FACTORS = ("descale_q", "descale_k", "descale_v")

Dtype = Callable[[str, Any], str]
Extents = tuple[int, int, int | None, int | None]


class Given(NamedTuple):
    """The array of a keyword argument: what of it decides the program, and `axes`, those it is indexed by."""

    name: str
    ndim: int
    kind: Kind
    axes: tuple[str, ...]


class Descale(NamedTuple):
    """Factors as the user gave them, and of what: the number of key heads, the dtypes of q and of k and v."""

    q: Any
    k: Any
    v: Any
    heads_kv: int
    dtype_q: str
    dtype_kv: str


def descale_of(
    factors: tuple[Any, Any, Any], k_shape: Sequence[int], layout: str, dtype_q: str, dtype_kv: str
) -> Descale:
    """`layout` is that of k."""
    check_rank("k", k_shape, layout)
    return Descale(*factors, to_canonical(layout, tuple(k_shape))[-2], dtype_q, dtype_kv)


def descaled(
    descale: Descale, scale: float | None, head_dim: int, dtype: Dtype, extents: Extents
) -> tuple[float | None, float | None, list[tuple[Given, Any]]]:
    """(scale with the numbers among the factors of scores, the number that out is multiplied by, and the
    arrays among the factors)."""
    given: list[tuple[Given, Any]] = []
    of_out: float | None = None
    dtypes = (descale.dtype_q, descale.dtype_kv, descale.dtype_kv)
    for name, factor, stored in zip(FACTORS, descale[:3], dtypes, strict=True):
        if factor is None:
            continue
        if stored not in FLOATS8:
            raise InvalidCall(
                name,
                f"given for {stored}",
                "None: only 8-bit floats have a factor",
                "Multiply scale by it" if name != "descale_v" else "Multiply the result by it",
            )
        if isinstance(factor, Real) or not hasattr(factor, "shape"):
            value = real(name, factor, "None, a finite number, or an array", None)
            if not math.isfinite(value):
                raise InvalidCall(name, repr(value), "None, a finite number, or an array")
            if name == "descale_v":
                of_out = value
            else:
                scale = (int(head_dim) ** -0.5 if scale is None else scale) * value
        else:
            given.append((_array(name, factor, dtype, extents[0], extents[1], descale.heads_kv), factor))
    return scale, of_out, given


def _array(name: str, array: Any, dtype: Dtype, batch: int, heads_q: int, heads_kv: int) -> Given:
    found, shape = dtype(name, array), tuple(array.shape)
    if found not in FLOATS:
        raise InvalidCall(name, f"dtype {found}, shape {shape}", f"one of {', '.join(FLOATS)}")
    missing = 2 - len(shape)
    aligned = (1,) * missing + shape
    wanted = (batch, heads_kv)
    if missing < 0 or any(have not in (1, want) for have, want in zip(aligned, wanted, strict=True)):
        raise InvalidCall(name, f"shape {shape}", f"a shape that broadcasts to (batch, key heads) = {wanted}")
    group = heads_q // max(heads_kv, 1)
    by_head = "head" if group < 2 else f"head // {group}"
    names = ("batch", by_head)
    return Given(name, len(shape), "float", tuple(n for n, e in zip(names, aligned, strict=True) if e != 1))


def real(
    argument: str, value: Any, expected: str, hint: str | None = "It is a Python number, not an array"
) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InvalidCall(argument, f"{value!r}", expected, hint)
    return float(value)
