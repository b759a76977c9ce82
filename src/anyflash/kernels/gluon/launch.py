"""From views to descriptors and launches.

A call that TMA cannot take (`unfit`) is for the portable kernels, whose results and stats are the same.
Nothing here waits for the device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from anyflash.core.device import Device
from anyflash.core.dtypes import ITEMSIZE
from anyflash.core.view import View, contiguous_strides
from anyflash.kernels.gluon import forward as forward_kernels
from anyflash.kernels.gluon import schedule
from anyflash.kernels.gluon.hopper import TensorDescriptor, shared_layout
from anyflash.kernels.gluon.sequences import FAR, UNBOUNDED, WRAP
from anyflash.kernels.triton import launch as portable
from anyflash.kernels.triton.device import Pointer, current, empty, pointer
from anyflash.kernels.triton.program import functions
from anyflash.kernels.triton.schedule import Tiles as PortableTiles
from anyflash.semantics.expr import Expr
from anyflash.semantics.operands import Operands, Results
from anyflash.semantics.problem import Problem
from anyflash.semantics.text import parse

# Blocks of 64 rows, as the forward reports them.
_REPAIR = PortableTiles(schedule.ROWS, 32, 8, 1)
_LARGEST_STEP = 2**39
# Element types that Gluon calls otherwise.
NAMES = {"float8_e4m3fn": "float8e4nv", "float8_e5m2": "float8e5"}
# What TMA and wgmma exchange units of 16 bytes in.
_PANEL_BYTES = 128
# Where an axis has one place, its step is none; TMA wants a valid one.
_STEP_BYTES = 16
_WORD = 2**32 - 1


def unfit(problem: Problem, operands: Operands, results: Results) -> str | None:
    """Why the arrays of a call cannot be moved by TMA, or None."""
    for name, view in (("q", operands.q), ("k", operands.k), ("v", operands.v), ("out", results.out)):
        if why := cannot_move(view):
            return f"{name} {why}"
    for name, view in (("lse", results.lse), ("stats", results.stats)):
        if view.strides != contiguous_strides(view.shape, view.itemsize):
            return f"{name} is not contiguous"
    return None


def cannot_move(view: View) -> str | None:
    """Why TMA cannot move tiles of one array, or None."""
    assert view.ptr is not None
    if not view.size:
        return "is empty"
    if view.ptr % 16:
        return "does not start at a multiple of 16 bytes"
    if view.strides[-1] != view.itemsize:
        return f"has elements {view.strides[-1]} bytes apart along the head dim"
    for extent, stride in zip(view.shape[:-1], view.strides[:-1], strict=True):
        if extent > 1 and (stride % 16 or not 0 < stride < _LARGEST_STEP):
            return f"has rows {stride} bytes apart, not a positive multiple of 16"
    return None


def forward(problem: Problem, operands: Operands, results: Results) -> None:
    """Write out, lse and stats. The arrays are fit."""
    call = portable.Call(problem, operands)
    with current(call.device):
        if problem.packed_q:
            portable.fill_rows_of_no_sequence(call, results)
        odd, _ = start(call, results)
        if call.hides:
            portable.forward(problem, operands, results, _REPAIR, odd)


class Cached(NamedTuple):
    """Where keys lie that are in a cache: what pages.py calls so, how many a sequence can have, and fields of
    schedule.Form."""

    cache: tuple[Any, ...]
    most: int
    chunk: int
    page: int
    padded: bool
    fewest: int


def start(call: portable.Call, results: Results, cached: Cached | None = None) -> tuple[Any, int]:
    """Launch the forward on the current device. Returns `odd`, None if nothing can be hidden, and how many
    blocks of 64 rows it has for a plane."""
    problem, program, packed = call.problem, call.problem.program, call.problem.packed_q
    found = functions(program.score, program.mask, tuple(spec.dtype for spec in problem.tables), "gluon")
    tiles, members = forward_tiles(problem), heads_together(problem)
    blocks, entries = call.row_blocks(tiles.block_m // members)
    planes = problem.heads_q // members * entries
    odd_blocks, _ = call.row_blocks(schedule.ROWS)
    odd = None
    if call.hides:
        odd = empty((problem.heads_q * entries * odd_blocks * members,), call.device, "int32")
        # Not all of the last block's tiles have rows.
        odd = odd.zero_() if members > 1 else odd
    sinks, *lengths, tables = call.shared_arrays()
    extents = call.extents if cached is None else (call.extents[0], cached.most)
    launch(
        forward_kernels.forward,
        min(blocks * planes, processors(call.device)),
        *boxes(problem, call.operands, results, tiles, members, 0 if cached is None else cached.chunk),
        pointer(results.lse),
        pointer(results.stats),
        odd,
        sinks,
        *lengths,
        None if cached is None else cached.cache,
        tables,
        problem.total_q if packed else problem.seqlen_q,
        odd_blocks * members,
        blocks,
        problem.heads_q // members,
        planes,
        section(problem, planes, members),
        problem.batch,
        problem.group // members,
        *extents,
        float(problem.scale),
        call.unit,
        *dropout_numbers(call),
        SCORE=found.final_score,
        ALLOWED=found.allowed,
        TILE_CLASS=found.tile_class,
        C=schedule.Form(
            identity=call.identity,
            masked=found.masked,
            wide=not reads_tables(program.mask),
            sinks=program.sinks,
            guard=call.hides,
            packed=packed,
            used=call.operands.seqused_k is not None,
            chunk=0 if cached is None else cached.chunk,
            page=0 if cached is None else cached.page,
            padded=cached is not None and cached.padded,
            fewest=0 if cached is None else cached.fewest,
            block_n=tiles.block_n,
            consumers=tiles.consumers,
            stages=tiles.stages,
            turns=tiles.turns,
            own_out=tiles.own_out,
            consumer_registers=tiles.consumer_registers,
            producer_registers=tiles.producer_registers,
            dropout=program.dropout_p > 0,
            members=members,
        ),
        num_warps=4,
    )
    if odd is not None and members > 1:
        # Tiles of fewer tokens: as many as there are members make a block of 64 rows.
        odd = odd.view(-1, members).amax(1)
    return odd, odd_blocks


def dropout_numbers(call: portable.Call) -> tuple[Any, ...]:
    """What dropout.py calls `dropout`; None where nothing is dropped."""
    if not call.problem.program.dropout_p:
        return (None,) * 4
    *_, seed, drop, keep_scale = call.numbers()
    # No word is above the greatest; where all are to be dropped the scale is 0.
    words = seed & _WORD, seed >> 32 & _WORD, min(drop, _WORD)
    return (*(word - (word >> 31 << 32) for word in words), keep_scale)


def heads_together(problem: Problem) -> int:
    """How many heads of a group are in one tile. Packed sequences have lengths that nobody here knows."""
    program = problem.program
    if problem.packed_q or program.dropout_p or reads_head(program.mask):
        return 1
    return schedule.members(problem.group, problem.seqlen_q, forward_tiles(problem).block_m)


def forward_tiles(problem: Problem) -> schedule.Tiles:
    program = problem.program
    masked, scored, dropped = program.mask is not None, program.score is not None, program.dropout_p > 0
    return schedule.forward_tiles(problem.head_dim, problem.head_dim_v, masked, scored, dropped)


def boxes(
    problem: Problem,
    operands: Operands,
    results: Results,
    tiles: schedule.Tiles,
    members: int = 1,
    chunk: int = 0,
) -> tuple[Any, ...]:
    """Descriptors of q, k, v and out, and of the columns behind, None for a head in one piece; q and out with
    so many heads in a tile. With `chunk` those of k and v are of so many rows of a cache."""
    of_rows = functools.partial(rows_of_heads, members=members) if members > 1 else rows
    (wide, rest), (wide_v, rest_v) = schedule.split(problem.head_dim), schedule.split(problem.head_dim_v)
    arrays = (
        (of_rows, operands.q, schedule.ROWS, wide, rest),
        (chunks if chunk else rows, operands.k, chunk or tiles.block_n, wide, rest),
        (chunks if chunk else rows, operands.v, chunk or tiles.block_n, wide_v, rest_v),
        (of_rows, results.out, schedule.ROWS, wide_v, rest_v),
    )
    return (
        *(of(view, extent, wide) for of, view, extent, wide, _rest in arrays),
        *(of(view, extent, rest) if rest else None for of, view, extent, _wide, rest in arrays),
    )


def launch(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    """Start a kernel on the current device."""
    kernel[(programs,)](*arguments, **constants)


def rows(view: View, extent: int, columns: int | None = None) -> Any:
    """A descriptor of boxes of `extent` rows of a head, as sequences.py names their coordinates, and of all
    their columns or so many."""
    size = view.itemsize
    # An axis of extent 1 has any step; TMA wants a valid one.
    *axes, dim = [
        (length, stride // size if length > 1 else 16 // size)
        for length, stride in zip(view.shape, view.strides, strict=True)
    ]
    if view.ndim == 3:
        (_, token), head = axes
        shape = (UNBOUNDED, UNBOUNDED, head[0], FAR, dim[0])
        strides = (WRAP - token, token, head[1], token, 1)
    else:
        batch, token, head = axes
        shape = (batch[0], head[0], token[0], dim[0])
        strides = (batch[1], head[1], token[1], 1)
    block = (1,) * (len(shape) - 2) + (extent, columns or schedule.padded(dim[0]))
    return descriptor(view, shape, strides, block)


def rows_of_heads(view: View, extent: int, columns: int, members: int) -> Any:
    """A descriptor of boxes of `extent` rows of so many heads together (heads.py), and so many columns."""
    size = view.itemsize
    batch, token, head, dim = [
        (length, stride // size if length > 1 else 16 // size)
        for length, stride in zip(view.shape, view.strides, strict=True)
    ]
    shape = (batch[0], head[0] // members, token[0], members, dim[0])
    strides = (batch[1], members * head[1], token[1], head[1], 1)
    return descriptor(view, shape, strides, (1, 1, extent // members, members, columns))


def page_step(view: View) -> int:
    """How many slots apart the pages of a cache lie."""
    return view.strides[0] // slot_bytes(view) if view.shape[0] > 1 else view.shape[1]


def slot_bytes(view: View) -> int:
    """Bytes from slot to slot, a valid step for TMA also where there is one alone."""
    pages, slots = view.shape[:2]
    return view.strides[1] if slots > 1 else view.strides[0] if pages > 1 else _STEP_BYTES


def chunks(view: View, extent: int, columns: int = schedule.GREATEST_DIM) -> Any:
    """A descriptor of boxes of `extent` rows of a head of a cache, (pages, slots, heads, dim), and of one
    panel of such a piece of the head."""
    size = view.itemsize
    heads, dim = view.shape[2:]
    token, head = slot_bytes(view) // size, (view.strides[2] if heads > 1 else _STEP_BYTES) // size
    shape, strides = (UNBOUNDED, UNBOUNDED, heads, FAR, dim), (WRAP - token, token, head, token, 1)
    return descriptor(view, shape, strides, (1, 1, 1, extent, min(_PANEL_BYTES // size, columns)))


def elements(view: View, extent: int) -> Any:
    """A descriptor of `extent` neighbours of a contiguous array, taken as one row."""
    return descriptor(view, (view.size,), (1,), (extent,))


def descriptor(
    view: View, shape: tuple[int, ...], strides: tuple[int, ...], block: tuple[int, ...]
) -> TensorDescriptor:
    """A descriptor over the memory of a view; strides in elements."""
    assert view.ptr is not None
    return _descriptor(view.ptr, view.dtype, shape, strides, block)


@functools.lru_cache(maxsize=1024)
def _descriptor(
    address: int, dtype: str, shape: tuple[int, ...], strides: tuple[int, ...], block: tuple[int, ...]
) -> TensorDescriptor:
    import torch
    from triton.experimental.gluon import language as gl

    layout = shared_layout(list(block), getattr(gl, NAMES.get(dtype, dtype)))
    base = Pointer(address, getattr(torch, dtype))
    return TensorDescriptor(base, list(shape), list(strides), list(block), layout)


@functools.lru_cache(maxsize=16)
def processors(device: Device) -> int:
    """Streaming multiprocessors: one persistent block each."""
    import torch

    return int(torch.cuda.get_device_properties(device.index).multi_processor_count)


def section(problem: Problem, planes: int, members: int = 1) -> int:
    """Planes of so many heads side by side. Packed, sequences differ in length: all heads of one block."""
    if problem.packed_q:
        return planes
    dims = problem.head_dim, problem.head_dim_v
    return schedule.section(
        planes, problem.group // members, problem.seqlen_k, *dims, ITEMSIZE[problem.dtype]
    )


@functools.lru_cache(maxsize=256)
def reads_tables(text: str | None) -> bool:
    """Does a mask read tables?"""
    return text is not None and _somewhere(parse(text), lambda e: e.op == "load")


@functools.lru_cache(maxsize=256)
def reads_head(text: str | None) -> bool:
    """Does a mask differ from head to head?"""
    return text is not None and _somewhere(parse(text), lambda e: e.op == "var" and e.value == "head")


def _somewhere(e: Expr, fits: Callable[[Expr], bool]) -> bool:
    return fits(e) or any(_somewhere(a, fits) for a in e.args)
