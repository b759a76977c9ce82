"""Hopper's kernels, each of their synchronising calls dropped or weakened: the emulator notices, or the
reason why nothing goes wrong stands here.

Needs TRITON_INTERPRET=1: the portable kernels around them are interpreted.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("triton", reason="needs triton: nox -s 'systems(triton39)'")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1: nox -s 'systems(triton39)'", allow_module_level=True)

import numpy as np
import torch
import triton
from triton.runtime.jit import JITFunction

from anyflash.contract import direct
from anyflash.core.errors import BackendBroken
from anyflash.dispatch.plan import run_backward, run_forward
from anyflash.kernels.gluon import (
    backward,
    backward_dq,
    backward_wide,
    forward,
    keys,
    pieces,
    pipeline,
    schedule,
    schedule_backward,
)
from anyflash.semantics.operands import Gradients, Results, Saved
from gpu import emulated
from gpu.emulator.errors import EmulationError
from gpu.emulator.mutations import CALLS, Mutation, mutations, noticed

SEEDS = range(3)
LENGTH, HEADS, DIM = 200, 2, 64
# Helpers of pipeline.py, dropped call by call beside being mutated themselves.
HELPERS = dict.fromkeys(("await_full", "fill", "open_turns", "pass_turn", "release", "take_turn"))
_TOLERANCE = 8 * float(np.finfo(np.float16).eps)
# The older Triton gets the forward alone: what is emulated is the same.
NEWEST = triton.__version__ >= "3.9"


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Scenario:
    """A call, in a configuration that takes a way of its own through the kernels."""

    tiles: schedule.Tiles
    causal: bool = False
    backward: bool = False
    reduce: bool = False
    dim: int = DIM
    length: int = LENGTH

    def __str__(self) -> str:
        part = "backward, reduced" if self.reduce else "backward" if self.backward else "forward"
        more = (", causal" if self.causal else "") + (f", {self.dim}" if self.dim != DIM else "")
        return f"{part}, turns {self.tiles.turns}{more}"

    def __post_init__(self) -> None:
        rng = np.random.default_rng(0)
        arrays = [
            rng.standard_normal((1, self.length, heads, self.dim)).astype(np.float16)
            for heads in (HEADS, 1, 1, HEADS)
        ]
        object.__setattr__(self, "_dout", arrays.pop())
        object.__setattr__(
            self, "_call", direct.prepare(*arrays, causal=self.causal, deterministic=not self.reduce)
        )

    def _forward(self, backend: str) -> tuple[np.ndarray, ...]:
        problem, operands = self._call
        out = np.full(problem.out_shape, np.nan, np.float16)
        lse, stats = (np.full((*planes, *problem.lse_shape), np.nan, np.float32) for planes in ((), (2,)))
        run_forward(
            problem, operands, Results(*(direct.view_of(x, True) for x in (out, lse, stats))), backend
        )
        return out, lse, stats

    @cache  # noqa: B019 - a handful of scenarios, for the length of a test run
    def _saved(self) -> tuple[np.ndarray, ...]:
        with self._hopper(0, None):
            return self._forward("hopper")

    def _backward(self, backend: str) -> tuple[np.ndarray, ...]:
        problem, operands = self._call
        shapes = (problem.q_shape, problem.k_shape, problem.v_shape)
        grads = [np.full(shape, np.nan, np.float16) for shape in shapes]
        out, _, stats = self._saved()
        saved = Saved(*(direct.view_of(x) for x in (out, stats, self._dout)))
        made = Gradients(*(direct.view_of(x, True) for x in grads))
        run_backward(problem, operands, saved, made, backend)
        return tuple(grads)

    @cache  # noqa: B019
    def _wanted(self) -> tuple[np.ndarray, ...]:
        return self._backward("triton") if self.backward else self._forward("reference")[:2]

    @contextmanager
    def _hopper(self, seed: int, replaced: Any) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            emulated.install(patch, seed, replaced)
            patch.setattr(schedule, "forward_tiles", lambda *_: self.tiles)
            tiles = schedule_backward.BackwardTiles(64 if self.dim == DIM else 32, 2)
            patch.setattr(schedule_backward, "rows_tiles", lambda *_: tiles)
            yield

    def run(self, seed: int, replaced: Any) -> bool:
        wanted = self._wanted()
        if self.backward:
            self._saved()
        try:
            with self._hopper(seed, replaced):
                found = self._backward("hopper") if self.backward else self._forward("hopper")[:2]
        except BackendBroken as broken:
            if isinstance(broken.__cause__, EmulationError):
                raise broken.__cause__ from None
            raise
        pairs = zip(found, wanted, strict=True)
        return all(bool(np.abs(a - b).max() <= _TOLERANCE * np.abs(b).max()) for a, b in pairs)


_PLAIN = schedule.Tiles(64, 2, 2, 232, 40, 1, True)
FORWARD = (
    Scenario(_PLAIN),
    Scenario(schedule.Tiles(64, 2, 2, 232, 40, 2, True)),
    Scenario(schedule.Tiles(64, 2, 2, 232, 40, 0, False)),
    Scenario(_PLAIN, causal=True),
    Scenario(_PLAIN, dim=96),
)
BACKWARD = (Scenario(_PLAIN, backward=True, reduce=True), Scenario(_PLAIN, backward=True))
WIDE = (Scenario(schedule.Tiles(64, 2, 2, 240, 32, 0, False), backward=True, dim=136, length=130),)


def functions(module: ModuleType) -> list[Any]:
    """The functions that a module defines itself."""
    found = (value for value in vars(module).values() if isinstance(value, JITFunction))
    return [value for value in found if value.fn.__module__ == module.__name__]


TRIED: dict[str, tuple[tuple[Scenario, ...], ModuleType]] = {
    "forward": (FORWARD, forward),
    "pieces": (FORWARD[-1:] + FORWARD[:1], pieces),
    "pipeline": (FORWARD + BACKWARD[1:], pipeline),
}
if NEWEST:
    TRIED |= {
        "backward": (BACKWARD, backward),
        "keys": (BACKWARD, keys),
        "backward_dq": (BACKWARD[1:], backward_dq),
        "backward_wide": (WIDE, backward_wide),
    }

# Mutations that change nothing but the order in which things happen to be done, and why.
_BLOCK = "its phase has ended: the wait is there to end a basic block, for ptxas"
_Q_LAST = "readers leave q after dout, and the producer waits for q before it loads either"
_TURN = "turns are about speed: no data hangs on them"
HARMLESS = {
    "forward.under_product: await_full 3 dropped": _BLOCK,
    "forward.under_product: release 1 too early": "before it, the producer waits for a later stage of v",
    "forward.consumer: release 2 too early": "before the next item's tiles, the producer waits for q",
    "pipeline.take_turn: barrier_wait 1 dropped": _TURN,
    "pipeline.take_turn: barrier_wait 1 turned": _TURN,
    "keys.producer: barrier_wait 2 dropped": _Q_LAST,
    "backward.run_of_rows: barrier_wait 3 dropped": _BLOCK,
    "backward.run_of_rows: barrier_arrive 2 too early": _Q_LAST,
    "backward_wide.run_of_rows: barrier_arrive 2 too early": _Q_LAST,
    "backward_dq.run_of_keys: await_full 3 dropped": _BLOCK,
    "backward_dq.run_of_keys: release 1 too early": "readers leave k after v, and it is waited for first",
}


def how(mutation: Mutation, scenarios: tuple[Scenario, ...]) -> str | None:
    for scenario in scenarios:
        if found := noticed(scenario.run, mutation, SEEDS):
            return found
    return None


@pytest.mark.parametrize("scenario", FORWARD + (BACKWARD + WIDE) * NEWEST, ids=str)
def test_unmutated(scenario: Scenario) -> None:
    for seed in range(9):
        assert scenario.run(seed, None)


@pytest.mark.parametrize("name", TRIED)
def test_every_mutation_is_noticed(name: str) -> None:
    scenarios, module = TRIED[name]
    tried = list(mutations(functions(module), CALLS | (HELPERS if module is not pipeline else {})))
    assert len(tried) > 10
    missed = {mutation.name for mutation in tried if how(mutation, scenarios) is None}
    assert missed == {known for known in HARMLESS if known.startswith(f"{name}.")}
