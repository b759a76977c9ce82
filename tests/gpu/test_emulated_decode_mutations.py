"""The Hopper kernel of calls over a cache, each of its synchronising calls dropped or weakened: the emulator
notices, or it is said why it cannot.

Needs TRITON_INTERPRET=1: the portable kernels around it are interpreted.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache

import pytest

pytest.importorskip("triton", reason="needs triton: nox -s 'systems(triton39)'")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1: nox -s 'systems(triton39)'", allow_module_level=True)

from dataclasses import replace
from typing import Any

import numpy as np
import torch
import triton

from anyflash.contract.cases import Packed
from anyflash.contract.run import assess, known
from anyflash.core.errors import BackendBroken
from anyflash.kernels.gluon import decode, schedule_decode, segments
from gpu import emulated
from gpu.emulator.errors import EmulationError
from gpu.emulator.mutations import CALLS, mutations, noticed
from gpu.test_emulated_decode import FORMS, case
from gpu.test_emulated_mutations import functions
from kvcache.laying import lay_out

SEEDS = range(3)
HELPERS = dict.fromkeys(("await_full", "fill_from_pages", "release"))
ONE = case("one", Packed((2,), (350,)), 2, 1, dtype="float16")
TWO = case("two", Packed((9,), (350,)), 8, 1, dtype="float16")
MODULES = {"decode": decode, "segments": segments} if triton.__version__ >= "3.9" else {"segments": segments}

# What the emulator cannot see, as a partition is one thread there: test_compiled_hopper_decode.py does.
UNSEEN = {"decode.take_queries: meet 1 dropped"}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def laid(wanted: Any) -> Any:
    return lay_out(wanted, known(wanted)[0], FORMS["pages_of_16"])


def run(wanted: Any, seed: int, replaced: Any) -> bool:
    """Few keys in few stages, so that each stage is used several times."""
    tiles = schedule_decode.tiles

    def narrow(*dims_and_rows: int) -> schedule_decode.Tiles:
        return replace(tiles(*dims_and_rows), block_n=32, stages=2)

    with pytest.MonkeyPatch.context() as patch:
        emulated.install(patch, seed, replaced, resident=2)
        patch.setattr(schedule_decode, "tiles", narrow)
        patch.setattr(schedule_decode, "cut", lambda *_: (2, 4))
        try:
            found = laid(wanted).canonical(*laid(wanted).run("hopper"))
        except BackendBroken as broken:
            if isinstance(broken.__cause__, EmulationError):
                raise broken.__cause__ from None
            raise
    assert all(np.isfinite(array).any() for array in found.values()) or replaced
    return not [v.complaint for v in assess(wanted, found, known(wanted)[1], ("forward",)) if v.complaint]


@pytest.mark.parametrize("wanted", [ONE, TWO], ids=lambda wanted: wanted.id)
def test_unmutated(wanted: Any) -> None:
    for seed in range(9):
        assert run(wanted, seed, None)


@pytest.mark.parametrize("name", MODULES)
def test_every_mutation_is_noticed(name: str) -> None:
    tried = list(mutations(functions(MODULES[name]), CALLS | HELPERS))
    missed = {
        mutation.name
        for mutation in tried
        if noticed(lambda seed, replaced: run(ONE, seed, replaced), mutation, SEEDS) is None
    }
    assert missed == {known for known in UNSEEN if known.startswith(f"{name}.")}
