"""The CPU backend: kernels emitted by `kernels.llvm` for the machine they run on."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from anyflash.core.device import Device
from anyflash.core.dtypes import FLOATS8
from anyflash.core.errors import InvalidCall
from anyflash.core.threads import num_threads
from anyflash.core.view import View
from anyflash.semantics.arrays import as_numpy
from anyflash.semantics.cache import CacheCall, write
from anyflash.semantics.operands import Gradients, Operands, Results, Saved
from anyflash.semantics.problem import Problem

_MAX_KEPT = 256  # launches a problem


# Below this many multiply-adds a call is over before a second thread has woken up.
_ALONE = 1 << 21


@dataclass(frozen=True, slots=True)
class Config:
    """The instruction set that kernels are compiled for, and up to how many rows of a key head are decoded.
    `launches` keeps what was prepared for strides met before."""

    target: str
    decoded_rows: int
    launches: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)


class CpuBackend:
    name = "cpu"
    rank: int | None = 10
    accepts = "memory"

    def available(self) -> str | None:
        from anyflash.kernels.llvm.target import host_target

        try:
            target = host_target()
        except InvalidCall as error:
            return str(error)
        return None if target.fma else "needs a processor with AVX2 and FMA, or AArch64"

    def decline(self, problem: Problem, device: Device) -> list[str]:
        from anyflash.semantics.limits import integers_too_wide

        if device.kind != "cpu":
            return [f"runs on the cpu, the arrays are on {device}"]
        return integers_too_wide(problem)

    def configure(self, problem: Problem) -> Config:
        from anyflash.kernels.llvm.schedule import decode_rows
        from anyflash.kernels.llvm.target import host_target

        return Config(host_target().name, decode_rows(problem))

    def forward(self, problem: Problem, config: Config, operands: Operands, results: Results) -> None:
        if operands.cu_seqlens_q is not None:
            self._fill_rows_of_no_sequence(problem, operands, results)
        out, decoded = results.out, config.decoded_rows
        if problem.batch == 0 or 0 in out.shape:
            return
        arrays = {"q": operands.q, "k": operands.k, "v": operands.v, "out": out}
        rows = {"lse": results.lse, "stats": results.stats}
        values = {name: view.ptr for name, view in arrays.items()}
        values |= {"lse": results.lse.ptr, "stats": results.stats.ptr, "decoded_rows": decoded}
        if decoded:
            from anyflash.kernels.llvm import launch, schedule

            if launch.any_decoded(problem, operands, decoded):
                work = self._launch(problem, "decode", config, arrays, rows, operands.tables, {})
                tasks = problem.batch * problem.heads_kv * schedule.splits(problem)
                work.run(operands, values.copy(), tasks, _threads(problem), 0)
        if problem.group * problem.seqlen_q > decoded:
            work = self._launch(problem, "forward", config, arrays, rows, operands.tables, {})
            tasks = problem.batch * problem.heads_q * work.num_q_blocks
            work.run(operands, values, tasks, _threads(problem), 0)

    def backward(
        self, problem: Problem, config: Config, operands: Operands, saved: Saved, grads: Gradients
    ) -> None:
        from anyflash.kernels.llvm import schedule

        threads = _threads(problem)
        number = np.float64 if problem.dtype == "float64" else np.float32
        sums = schedule.table_sums(problem)
        totals: dict[int, np.ndarray] = {}
        for i, view in enumerate(grads.tables):
            if view is not None:
                as_numpy(view)[...] = 0
                if i in sums.own:
                    totals[i] = np.zeros((sums.count, *problem.tables[i].shape), number)
        if grads.dsinks is not None:
            as_numpy(grads.dsinks)[...] = 0
        if problem.batch == 0 or 0 in saved.out.shape:
            for view in (grads.dq, grads.dk, grads.dv):
                as_numpy(view)[...] = 0
            return
        self._zero_unused_keys(problem, operands, grads)
        block_q = schedule.block_q(problem, config.target)
        blocks = -(-problem.seqlen_q // block_q)
        sink_sums = np.zeros((problem.batch, problem.heads_q, blocks), number)
        for walk in schedule.backward_walks(problem, block_q, threads):
            for decoded, rows in self._ways(problem, config, operands):
                self._walk(
                    problem, config, operands, saved, grads, walk, totals, sink_sums, threads, decoded, rows
                )
        for i, total in totals.items():
            view = grads.tables[i]
            assert view is not None
            np.add.reduce(total, axis=0, out=as_numpy(view))
        if grads.dsinks is not None:
            as_numpy(grads.dsinks)[...] = sink_sums.sum(axis=(0, 2))

    def _walk(
        self,
        problem: Problem,
        config: Config,
        operands: Operands,
        saved: Saved,
        grads: Gradients,
        walk: Any,
        totals: dict[int, np.ndarray],
        sink_sums: np.ndarray,
        threads: int,
        decoded: bool,
        decoded_rows: int,
    ) -> None:
        from anyflash.kernels.llvm import launch
        from anyflash.kernels.llvm.spec import ARRAYS

        every = {
            "q": operands.q, "k": operands.k, "v": operands.v, "out": saved.out, "dout": saved.dout,
            "dq": grads.dq, "dk": grads.dk, "dv": grads.dv,
        }  # fmt: skip
        arrays = {name: every[name] for name in ARRAYS[walk.part]}
        rows = {"stats": saved.stats}
        if saved.dlse is not None:
            rows["dlse"] = saved.dlse
        strides: dict[int, tuple[int, ...]] = {}
        values = launch.addresses([*arrays.items(), *rows.items()])
        values["tasks"] = walk.tasks.ctypes.data
        values["dsinks"] = sink_sums.ctypes.data
        values["decoded_rows"] = decoded_rows
        if walk.part != "backward_dkv":
            for i, view in enumerate(grads.tables):
                if view is not None:
                    own = totals.get(i)
                    strides[i] = view.strides if own is None else own.strides[1:]
                    assert view.ptr is not None
                    values[f"grad{i}"] = view.ptr if own is None else own.ctypes.data
                    values[f"grad{i}_partial"] = 0 if own is None else own.strides[0]
        work = self._launch(problem, walk.part, config, arrays, rows, operands.tables, strides, decoded)
        work.run(operands, values, len(walk.tasks), threads, walk.acc_keys)

    @staticmethod
    def _ways(problem: Problem, config: Config, operands: Operands) -> list[tuple[bool, int]]:
        """(whether a backward kernel is for sequences that were decoded, up to how many rows those have)."""
        from anyflash.kernels.llvm import launch

        rows = config.decoded_rows
        ways = [(True, rows)] if rows and launch.any_decoded(problem, operands, rows) else []
        return [*ways, (False, rows if ways else -1)] if problem.group * problem.seqlen_q > rows else ways

    @staticmethod
    def _fill_rows_of_no_sequence(problem: Problem, operands: Operands, results: Results) -> None:
        """Packed rows behind the last sequence have no task that would write them."""
        if operands.cu_seqlens_q is None:
            return
        used = int(as_numpy(operands.cu_seqlens_q)[-1])
        if used < problem.total_q:
            as_numpy(results.out)[used:] = 0
            as_numpy(results.lse)[:, used:] = -np.inf
            as_numpy(results.stats)[:, :, used:] = np.array([-np.inf, 0.0])[:, None, None]

    @staticmethod
    def _zero_unused_keys(problem: Problem, operands: Operands, grads: Gradients) -> None:
        """Packed tokens that belong to no sequence, or lie past seqused_k, have no task that would write
        them."""
        if problem.addressing == "varlen":
            for view in (grads.dq, grads.dk, grads.dv):
                as_numpy(view)[...] = 0

    def _launch(
        self,
        problem: Problem,
        part: Any,
        config: Config,
        arrays: dict[str, View],
        rows: dict[str, View],
        tables: tuple[View, ...],
        gradient_strides: dict[int, tuple[int, ...]],
        decoded: bool = False,
    ) -> Any:
        views = (*arrays.values(), *rows.values(), *tables)
        key = (part, decoded, *rows, *[view.strides for view in views], *gradient_strides.items())
        found = config.launches.get(key)
        if found is None:
            from anyflash.kernels.llvm.launch import Launch
            from anyflash.kernels.llvm.target import get_target

            target = get_target(config.target)
            found = Launch(problem, part, target, arrays, rows, tables, gradient_strides, decoded)
            if len(config.launches) >= _MAX_KEPT:
                config.launches.clear()
            config.launches[key] = found
        return found

    @staticmethod
    def _eight_bits(problem: Problem, target: Any) -> dict[str, str]:
        from anyflash.kernels.llvm import schedule

        if problem.dtype_kv not in FLOATS8:
            return {}
        paired = schedule.dot(target, problem.dtype) != "number"
        made = "bfloat16" if paired else "float32"
        return {"8-bit floats": f"read tile by tile as {made}, in float32 where queries are few"}

    def append(self, problem: Problem, config: Config, call: CacheCall, turned: View | None) -> Operands:
        return write(call, turned)

    def restate(self, problem: Problem, config: Config, lse: View, stats: View) -> None:
        # Kernels keep the maximum in the unit of scores, log2 without a program, and log2 of the sum.
        unit = 1.0 if problem.program.score else math.log2(math.e)
        given, written = as_numpy(lse), as_numpy(stats)
        empty = given == -np.inf
        written[0] = np.where(empty, 0, given * unit)
        written[1] = np.where(empty, np.inf, 0)

    def explain(self, problem: Problem, config: Config) -> dict[str, Any]:
        from anyflash.kernels.llvm import schedule
        from anyflash.kernels.llvm.target import get_target

        target = get_target(config.target)
        block_q = schedule.block_q(problem, config.target)
        return {
            "instruction set": target.name,
            "block_q": block_q,
            "block_k": schedule.BLOCK_K,
            "register tiles": [
                (rows, columns)
                for _, columns, rows in schedule.tile(target).cut(
                    block_q // schedule.lanes(target, problem.dtype)
                )
            ],
            "threads": num_threads(),
            **self._eight_bits(problem, target),
            "backward": "none"
            if problem.dtype_kv in FLOATS8
            else " + ".join(w.part for w in schedule.backward_walks(problem, block_q, num_threads())),
        }


def _threads(problem: Problem) -> int:
    work = problem.batch * problem.heads_q * problem.seqlen_q * problem.seqlen_k
    return 1 if work * (problem.head_dim + problem.head_dim_v) < _ALONE else num_threads()


BACKEND = CpuBackend()
