"""The instruments: agreement, time, memory, and the collection of texts."""

from __future__ import annotations

import contextlib
import time

import numpy as np
import pytest

from anyflash.adoption import agreement, corpus, memory, timing
from anyflash.adoption.row import Result, Role, Variant

EXACT = np.linspace(-1.0, 1.0, 2000)
ROUNDED = EXACT.astype(np.float32)


def found(outputs: np.ndarray, gradients: np.ndarray = ROUNDED) -> agreement.Agreement:
    results: dict[Role, Result] = {
        "eager": Result({"x": ROUNDED}, {"g": ROUNDED}),
        "best": Result({"x": ROUNDED * np.float32(1 + 1e-6)}, {"g": ROUNDED}),
        "ours": Result({"x": outputs}, {"g": gradients}),
    }
    first, second = agreement.compare(Result({"x": EXACT}, {"g": EXACT}), results, "float32")
    assert (first.kind, second.kind) == ("outputs", "gradients")
    return first if gradients is ROUNDED else second


@pytest.mark.parametrize(
    ("scale", "holds"), [(1.0, True), (1 + 1e-6, True), (1 + 2e-6, True), (1 + 4e-6, False), (np.nan, False)]
)
def test_agreement_of_outputs(scale: float, holds: bool) -> None:
    assert found(ROUNDED * np.float32(scale)).holds == holds


def test_agreement_of_gradients() -> None:
    assert not found(ROUNDED, ROUNDED * np.float32(1 + 1e-6)).holds


def test_one_wrong_element_of_many() -> None:
    wrong = ROUNDED.copy()
    wrong[7] += 1e-3
    judged = found(wrong)
    assert not judged.holds
    assert judged.difference == pytest.approx(1e-3, rel=1e-3)
    assert judged.of == 1.0


def test_results_must_be_of_the_same_things() -> None:
    with pytest.raises(ValueError, match="names"):
        agreement.compare(Result({"x": EXACT}, {}), {"ours": Result({"y": EXACT}, {})}, "float32")


@pytest.mark.parametrize(("rounds", "budget", "expected"), [(4, 60.0, 4), (50, 0.0, 5)])
def test_timing_takes_turns(rounds: int, budget: float, expected: int) -> None:
    order: list[Role] = []
    roles: tuple[Role, ...] = ("eager", "best", "ours")
    variants = [Variant(role, role, contextlib.nullcontext) for role in roles]

    def step(role: Role) -> None:
        order.append(role)
        time.sleep(0.002 if role == "eager" else 0.0)

    done: list[int] = []
    seconds = timing.interleaved(step, variants, rounds, budget, done.append)
    assert done == list(range(1, expected + 1))
    assert order[:9] == ["eager", "best", "ours", "best", "ours", "eager", "ours", "eager", "best"]
    assert all(len(s) == expected for s in seconds.values())
    assert min(seconds["eager"]) >= 0.002


MIB = 1 << 20


def test_peak_of_what_is_freed_again() -> None:
    def step() -> None:
        for _ in range(3):
            np.ones(40 * MIB // 8)

    assert memory.peak_rise(step) == pytest.approx(40 * MIB, rel=0.1)


def test_peak_is_not_hidden_by_freed_memory() -> None:
    """Memory freed before, in pieces as a heap keeps them, does not make a step look smaller."""
    kept = [np.ones(30_000) for _ in range(300)]
    kept = kept[::50]
    assert memory.peak_rise(lambda: [np.ones(30_000) for _ in range(200)]) == pytest.approx(
        200 * 30_000 * 8, rel=0.1
    )
    assert len(kept) == 6


def test_peak_of_nothing() -> None:
    assert memory.peak_rise(lambda: None) < MIB
    assert "resident memory" in memory.method()


def test_texts_are_the_same_each_time() -> None:
    first, second = corpus.passages(50, 12, 250), corpus.passages(50, 12, 250)
    assert first == second
    lengths = sorted(len(p.split()) for p in first)
    assert lengths[0] >= 12
    assert lengths[-1] <= 250
    assert lengths[-1] > 4 * lengths[0]
    assert len(set(first)) == 50
    text = corpus.text(20_000)
    assert len(text) == 20_000
    assert corpus.text(1000) == text[:1000]


def test_too_few_texts() -> None:
    with pytest.raises(RuntimeError, match="are needed"):
        corpus.text(10**10)
    with pytest.raises(RuntimeError, match="are needed"):
        corpus.passages(10**7, 100, 200)
