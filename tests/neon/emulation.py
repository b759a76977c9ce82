"""The CPU backend with its kernels compiled for AArch64 and run under an emulator.

Everything but the call of the compiled function is the library's own code: launches, argument blocks, tasks,
scratch. What the block points to is copied into the emulator and back, by sizes that follow from the problem.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from anyflash.core.dtypes import ITEMSIZE
from anyflash.kernels.llvm import launch, pool, schedule
from anyflash.kernels.llvm.layout import padded
from anyflash.kernels.llvm.spec import ARRAYS, TASK_WORDS, Spec, partial_bytes
from anyflash.kernels.llvm.target import Target
from neon import runner

_ROW_ARRAYS = ("lse", "stats", "dlse")
_WRITTEN = re.compile(r"counter|partials|arrivals|out|lse|stats|dq|dk|dv|dsinks|grad\d+")
_LINE = 64


class _Call:
    """One launch: which function, and the words of its argument block by name."""

    def __init__(self, work: launch.Launch, args: int) -> None:
        self.spec, self.problem, self.work = work.spec, work.problem, work
        count = len(work.block.index)
        block = (ctypes.c_int64 * count).from_address(args)
        self.words = {name: int(block[i]) for name, i in work.block.index.items()}

    def region(self, name: str) -> tuple[int, int] | None:
        """(first, last + 1) byte of what the word `name` points to; None if it is no address in use."""
        at = self.words[name]
        size = self.sizes().get(name)
        if not at or size is None:
            return None
        below, above = size
        return at - below, at + above

    def sizes(self) -> dict[str, tuple[int, int]]:
        """Bytes before and behind the address of each word that is one."""
        p, w, number = self.problem, self.words, self.work.size
        rows = ("batch", "head", "token")
        lse = (p.batch, p.heads_q, p.seqlen_q) if p.addressing == "dense" else (1, p.heads_q, p.total_q)
        blocks = w["num_q_blocks"]
        found: dict[str, tuple[int, int]] = {
            "counter": (0, 8),
            "tasks": (0, 8 * len(TASK_WORDS) * w["num_tasks"]),
            "scratch": (0, 8),
            "sequences": (0, 32 * p.batch),
            "sinks": (0, p.heads_q * number),
            "dsinks": (0, p.batch * p.heads_q * blocks * number),
        }
        if self.spec.part == "decode":
            groups, splits = p.batch * p.heads_kv, schedule.splits(p)
            one = partial_bytes(self.spec.decode_rows, padded(p.head_dim_v, self.work.lanes), number)
            found["partials"] = (0, groups * splits * one if splits > 1 else 0)
            found["arrivals"] = (0, 8 * groups)
        for name in _ROW_ARRAYS:
            extents = (*lse, 2) if name == "stats" else lse
            axes = (*rows, "plane") if name == "stats" else rows
            found[name] = self._span(extents, [w[f"{name}_{a}"] for a in axes], number)
        for name in ARRAYS[self.spec.part]:
            shape = {
                "q": p.q_shape, "dq": p.q_shape, "k": p.k_shape, "dk": p.k_shape, "v": p.v_shape,
                "dv": p.v_shape,
            }.get(name, p.out_shape)  # fmt: skip
            strides = [w[f"{name}_{a}"] for a in ("batch", "token", "head", "dim")]
            found[name] = self._span((1, 1, *shape)[-4:], strides, ITEMSIZE[p.dtype])
        for i, table in enumerate(self.spec.tables):
            axes = range(table.rank)
            extents = [w[f"table{i}_extent{a}"] for a in axes]
            found[f"table{i}"] = self._span(
                extents, [w[f"table{i}_stride{a}"] for a in axes], ITEMSIZE[table.dtype]
            )
            if table.bounded_axis is not None:
                cut = [
                    -(-n // self.spec.bounds_block) if a == table.bounded_axis else n
                    for a, n in enumerate(extents)
                ]
                found[f"bounds{i}"] = self._span(cut, [w[f"bounds{i}_stride{a}"] for a in axes], 16)
            if table.gradient:
                count = schedule.table_sums(p).count if w[f"grad{i}_partial"] else 1
                strides = [w[f"grad{i}_stride{a}"] for a in axes]
                found[f"grad{i}"] = self._span((*extents, count), (*strides, w[f"grad{i}_partial"]), number)
        return found

    @staticmethod
    def _span(extents: Any, strides: Any, itemsize: int) -> tuple[int, int]:
        steps = [(n - 1) * s for n, s in zip(extents, strides, strict=True)]
        return -sum(min(s, 0) for s in steps), sum(max(s, 0) for s in steps) + itemsize


def _emulate(call: _Call, ir: str, scratch_bytes: int) -> None:
    names = [n for n in call.words if call.region(n) is not None]
    regions = [call.region(n) for n in names]
    scratch_at = ctypes.c_int64.from_address(call.words["scratch"]).value
    regions.append((scratch_at, scratch_at + scratch_bytes))
    # An address keeps its place within a cache line.
    buffers = [bytes(lo % _LINE) + ctypes.string_at(lo, hi - lo) for lo, hi in regions]
    words: dict[str, int | runner.Pointer] = dict(call.words)
    for i, name in enumerate(names):
        lo = regions[i][0]
        words[name] = runner.Pointer(i, lo % _LINE + call.words[name] - lo)
    place = runner.Pointer(names.index("scratch"), regions[names.index("scratch")][0] % _LINE)
    patches = {place: runner.Pointer(len(names), scratch_at % _LINE)}
    after = runner.run(ir, call.spec.part, buffers, list(words.values()), patches=patches)
    for name, (lo, hi), content in zip(names, regions, after, strict=False):
        if _WRITTEN.fullmatch(name):
            ctypes.memmove(lo, content[lo % _LINE :], hi - lo)


@contextmanager
def emulated() -> Iterator[None]:
    """The CPU backend, with the target "neon", runs under the emulator."""
    texts: dict[int, str] = {}
    current: list[launch.Launch] = []
    run = launch.Launch.run

    def compiled(spec: Spec, target: Target) -> launch.Code:
        assert target.name == "neon"
        ir = launch.emitted(spec, target)
        texts[id(ir)] = ir
        sizes = [int(re.search(rf"@{name} = constant i64 (\d+)", ir)[1]) for name in launch.SIZES]
        return launch.Code(id(ir), *sizes)

    def noted(self: launch.Launch, *arguments: Any) -> None:
        current.append(self)
        run(self, *arguments)
        current.pop()

    def call(team: pool.Team, function: int, args: int) -> None:
        work = current[-1]
        found = _Call(work, args)
        _emulate(found, texts[function], work.scratch_bytes(found.words["acc_keys"]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "compiled", compiled)
        patch.setattr(launch.Launch, "run", noted)
        patch.setattr(pool.Team, "run", call)
        yield
