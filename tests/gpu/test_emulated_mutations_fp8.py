"""The Hopper forward of 8-bit floats, each of its synchronising calls dropped or weakened, as
test_emulated_mutations.py does it with the others: the emulator notices, or the reason why nothing goes wrong
stands here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest

pytest.importorskip("triton", reason="needs triton: nox -s 'systems(triton39)'")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1: nox -s 'systems(triton39)'", allow_module_level=True)

import ml_dtypes
import numpy as np
import torch
from triton.runtime.jit import JITFunction

import anyflash as af
from anyflash.core.errors import BackendBroken
from anyflash.kernels.gluon import forward_fp8, schedule_fp8
from anyflash.kernels.gluon.schedule import Tiles
from gpu import emulated
from gpu.emulator.errors import EmulationError
from gpu.emulator.mutations import CALLS, Mutation, mutations, noticed

SEEDS = range(3)
LENGTH, HEADS, DIM = 200, 2, 64
HELPERS = dict.fromkeys(
    ("await_empty", "await_full", "fill", "open_turns", "pass_turn", "release", "take_turn", "turn_tile")
)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Scenario:
    tiles: Tiles
    causal: bool

    def __str__(self) -> str:
        return f"turns {self.tiles.turns}" + (", causal" if self.causal else "")

    def _bits(self, seed: int, replaced: Any) -> list[bytes]:
        rng = np.random.default_rng(0)
        q, k, v = (
            rng.standard_normal((1, LENGTH, heads, DIM)).astype(ml_dtypes.float8_e4m3fn)
            for heads in (HEADS, 1, 1)
        )
        with pytest.MonkeyPatch.context() as patch:
            emulated.install(patch, seed, replaced)
            patch.setattr(schedule_fp8, "forward_tiles", lambda *_: self.tiles)
            found = af.attention(q, k, v, causal=self.causal, return_lse=True, backend="hopper")
        return [x.tobytes() for x in found]

    @cache  # noqa: B019 - a handful of scenarios, for the length of a test run
    def _wanted(self) -> list[bytes]:
        return self._bits(0, None)

    def run(self, seed: int, replaced: Any) -> bool:
        try:
            return self._bits(seed, replaced) == self._wanted()
        except BackendBroken as broken:
            if isinstance(broken.__cause__, EmulationError):
                raise broken.__cause__ from None
            raise


SCENARIOS = (
    Scenario(Tiles(64, 2, 2, 232, 40, 1, True), causal=False),
    Scenario(Tiles(64, 2, 2, 232, 40, 2, True), causal=False),
    Scenario(Tiles(64, 2, 2, 232, 40, 1, True), causal=True),
)

HARMLESS = {
    "forward_fp8.under_product: await_full 3 dropped": "its phase has ended: the end of a basic block",
    "forward_fp8.consumer: release 2 too early": "before the next item's tiles, the mover waits for q",
}


def tried() -> list[Mutation]:
    found = (value for value in vars(forward_fp8).values() if isinstance(value, JITFunction))
    own = [value for value in found if value.fn.__module__ == forward_fp8.__name__]
    return list(mutations(own, CALLS | HELPERS))


@pytest.mark.parametrize("scenario", SCENARIOS, ids=str)
def test_unmutated(scenario: Scenario) -> None:
    for seed in range(9):
        assert scenario.run(seed, None)


def test_every_mutation_is_noticed() -> None:
    missed = {
        mutation.name
        for mutation in tried()
        if not any(noticed(scenario.run, mutation, SEEDS) for scenario in SCENARIOS)
    }
    assert missed == set(HARMLESS)
