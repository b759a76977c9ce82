"""From views to launches of `decode`: calls over a cache, and dense ones of few rows over many keys.

What kernels/triton/launch_decode.py says holds here: nothing reads what a sequence holds, no memory taken
depends on it, and sequences with few and with some rows have a launch each. Those with many rows have the
forward's, over the cache; what must be done again where a mask hides infinite values or NaN is the portable
kernel's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from anyflash.core.dtypes import FLOATS8
from anyflash.core.log import logger
from anyflash.core.view import View
from anyflash.kernels.gluon import decode as kernels
from anyflash.kernels.gluon import launch as launching
from anyflash.kernels.gluon import launch_pages
from anyflash.kernels.gluon import schedule_decode as schedule
from anyflash.kernels.triton import launch as portable
from anyflash.kernels.triton import launch_decode as portable_decode
from anyflash.kernels.triton.device import current, empty, steps
from anyflash.kernels.triton.program import functions
from anyflash.kernels.triton.schedule import ROWS, Rows
from anyflash.kernels.triton.workspace import counters
from anyflash.semantics.operands import Operands, Results
from anyflash.semantics.problem import Problem

SERVED: tuple[Rows, ...] = ("few", "some")
# Both backends send the same calls to the kernel that splits keys.
serves = portable_decode.serves


def lacks(problem: Problem) -> list[str]:
    """What of a call that the portable kernel of this name serves this one does not know."""
    reasons = []
    if problem.dtype_kv in FLOATS8:
        reasons.append("splits no keys of 8-bit floats")
    return reasons


def unfit(problem: Problem, operands: Operands) -> str | None:
    """Why the keys of a call cannot be moved by TMA, or None."""
    for name, view in (("k", operands.k), ("v", operands.v)):
        if why := launching.cannot_move(view):
            return f"{name} {why}"
    return launch_pages.unfit(_as_cache(problem), operands, _block_n(problem))


def explain(problem: Problem) -> dict[str, str]:
    """What runs, by number of rows."""
    found = {}
    for rows in portable_decode.kinds(problem):
        if rows in SERVED:
            chosen = _tiles(problem, rows)
            segments, least = schedule.cut(rows, chosen.block_n)
            cut = f"at most {segments} segments of {least * chosen.block_n} keys or more"
            found[f"forward, {rows} rows"] = f"{chosen}, {cut}"
        else:
            found[f"forward, {rows} rows"] = f"{launching.forward_tiles(problem)}, the forward over the cache"
    return found


def forward(problem: Problem, operands: Operands, results: Results) -> None:
    """Write out, lse and stats. The keys are fit."""
    problem = portable_decode.simplified(problem)
    call = portable.Call(problem, operands)
    with current(call.device):
        if problem.packed_q:
            portable.fill_rows_of_no_sequence(call, results)
        if problem.batch and problem.seqlen_q:
            for rows in portable_decode.kinds(problem):
                if rows in SERVED:
                    odd = _launch(call, rows, results)
                    if odd is not None:
                        portable_decode.launch(call, rows, results, odd)
                elif why := launch_pages.unfit_for_many(problem, operands, results):
                    logger.info("many rows over a cache on hopper: the portable kernel, as %s", why)
                    portable_decode.launch(call, rows, results)
                else:
                    launch_pages.many(call, results)


def _launch(call: portable.Call, rows: Rows, results: Results) -> Any:
    """One launch; where keys may be hidden, which sums of 64 rows came out infinite or NaN."""
    problem, operands = call.problem, call.operands
    program = problem.program
    below, most = ROWS[rows]
    chosen = _tiles(problem, rows)
    segments, least = schedule.cut(rows, chosen.block_n)
    parts = min(segments, max(-(-problem.seqlen_k // (chosen.block_n * least)), 1))
    programs = problem.batch * problem.heads_kv
    kept_rows = schedule.kept_rows(_greatest(problem, rows))
    kept = programs * chosen.consumers if parts > 1 else 1
    words = schedule.segment_words(kept_rows, problem.head_dim_v)
    odd = empty((programs * 2,), call.device, "int32") if call.hides else None
    cached = _as_cache(problem)
    together = launch_pages.chunk(cached, operands, chosen.block_n)
    found = functions(program.score, program.mask, tuple(t.dtype for t in problem.tables), "gluon")
    walked = portable_decode.walked(problem)
    sinks, cu_seqlens_q, _, seqused_k, tables = call.shared_arrays()
    launching.launch(
        kernels.decode,
        programs * parts,
        launching.pointer(operands.q),
        launching.chunks(operands.k, together),
        launching.chunks(operands.v, together),
        *[launching.pointer(view) for view in (results.out, results.lse, results.stats)],
        empty((kept * parts * words,), call.device),
        counters(kept, call.device),
        odd,
        sinks,
        cu_seqlens_q,
        seqused_k,
        launch_pages.cache(cached, operands),
        tables,
        *[_steps(view, 4) for view in (operands.q, results.out)],
        _steps(results.lse, 3),
        _planes(results.stats),
        parts,
        problem.heads_q,
        problem.group,
        problem.seqlen_q,
        launch_pages.most_keys(cached, operands),
        problem.total_q,
        below + 1,
        most,
        float(problem.scale),
        call.unit,
        SCORE=found.final_score,
        ALLOWED=found.allowed,
        TILE_CLASS=found.tile_class,
        C=schedule.Form(
            identity=call.identity,
            masked=found.masked,
            trim=walked.trim,
            skips=walked.runs,
            sinks=program.sinks,
            guard=call.hides,
            packed=problem.packed_q,
            used=operands.seqused_k is not None,
            leftpad=operands.leftpad_k is not None,
            page=0 if operands.block_table is None else problem.page_size,
            dim=problem.head_dim,
            dim_v=problem.head_dim_v,
            width=schedule.padded(problem.head_dim),
            width_v=schedule.padded(problem.head_dim_v),
            block_n=chosen.block_n,
            segments=segments,
            least=least,
            kept=kept_rows,
            head=schedule.head_words(kept_rows),
            piece=schedule.piece(kept_rows, problem.head_dim_v),
            consumers=chosen.consumers,
            stages=chosen.stages,
            consumer_registers=chosen.consumer_registers,
            producer_registers=chosen.producer_registers,
        ),
        num_warps=4,
        maxnreg=chosen.launched_registers,
    )
    return odd


def _greatest(problem: Problem, rows: Rows) -> int:
    """How many rows a sequence of this launch can have."""
    return min(problem.seqlen_q * problem.group, ROWS[rows][1])


def _tiles(problem: Problem, rows: Rows) -> schedule.Tiles:
    return schedule.tiles(problem.head_dim, problem.head_dim_v, _greatest(problem, rows))


def _steps(view: View, axes: int) -> tuple[int, ...]:
    """Strides in elements; packed arrays have no batch axis."""
    found = steps(view)
    return found if len(found) == axes else (0, *found)


def _planes(stats: View) -> tuple[int, ...]:
    """Of (plane, batch, head, row)."""
    plane, *others = steps(stats)
    return (plane, *others) if len(others) == 3 else (plane, 0, *others)


def _as_cache(problem: Problem) -> Problem:
    """Dense keys are a cache of one page for each sequence."""
    if problem.addressing == "paged":
        return problem
    return replace(problem, num_pages=problem.batch, page_size=problem.seqlen_k)


def _block_n(problem: Problem) -> int:
    return schedule.tiles(problem.head_dim, problem.head_dim_v, schedule.ROWS).block_n
