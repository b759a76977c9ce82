"""What must not change a bit: threads, how a backward is cut, who else is in the batch, register tiles."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from anyflash.kernels.llvm import schedule, scratch
from anyflash.kernels.llvm.schedule import BLOCK_K, Walk
from anyflash.kernels.llvm.spec import RegisterTile
from kernels.cases import Array, Case, Program, draw
from kernels.programs import floats, table
from kernels.run import COMBINATIONS, check, run, same_bits

HEADS, QUERIES, KEYS = (4, 2), 110, 700
EVERY = COMBINATIONS[:3]
CAUSAL = lambda rng: {"causal": True}


def slopes(rng: np.random.Generator):
    found = table(floats(rng, HEADS[0]))
    return {"score": lambda s, at: s * found[at.head], "causal": True}


def dense_bias(rng: np.random.Generator):
    return {"bias": floats(rng, QUERIES, KEYS)}


PROGRAMS: dict[str, Program] = {
    "plain": lambda rng: {},
    "causal, sinks": lambda rng: {"causal": True, "sinks": floats(rng, HEADS[0])},
    "dropout": lambda rng: {"dropout_p": 0.2, "window": (200, 0)},
    "slopes": slopes,
    "bias": dense_bias,
}
FORMS = [(name, at) for name in PROGRAMS for at in EVERY if name in ("plain", "slopes") or at is EVERY[0]]


def case(name: str, dtype: str) -> Case:
    return Case(name, dtype, dims=(24, 40), heads=HEADS, lens=(QUERIES, KEYS), program=PROGRAMS[name])


@pytest.mark.parametrize(("name", "at"), FORMS, ids=str)
def test_threads_and_parts(name: str, at: tuple[str, str]) -> None:
    """Three threads make a backward of two heads go in two walks, over ranges of queries and of keys."""
    dtype, target = at
    given = case(name, dtype)
    alone = check(given, target)
    for threads in (2, 3, 16):
        assert not same_bits(alone, run(given, target, threads=threads)), threads


def test_three_threads_do_split() -> None:
    for name in PROGRAMS:
        problem = draw(case(name, "float32")).problem
        parts = [[w.part for w in schedule.backward_walks(problem, 48, n)] for n in (1, 3)]
        # Every row adds to the same slopes.
        split = ["backward"] if name == "slopes" else ["backward_dq", "backward_dkv"]
        assert parts == [["backward"], split], name


@pytest.mark.parametrize("step", [BLOCK_K, 3 * BLOCK_K])
def test_ranges_of_keys(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype, target = EVERY[0]
    given = case("causal, sinks", dtype)
    whole = run(given, target, threads=1)
    monkeypatch.setattr(schedule, "KEYS_A_TASK", step)
    assert not same_bits(whole, run(given, target, threads=3))


@pytest.mark.parametrize("at", EVERY, ids=str)
def test_batch_entries_do_not_know_each_other(at: tuple[str, str]) -> None:
    dtype, target = at
    batch = 3
    shape = {
        "dims": (24, 40),
        "heads": HEADS,
        "batch": batch,
        "lens": (50, 100),
        "program": lambda rng: {"causal": True},
    }
    together = run(Case("batch", dtype, **shape), target, threads=2)

    def only(i: int):
        def edit(arrays: dict[str, Array]) -> None:
            for name in arrays:
                arrays[name] = arrays[name][i : i + 1]

        return edit

    for i in range(batch):
        alone = run(Case("batch", dtype, edit=only(i), **shape), target)
        for name, found in alone.items():
            part = together[name][:, i : i + 1] if name == "stats" else together[name][i : i + 1]
            assert found.tobytes() == part.tobytes(), (i, name)


PACKED = ((20, 100), (0, 7), (1, 70), (129, 129), (9, 0), (4, 65), (33, 193), (100, 5), (2, 0))


@pytest.mark.parametrize("at", EVERY, ids=str)
def test_packed_sequences_do_not_know_each_other(at: tuple[str, str]) -> None:
    """Each as in a call of its own, with its own number of queries a block."""
    dtype, target = at
    shape = {"dims": (24, 40), "heads": HEADS, "program": lambda rng: {"window": (60, 5)}}
    together = run(Case("packed", dtype, packed=PACKED, **shape), target, threads=3)
    starts = np.cumsum([(0, 0), *PACKED], axis=0)
    for i, lens in enumerate(PACKED):
        (q0, k0), (q1, k1) = starts[i], starts[i + 1]
        rows = {"q": (q0, q1), "k": (k0, k1), "v": (k0, k1), "dout": (q0, q1)}

        def edit(arrays: dict[str, Array], rows=rows, i=i) -> None:
            whole = Case("packed", dtype, packed=PACKED, **shape)
            arrays |= cut(whole, rows)

        alone = run(Case("packed", dtype, packed=(lens,), edit=edit, **shape), target)
        for name, found in alone.items():
            if name in ("lse", "stats"):
                part = together[name][..., q0:q1]
            else:
                first, last = (q0, q1) if name in ("out", "dq") else (k0, k1)
                part = together[name][first:last]
            assert found.tobytes() == np.ascontiguousarray(part).tobytes(), (i, lens, name)


def cut(whole: Case, rows: dict[str, tuple[int, int]]) -> dict[str, Array]:
    arrays = draw(whole).arrays
    found = {name: arrays[name][first:last] for name, (first, last) in rows.items()}
    found["dlse"] = arrays["dlse"][:, slice(*rows["q"])]
    return found


@pytest.mark.parametrize("at", EVERY, ids=str)
def test_register_tiles_change_speed_only(at: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    dtype, target = at
    given = Case(
        "tiles", dtype, dims=(24, 40), heads=(2, 1), lens=(100, 200), program=lambda rng: {"causal": True}
    )
    usual = run(given, target)
    make = schedule.make_spec
    other = {"query_vectors": 2, "tile": RegisterTile(4, 2, 8)}
    monkeypatch.setattr(schedule, "make_spec", lambda *a: dataclasses.replace(make(*a), **other))
    monkeypatch.setattr(schedule, "query_vectors", lambda *a: other["query_vectors"])
    assert not same_bits(usual, run(given, target))


def test_contents_of_scratch_do_not_matter() -> None:
    for dtype, target in EVERY:
        given = case("plain", dtype)
        poisoned = run(given, target)
        scratch.poison(False)
        try:
            assert not same_bits(poisoned, run(given, target))
        finally:
            scratch.poison(True)


def test_walks_of_the_split_are_those_of_the_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task that stands for several heads and blocks gives the bits of many small ones."""
    dtype, target = EVERY[0]
    given = case("plain", dtype)
    usual = run(given, target)
    walks = schedule.backward_walks

    def joined(problem, block_q: int, threads: int) -> tuple[Walk, ...]:
        (walk,) = walks(problem, block_q, 1)
        tasks = walk.tasks[:1].copy()
        tasks[0, 1], tasks[0, 3] = problem.batch, problem.heads_kv
        return (Walk("backward", tasks, walk.acc_keys),)

    monkeypatch.setattr(schedule, "backward_walks", joined)
    assert not same_bits(usual, run(given, target))
