"""From views to a running kernel: the argument block, the tables' block bounds, scratch, threads.

A `Launch` holds what stays the same for one problem and one set of strides: code, argument template, tasks. A
call then fills in addresses and runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from anyflash.core.view import View
from anyflash.kernels.llvm import engine, pool, schedule
from anyflash.kernels.llvm.layout import padded
from anyflash.kernels.llvm.spec import ARRAYS, ArgumentBlock, Part, Spec, partial_bytes
from anyflash.kernels.llvm.target import Target
from anyflash.semantics.arrays import as_numpy
from anyflash.semantics.limits import check_table
from anyflash.semantics.operands import Operands
from anyflash.semantics.problem import Problem
from anyflash.semantics.rng import threshold

SIZES = ("scratch_bytes", "block_bytes")


@dataclass(frozen=True)
class Code:
    """A compiled function, the scratch of fixed size that a thread needs, and what it needs more for each
    block of keys."""

    address: int
    scratch_bytes: int
    block_bytes: int


_codes: dict[tuple[Spec, Target], Code] = {}


def compiled(spec: Spec, target: Target) -> Code:
    """The kernel for `spec`: from this process, from disk, or compiled now."""
    found = _codes.get((spec, target))
    if found is None:
        kernel = engine.compile_module(lambda: emitted(spec, target), target, spec.key, [spec.part, *SIZES])
        found = Code(kernel.addresses[spec.part], *(kernel.integer(size) for size in SIZES))
        _codes[spec, target] = found
    return found


def emitted(spec: Spec, target: Target) -> str:
    """The module's text. The scratch sizes are in it, so that a stored object needs no emitter."""
    # The emitters are not imported where every kernel is on disk.
    from anyflash.kernels.llvm.backward import emit_backward
    from anyflash.kernels.llvm.decode import emit_decode
    from anyflash.kernels.llvm.forward import emit_forward

    emit = {"forward": emit_forward, "decode": emit_decode}.get(spec.part, emit_backward)
    ir, *sizes = emit(spec, target)
    constants = [f"@{name} = constant i64 {size}\n" for name, size in zip(SIZES, sizes, strict=True)]
    return "\n".join([ir, *constants])


class Launch:
    """One part of one problem with fixed strides, ready to run on any memory."""

    def __init__(
        self,
        problem: Problem,
        part: Part,
        target: Target,
        arrays: Mapping[str, View],
        rows: Mapping[str, View],
        tables: tuple[View, ...],
        gradient_strides: Mapping[int, tuple[int, ...]],
        decoded: bool = False,
    ) -> None:
        self.problem, self.part, self.target = problem, part, target
        dense = frozenset(
            n for n in ARRAYS[part] if arrays[n].shape[-1] <= 1 or _inner(arrays[n]) == arrays[n].itemsize
        )
        codes = schedule.table_codes(problem, part in ("backward", "backward_dq"), tables, gradient_strides)
        ahead = schedule.made_ahead(problem, part, target, arrays["k"], arrays["v"])
        self.spec = schedule.make_spec(problem, part, target, dense, "dlse" in rows, codes, ahead, decoded)
        self.code = compiled(self.spec, target)
        self.lanes = schedule.lanes(target, problem.dtype)
        self.block_q = self.spec.query_vectors * self.lanes
        self.size = 8 if problem.dtype == "float64" else 4
        self.num_q_blocks = -(-problem.seqlen_q // self.block_q)
        self.sequences = _dense_sequences(problem) if problem.addressing == "dense" else None
        self.block = ArgumentBlock(self.spec, self._fixed(arrays, rows, tables, gradient_strides))
        width = sum(padded(d, self.lanes) for d in (problem.head_dim, problem.head_dim_v))
        self.bytes_a_key = width * self.size

    def _fixed(
        self,
        arrays: Mapping[str, View],
        rows: Mapping[str, View],
        tables: tuple[View, ...],
        gradient_strides: Mapping[int, tuple[int, ...]],
    ) -> dict[str, int | float]:
        problem, p = self.problem, self.problem.program.dropout_p
        values: dict[str, int | float] = {
            "heads_q": problem.heads_q,
            "group": problem.group,
            "num_q_blocks": self.num_q_blocks,
            "scale": float(problem.scale),
            # A threshold of 2**32 drops everything, and is more than a word holds.
            "keep_scale": 1.0 / (1.0 - p) if threshold(p) < 2**32 else 0.0,
            "drop_threshold": min(threshold(p), 2**32 - 1),
            "sinks_stride": self.size,
        }
        if self.sequences is not None:
            values["sequences"] = self.sequences.ctypes.data
        values["page_size"] = problem.page_size
        for name in ARRAYS[self.part]:
            # Packed arrays have no batch axis: their sequences start at a token.
            strides = arrays[name].strides if arrays[name].ndim == 4 else (0, *arrays[name].strides)
            for axis, stride in zip(("batch", "token", "head", "dim"), strides, strict=True):
                values[f"{name}_{axis}"] = stride
        for name, view in rows.items():
            strides = view.strides
            if name == "stats":
                values["stats_plane"], strides = strides[0], strides[1:]
            if problem.packed_q:
                strides = (0, *strides)
            for axis, stride in zip(("batch", "head", "token"), strides, strict=True):
                values[f"{name}_{axis}"] = stride
        for i, view in enumerate(tables):
            for a, (stride, extent) in enumerate(zip(view.strides, view.shape, strict=True)):
                values[f"table{i}_stride{a}"], values[f"table{i}_extent{a}"] = stride, extent
        for i, strides in gradient_strides.items():
            for a, stride in enumerate(strides):
                values[f"grad{i}_stride{a}"] = stride
        return values

    def run(
        self, operands: Operands, addresses: dict[str, int], num_tasks: int, threads: int, acc_keys: int
    ) -> None:
        """Run over `num_tasks` tasks. `addresses` holds every array's; tables, sinks, seed are taken from
        `operands`."""
        if not num_tasks:
            return
        kept: list[object] = []
        values = addresses
        if self.sequences is None:
            sequences = _sequences(self.problem, operands)
            kept.append(sequences)
            values["sequences"] = sequences.ctypes.data
        if operands.block_table is not None:
            assert operands.block_table.ptr is not None
            values["block_table"] = operands.block_table.ptr
            values["block_table_stride"] = operands.block_table.strides[0]
        values["num_tasks"] = num_tasks
        values["acc_keys"] = acc_keys
        if self.spec.dropout:
            values["seed_low"], values["seed_high"] = _signed(operands.seed), _signed(operands.seed >> 32)
        if operands.sinks is not None:
            sinks = as_numpy(operands.sinks).astype(np.float64 if self.size == 8 else np.float32)
            kept.append(sinks)
            values["sinks"] = sinks.ctypes.data
        for i, view in enumerate(operands.tables):
            assert view.ptr is not None
            values[f"table{i}"] = view.ptr
            axis = self.spec.tables[i].bounded_axis
            values_of = as_numpy(view)
            check_table(values_of, i)
            if axis is not None:
                bounds = block_bounds(values_of, axis, self.spec.bounds_block)
                kept.append(bounds)
                values[f"bounds{i}"] = bounds.ctypes.data
                for a in range(view.ndim):
                    values[f"bounds{i}_stride{a}"] = bounds.strides[a]
        if self.part == "decode":
            kept += self._split(values)
        with pool.lease(min(threads, num_tasks)) as team:
            block, address = self.block.fill(values, team.scratch(self.scratch_bytes(acc_keys)))
            kept.append(block)
            team.run(self.code.address, address)

    def scratch_bytes(self, acc_keys: int) -> int:
        """What a thread needs where a task sums the gradients of `acc_keys` keys, 0 for none."""
        keys = acc_keys if self.part == "backward_dkv" else self.problem.seqlen_k
        blocks = -(-keys // self.spec.block_k)
        return self.code.scratch_bytes + acc_keys * self.bytes_a_key + blocks * self.code.block_bytes

    def _split(self, values: dict[str, int]) -> list[object]:
        """Shared memory in which the splits of a decode meet."""
        problem, splits = self.problem, schedule.splits(self.problem)
        values["splits"] = splits
        groups = problem.batch * problem.heads_kv
        size = partial_bytes(self.spec.decode_rows, padded(problem.head_dim_v, self.lanes), self.size)
        partials = np.empty(groups * splits * size if splits > 1 else 0, np.uint8)
        arrivals = np.zeros(groups, np.int64)
        values["partials"], values["arrivals"] = partials.ctypes.data, arrivals.ctypes.data
        return [partials, arrivals]


def _inner(view: View) -> int:
    return view.strides[-1]


def _signed(word: int) -> int:
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >> 31 else word


def _dense_sequences(problem: Problem) -> NDArray[np.int64]:
    """(batch, 4): q_start, q_len, k_start, k_len."""
    table = np.zeros((problem.batch, 4), np.int64)
    table[:, 1], table[:, 3] = problem.seqlen_q, problem.seqlen_k
    return table


def _sequences(problem: Problem, operands: Operands) -> NDArray[np.int64]:
    """The same where lengths are data. In pages, k_start is the slot of the first key."""
    table = np.zeros((problem.batch, 4), np.int64)
    table[:, 1] = problem.seqlen_q
    for column, view in ((0, operands.cu_seqlens_q), (2, operands.cu_seqlens_k)):
        if view is not None:
            cumulative = as_numpy(view)
            table[:, column], table[:, column + 1] = cumulative[:-1], np.diff(cumulative)
    if operands.seqused_k is not None:
        table[:, 3] = as_numpy(operands.seqused_k)
    if operands.leftpad_k is not None:
        table[:, 2] = as_numpy(operands.leftpad_k)
    return table


def any_decoded(problem: Problem, operands: Operands, rows: int) -> bool:
    """Whether some sequence is short enough for a decode of `rows` rows."""
    if operands.cu_seqlens_q is None:
        return True
    lengths = np.diff(as_numpy(operands.cu_seqlens_q)) * problem.group
    return bool(((lengths > 0) & (lengths <= rows)).any())


def block_bounds(table: NDArray[np.generic], axis: int, block: int) -> NDArray[np.int64]:
    """Smallest and largest element of every `block` along `axis`: that axis shortened, and a last axis of
    2."""
    values = table.astype(np.int64)
    starts = np.arange(0, max(values.shape[axis], 1), block)
    if values.shape[axis] == 0:
        return np.zeros((*values.shape[:axis], 1, *values.shape[axis + 1 :], 2), np.int64)
    low = np.minimum.reduceat(values, starts, axis=axis)
    return np.ascontiguousarray(np.stack([low, np.maximum.reduceat(values, starts, axis=axis)], axis=-1))


def addresses(views: Iterable[tuple[str, View]]) -> dict[str, int]:
    result: dict[str, int] = {}
    for name, view in views:
        assert view.ptr is not None
        result[name] = view.ptr
    return result
