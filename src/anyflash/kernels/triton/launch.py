"""From views to launches: arguments, constants, grids.

All constants that a kernel is specialised by are collected in `_constants`; what differs from call to call
travels as arguments. Nothing here waits for the device.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

from anyflash.core.device import Device
from anyflash.core.errors import Unsupported
from anyflash.core.view import View
from anyflash.kernels.triton import backward as backward_kernels
from anyflash.kernels.triton import forward as forward_kernels
from anyflash.kernels.triton import prepare, schedule
from anyflash.kernels.triton import tables as table_kernels
from anyflash.kernels.triton.device import architecture, current, empty, pointer, steps
from anyflash.kernels.triton.precision import float32_products
from anyflash.kernels.triton.program import Functions, functions
from anyflash.kernels.triton.vectors import neighbours
from anyflash.semantics.operands import Gradients, Operands, Results, Saved
from anyflash.semantics.problem import Problem
from anyflash.semantics.rng import threshold

_LOG2_E = math.log2(math.e)
# A tile has at most 128 rows and 512 columns.
_FARTHEST = 2**31 // 1024


def forward(
    problem: Problem,
    operands: Operands,
    results: Results,
    tiles: schedule.Tiles | None = None,
    odd: Any = None,
) -> None:
    """`odd` and `tiles`: another kernel has run; of the blocks of these tiles those are computed again,
    carefully, whose number in `odd` says that their sums came out infinite or NaN."""
    call = Call(problem, operands)
    with current(call.device):
        if problem.packed_q and odd is None:
            fill_rows_of_no_sequence(call, results)
        if not problem.batch or not problem.seqlen_q:
            return
        tiles = tiles or call.tiles("forward")
        call.launch(
            forward_kernels.forward,
            call.row_blocks(tiles.block_m),
            problem.heads_q,
            tiles,
            [pointer(view) for view in (operands.q, operands.k, operands.v)]
            + [pointer(view) for view in (results.out, results.lse, results.stats)],
            [
                *call.shared_arrays(),
                *(_rows(view) for view in (operands.q, operands.k, operands.v, results.out)),
                _lse_steps(problem, steps(results.lse)),
                _stats_steps(problem, steps(results.stats)),
            ],
            {"SCORE": call.functions.final_score, "SINKS": problem.program.sinks},
            odd,
        )


def backward(problem: Problem, operands: Operands, saved: Saved, grads: Gradients) -> None:
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
        # delta - dlse of every row, in the layout of lse.
        delta = empty(problem.lse_shape, call.device)
        if problem.seqlen_q:
            _prepare(call, saved, delta, grads)
        _gradients(call, saved, delta, grads)


def restate(problem: Problem, lse: View, stats: View) -> None:
    """Stats of rows whose lse is given."""
    if not lse.size:
        return
    _, unit = _unit(problem)
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
            unit,
            BLOCK=block,
        )


def _unit(problem: Problem) -> tuple[bool, float]:
    """Whether products stay as they are, and by what a score is multiplied for exp2. The factor goes into the
    exponent only if it keeps the order."""
    identity = problem.program.score is None and problem.scale > 0
    return identity, _LOG2_E * (problem.scale if identity else 1.0)


def _prepare(call: Call, saved: Saved, delta: Any, grads: Gradients) -> None:
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
        delta,
        partial,
        pointer(operands.sinks) if operands.sinks is not None else None,
        _optional(call.lengths[0]),
        _rows(saved.out),
        _rows(saved.dout),
        _lse_steps(problem, steps(saved.dlse)) if saved.dlse is not None else (0, 0, 0),
        _stats_steps(problem, steps(saved.stats)),
        _lse_steps(problem, delta.stride()),
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


def _gradients(call: Call, saved: Saved, delta: Any, grads: Gradients) -> None:
    problem, operands = call.problem, call.operands
    arrays = [pointer(view) for view in (operands.q, operands.k, operands.v, saved.dout, saved.stats)]
    arrays.append(delta)
    layout = [_rows(view) for view in (operands.q, operands.k, operands.v, saved.dout)]
    layout += [_stats_steps(problem, steps(saved.stats)), _lse_steps(problem, delta.stride())]
    formulas = {"SCORE": call.functions.final_score, "SLOPE": call.functions.slope}
    lengths = call.shared_arrays()[1:]
    if problem.seqlen_k:
        tiles = call.tiles("backward_dkv")
        call.launch(
            backward_kernels.backward_dkv,
            call.key_blocks(tiles.block_n),
            problem.heads_kv,
            tiles,
            [*arrays, pointer(grads.dk), pointer(grads.dv)],
            [*lengths, *layout, _rows(grads.dk), _rows(grads.dv)],
            formulas,
        )
    if problem.seqlen_q:
        tiles = call.tiles("backward_dq")
        call.launch(
            backward_kernels.backward_dq,
            call.row_blocks(tiles.block_m),
            problem.heads_q,
            tiles,
            [*arrays, pointer(grads.dq)],
            [*lengths, *layout, _rows(grads.dq)],
            formulas,
        )
    if problem.seqlen_q and problem.seqlen_k:
        for slot, view in enumerate(grads.tables):
            if view is not None:
                table_kernels.run(call, slot, view, arrays, layout)


class Call:
    """What every kernel of one call needs."""

    def __init__(self, problem: Problem, operands: Operands) -> None:
        self.problem, self.operands = problem, operands
        self.device: Device = operands.q.device
        program = problem.program
        self.functions: Functions = functions(
            program.score, program.mask, tuple(spec.dtype for spec in problem.tables)
        )
        self.identity, self.unit = _unit(problem)
        self.hides = self.functions.masked or not self.functions.identity

    def launch(
        self,
        kernel: Any,
        grid: tuple[int, int],
        heads: int,
        tiles: schedule.Tiles,
        arrays: list[Any],
        layout: list[Any],
        formulas: dict[str, Any],
        odd: Any = None,
    ) -> None:
        """A plain launch, and where a mask or a score program may hide keys, a careful one behind it; that
        alone where `odd` is given."""
        blocks, entries = grid
        programs = blocks * heads * entries
        plain = odd is None
        odd = empty((programs,), self.device, "int32") if plain else odd
        constants = formulas | self.constants(tiles)
        for careful in (False, True)[1 - plain : 1 + self.hides]:
            kernel[(programs,)](
                *arrays,
                odd,
                *layout,
                blocks,
                self.problem.batch,
                *self.numbers(),
                CAREFUL=careful,
                **constants,
                num_warps=tiles.warps,
                num_stages=1 if careful else tiles.stages,
            )

    def row_blocks(self, block: int) -> tuple[int, int]:
        """Blocks of rows that a head has, and batch entries of a grid. Packed, the first is of all
        sequences."""
        problem = self.problem
        if problem.packed_q:
            return problem.total_q // block + problem.batch, 1
        return _blocks(problem.seqlen_q, block), problem.batch

    def key_blocks(self, block: int) -> tuple[int, int]:
        problem = self.problem
        if problem.packed_q:
            return problem.total_k // block + problem.batch, 1
        return _blocks(problem.seqlen_k, block), problem.batch

    def tiles(self, part: schedule.Part) -> schedule.Tiles:
        problem, size = self.problem, self.operands.q.itemsize
        return schedule.tiles(part, architecture(self.device), problem.head_dim, problem.head_dim_v, size)

    def shared_arrays(self) -> list[Any]:
        """sinks, cu_seqlens_q, cu_seqlens_k, seqused_k, tables."""
        tables = tuple([(pointer(t), steps(t), tuple(t.shape)) for t in self.operands.tables])
        return [*map(_optional, (self.operands.sinks, *self.lengths)), tables]

    @cached_property
    def lengths(self) -> tuple[View | None, ...]:
        """cu_seqlens_q, cu_seqlens_k, seqused_k: kernels read them as rows of neighbours."""
        operands = self.operands
        views = (operands.cu_seqlens_q, operands.cu_seqlens_k, operands.seqused_k)
        return tuple([None if view is None else neighbours(view) for view in views])

    @property
    def extents(self) -> tuple[int, int]:
        """Rows and keys: of a dense sequence, or of all packed ones."""
        problem = self.problem
        if problem.packed_q:
            return problem.total_q, problem.total_k
        return problem.seqlen_q, problem.seqlen_k

    def numbers(self) -> tuple[Any, ...]:
        """heads, group, extents, scale, unit, seed, threshold, keep_scale."""
        problem, p = self.problem, self.problem.program.dropout_p
        drop = threshold(p)
        seed = self.operands.seed
        return (
            problem.heads_q,
            problem.group,
            *self.extents,
            float(problem.scale),
            self.unit,
            seed - (1 << 64) if seed >> 63 else seed,
            drop,
            1.0 / (1.0 - p) if drop < 2**32 else 0.0,
        )

    def constants(self, tiles: schedule.Tiles) -> dict[str, Any]:
        problem, found = self.problem, self.functions
        wide, rest = schedule.split(problem.head_dim)
        wide_v, rest_v = schedule.split(problem.head_dim_v)
        return {
            "ALLOWED": found.allowed,
            "TILE_CLASS": found.tile_class,
            "IDENTITY": self.identity,
            "MASK": found.masked,
            "DROPOUT": problem.program.dropout_p > 0,
            "PACKED": problem.packed_q,
            "USED": problem.seqused_k,
            "PRECISION": self.precision(),
            "DIM": problem.head_dim,
            "WIDE": wide,
            "REST": rest,
            "DIM_V": problem.head_dim_v,
            "WIDE_V": wide_v,
            "REST_V": rest_v,
            "BLOCK_M": tiles.block_m,
            "BLOCK_N": tiles.block_n,
        }

    def precision(self) -> str:
        """How the kernels multiply."""
        return (
            "ieee"
            if self.problem.dtype != "float32"
            else float32_products(architecture(self.device)).products
        )


def _optional(view: View | None) -> Any:
    return None if view is None else pointer(view)


def _blocks(extent: int, block: int) -> int:
    return -(-extent // block)


def _rows(view: View) -> tuple[int, ...]:
    """Steps (batch, token, head, dim); packed arrays have no batch axis.

    Raises Unsupported if rows lie so far apart that a place within a tile needs more than 32 bits.
    """
    found = steps(view)
    found = found if len(found) == 4 else (0, *found)
    farthest = max(abs(found[1]), abs(found[3]))
    if farthest > _FARTHEST:
        raise Unsupported(
            f"an array of shape {tuple(view.shape)} whose neighbours lie {farthest} elements apart",
            {"triton": [f"places within a tile have 32 bits, enough for {_FARTHEST} elements"]},
            "Make it contiguous",
        )
    return found


def _lse_steps(problem: Problem, found: tuple[int, ...]) -> tuple[int, ...]:
    return (0, *found) if problem.packed_q else found


def _stats_steps(problem: Problem, found: tuple[int, ...]) -> tuple[int, ...]:
    return (found[0], 0, *found[1:]) if problem.packed_q else found


def fill_rows_of_no_sequence(call: Call, results: Results) -> None:
    """Packed rows behind the last sequence have no block that would write them."""
    problem = call.problem
    prepare.fill_rest[(problem.heads_q,)](
        pointer(results.out),
        pointer(results.lse),
        pointer(results.stats),
        _optional(call.lengths[0]),
        _rows(results.out),
        _lse_steps(problem, steps(results.lse)),
        _stats_steps(problem, steps(results.stats)),
        problem.batch,
        problem.total_q,
        DIM=problem.head_dim_v,
        WIDTH=max(16, 1 << (problem.head_dim_v - 1).bit_length()),
        BLOCK=16,
    )


def _zero(view: View) -> None:
    """Zeros into an array of at most four axes."""
    missing = 4 - view.ndim
    shape = (1,) * missing + tuple(view.shape)
    if view.size:
        block = 1024
        prepare.zero[(_blocks(view.size, block),)](
            pointer(view), (0,) * missing + steps(view), view.size, *shape[1:], BLOCK=block
        )
