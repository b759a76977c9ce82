"""A call over a KV cache: what is written before it attends, as one launch.

The grid and what is allocated follow from shapes alone, and nothing waits for the device.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from anyflash.core.dtypes import FLOATS8
from anyflash.core.errors import Unsupported
from anyflash.core.view import View
from anyflash.kernels.triton import append as kernels
from anyflash.kernels.triton.device import current, empty, pointer, steps
from anyflash.kernels.triton.narrow import bits
from anyflash.kernels.triton.vectors import neighbours
from anyflash.semantics.addressing import INT32_MAX
from anyflash.semantics.cache import CacheCall
from anyflash.semantics.operands import Operands
from anyflash.semantics.problem import Problem
from anyflash.semantics.rotary import Rotary

# Elements of a program's tile: small, because there are few rows in a step of decoding.
_TILE = 1024


def append(problem: Problem, call: CacheCall, turned: View | None) -> Operands:
    """As `Backend.append` says. Lengths that were read stay what they are."""
    operands = call.operands
    if call.rotary is not None and problem.dtype_kv in FLOATS8:
        raise Unsupported(
            f"rotary embedding of keys for a cache in {problem.dtype_kv}",
            {"triton": ["keys that are 8-bit floats already are not turned"]},
            "Turn queries and new keys before they are rounded",
        )
    with current(operands.q.device):
        counts = None
        if call.placement is None:
            # Who attends next wants vectors without gaps, too.
            lengths = (operands.cu_seqlens_q, operands.leftpad_k, operands.seqused_k)
            starts, leftpad, used = map(_neighbours, lengths)
            if used is None:
                counts = used = _workspace(problem, operands)
            operands = replace(operands, cu_seqlens_q=starts, leftpad_k=leftpad, seqused_k=used)
        _launch(problem, call, operands, counts, turned)
    return operands if turned is None else replace(operands, q=turned)


def _launch(
    problem: Problem, call: CacheCall, operands: Operands, counts: View | None, turned: View | None
) -> None:
    given, new, rotary, batch = call.integers, call.new, call.rotary, problem.batch
    table, positions, seqlens = operands.block_table, given.rotary_positions, _neighbours(given.seqlens)
    starts_new = None if new is None else _neighbours(given.cu_seqlens_k)
    each_new, total_new = (0, 0) if new is None else _rows(new[0])
    each_q, total_q = _rows(operands.q)
    block = max(2, _TILE // _power(max(problem.head_dim, problem.head_dim_v)))
    counting = 0 if counts is None else -(-batch // kernels.COUNTED.value)
    blocks_new = -(-total_new // block)
    blocks_q = 0 if turned is None else -(-total_q // block)
    grid = counting + blocks_new * problem.heads_kv + blocks_q * problem.heads_q
    if not grid or not batch:
        return
    kernels.append[(grid,)](
        _pointer(counts),
        () if new is None else (bits(new[0]), bits(new[1])),
        (bits(operands.k), bits(operands.v)),
        bits(operands.q),
        _pointer(turned),
        _pointer(operands.cu_seqlens_q),
        _pointer(starts_new),
        _pointer(seqlens),
        _pointer(operands.leftpad_k),
        _pointer(table),
        _pointer(positions),
        *((None, None, (0, 0), (0, 0), 0) if rotary is None else _tables(rotary)),
        () if new is None else (_steps(new[0], 4), _steps(new[1], 4)),
        (steps(operands.k), steps(operands.v)),
        _steps(operands.q, 4),
        (0, 0) if table is None else steps(table),
        (0, 0) if positions is None else _steps(positions, 2),
        counting,
        blocks_new,
        problem.heads_kv,
        blocks_q,
        problem.heads_q,
        batch,
        each_q,
        total_q,
        each_new,
        total_new,
        batch.bit_length(),
        problem.page_size,
        problem.num_pages,
        min((1 if table is None else table.shape[1]) * problem.page_size, INT32_MAX),
        COUNT=counts is not None,
        NEW=new is not None,
        ROTARY=turned is not None,
        INTERLEAVED=rotary is not None and rotary.interleaved,
        PAIRS=0 if rotary is None else rotary.cos.shape[1],
        DIM=problem.head_dim,
        DIM_V=problem.head_dim_v,
        WIDTH=_power(problem.head_dim),
        WIDTH_V=_power(problem.head_dim_v),
        BLOCK=block,
        num_warps=4,
    )


def _workspace(problem: Problem, operands: Operands) -> View:
    device = operands.q.device
    made = empty((problem.batch,), device, "int32")
    return View(made.data_ptr(), (problem.batch,), (4,), "int32", device, True, made)


def _tables(rotary: Rotary) -> tuple[Any, ...]:
    cos, sin = rotary.cos, rotary.sin
    return pointer(cos), pointer(sin), steps(cos), steps(sin), cos.shape[0]


def _rows(view: View) -> tuple[int, int]:
    """(rows of a sequence, all rows); packed, the first means nothing."""
    if view.ndim == 3:
        return 1, view.shape[0]
    return view.shape[1], view.shape[0] * view.shape[1]


def _steps(view: View, axes: int) -> tuple[int, ...]:
    """With a batch axis, which packed arrays lack."""
    found = steps(view)
    return (0,) * (axes - len(found)) + found


def _power(dim: int) -> int:
    return max(2, 1 << (dim - 1).bit_length())


def _neighbours(view: View | None) -> View | None:
    return None if view is None else neighbours(view)


def _pointer(view: View | None) -> Any:
    return None if view is None else pointer(view)
