"""From views to launches of `decode`: calls over a cache, and dense ones of few rows over many keys.

Nothing here reads what a sequence holds, and no memory taken depends on it: a call may be recorded in a
graph and run again with other lengths, other page tables and other tokens. There is one launch for dense
queries. Packed ones may have few, some and many rows (`schedule.ROWS`): one launch for each that the shapes
allow, in which the sequences of the others have nothing to do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

from anyflash.kernels.triton import decode as kernels
from anyflash.kernels.triton import schedule
from anyflash.kernels.triton.device import architecture, current, empty, pointer, steps
from anyflash.kernels.triton.launch import (
    Call,
    _blocks,
    _lse_steps,
    _rows,
    _stats_steps,
    fill_rows_of_no_sequence,
)
from anyflash.kernels.triton.narrow import bits, format_of
from anyflash.kernels.triton.vectors import neighbours
from anyflash.kernels.triton.workspace import counters
from anyflash.semantics.expr import Expr
from anyflash.semantics.operands import Operands, Results
from anyflash.semantics.problem import Problem
from anyflash.semantics.text import parse

# Of one query this hides nothing: it stands at the last key.
_CAUSAL = "(le k q)"


def serves(problem: Problem) -> bool:
    """Is this a call for the kernel of this file?"""
    if problem.addressing == "paged":
        return True
    most = schedule.ROWS["some"][1]
    return (
        problem.addressing == "dense"
        and 0 < problem.seqlen_q * problem.group <= most
        and problem.seqlen_k >= schedule.DECODE_KEYS
        and not problem.program.dropout_p
    )


def simplified(problem: Problem) -> Problem:
    """The same without a mask that hides nothing."""
    if problem.seqlen_q == 1 and problem.program.mask == _CAUSAL:
        problem = replace(problem, program=replace(problem.program, mask=None))
    return problem


def forward(problem: Problem, operands: Operands, results: Results) -> None:
    problem = simplified(problem)
    call = Call(problem, operands)
    with current(call.device):
        if problem.packed_q:
            fill_rows_of_no_sequence(call, results)
        if problem.batch and problem.seqlen_q:
            for rows in kinds(problem):
                launch(call, rows, results)


def kinds(problem: Problem) -> Iterator[schedule.Rows]:
    """What numbers of rows a sequence can have here; one without rows needs no launch."""
    greatest = problem.seqlen_q * problem.group
    least = problem.group if problem.packed_q else greatest
    for rows, (below, most) in schedule.ROWS.items():
        if greatest > below and least <= most:
            yield rows


def launch(call: Call, rows: schedule.Rows, results: Results, odd: Any = None) -> None:
    """Sequences with such a number of rows. `odd`: another kernel has run; of its blocks of 64 rows those are
    computed again whose number says that their sums came out infinite or NaN: (sequences, key heads, 2), or
    for many rows what `any_odd_rows` is given."""
    problem, operands = call.problem, call.operands
    arch = architecture(call.device)
    narrow, dims = format_of(problem.dtype_kv), (problem.head_dim, problem.head_dim_v)
    size, greatest = max(2, operands.q.itemsize), problem.seqlen_q * problem.group
    chosen = schedule.decode_constants(rows, arch, *dims, size, greatest, narrow != "")
    block_m, split = chosen["BLOCK_M"], bool(chosen["SPLIT"])
    below, most = schedule.ROWS[rows]
    blocks, entries = _blocks(min(problem.seqlen_q * problem.group, most), block_m), problem.batch
    # Blocks of all sequences together: each has at most one more than its rows fill.
    together = problem.total_q * problem.group // block_m + problem.batch
    search = problem.packed_q and together < blocks * entries
    if search:
        blocks, entries = together, 1
    most_segments = _blocks(_blocks(problem.seqlen_k, chosen["BLOCK_N"]), chosen["LEAST"])
    parts = min(chosen["SEGMENTS"], max(most_segments, 1))
    programs = blocks * problem.heads_kv * entries
    # A block that must be mended goes through the workspace, too.
    kept = programs if split and (parts > 1 or call.hides) else 0
    table = operands.block_table
    page = 0 if table is None else problem.page_size
    gather = page > 0 and (page % chosen["BLOCK_N"] != 0 or operands.leftpad_k is not None)
    capacity = problem.page_size if table is None else table.shape[1] * problem.page_size
    sinks, cu_seqlens_q, _, seqused_k, tables = call.shared_arrays()
    leftpad = None if operands.leftpad_k is None else neighbours(operands.leftpad_k)
    way = walked(problem)
    kernels.decode[(programs * parts,)](
        *[bits(view) for view in (operands.q, operands.k, operands.v)],
        *[pointer(view) for view in (results.out, results.lse, results.stats)],
        empty((kept * parts * schedule.segment_words(chosen),), call.device),
        counters(kept, call.device) if split else None,
        sinks,
        cu_seqlens_q,
        seqused_k,
        None if table is None else pointer(table),
        None if leftpad is None else pointer(leftpad),
        tables,
        *[_rows(view) for view in (operands.q, operands.k, operands.v, results.out)],
        _lse_steps(problem, steps(results.lse)),
        _stats_steps(problem, steps(results.stats)),
        (0, 0) if table is None else steps(table),
        blocks,
        parts,
        problem.batch,
        problem.heads_q,
        problem.group,
        problem.seqlen_q,
        problem.seqlen_k,
        problem.total_q,
        capacity if problem.num_pages else 0,
        problem.num_pages if problem.addressing == "paged" else problem.batch,
        below + 1,
        most,
        float(problem.scale),
        call.unit,
        SCORE=call.functions.final_score,
        ALLOWED=call.functions.allowed,
        TILE_CLASS=call.functions.tile_class,
        IDENTITY=call.identity,
        MASK=call.functions.masked,
        TRIM=way.trim,
        # A walk without runs keeps a third of the registers free. Many rows gain more from full tiles.
        RUNS=way.runs or (way.classed and not split),
        HIDES=call.hides,
        SINKS=problem.program.sinks,
        PACKED=problem.packed_q,
        SEARCH=search,
        USED=operands.seqused_k is not None,
        PADDED=operands.leftpad_k is not None,
        PAGE=page,
        GATHER=gather,
        PRECISION=call.precision(),
        **chosen,
        FACTOR=call.functions.factor,
        FORMAT_Q=format_of(problem.dtype),
        FORMAT=narrow,
        odd=None if rows == "many" else odd,
        odd_rows=odd if rows == "many" else None,
    )


class Walk(NamedTuple):
    """How tiles of keys are walked. trim: empty ones at both ends are left out; classed: a class holds for
    all rows of a tile; runs: some between the ends may be empty, too."""

    trim: bool
    classed: bool
    runs: bool


def walked(problem: Problem) -> Walk:
    mask = _known(problem.program.mask)
    classed = problem.program.mask is not None and not (problem.group > 1 and mask.by_head)
    trim = classed and not mask.loads_along_keys
    return Walk(trim, classed, classed and not (trim and mask.interval))


class _Mask(NamedTuple):
    """What a mask's formula says of how tiles are walked."""

    by_head: bool
    loads_along_keys: bool
    interval: bool


@lru_cache(maxsize=256)
def _known(mask: str | None) -> _Mask:
    """Found once for each formula: every layer of a model asks at every step."""
    tree = parse(mask or "true")
    return _Mask(_reads(tree, "head"), _loads_along_keys(tree), _is_interval(tree))


def _reads(expr: Expr, name: str) -> bool:
    return (expr.op == "var" and expr.value == name) or any(_reads(a, name) for a in expr.args)


def _loads_along_keys(expr: Expr) -> bool:
    """Does it look up a table by key? Then tiles are classed one at a time."""
    if expr.op == "load" and any(_reads(index, "k") for index in expr.args):
        return True
    return any(_loads_along_keys(a) for a in expr.args)


def _is_interval(mask: Expr) -> bool:
    """Does every row see keys from one to another? Then no tile between those is worth being skipped."""
    if mask.op == "and":
        return all(_is_interval(a) for a in mask.args)
    return mask.op in ("le", "lt") and all(_is_linear(a) for a in mask.args)


def _is_linear(expr: Expr) -> bool:
    return expr.op in ("var", "const") or (
        expr.op in ("add", "sub", "neg") and all(_is_linear(a) for a in expr.args)
    )
