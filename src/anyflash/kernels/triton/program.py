"""A problem's device functions: generated from its expressions, decorated, kept.

    final_score(score, at...)     the score program
    slope(score, at...)           its derivative by the score
    allowed(at...)                the mask
    factor(batch, head, tables)   what out is multiplied by; None for nothing
    tile_class(ends...)           EMPTY, PARTIAL or FULL of a tile, without its edges
    slope_of_J(score, at...)      the derivative by load J of the table whose gradient is wanted, and
    place_of_J(at...)             the element it goes to, as an offset into the gradient

Kernels take them as constants, so that one kernel file serves every program. `at...` is batch, head, row,
q, k, q_len, k_len, tables; a table is (pointer, strides, extents), strides in elements.

The same text serves two dialects, Triton and Gluon: what differs is the language that `tl` names, the
decorator, and the functions of `elementary`, which each has.
"""

from __future__ import annotations

import hashlib
import linecache
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from anyflash.kernels.triton.bounds import write_class
from anyflash.kernels.triton.expressions import Writer
from anyflash.semantics.derivative import derivative, table_derivatives
from anyflash.semantics.expr import Expr
from anyflash.semantics.problem import TableSpec
from anyflash.semantics.text import parse

EMPTY, PARTIAL, FULL = 0, 1, 2

_AT = "batch, head, row, q, k, q_len, k_len, tables"
_ENDS = (
    "batch, head, row_low, row_high, q_low, q_high, k_low, k_high, q_len, k_len, tables, "
    "BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr"
)
Dialect = Literal["triton", "gluon"]
_NAMES = "clamped, floor_div, floor_mod, indices, maximum, minimum, saturated, scalar, tanh, truth, whole"
_HEADS: dict[Dialect, str] = {
    "triton": f"""import triton.language as tl
from triton import jit

from anyflash.kernels.triton.elementary import {_NAMES}
""",
    "gluon": f"""from triton.experimental.gluon import jit, language as tl

from anyflash.kernels.gluon.elementary import {_NAMES}
""",
}


@dataclass(frozen=True, slots=True)
class Functions:
    """Device functions of one program. `identity`: scores stay as they are; `masked`: there is a mask.

    `loads` are (slope_of, place_of) for each distinct load of each table, by slot.
    """

    final_score: Any
    slope: Any
    allowed: Any
    tile_class: Any
    identity: bool
    masked: bool
    loads: tuple[tuple[tuple[Any, Any], ...], ...]
    factor: Any = None


@lru_cache(maxsize=256)
def functions(
    score: str | None,
    mask: str | None,
    dtypes: tuple[str, ...],
    dialect: Dialect = "triton",
    factor: str | None = None,
) -> Functions:
    """The functions of a program's expression texts; `dtypes` are those of the tables, by slot."""
    tables = tuple(TableSpec(dtype, ()) for dtype in dtypes)
    formula, condition = parse(score or "score"), parse(mask or "true")
    parts = [_HEADS[dialect]]
    parts.append(_function("final_score", f"score, {_AT}", tables, formula))
    parts.append(_function("slope", f"score, {_AT}", tables, derivative(formula)))
    parts.append(_function("allowed", _AT, tables, condition))
    parts.append(_class_function(tables, condition))
    if factor is not None:
        parts.append(_function("factor", "batch, head, tables", tables, parse(factor)))
    loads: list[list[tuple[str, str]]] = []
    for slot in range(len(tables)):
        names: list[tuple[str, str]] = []
        for j, (value, indices) in enumerate(table_derivatives(formula, slot)):
            pair = f"slope_of_{slot}_{j}", f"place_of_{slot}_{j}"
            parts.append(_function(pair[0], f"score, {_AT}", tables, value))
            parts.append(_place_function(pair[1], tables, slot, indices))
            names.append(pair)
        loads.append(names)
    made = _module("\n\n".join(parts))
    return Functions(
        made["final_score"],
        made["slope"],
        made["allowed"],
        made["tile_class"],
        score is None,
        mask is not None,
        tuple(tuple((made[a], made[b]) for a, b in names) for names in loads),
        made.get("factor"),
    )


def _function(name: str, parameters: str, tables: tuple[TableSpec, ...], expr: Expr) -> str:
    writer = Writer(tables)
    return _text(name, parameters, writer, writer(expr))


def _class_function(tables: tuple[TableSpec, ...], condition: Expr) -> str:
    writer = Writer(tables)
    sure, possible = write_class(writer, condition)
    result = f"tl.where(truth({sure}), {FULL}, tl.where(truth({possible}), {PARTIAL}, {EMPTY}))"
    return _text("tile_class", _ENDS, writer, result)


def _place_function(name: str, tables: tuple[TableSpec, ...], slot: int, indices: tuple[Expr, ...]) -> str:
    """Strides of the gradient come last: `steps`, in elements."""
    writer = Writer(tables)
    terms = [
        f"clamped({writer(index)}, tables[{slot}][2][{axis}]) * steps[{axis}]"
        for axis, index in enumerate(indices)
    ]
    return _text(name, f"{_AT}, steps", writer, " + ".join(terms) or "0")


def _text(name: str, parameters: str, writer: Writer, result: str) -> str:
    body = "".join(f"    {line}\n" for line in (*writer.lines, f"return {result}"))
    return f"@jit\ndef {name}({parameters}):\n{body}"


def _module(source: str) -> dict[str, Any]:
    """Run the source. Triton reads it again through `linecache`, so it is entered there."""
    name = f"<anyflash program {hashlib.sha256(source.encode()).hexdigest()[:16]}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    space: dict[str, Any] = {"__name__": f"anyflash.kernels.triton.{name[1:-1].replace(' ', '_')}"}
    exec(compile(source, name, "exec"), space)
    return space
