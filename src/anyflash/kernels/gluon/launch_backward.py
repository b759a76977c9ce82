"""The backward's launches: Hopper's kernels for the products, the portable backward around them.

delta, gradients of sinks and tables, and the careful launches that follow where sums came out infinite or NaN
are those of kernels/triton. A call that TMA cannot take (`unfit`) is the portable backward's whole.
"""

from __future__ import annotations

from typing import Any

from anyflash.core.view import View, contiguous_strides
from anyflash.kernels.gluon import backward as keys_kernel
from anyflash.kernels.gluon import backward_dq as rows_kernel
from anyflash.kernels.gluon import backward_wide as wide_kernel
from anyflash.kernels.gluon import finish as finish_kernel
from anyflash.kernels.gluon import launch, schedule
from anyflash.kernels.gluon import schedule_backward as tables
from anyflash.kernels.triton import launch_backward as portable
from anyflash.kernels.triton.device import empty, steps
from anyflash.kernels.triton.launch import Call
from anyflash.kernels.triton.launch_backward import Repairs, Rows
from anyflash.kernels.triton.program import Functions, functions
from anyflash.kernels.triton.schedule import Tiles as PortableTiles
from anyflash.semantics.operands import Gradients, Operands, Saved
from anyflash.semantics.problem import Problem

# Coordinates of TMA have 32 bits.
_MOST_ROWS = 2**31
# Of 64 keys and of 64 rows, as the kernels report them.
_REPAIR_KEYS = PortableTiles(32, 64, 8, 1)
_REPAIR_ROWS = PortableTiles(64, 32, 8, 1)


def unfit(operands: Operands, saved: Saved, grads: Gradients) -> str | None:
    """Why the arrays of a backward cannot be moved by TMA, or None."""
    for name, view in (("q", operands.q), ("k", operands.k), ("v", operands.v), ("dout", saved.dout)):
        if why := launch.cannot_move(view):
            return f"{name} {why}"
    for name, view in (("dq", grads.dq), ("dk", grads.dk), ("dv", grads.dv)):
        if view.strides[-1] != view.itemsize:
            return f"{name} has elements {view.strides[-1]} bytes apart along the head dim"
    stats = saved.stats
    if (
        stats.ptr is None
        or stats.ptr % 16
        or stats.strides != contiguous_strides(stats.shape, stats.itemsize)
    ):
        return "stats is not contiguous from a multiple of 16 bytes on"
    if stats.size >= _MOST_ROWS:
        return f"has {stats.size // 2} rows"
    return None


def backward(problem: Problem, operands: Operands, saved: Saved, grads: Gradients) -> None:
    """Write the gradients. The arrays are fit. A call that need not be deterministic has dq added up in no
    fixed order."""

    def products(call: Call, delta: Rows) -> Repairs:
        return _Products(call, saved, delta, grads).run()

    portable.backward(problem, operands, saved, grads, products)


class _Products:
    """What the kernels of one backward share."""

    def __init__(self, call: Call, saved: Saved, delta: Rows, grads: Gradients) -> None:
        problem, operands = call.problem, call.operands
        self.call, self.saved, self.delta, self.grads = call, saved, delta, grads
        program = problem.program
        dtypes = tuple(spec.dtype for spec in problem.tables)
        self.found: Functions = functions(program.score, program.mask, dtypes, "gluon")
        self.dims = problem.head_dim, problem.head_dim_v
        self.dropped = program.dropout_p > 0
        self.wide = tables.wide(*self.dims, self.dropped)
        self.keys_tiles = tables.keys_tiles(*self.dims, not call.identity, self.dropped)
        self.reduce = not program.deterministic and tables.adds(*self.dims, not call.identity, self.dropped)
        self.guard = call.hides
        _, *lengths, self.tables = call.shared_arrays()
        self.lengths = lengths
        rows = problem.total_q if problem.packed_q else problem.seqlen_q
        entry_rows = 0 if problem.packed_q else problem.heads_q * rows
        # Of stats (batch entry, head, plane), of delta (batch entry, head).
        self.row_steps = (entry_rows, rows, saved.stats.size // 2, *delta.steps[:2])
        self.moved = (operands.q, operands.k, operands.v, saved.dout)

    def run(self) -> Repairs:
        """For each part that is done, None or what has to be looked at again, carefully."""
        done: Repairs = {}
        sums = None
        problem = self.call.problem
        if self.reduce:
            shape = (*problem.q_shape[:-1], schedule.padded(problem.head_dim))
            sums = empty(shape, self.call.device).zero_()
        done["backward_dkv"] = self._keys(sums)
        done["backward_dq"] = self._rows() if sums is None else self._finish(sums)
        return done

    def _keys(self, sums: Any) -> tuple[PortableTiles, Any] | None:
        call, grads, problem = self.call, self.grads, self.call.problem
        tiles = self.keys_tiles
        width, width_v = (tables.keys_width(*self.dims, dim, self.dropped) for dim in self.dims)
        blocks, entries = call.key_blocks(tiles.held)
        odd_blocks, odd = self._flags(*call.key_blocks(schedule.ROWS), problem.heads_kv)
        q, k, v, dout = self.moved
        stats = self.saved.stats
        launch.launch(
            wide_kernel.backward_wide if self.wide else keys_kernel.backward,
            blocks * problem.heads_kv * entries,
            launch.rows(q, tiles.moving, width),
            launch.rows(k, tiles.held, width),
            launch.rows(v, tiles.held, width_v),
            launch.rows(dout, tiles.moving, width_v),
            launch.elements(stats, tiles.moving),
            launch.elements(_view(self.delta.memory, call), tiles.moving),
            None if sums is None else launch.rows(_view(sums, call), tiles.moving, sums.shape[-1] // 2),
            launch.pointer(grads.dk),
            launch.pointer(grads.dv),
            odd,
            *self.lengths,
            self.tables,
            _steps(grads.dk),
            _steps(grads.dv),
            blocks,
            problem.batch,
            *self._numbers(odd_blocks),
            C=self._form(tiles, sums is not None),
            SCORE=self.found.final_score,
            SLOPE=self.found.slope,
            ALLOWED=self.found.allowed,
            TILE_CLASS=self.found.tile_class,
            num_warps=4,
        )
        return (_REPAIR_KEYS, odd) if self.guard else None

    def _rows(self) -> tuple[PortableTiles, Any] | None:
        call, grads, problem = self.call, self.grads, self.call.problem
        tiles = tables.rows_tiles(*self.dims, call.hides or self.dropped)
        blocks, entries = call.row_blocks(tables.HELD)
        odd_blocks, odd = self._flags(*call.row_blocks(schedule.ROWS), problem.heads_q)
        q, k, v, dout = self.moved
        launch.launch(
            rows_kernel.backward_dq,
            blocks * problem.heads_q * entries,
            *_in_pieces((q, schedule.ROWS), (k, tiles.moving), (v, tiles.moving), (dout, schedule.ROWS)),
            launch.pointer(self.saved.stats),
            self.delta.memory,
            launch.pointer(grads.dq),
            odd,
            *self.lengths,
            self.tables,
            _steps(grads.dq),
            blocks,
            problem.batch,
            *self._numbers(odd_blocks),
            C=self._form(tiles, False),
            SCORE=self.found.final_score,
            SLOPE=self.found.slope,
            ALLOWED=self.found.allowed,
            TILE_CLASS=self.found.tile_class,
            num_warps=4,
        )
        return (_REPAIR_ROWS, odd) if self.guard else None

    def _finish(self, sums: Any) -> tuple[PortableTiles, Any] | None:
        call, dq, problem = self.call, self.grads.dq, self.call.problem
        blocks, entries = call.row_blocks(schedule.ROWS)
        _, odd = self._flags(blocks, entries, problem.heads_q)
        lead = () if dq.ndim == 4 else (0,)
        finish_kernel.finish[(blocks * problem.heads_q * entries,)](
            sums,
            launch.pointer(dq),
            odd,
            self.lengths[0],
            (*lead, *sums.stride()),
            (*lead, *steps(dq)),
            blocks,
            problem.batch,
            problem.heads_q,
            call.extents[0],
            float(problem.scale),
            GUARD=self.guard,
            PACKED=problem.packed_q,
            DIM=problem.head_dim,
            WIDTH=sums.shape[-1],
            BLOCK=schedule.ROWS,
        )
        return (_REPAIR_ROWS, odd) if self.guard else None

    def _flags(self, blocks: int, entries: int, heads: int) -> tuple[int, Any]:
        """Flags of a careful launch's programs, zeros, and how many a head has."""
        odd = empty((blocks * heads * entries,), self.call.device, "int32").zero_() if self.guard else None
        return blocks, odd

    def _numbers(self, odd_blocks: int) -> tuple[Any, ...]:
        """heads, group, extents, steps of rows, odd_blocks, scale, unit, dropout's."""
        problem = self.call.problem
        return (
            problem.heads_q,
            problem.group,
            *self.call.extents,
            self.row_steps,
            odd_blocks,
            float(problem.scale),
            self.call.unit,
            *launch.dropout_numbers(self.call),
        )

    def _form(self, tiles: tables.BackwardTiles, reduce: bool) -> tables.BackwardForm:
        problem = self.call.problem
        return tables.BackwardForm(
            identity=self.call.identity,
            masked=self.found.masked,
            wide=not launch.reads_tables(problem.program.mask),
            guard=self.guard,
            packed=problem.packed_q,
            used=problem.seqused_k,
            dropout=self.dropped,
            reduce=reduce,
            dim=problem.head_dim,
            dim_v=problem.head_dim_v,
            stages=tiles.stages,
            consumer_registers=tiles.consumer_registers,
            producer_registers=tiles.producer_registers,
        )


def _in_pieces(*arrays: tuple[View, int]) -> tuple[Any, ...]:
    """Descriptors of so many rows of each array, then of the columns behind, None for a head in one piece."""
    parts = [(view, extent, *schedule.split(view.shape[-1])) for view, extent in arrays]
    return (
        *(launch.rows(view, extent, wide) for view, extent, wide, _rest in parts),
        *(launch.rows(view, extent, rest) if rest else None for view, extent, _wide, rest in parts),
    )


def _view(made: Any, call: Call) -> View:
    """Working memory as a view."""
    shape = tuple(made.shape)
    return View(made.data_ptr(), shape, contiguous_strides(shape, 4), "float32", call.device, owner=made)


def _steps(view: View) -> tuple[int, ...]:
    """(first, token, head) in elements; packed arrays begin at a token."""
    found = steps(view)
    return found[:3] if len(found) == 4 else (found[0], found[0], found[1])
