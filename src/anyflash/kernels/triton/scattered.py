"""The gradient of a table that pairs read at places of their own: `table[q - k]`, or a clamped index.

Which pairs an element has is not known beforehand, so every pair adds its share to its element, atomically.
Floats would be summed in whatever order programs come; integers add up to the same in any. So two walks
over the pairs:

    bound = sum |share|                    of all pairs, one partial sum a program, added in order
    unit  = 2 ** (floor(log2 bound) - 59)
    sum   = sum round(share / unit)        in 64 bits, and dtable = sum * unit

No element's sum leaves 61 bits, and what rounding takes from a share is less than bound / 2 ** 59: far less
than float32 would. A share that is infinite or NaN goes to dtable itself, where any order gives the same.

Registers as in slopes.py. A configuration may change BLOCK_M and BLOCK_N (multiples of 16), warps and stages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from anyflash.core.view import View, contiguous_strides
from anyflash.kernels.triton.device import empty, pointer, steps
from anyflash.kernels.triton.sequences import class_of, sequence
from anyflash.kernels.triton.slopes import tile_of_slopes
from anyflash.kernels.triton.tiles import finite

if TYPE_CHECKING:
    from anyflash.kernels.triton.launch import Call
    from anyflash.kernels.triton.schedule import Tiles

# Powers of two that float32 holds with room on both sides.
_GREATEST_POWER = tl.constexpr(126.0)


@triton.jit
def power_of_unit(bound):
    """log2 of 1 / unit, the same wherever it is asked for. A bound of 0, or beyond float32, has no shares
    that matter."""
    usable = (bound > 0.0) & (bound < float("inf"))
    power = 59.0 - tl.floor(tl.log2(tl.where(usable, bound, 1.0)))
    return tl.minimum(tl.maximum(power, -_GREATEST_POWER), _GREATEST_POWER)


@triton.jit
def scatter(
    q, k, v, dout, stats, delta, grad, sums, bounds, bound, cu_seqlens_q, cu_seqlens_k, seqused_k, tables,
    q_steps, k_steps, v_steps, dout_steps, stats_steps, delta_steps, grad_steps, sum_steps,
    row_blocks, heads, group, seqlen_q, seqlen_k, scale, unit, seed: tl.int64, threshold: tl.int64,
    keep_scale,
    SCORE: tl.constexpr, SLOPE_OF: tl.constexpr, PLACE_OF: tl.constexpr, ALLOWED: tl.constexpr,
    TILE_CLASS: tl.constexpr, IDENTITY: tl.constexpr, MASK: tl.constexpr, DROPOUT: tl.constexpr,
    PACKED: tl.constexpr, USED: tl.constexpr, ADD: tl.constexpr, PRECISION: tl.constexpr,
    DIM: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr,
    DIM_V: tl.constexpr, WIDE_V: tl.constexpr, REST_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program for each block of rows, head and batch entry. ADD: shares go to `sums` (int64) and, those
    that are no numbers, to `grad`; else their magnitudes, added up, to `bounds`, one a program."""
    program = tl.program_id(0)
    block, head, entry = program % row_blocks, program // row_blocks % heads, program // (row_blocks * heads)
    q_start, q_len, k_start, k_len = sequence(
        entry, cu_seqlens_q, cu_seqlens_k, seqused_k, seqlen_q, seqlen_k, PACKED, USED
    )
    numbers = (scale, unit, seed, threshold, keep_scale)
    at = (entry, head, q_len, k_len)
    first_row = block * BLOCK_M
    magnitude = tl.zeros([BLOCK_M], tl.float32)
    factor = 1.0
    if ADD:
        factor = tl.exp2(power_of_unit(tl.load(bound)))
    for tile in range(tl.where(first_row < q_len, tl.cdiv(k_len, BLOCK_N), 0)):
        first_k = tile * BLOCK_N
        if class_of(first_row, first_k, at, tables, TILE_CLASS, MASK, BLOCK_M, BLOCK_N) > 0:
            # (BLOCK_M, BLOCK_N)
            share = tile_of_slopes(
                q, k, v, dout, stats, delta, tables, q_steps, k_steps, v_steps, dout_steps,
                stats_steps, delta_steps, q_start, k_start, first_row, first_k, at, group, numbers,
                SCORE, SLOPE_OF, ALLOWED, IDENTITY, DROPOUT, PRECISION,
                DIM, WIDE, REST, DIM_V, WIDE_V, REST_V, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            sound = finite(share)
            if ADD:
                row = (first_row + tl.arange(0, BLOCK_M))[:, None]
                key = (first_k + tl.arange(0, BLOCK_N))[None, :]
                nothing = tl.zeros([BLOCK_M, BLOCK_N], tl.int64)
                position = row + (k_len - q_len)
                where = PLACE_OF(entry, head, row, position, key, q_len, k_len, tables, sum_steps) + nothing
                whole_share = tl.floor(tl.where(sound, share, 0.0) * factor + 0.5).to(tl.int64)
                tl.atomic_add(sums + where, whole_share, mask=whole_share != 0)
                where = PLACE_OF(entry, head, row, position, key, q_len, k_len, tables, grad_steps) + nothing
                tl.atomic_add(grad + where, share, mask=sound == 0)
            else:
                magnitude += tl.sum(tl.where(sound, tl.abs(share), 0.0), 1)
    if not ADD:
        tl.store(bounds + program, tl.sum(magnitude, 0))


@triton.jit
def add_bounds(bounds, bound, programs, BLOCK: tl.constexpr):
    """One program: the bound of all pairs, in one order."""
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, programs, BLOCK):
        at = first + tl.arange(0, BLOCK)
        total += tl.load(bounds + at, mask=at < programs, other=0.0)
    tl.store(bound, tl.sum(total, 0))


@triton.jit
def settle(sums, bound, grad, grad_steps, size: tl.int64, second, third, fourth, BLOCK: tl.constexpr):
    """One program for each block of elements of an array of four axes, of which the last three extents are
    given: adds what `sums`, which lies row by row, says."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < size
    total = tl.load(sums + at, mask=there, other=0).to(tl.float32)
    place = at % fourth * grad_steps[3] + at // fourth % third * grad_steps[2]
    place += at // fourth // third % second * grad_steps[1] + at // fourth // third // second * grad_steps[0]
    total = total * tl.exp2(-power_of_unit(tl.load(bound)))
    tl.store(grad + place, tl.load(grad + place, mask=there, other=0.0) + total, mask=there)


def run(
    call: Call, grad: View, arrays: list[Any], layout: list[Any], tiles: Tiles, constants: dict[str, Any]
) -> None:
    """Add the gradient by one load of a table to `grad`."""
    problem = call.problem
    row_blocks = -(-problem.seqlen_q // tiles.block_m)
    programs = row_blocks * problem.heads_q * problem.batch
    sums = empty((max(1, grad.size),), call.device, "int64").zero_()
    bounds, bound = empty((programs,), call.device), empty((1,), call.device)
    sum_steps = contiguous_strides(grad.shape, 1)
    for add in (False, True):
        scatter[(programs,)](
            *arrays, pointer(grad), sums, bounds, bound, *call.shared_arrays()[1:], *layout, steps(grad),
            sum_steps, row_blocks, *call.numbers(), ADD=add, **constants,
        )  # fmt: skip
        if not add:
            add_bounds[(1,)](bounds, bound, programs, BLOCK=1024)
    missing = 4 - grad.ndim
    shape = (1,) * missing + tuple(grad.shape)
    block = 256
    settle[(-(-grad.size // block),)](
        sums, bound, pointer(grad), (0,) * missing + steps(grad), grad.size, *shape[1:], BLOCK=block
    )
