"""The definition of attention as a backend: exact, slow, quadratic in memory, run only if named."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from anyflash.core.device import Device
from anyflash.core.errors import Unsupported
from anyflash.core.view import View
from anyflash.semantics import reference
from anyflash.semantics.arrays import as_numpy
from anyflash.semantics.cache import CacheCall, write
from anyflash.semantics.operands import Gradients, Operands, Results, Saved
from anyflash.semantics.problem import Problem


class Reference:
    name = "reference"
    rank = None
    accepts = "memory"

    def available(self) -> str | None:
        return None

    def decline(self, problem: Problem, device: Device) -> list[str]:
        return [] if device.kind == "cpu" else [f"reads host memory, and the arrays are on {device}"]

    def configure(self, problem: Problem) -> str:
        return "float64"

    def forward(self, problem: Problem, config: str, operands: Operands, results: Results) -> None:
        found = reference.forward(problem, *_inputs(operands), **_pages(operands))
        for view, value in (
            (results.out, found.out),
            (results.lse, found.lse),
            (results.stats, found.stats),
        ):
            _write(view, value)

    def backward(
        self, problem: Problem, config: str, operands: Operands, saved: Saved, grads: Gradients
    ) -> None:
        dlse = None if saved.dlse is None else as_numpy(saved.dlse)
        found = reference.backward(problem, *_inputs(operands), as_numpy(saved.dout), dlse)
        _write(grads.dq, found.dq)
        _write(grads.dk, found.dk)
        _write(grads.dv, found.dv)
        for view, value in zip(grads.tables, found.dtables, strict=True):
            if view is not None:
                _write(view, value)
        if grads.dsinks is not None:
            _write(grads.dsinks, found.dsinks)

    def append(self, problem: Problem, config: str, call: CacheCall, turned: View | None) -> Operands:
        return write(call, turned)

    def restate(self, problem: Problem, config: str, lse: View, stats: View) -> None:
        raise Unsupported(
            "a backward from a given lse", {self.name: ["the reference computes its softmax anew"]}
        )

    def explain(self, problem: Problem, config: str) -> dict[str, Any]:
        scores = problem.seqlen_q * problem.seqlen_k
        return {"arithmetic": config, "scratch_bytes": 8 * scores * problem.batch * problem.heads_q}


def _inputs(operands: Operands) -> tuple[Any, ...]:
    def optional(view: View | None) -> NDArray[Any] | None:
        return None if view is None else as_numpy(view)

    return (
        as_numpy(operands.q),
        as_numpy(operands.k),
        as_numpy(operands.v),
        tuple(as_numpy(table) for table in operands.tables),
        optional(operands.sinks),
        optional(operands.cu_seqlens_q),
        optional(operands.cu_seqlens_k),
        optional(operands.seqused_k),
        operands.seed,
    )


def _pages(operands: Operands) -> dict[str, Any]:
    table, leftpad = operands.block_table, operands.leftpad_k
    return {
        "block_table": None if table is None else as_numpy(table),
        "leftpad_k": None if leftpad is None else as_numpy(leftpad),
    }


def _write(view: View, value: NDArray[Any]) -> None:
    # A value beyond the range of a narrow dtype becomes inf, as in every other backend.
    with np.errstate(over="ignore", invalid="ignore"):
        as_numpy(view)[...] = value


BACKEND = Reference()
