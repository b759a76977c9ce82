"""Beyond its arrays a call takes memory for tiles, and for K and V of one head a thread: at most linear in
the length, whatever the program. Measured: what numpy allocates, scratch included."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest

from anyflash.kernels.llvm import scratch
from kernels.cases import Case, Program
from kernels.programs import floats, table
from kernels.run import COMBINATIONS, CpuBackend, run

HEADS, DIMS, THREADS = (4, 2), (32, 24), 3
LENGTHS = SHORT, MIDDLE, LONG = 512, 1024, 3072
TILES = 1 << 19  # bytes of a thread's tiles at these head dims, whatever the length


def documents(length: int) -> Program:
    def make(rng: np.random.Generator):
        ids = table(np.sort(rng.integers(0, 9, length)).astype(np.int32))
        return {"mask": lambda at: ids[at.k] == ids[at.q]}

    return make


PROGRAMS: dict[str, Callable[[int], Program]] = {
    "plain": lambda n: lambda rng: {},
    "causal, sinks, dropout": lambda n: (
        lambda rng: {"causal": True, "sinks": floats(rng, 4), "dropout_p": 0.1}
    ),
    "bias": lambda n: lambda rng: {"bias": floats(rng, n, n)},
    "dense mask": lambda n: lambda rng: {"mask": np.tri(n, dtype=bool)},
    "documents": documents,
    "slopes": lambda n: lambda rng: {"alibi_slopes": floats(rng, 4)},
}


class Watched(CpuBackend):
    """Notes the greatest number of bytes that lie allocated in a call beyond those before it."""

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}

    def forward(self, *arguments) -> None:
        self._watch("forward", super().forward, arguments)

    def backward(self, *arguments) -> None:
        self._watch("backward", super().backward, arguments)

    def _watch(self, name: str, call, arguments) -> None:
        call(*arguments)  # compiles, and fills what is kept from call to call
        gc.collect()
        scratch.free_scratch()
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        call(*arguments)
        self.peaks[name] = tracemalloc.get_traced_memory()[1] - before


def peaks(length: int, dtype: str, target: str, program: Program, threads: int = THREADS) -> dict[str, int]:
    watched = Watched()
    case = Case("memory", dtype, dims=DIMS, heads=HEADS, lens=(length, length), program=program)
    tracemalloc.start()
    try:
        run(case, target, threads=threads, backend=watched)
    finally:
        tracemalloc.stop()
    return watched.peaks


FORMS = [
    (name, at) for name in PROGRAMS for at in COMBINATIONS[:3] if name == "plain" or at is COMBINATIONS[0]
]


@pytest.mark.parametrize(("name", "at"), FORMS, ids=str)
def test_memory_is_linear_in_the_length(name: str, at: tuple[str, str]) -> None:
    dtype, target = at
    found = {n: peaks(n, dtype, target, PROGRAMS[name](n)) for n in LENGTHS}
    for part in ("forward", "backward"):
        short, middle, long = (found[n][part] for n in LENGTHS)
        # At most proportional to the length, and far from a number for each score.
        assert middle <= short * (MIDDLE / SHORT), (part, short, middle)
        assert long <= middle * (LONG / MIDDLE), (part, middle, long)
        # Tiles, and packed rows, words and sums of both gradients for the keys of one head, for each thread.
        a_key = 3 * 4 * sum(-(-d // 32) * 32 for d in DIMS)
        assert long <= THREADS * (TILES + LONG * a_key), (part, long)
        assert long < 4 * LONG * LONG / 8, (part, long)


def test_memory_grows_with_threads_at_most() -> None:
    dtype, target = COMBINATIONS[0]
    plain = PROGRAMS["plain"](MIDDLE)
    one, four = (peaks(MIDDLE, dtype, target, plain, threads) for threads in (1, 4))
    for part in ("forward", "backward"):
        assert four[part] <= 4 * one[part] + 16384, part
