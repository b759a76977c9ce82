"""Launches of the backward: what the rows need first, then the products, then gradients of tables.

Other kernels may do the products in the middle; what is around them is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from anyflash.core.view import View
from anyflash.kernels.triton import backward as backward_kernels
from anyflash.kernels.triton import prepare, schedule
from anyflash.kernels.triton import tables as table_kernels
from anyflash.kernels.triton.device import current, empty, pointer, steps
from anyflash.kernels.triton.launch import (
    Call,
    _blocks,
    _lse_steps,
    _optional,
    _rows,
    _stats_steps,
    unit,
)
from anyflash.semantics.operands import Gradients, Operands, Saved
from anyflash.semantics.problem import Problem

# For a part of a backward that other kernels have done: of the blocks of these tiles those are computed again
# whose number in the array says that their sums came out infinite or NaN. None: nothing is.
Repairs = dict[schedule.Part, tuple[schedule.Tiles, Any] | None]

ROWS_TOGETHER = 64


def backward(
    problem: Problem,
    operands: Operands,
    saved: Saved,
    grads: Gradients,
    products: Callable[[Call, Rows], Repairs] | None = None,
) -> None:
    """`products`, of the call and delta: other kernels for dq, dk and dv. What they return is looked at
    again, carefully; what they leave out is computed here."""
    call = Call(problem, operands)
    with current(call.device):
        for view in grads.tables:
            if view is not None:
                _zero(view)
        if grads.dsinks is not None:
            _zero(grads.dsinks)
        if problem.packed_q:
            for view in (grads.dq, grads.dk, grads.dv):
                _zero(view)
        if not problem.batch:
            return
        delta = Rows.of(call)
        if problem.seqlen_q:
            _prepare(call, saved, delta, grads)
        done = products(call, delta) if products and problem.seqlen_q and problem.seqlen_k else {}
        _gradients(call, saved, delta, grads, done)


def restate(problem: Problem, lse: View, stats: View) -> None:
    """Stats of rows whose lse is given."""
    if not lse.size:
        return
    _, exponent = unit(problem)
    heads, rows = lse.shape[-2:]
    block = 256
    with current(lse.device):
        prepare.stats_of_lse[(_blocks(lse.size, block),)](
            pointer(lse),
            pointer(stats),
            _lse_steps(problem, steps(lse)),
            _stats_steps(problem, steps(stats)),
            lse.size,
            heads,
            rows,
            exponent,
            BLOCK=block,
        )


def _prepare(call: Call, saved: Saved, delta: Rows, grads: Gradients) -> None:
    problem, block = call.problem, 32
    sinks = grads.dsinks is not None
    blocks, entries = call.row_blocks(block)
    partial = empty((blocks * problem.heads_q * entries if sinks else 0,), call.device)
    wide, rest = schedule.split(problem.head_dim_v)
    operands = call.operands
    prepare.delta[(blocks * problem.heads_q * entries,)](
        pointer(saved.out),
        pointer(saved.dout),
        pointer(saved.dlse) if saved.dlse is not None else None,
        pointer(saved.stats),
        delta.memory,
        partial,
        pointer(operands.sinks) if operands.sinks is not None else None,
        _optional(call.lengths[0]),
        _rows(saved.out),
        _rows(saved.dout),
        _lse_steps(problem, steps(saved.dlse)) if saved.dlse is not None else (0, 0, 0),
        _stats_steps(problem, steps(saved.stats)),
        delta.steps,
        blocks,
        problem.batch,
        problem.heads_q,
        call.extents[0],
        call.unit,
        DLSE=saved.dlse is not None,
        SINKS=sinks,
        PACKED=problem.packed_q,
        DIM=problem.head_dim_v,
        WIDE=wide,
        REST=rest,
        BLOCK=block,
    )
    if grads.dsinks is not None:
        prepare.sum_sinks[(problem.heads_q,)](
            partial,
            pointer(grads.dsinks),
            steps(grads.dsinks)[0],
            blocks,
            entries,
            BLOCK=64,
        )


def _gradients(call: Call, saved: Saved, delta: Rows, grads: Gradients, done: Repairs) -> None:
    problem, operands = call.problem, call.operands
    arrays = [pointer(view) for view in (operands.q, operands.k, operands.v, saved.dout, saved.stats)]
    arrays.append(delta.memory)
    layout = [_rows(view) for view in (operands.q, operands.k, operands.v, saved.dout)]
    layout += [_stats_steps(problem, steps(saved.stats)), delta.steps]
    formulas = {"SCORE": call.functions.final_score, "SLOPE": call.functions.slope}
    lengths = call.shared_arrays()[1:]
    dkv = done.get("backward_dkv", (call.tiles("backward_dkv"), None))
    if problem.seqlen_k and dkv is not None:
        tiles, odd = dkv
        call.launch(
            backward_kernels.backward_dkv,
            call.key_blocks(tiles.block_n),
            problem.heads_kv,
            tiles,
            [*arrays, pointer(grads.dk), pointer(grads.dv)],
            [*lengths, *layout, _rows(grads.dk), _rows(grads.dv)],
            formulas,
            odd,
        )
    dq = done.get("backward_dq", (call.tiles("backward_dq"), None))
    if problem.seqlen_q and dq is not None:
        tiles, odd = dq
        call.launch(
            backward_kernels.backward_dq,
            call.row_blocks(tiles.block_m),
            problem.heads_q,
            tiles,
            [*arrays, pointer(grads.dq)],
            [*lengths, *layout, _rows(grads.dq)],
            formulas,
            odd,
        )
    if problem.seqlen_q and problem.seqlen_k:
        for slot, view in enumerate(grads.tables):
            if view is not None:
                table_kernels.run(call, slot, view, arrays, layout)


@dataclass(frozen=True, slots=True)
class Rows:
    """delta - dlse of every row, float32, and its steps (batch, head, row).

    Behind the rows of each sequence are zeros up to a multiple of ROWS_TOGETHER: who takes so many rows at a
    time finds nothing of another sequence there.
    """

    memory: Any
    steps: tuple[int, int, int]

    @classmethod
    def of(cls, call: Call) -> Rows:
        problem = call.problem
        if problem.packed_q:
            rows = problem.total_q + ROWS_TOGETHER * problem.batch
            shape, entry = (problem.heads_q, rows), ROWS_TOGETHER
        else:
            rows = _blocks(problem.seqlen_q, ROWS_TOGETHER) * ROWS_TOGETHER
            shape, entry = (problem.batch, problem.heads_q, rows), problem.heads_q * rows
        return cls(empty(shape, call.device).zero_(), (entry, rows, 1))


def _zero(view: View) -> None:
    """Zeros into an array of at most four axes."""
    missing = 4 - view.ndim
    shape = (1,) * missing + tuple(view.shape)
    if view.size:
        block = 1024
        prepare.zero[(_blocks(view.size, block),)](
            pointer(view), (0,) * missing + steps(view), view.size, *shape[1:], BLOCK=block
        )
