"""Tile sizes, and how a backward is cut into tasks.

    lanes = vector_bytes / itemsize        16 float on AVX-512, 8 on AVX2, 4 on NEON
    block_q = query_vectors * lanes        4 vectors of 32 registers, 3 of 16 (see gemm)
    block_k = 64                           S and P of a tile then stay in the first-level cache

Short calls take fewer vectors, so that a decode step does not compute for absent queries. block_k must not
depend on anything but the Spec: it decides in which groups a row's keys are rounded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from anyflash.core.dtypes import FLOATS8, kind
from anyflash.core.view import View
from anyflash.kernels.llvm.loads import loads_of, staged_axes
from anyflash.kernels.llvm.spec import (
    DECODE_QUERIES,
    SPLIT_KEYS,
    TASK_WORDS,
    Dot,
    Part,
    RegisterTile,
    Spec,
    TableCode,
)
from anyflash.kernels.llvm.target import Target, get_target
from anyflash.semantics.expr import Expr, walk
from anyflash.semantics.problem import Problem
from anyflash.semantics.text import parse

BLOCK_K = 64
_EVERYTHING = 1 << 40
# A task of `backward_dkv` sums dK and dV of this many keys: at head_dim 128 in float32 they fill half of a 1
# MiB cache.
KEYS_A_TASK = 512


def lanes(target: Target, dtype: str) -> int:
    return target.vector_bytes // (8 if dtype == "float64" else 4)


def tile(target: Target) -> RegisterTile:
    """Accumulators that leave registers for the operands."""
    return RegisterTile(8, 4, 24) if target.num_registers >= 32 else RegisterTile(4, 3, 12)


def decode_tile(target: Target, rows: int) -> RegisterTile:
    """As `tile`, for products of few rows: DECODE_QUERIES of them at a time."""
    rows, accumulators = min(rows, DECODE_QUERIES), tile(target).accumulators
    return RegisterTile(rows, max(1, min(8, accumulators // rows)), accumulators)


def block_q(problem: Problem, target_name: str) -> int:
    """Queries a block."""
    target = get_target(target_name)
    return query_vectors(target, problem) * lanes(target, problem.dtype)


def dot(target: Target, dtype: str) -> Dot:
    """bfloat16 goes in pairs where the machine has instructions for them, and so do 8-bit floats, each of
    which is a bfloat16."""
    if dtype in ("bfloat16", *FLOATS8) and target.vector_bytes == 64:
        return "tiles" if target.tiles else "pair" if target.bf16_dot else "number"
    return "number"


def query_vectors(target: Target, problem: Problem) -> int:
    """Vectors of queries a block.

    What a register tile holds, or a vector less where the last block then has fewer absent queries. Short
    vectors take twice as many, so that a block's fixed work has enough queries to serve. Tiles come two by
    two.
    """
    width = lanes(target, problem.dtype)
    needed = max(1, -(-problem.seqlen_q // width))
    if dot(target, problem.dtype) == "tiles":
        return max(2, min(6, needed + needed % 2))
    most = tile(target).columns
    if width < 8:
        return 2 * most if needed > most else needed
    if needed <= most:
        return needed
    return min((most, 3), key=lambda vectors: -(-needed // vectors) * vectors)


# What a thread holds of a decode's rows stays in the second-level cache.
_MOST_DECODE_ROWS = 128


def decode_rows(problem: Problem) -> int:
    """Rows of a decode's row group, rounded up so that few kernels serve all; 0 where no sequence is decoded.

    A query a lane, the forward leaves lanes idle below a vector of queries, and reads a key head once for
    every query head of its group. Of packed queries each sequence goes its own way: a result must not depend
    on how long its neighbours are.
    """
    rows, most = problem.group * problem.seqlen_q, DECODE_QUERIES
    while 2 * most <= min(problem.group * DECODE_QUERIES, _MOST_DECODE_ROWS):
        most *= 2
    if problem.packed_q and problem.group <= most:
        rows = min(rows, most)
    if not 0 < rows <= most or problem.program.dropout_p > 0.0:
        return 0
    return 1 << (rows - 1).bit_length()


# What a thread may hold of K and V in the form of the products. Beyond, each tile makes its own.
_MOST_AHEAD = 1 << 26


def reads_in_place(problem: Problem, target: Target, view: View) -> bool:
    """Whether rows of k or v lie in memory as packed rows do."""
    columns, form = view.shape[-1], dot(target, problem.dtype)
    if form == "number":
        fits = view.dtype in ("float32", "float64") and columns % lanes(target, problem.dtype) == 0
    else:
        fits = view.dtype == "bfloat16" and columns % (2 * lanes(target, problem.dtype)) == 0
    if problem.addressing == "paged" and problem.page_size % BLOCK_K:
        return False
    return fits and view.strides[-1] == view.itemsize and view.strides[-3] == columns * view.itemsize


def made_ahead(problem: Problem, part: Part, target: Target, k: View, v: View) -> frozenset[str]:
    """The arrays among k and v whose blocks are made once a key head: those that cannot be read in place, or
    are contracted over tokens in a form that interleaves them, if several query blocks of a head group read
    them."""
    blocks = problem.group * -(
        -problem.seqlen_q // (query_vectors(target, problem) * lanes(target, problem.dtype))
    )
    a_key = 8 * (problem.head_dim + problem.head_dim_v)
    if part == "decode" or blocks < 4 or a_key * problem.seqlen_k > _MOST_AHEAD:
        return frozenset()
    words = {"forward": "v", "backward_dkv": ""}.get(part, "k")
    interleaved = dot(target, problem.dtype) != "number"
    return frozenset(
        name
        for name, view in (("k", k), ("v", v))
        if not reads_in_place(problem, target, view) or (interleaved and name == words)
    )


def splits(problem: Problem) -> int:
    """Splits of the longest sequence."""
    return max(1, -(-problem.seqlen_k // SPLIT_KEYS))


def bounds_block(block_q: int) -> int:
    """Granularity of the bounds of table blocks: at least a tile in either direction, so that it meets two at
    most."""
    return max(BLOCK_K, -(-block_q // BLOCK_K) * BLOCK_K)


def table_codes(
    problem: Problem, gradients: bool, tables: Sequence[View], gradient_strides: Mapping[int, tuple[int, ...]]
) -> tuple[TableCode, ...]:
    """How each table appears in code. Bounds help only where a mask reads the table."""
    mask = parse(problem.program.mask) if problem.program.mask else None
    axes = _bounded_axes(mask)
    return tuple(
        TableCode(
            t.dtype,
            len(t.shape),
            gradients and t.needs_grad,
            axes.get(i) if _bounds_possible(t.dtype) else None,
            _staged_axes(problem, i, tables[i], gradient_strides.get(i)),
        )
        for i, t in enumerate(problem.tables)
    )


def _staged_axes(
    problem: Problem, slot: int, table: View, gradient: tuple[int, ...] | None
) -> tuple[int, int] | None:
    """The axes of rows and of keys, if some load takes (row, k) pairs of this table whose keys, and those of
    its gradient, are contiguous."""
    if kind(table.dtype) == "int":
        return None
    size = 8 if problem.dtype == "float64" else 4
    for text in (problem.program.score, problem.program.mask):
        for load in loads_of(parse(text)) if text else ():
            axes = staged_axes(load) if load.value == slot else None
            if axes and table.strides[axes[1]] == table.itemsize:
                return axes if gradient is None or gradient[axes[1]] == size else None
    return None


def _bounds_possible(dtype: str) -> bool:
    return dtype == "bool" or dtype.startswith(("int", "uint"))


def _bounded_axes(mask: Expr | None) -> dict[int, int]:
    """For each table of a mask that is read along exactly one axis by queries or keys: that axis."""
    found: dict[int, set[int]] = {}

    def visit(e: Expr) -> None:
        if e.op == "load":
            along = {a for a, index in enumerate(e.args) if variables(index) & {"row", "q", "k"}}
            found[e.value] = found.get(e.value, set()) | (along if len(along) == 1 else {-1, -2})

    if mask is not None:
        walk(mask, visit)
    return {slot: next(iter(along)) for slot, along in found.items() if len(along) == 1}


def variables(expr: Expr) -> set[str]:
    names: set[str] = set()
    walk(expr, lambda e: names.add(e.value) if e.op == "var" else None)
    return names


def make_spec(
    problem: Problem,
    part: Part,
    target: Target,
    dense: frozenset[str],
    dlse: bool,
    codes: tuple[TableCode, ...],
    ahead: frozenset[str],
    decoded: bool = False,
) -> Spec:
    """`decoded` makes a backward for sequences that were decoded. A backward forms its scores as its forward
    did, or exp(score - maximum) would be another's."""
    program = problem.program
    vectors = query_vectors(target, problem)
    return Spec(
        part=part,
        dtype=problem.dtype,
        dtype_kv=problem.dtype_kv,
        dtype_out=problem.dtype_out,
        head_dim=problem.head_dim,
        head_dim_v=problem.head_dim_v,
        score=program.score,
        mask=program.mask,
        factor=program.factor,
        tables=codes,
        dropout=program.dropout_p > 0.0,
        sinks=program.sinks,
        dlse=dlse,
        dense=dense,
        query_vectors=vectors,
        block_k=BLOCK_K,
        dot="number" if decoded or part == "decode" else dot(target, problem.dtype),
        tile=decode_tile(target, decode_rows(problem)) if part == "decode" else tile(target),
        bounds_block=bounds_block(vectors * lanes(target, problem.dtype)),
        decode_rows=decode_rows(problem) if part == "decode" or decoded else 0,
        ahead=ahead,
        paged=problem.addressing == "paged",
    )


@dataclass(frozen=True)
class Walk:
    """One launch of a backward: its part, its tasks (n, len(TASK_WORDS)), and the keys that a task's sums
    must hold."""

    part: Part
    tasks: np.ndarray
    acc_keys: int


@dataclass(frozen=True)
class TableSums:
    """How the gradients of tables are added up, whatever the number of threads.

    batch, heads    tasks are cut along batch entries and key heads
    blocks          tasks may be cut along query blocks
    own             the tables of which each (batch entry, key head) has sums of its own, added up afterwards
    count           how many such sums there are
    """

    batch: bool
    heads: bool
    blocks: bool
    own: frozenset[int]
    count: int


def table_sums(problem: Problem) -> TableSums:
    """Tasks that add to the same element of a table's gradient either keep sums of their own, where the table
    is small beside q, k and v, or are joined into one task that adds in order."""
    program = problem.program
    slots = [i for i, t in enumerate(problem.tables) if t.needs_grad]
    axes = _separating_axes(parse(program.score)) if program.score and slots else {}
    budget = problem.batch * (
        problem.heads_q * problem.seqlen_q * problem.head_dim
        + problem.heads_kv * problem.seqlen_k * (problem.head_dim + problem.head_dim_v)
    )
    batch = heads = blocks = True
    own: set[int] = set()
    for slot in slots:
        apart = axes.get(slot, {"batch", "head", "row"})
        blocks = blocks and "row" in apart
        if {"batch", "head"} <= apart:
            continue
        size = int(np.prod(problem.tables[slot].shape, dtype=np.int64))
        if size * problem.batch * problem.heads_kv <= max(budget, 1 << 16):
            own.add(slot)
        else:
            batch = batch and "batch" in apart
            heads = heads and "head" in apart
    count = (problem.batch if batch else 1) * (problem.heads_kv if heads else 1)
    return TableSums(batch, heads, blocks, frozenset(own) if count > 1 else frozenset(), count)


def backward_walks(problem: Problem, block_q: int, threads: int) -> tuple[Walk, ...]:
    """All five products in one walk where that gives the threads enough to do; else two walks of seven
    products."""
    sums = table_sums(problem)
    keys = -(-max(problem.seqlen_k, 1) // BLOCK_K) * BLOCK_K
    num_blocks = -(-problem.seqlen_q // block_q)
    # An uneven last round leaves threads idle; two rounds or an even one are taken as good enough.
    enough = sums.count >= 2 * threads or sums.count % threads == 0
    if threads == 1 or enough or not sums.blocks or num_blocks == 1:
        return (Walk("backward", _query_tasks(problem, sums, 1), keys),)
    step = min(KEYS_A_TASK, keys)
    dq = Walk("backward_dq", _query_tasks(problem, sums, num_blocks), 0)
    return dq, Walk("backward_dkv", _key_tasks(problem, step), step)


def _query_tasks(problem: Problem, sums: TableSums, num_blocks: int) -> np.ndarray:
    """Tasks over all keys; of each (batch entry, key head), the last query blocks first: causal, they are
    longest."""
    batches = [(i, i + 1) for i in range(problem.batch)] if sums.batch else [(0, problem.batch)]
    heads = [(i, i + 1) for i in range(problem.heads_kv)] if sums.heads else [(0, problem.heads_kv)]
    blocks = [(i, i + 1) for i in reversed(range(num_blocks))] if num_blocks > 1 else [(0, _EVERYTHING)]
    tasks = [
        (*batch, *head, *block, 0, _EVERYTHING, i * len(heads) + j)
        for i, batch in enumerate(batches)
        for j, head in enumerate(heads)
        for block in blocks
    ]
    return np.array(tasks, np.int64).reshape(-1, len(TASK_WORDS))


def _key_tasks(problem: Problem, step: int) -> np.ndarray:
    """Tasks over all queries, each for `step` keys."""
    tasks = [
        (batch, batch + 1, head, head + 1, 0, _EVERYTHING, first, first + step, 0)
        for batch in range(problem.batch)
        for head in range(problem.heads_kv)
        for first in range(0, problem.seqlen_k, step)
    ]
    return np.array(tasks, np.int64).reshape(-1, len(TASK_WORDS))


def _separating_axes(score: Expr) -> dict[int, set[str]]:
    """For each table of a score: the variables that are an index by themselves in every load of it. Pairs
    that differ in such a variable never meet in an element."""
    found: dict[int, set[str]] = {}

    def visit(e: Expr) -> None:
        if e.op == "load" and e.kind == "float":
            alone = {index.value for index in e.args if index.op == "var"}
            found[e.value] = found[e.value] & alone if e.value in found else alone

    walk(score, visit)
    return found
