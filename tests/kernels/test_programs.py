"""Every kind of score and mask, forward, backward and as a decode, against the reference."""

from __future__ import annotations

import pytest

from kernels.cases import Case
from kernels.programs import BATCH, HEADS, KEYS, PROGRAMS, QUERIES
from kernels.run import COMBINATIONS, check

# Each program on one target in full, and on another of the rest in turn.
FIRST, *OTHERS = COMBINATIONS
TURNS = [(name, at) for i, name in enumerate(PROGRAMS) for at in (FIRST, OTHERS[i % len(OTHERS)])]
ROWS = 2  # of a decode


def case(name: str, dtype: str, queries: int = QUERIES) -> Case:
    return Case(
        name, dtype, dims=(24, 19), heads=(HEADS, 2), batch=BATCH, lens=(queries, KEYS),
        program=PROGRAMS[name], dlse=len(name) % 2 == 0,
    )  # fmt: skip


@pytest.mark.parametrize(("name", "at"), TURNS, ids=str)
def test_forward_and_backward(name: str, at: tuple[str, str]) -> None:
    dtype, target = at
    check(case(name, dtype), target)


@pytest.mark.parametrize(
    ("name", "at"), [(n, COMBINATIONS[i % len(COMBINATIONS)]) for i, n in enumerate(PROGRAMS)], ids=str
)
def test_decode(name: str, at: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.programs.QUERIES", ROWS)
    dtype, target = at
    check(case(name, dtype, ROWS), target, backward=False)
