"""From views to the launch of the forward of 8-bit floats. What TMA cannot move is as in launch.py."""

from __future__ import annotations

from anyflash.kernels.gluon import forward_fp8, launch, schedule, schedule_fp8
from anyflash.kernels.triton import launch as portable
from anyflash.kernels.triton.device import current, empty
from anyflash.kernels.triton.program import functions
from anyflash.kernels.triton.schedule import Tiles as PortableTiles
from anyflash.semantics.operands import Operands, Results
from anyflash.semantics.problem import Problem

# Blocks of 64 rows, as the forward reports them.
_REPAIR = PortableTiles(schedule.ROWS, 32, 8, 1)


def forward(problem: Problem, operands: Operands, results: Results) -> None:
    """Write out, lse and stats. The arrays are fit."""
    call = portable.Call(problem, operands)
    program, packed = problem.program, problem.packed_q
    dtypes = tuple(spec.dtype for spec in problem.tables)
    found = functions(program.score, program.mask, dtypes, "gluon", program.factor)
    linear = schedule_fp8.only_scales(program.score)
    scored = program.score is not None and not linear
    tiles = schedule_fp8.forward_tiles(problem.head_dim, problem.head_dim_v, scored)
    with current(call.device):
        if packed:
            portable.fill_rows_of_no_sequence(call, results)
        blocks, entries = call.row_blocks(tiles.block_m)
        planes = problem.heads_q * entries
        odd_blocks, _ = call.row_blocks(schedule.ROWS)
        odd = empty((planes * odd_blocks,), call.device, "int32") if call.hides else None
        sinks, *lengths, tables = call.shared_arrays()
        launch.launch(
            forward_fp8.forward_fp8,
            min(blocks * planes, launch.processors(call.device)),
            launch.rows(operands.q, schedule.ROWS),
            launch.rows(operands.k, tiles.block_n),
            launch.rows(operands.v, tiles.block_n),
            launch.rows(results.out, schedule.ROWS),
            launch.pointer(results.lse),
            launch.pointer(results.stats),
            odd,
            sinks,
            *lengths,
            tables,
            problem.total_q if packed else problem.seqlen_q,
            odd_blocks,
            blocks,
            problem.heads_q,
            planes,
            launch.section(problem, planes),
            problem.batch,
            problem.group,
            *call.extents,
            float(problem.scale),
            call.unit,
            SCORE=found.final_score,
            ALLOWED=found.allowed,
            TILE_CLASS=found.tile_class,
            FACTOR=found.factor,
            LINEAR=linear,
            C=schedule.Form(
                identity=call.identity or linear,
                masked=found.masked,
                wide=not launch.reads_tables(program.mask),
                sinks=program.sinks,
                guard=call.hides,
                packed=packed,
                used=problem.seqused_k,
                consumers=tiles.consumers,
                stages=tiles.stages,
                turns=tiles.turns,
                own_out=tiles.own_out,
                consumer_registers=tiles.consumer_registers,
                producer_registers=tiles.producer_registers,
            ),
            num_warps=4,
        )
        if call.hides:
            portable.forward(problem, operands, results, _REPAIR, odd)
