"""Gradients of tables: dtable[place] += ds * d program / d load, summed over all pairs that read the element.

A bias reads each element at one batch entry, head, row and key, or at all of those that it does not have.
So a program owns the elements of one tile of the table, walks everything that the table lacks, and writes
once: no atomics, no buffer of scores. Where rows are summed over, they are shared out among at most SPLITS
programs, whose sums are then added in order.

An element of any other table (`table[q - k]`, or an index that is clamped) has no such owner: scattered.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from anyflash.core.view import View
from anyflash.kernels.triton import scattered
from anyflash.kernels.triton.device import empty, pointer, steps
from anyflash.kernels.triton.elementary import whole
from anyflash.kernels.triton.sequences import class_of, sequence
from anyflash.kernels.triton.slopes import tile_of_slopes
from anyflash.semantics.derivative import table_derivatives
from anyflash.semantics.expr import Expr
from anyflash.semantics.text import parse

if TYPE_CHECKING:
    from anyflash.kernels.triton.launch import Call

SPLITS = 16
_AXES = ("batch", "head", "row", "k")


@triton.jit
def owned(
    q, k, v, dout, stats, delta, grad, cu_seqlens_q, cu_seqlens_k, seqused_k, tables,
    q_steps, k_steps, v_steps, dout_steps, stats_steps, delta_steps, grad_steps, split_step,
    batch, row_blocks, k_blocks, splits, blocks_a_split, own_rows, own_keys,
    heads, group, seqlen_q, seqlen_k, scale, unit, seed: tl.int64, threshold: tl.int64, keep_scale,
    SCORE: tl.constexpr, SLOPE_OF: tl.constexpr, PLACE_OF: tl.constexpr, ALLOWED: tl.constexpr,
    TILE_CLASS: tl.constexpr, IDENTITY: tl.constexpr, MASK: tl.constexpr, DROPOUT: tl.constexpr,
    PACKED: tl.constexpr, USED: tl.constexpr, PRECISION: tl.constexpr,
    BY_BATCH: tl.constexpr, BY_HEAD: tl.constexpr, BY_ROW: tl.constexpr, BY_K: tl.constexpr,
    DIM: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr,
    DIM_V: tl.constexpr, WIDE_V: tl.constexpr, REST_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program for each element block: (batch), (head), (block of rows, or a share of them), (block of
    keys), each only if the table has the axis. `grad` is added to, at `split_step` times the share.
    `own_*` are how many elements it has along rows and keys."""
    own = tl.program_id(0)
    first_block, end_block = own * 0, row_blocks + own * 0
    share = own * 0
    if BY_ROW:
        first_block = own % row_blocks
        end_block = first_block + 1
        own = own // row_blocks
    else:
        share = own % splits
        first_block = share * blocks_a_split
        end_block = tl.minimum(first_block + blocks_a_split, row_blocks)
        own = own // splits
    first_tile, end_tile = own * 0, k_blocks + own * 0
    if BY_K:
        first_tile = own % k_blocks
        end_tile = first_tile + 1
        own = own // k_blocks
    first_head, end_head = own * 0, heads + own * 0
    if BY_HEAD:
        first_head = own % heads
        end_head = first_head + 1
        own = own // heads
    first_entry, end_entry = own * 0, batch + own * 0
    if BY_BATCH:
        first_entry = own
        end_entry = own + 1
    numbers = (scale, unit, seed, threshold, keep_scale)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for entry in range(first_entry, end_entry):
        q_start, q_len, k_start, k_len = sequence(
            entry, cu_seqlens_q, cu_seqlens_k, seqused_k, seqlen_q, seqlen_k, PACKED, USED
        )
        for head in range(first_head, end_head):
            at = (entry, head, q_len, k_len)
            for block in range(first_block, tl.minimum(end_block, tl.cdiv(q_len, BLOCK_M))):
                for tile in range(first_tile, tl.minimum(end_tile, tl.cdiv(k_len, BLOCK_N))):
                    first_row, first_k = block * BLOCK_M, tile * BLOCK_N
                    if class_of(first_row, first_k, at, tables, TILE_CLASS, MASK, BLOCK_M, BLOCK_N) > 0:
                        total += tile_of_slopes(
                            q, k, v, dout, stats, delta, tables, q_steps, k_steps, v_steps, dout_steps,
                            stats_steps, delta_steps, q_start, k_start, first_row, first_k, at, group,
                            numbers,
                            SCORE, SLOPE_OF, ALLOWED, IDENTITY, DROPOUT, PRECISION,
                            DIM, WIDE, REST, DIM_V, WIDE_V, REST_V, BLOCK_M, BLOCK_N,
                        )  # fmt: skip
    row = (first_block * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    key = (first_tile * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    there = (row < own_rows) & (key < own_keys)
    if not BY_ROW:
        total = tl.sum(total, 0, keep_dims=True)
        row = row * 0 + 0
        there = key < own_keys
    if not BY_K:
        total = tl.sum(total, 1, keep_dims=True)
        there = row < own_rows
    if not BY_ROW:
        row = tl.zeros([1, 1], tl.int32)
        if not BY_K:
            there = row < 1
    if not BY_K:
        key = tl.zeros([1, 1], tl.int32)
    place = PLACE_OF(first_entry, first_head, row, row, key, seqlen_q, seqlen_k, tables, grad_steps)
    target = grad + whole(share) * split_step + place + tl.zeros([1, 1], tl.int64)
    tl.store(target, tl.load(target, mask=there, other=0.0) + total, mask=there)


@triton.jit
def add_splits(
    partial, grad, partial_steps, grad_steps, splits, size, second, third, fourth, BLOCK: tl.constexpr
):
    """The shares of every element, in order; an array of four axes, of which the last three extents are
    given."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for share in range(splits):
        total += tl.load(partial + share * partial_steps[0] + at, mask=at < size, other=0.0)
    place = at % fourth * grad_steps[3] + at // fourth % third * grad_steps[2]
    place += at // fourth // third % second * grad_steps[1] + at // fourth // third // second * grad_steps[0]
    tl.store(grad + place, total, mask=at < size)


def run(call: Call, slot: int, grad: View, arrays: list[Any], layout: list[Any]) -> None:
    """Write the gradient of table `slot`; it holds zeros."""
    problem = call.problem
    tiles = call.tiles("backward_dq")
    row_blocks = -(-problem.seqlen_q // tiles.block_m)
    loads = table_derivatives(parse(problem.program.score or "score"), slot)
    splits = min(SPLITS, row_blocks)
    partial: Any = None
    for (_, indices), (slope_of, place_of) in zip(loads, call.functions.loads[slot], strict=True):
        axes = _axes(call, slot, indices)
        constants = call.constants(tiles) | {
            "SCORE": call.functions.final_score,
            "SLOPE_OF": slope_of,
            "PLACE_OF": place_of,
            "num_warps": tiles.warps,
            "num_stages": 1,
        }
        if axes is None:
            scattered.run(call, grad, arrays, layout, tiles, constants)
            continue
        by = dict(
            zip(("BY_BATCH", "BY_HEAD", "BY_ROW", "BY_K"), (axis in axes for axis in _AXES), strict=True)
        )
        rows, keys = axes.get("row", problem.seqlen_q), axes.get("k", problem.seqlen_k)
        blocks, k_blocks = -(-rows // tiles.block_m), -(-keys // tiles.block_n)
        shares = 1 if by["BY_ROW"] else splits
        target, target_steps, split_step = pointer(grad), steps(grad), 0
        if shares > 1:
            if partial is None:
                partial = empty((shares, *grad.shape), call.device).zero_()
            target, target_steps, split_step = partial, partial.stride()[1:], partial.stride(0)
        extents = {**axes, "row": blocks, "k": k_blocks}
        grid = shares
        for axis in axes:
            grid *= extents[axis]
        owned[(grid,)](
            *arrays, target, *call.shared_arrays()[1:], *layout, target_steps, split_step,
            problem.batch, blocks, k_blocks, shares, -(-blocks // shares), rows, keys, *call.numbers(),
            **by, **constants,
        )  # fmt: skip
    if partial is not None:
        _add(partial, grad, splits)


def _add(partial: Any, grad: View, splits: int) -> None:
    missing = 4 - grad.ndim
    shape = (1,) * missing + tuple(grad.shape)
    block = 256
    add_splits[(-(-grad.size // block),)](
        partial, pointer(grad), partial.stride(), (0,) * missing + steps(grad), splits, grad.size, *shape[1:],
        BLOCK=block,
    )  # fmt: skip


def _axes(call: Call, slot: int, indices: tuple[Expr, ...]) -> dict[str, int] | None:
    """The variables that index the table, and how many elements each reaches, if every element then has one
    owner; None if not.

    A table may be shorter than the bound of lengths that nobody has read: rows and keys past its end are not
    there.
    """
    problem = call.problem
    extents = {
        "batch": problem.batch,
        "head": problem.heads_q,
        "row": problem.seqlen_q,
        "k": problem.seqlen_k,
    }
    found: dict[str, int] = {}
    for index, extent in zip(indices, problem.tables[slot].shape, strict=True):
        if index.op == "const":
            continue
        if index.op != "var" or index.value not in extents or index.value in found:
            return None
        if extents[index.value] > extent and index.value in ("batch", "head"):
            return None
        found[index.value] = min(extents[index.value], extent)
    return found
