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
from anyflash.kernels.triton import forward as forward_kernels
from anyflash.kernels.triton import prepare, schedule
from anyflash.kernels.triton.device import architecture, current, empty, pointer, steps
from anyflash.kernels.triton.narrow import Narrow, narrow_of
from anyflash.kernels.triton.precision import float32_products
from anyflash.kernels.triton.program import Functions, functions
from anyflash.kernels.triton.vectors import neighbours
from anyflash.semantics.operands import Operands, Results
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
        tiles, made = tiles or call.tiles("forward"), call.functions
        call.launch(
            forward_kernels.forward,
            call.row_blocks(tiles.block_m),
            problem.heads_q,
            tiles,
            call.narrow.pointers(operands)
            + [pointer(view) for view in (results.out, results.lse, results.stats)],
            [
                *call.shared_arrays(),
                *(_rows(view) for view in (operands.q, operands.k, operands.v, results.out)),
                _lse_steps(problem, steps(results.lse)),
                _stats_steps(problem, steps(results.stats)),
            ],
            {"SCORE": made.final_score, "FACTOR": made.factor, "SINKS": problem.program.sinks}
            | call.narrow.constants(),
            odd,
        )


def unit(problem: Problem) -> tuple[bool, float]:
    """Whether products stay as they are, and by what a score is multiplied for exp2. The factor goes into the
    exponent only if it keeps the order."""
    identity = problem.program.score is None and problem.scale > 0
    return identity, _LOG2_E * (problem.scale if identity else 1.0)


class Call:
    """What every kernel of one call needs."""

    def __init__(self, problem: Problem, operands: Operands) -> None:
        self.problem, self.operands = problem, operands
        self.device: Device = operands.q.device
        program = problem.program
        self.functions: Functions = functions(
            program.score,
            program.mask,
            tuple(spec.dtype for spec in problem.tables),
            factor=program.factor,
        )
        self.identity, self.unit = unit(problem)
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
        for careful in (False, True) if plain and self.hides else (not plain,):
            if careful:
                arrays, constants = self._carefully(arrays, constants)
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

    def _carefully(self, arrays: list[Any], constants: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """What a careful launch has in place of these."""
        narrow = self.narrow.careful(self.problem.dtype)
        if narrow == self.narrow:
            return arrays, constants
        return [*narrow.pointers(self.operands), *arrays[3:]], constants | narrow.constants()

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
        """Raises Unsupported if not even the smallest have room in the device's shared memory."""
        problem, narrow, arch = self.problem, self.narrow, architecture(self.device)
        sizes = problem.head_dim, problem.head_dim_v, narrow.itemsize(problem)
        found = schedule.tiles(part, arch, *sizes, narrow.format != "")
        if why := schedule.too_small(found, part, arch, *sizes):
            raise Unsupported(
                f"{part} of head_dim {problem.head_dim} and {problem.head_dim_v}, {problem.dtype}, on {arch}",
                {"triton": [why]},
                "float16 and bfloat16 take half of it",
            )
        return found

    @cached_property
    def narrow(self) -> Narrow:
        return narrow_of(self.problem, architecture(self.device))

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
        wide, rest = schedule.split(problem.head_dim, self.narrow.least)
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
        problem = self.problem
        if problem.dtype != "float32":
            return "ieee"
        width = schedule.padded(max(problem.head_dim, problem.head_dim_v))
        return float32_products(architecture(self.device), width).products


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
