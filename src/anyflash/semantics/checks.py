"""The rules of shapes and dtypes: views and a program become a Problem, or an InvalidCall says what is wrong.

Everything here depends on shapes, dtypes and the program alone, so `describe` runs it once for each new
combination.
"""

from __future__ import annotations

from collections.abc import Sequence

from anyflash.core.dtypes import FLOATS, FLOATS8, TABLES, kind
from anyflash.core.errors import InvalidCall
from anyflash.core.view import View
from anyflash.semantics import text
from anyflash.semantics.addressing import LAYOUTS, Dense, Varlen, to_canonical
from anyflash.semantics.expr import Expr, walk
from anyflash.semantics.interval import Numbers, bound
from anyflash.semantics.problem import Problem, Program, TableSpec

MAX_HEAD_DIM = 576
# Queries that may stand beside a cache of 8-bit floats.
_BESIDE_NARROW = ("float16", "bfloat16", "float32")


def check_layout(layout: str, packed: bool) -> None:
    allowed = ("thd",) if packed else ("bshd", "bhsd")
    if layout not in allowed:
        hint = None
        if layout == "thd":
            hint = "Packed arrays are the business of anyflash.attention_varlen"
        elif packed and layout in LAYOUTS:
            hint = "Arrays with a batch axis are the business of anyflash.attention"
        raise InvalidCall("layout", repr(layout), " or ".join(map(repr, allowed)), hint)


def check_rank(argument: str, shape: Sequence[int], layout: str) -> None:
    axes = LAYOUTS[layout]
    if len(shape) != len(axes):
        raise InvalidCall(
            argument, f"shape {tuple(shape)}", f"{len(axes)} axes ({', '.join(axes)}) in layout {layout!r}"
        )


def pages_layout(layout: str) -> str:
    """The layout of a cache beside q in `layout`."""
    return "bshd" if layout == "thd" else layout


def problem_of(
    program: Program,
    layout: str,
    q: View,
    k: View,
    v: View,
    tables: Sequence[View],
    names: Sequence[str],
    needs_grad: Sequence[bool],
    sinks: View | None,
    lengths: Varlen | None,
    seqused_k: bool,
    paged: bool = False,
    leftpad_k: bool = False,
) -> Problem:
    """The Problem of views in the user's layout. With `paged`, k and v are those of a cache, whose lengths
    were read already. Raises InvalidCall."""
    name_k, name_v = ("cache.k", "cache.v") if paged else ("k", "v")
    layout_k = pages_layout(layout) if paged else layout
    for argument, view in (("q", q), (name_k, k), (name_v, v)):
        check_rank(argument, view.shape, layout if view is q else layout_k)
        if view.dtype not in FLOATS and view.dtype not in FLOATS8:
            hint = (
                "Its bytes are in the other order: array.astype(name) turns them"
                if view.dtype[0] in "<>"
                else None
            )
            raise InvalidCall(
                argument,
                f"dtype {view.dtype}, shape {view.shape}",
                f"one of {', '.join((*FLOATS, *FLOATS8))}",
                hint,
            )
        if view is v and k.dtype != q.dtype and v.dtype != k.dtype:
            raise InvalidCall(name_v, f"dtype {v.dtype}", f"{k.dtype}, the dtype of {name_k}")
        narrow_cache = paged and view.dtype in FLOATS8 and q.dtype in _BESIDE_NARROW
        if view.dtype != q.dtype and not narrow_cache:
            hint = "Cast the three to one dtype"
            if view.dtype in FLOATS8:
                hint += f", or give q as one of {', '.join(_BESIDE_NARROW)}" if paged else ""
            raise InvalidCall(argument, f"dtype {view.dtype}", f"{q.dtype}, the dtype of q", hint)
    q_shape = to_canonical(layout, q.shape)
    k_shape, v_shape = to_canonical(layout_k, k.shape), to_canonical(layout_k, v.shape)
    heads_q, heads_kv = q_shape[-2], k_shape[-2]
    head_dim, head_dim_v = q_shape[-1], v_shape[-1]
    for argument, view, dim in (("q", q, head_dim), (name_k, k, k_shape[-1]), (name_v, v, head_dim_v)):
        if not 1 <= dim <= MAX_HEAD_DIM:
            raise InvalidCall(argument, f"head_dim {dim} in shape {view.shape}", f"1 to {MAX_HEAD_DIM}")
    if k_shape[-1] != head_dim:
        raise InvalidCall(
            name_k,
            f"head_dim {k_shape[-1]} in shape {k.shape}",
            f"{head_dim}, the head_dim of q with shape {q.shape}",
        )
    if heads_q < 1 or heads_kv < 1 or heads_q % heads_kv:
        raise InvalidCall(
            name_k,
            f"{heads_kv} heads in shape {k.shape}",
            f"a count that divides the {heads_q} heads of q with shape {q.shape}",
            f"Is the layout {layout!r}, axes ({', '.join(LAYOUTS[layout])})?",
        )
    if v_shape[-2] != heads_kv:
        raise InvalidCall(name_v, f"{v_shape[-2]} heads in shape {v.shape}", f"{heads_kv}, the heads of k")
    if v_shape[-3] != k_shape[-3]:
        raise InvalidCall(
            name_v,
            f"{v_shape[-3]} rows in shape {v.shape}",
            f"{k_shape[-3]}, the rows of k with shape {k.shape}",
        )
    if paged and v_shape[0] != k_shape[0]:
        raise InvalidCall(
            name_v, f"{v_shape[0]} in shape {v.shape}", f"{k_shape[0]}, as k with shape {k.shape}"
        )
    if lengths is None:
        batch, ranges = q_shape[0], Dense(q_shape[1], k_shape[1]).ranges
        for argument, view, shape in (("k", k, k_shape), ("v", v, v_shape)):
            if shape[0] != batch:
                raise InvalidCall(
                    argument,
                    f"batch {shape[0]} in shape {view.shape}",
                    f"{batch}, the batch of q with shape {q.shape}",
                    "A batch of 1 is not stretched; broadcast it to a view first",
                )
    else:
        batch, ranges = lengths.batch, lengths.ranges
    if sinks is not None:
        if sinks.dtype not in FLOATS:
            raise InvalidCall(
                "sinks", f"dtype {sinks.dtype}, shape {sinks.shape}", f"one of {', '.join(FLOATS)}"
            )
        if sinks.shape != (heads_q,):
            raise InvalidCall("sinks", f"shape {sinks.shape}", f"({heads_q},), one logit a query head")
    ranges = {**ranges, "batch": (0, batch - 1), "head": (0, heads_q - 1)}
    _check_tables(program, tables, names, ranges, () if lengths is None else lengths.bounds)
    return Problem(
        program=program,
        dtype=q.dtype,
        batch=batch,
        heads_q=heads_q,
        heads_kv=heads_kv,
        seqlen_q=q_shape[-3] if lengths is None else lengths.longest_q,
        seqlen_k=k_shape[-3] if lengths is None else lengths.longest_k,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        tables=tuple(
            TableSpec(table.dtype, table.shape, bool(needed))
            for table, needed in zip(tables, needs_grad or [False] * len(tables), strict=True)
        ),
        addressing="paged" if paged else "dense" if lengths is None else "varlen",
        total_q=q_shape[0] if layout == "thd" else 0,
        total_k=k_shape[0] if layout_k == "thd" else 0,
        seqused_k=seqused_k,
        packed=paged and layout == "thd",
        num_pages=k_shape[0] if paged else 0,
        page_size=k_shape[1] if paged else 0,
        leftpad_k=leftpad_k,
        dtype_cache=None if k.dtype == q.dtype else k.dtype,
    )


def _check_tables(
    program: Program,
    tables: Sequence[View],
    names: Sequence[str],
    ranges: dict[str, tuple[int, int]],
    bounds: Sequence[str],
) -> None:
    """Every load names a table of the right rank and kind, with indices that can lie inside it. Of variables
    in `bounds` the ranges may be shorter."""
    used: set[int] = set()

    def check(node: Expr) -> None:
        if node.op != "load":
            return
        slot: int = node.value
        used.add(slot)
        if slot >= len(tables):
            raise InvalidCall(
                "tables", f"{len(tables)} given", f"at least {slot + 1}, which the program reads"
            )
        table = tables[slot]
        name = names[slot] if slot < len(names) else f"table {slot}"
        if table.dtype not in TABLES:
            raise InvalidCall(
                name, f"dtype {table.dtype}, shape {table.shape}", f"one of {', '.join(TABLES)}"
            )
        if kind(table.dtype) != node.kind:
            raise InvalidCall(name, f"dtype {table.dtype}", f"a {node.kind} dtype, which the program reads")
        if len(node.args) != table.ndim:
            raise InvalidCall(
                name, f"shape {table.shape}", f"{len(node.args)} axes, as {text.pretty(node)} reads it"
            )
        for axis, (index, extent) in enumerate(zip(node.args, table.shape, strict=True)):
            _check_index(name, table, axis, index, extent, ranges, bounds)

    for source in (program.score, program.mask, program.factor):
        if source is not None:
            walk(text.parse(source), check)
    if len(used) < len(tables):
        raise InvalidCall("tables", f"{len(tables)} given", f"{len(used)}, which the program reads")


def _check_index(
    name: str,
    table: View,
    axis: int,
    index: Expr,
    extent: int,
    ranges: dict[str, tuple[int, int]],
    bounds: Sequence[str],
) -> None:
    if any(low > high for low, high in ranges.values()):
        return  # there is no pair of a query and a key, so nothing is read
    low, high = (int(end) for end in bound(index, ranges, Numbers()))
    whole = index.op == "var" and index.value not in bounds
    inside = low >= 0 and high < extent if whole else low < extent and high >= 0
    if not inside:
        raise InvalidCall(
            name,
            f"shape {table.shape} is indexed along axis {axis} by {text.pretty(index)}, from {low} to {high}",
            f"indices from 0 to {extent - 1}",
            "Clamp the index with anyflash.minimum and anyflash.maximum if that is meant",
        )


def check_merge(arrays: dict[str, tuple[tuple[int, ...], str]], layout: str) -> None:
    """Raises InvalidCall unless out_a, lse_a, out_b and lse_b, each (shape, dtype), can be merged."""
    check_layout(layout, False)
    out_shape, out_dtype = arrays["out_a"]
    for argument in ("out_a", "out_b"):
        shape, dtype = arrays[argument]
        if dtype not in FLOATS:
            raise InvalidCall(argument, f"dtype {dtype}, shape {shape}", f"one of {', '.join(FLOATS)}")
        if len(shape) not in (3, 4) or (shape, dtype) != (out_shape, out_dtype):
            expected = f"shape {out_shape} of {out_dtype}, as out_a" if argument == "out_b" else "3 or 4 axes"
            raise InvalidCall(argument, f"shape {shape} of {dtype}", expected)
    *rows, _ = to_canonical(layout, out_shape) if len(out_shape) == 4 else out_shape
    lse_shape = (*rows[:-2], rows[-1], rows[-2])
    for argument in ("lse_a", "lse_b"):
        shape, dtype = arrays[argument]
        if dtype not in ("float32", "float64") or shape != lse_shape:
            raise InvalidCall(
                argument,
                f"shape {shape} of {dtype}",
                f"shape {lse_shape} of float32 or float64",
                f"It has the rows and heads of out_a with shape {out_shape} in layout {layout!r}",
            )
