"""Turns, when they end, and the interval of a median."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable

import numpy as np
import pytest

from anyflash.bench import timing
from anyflash.bench.timing import Effort, Way, best_peer, interleave, interval, ratios

EFFORT = Effort(least=3, most=12, seconds=10.0, spread=0.02, turn=1e-6)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A clock that only calls move, and no waiting."""
    state = [0.0]
    monkeypatch.setattr(timing, "settle", lambda: None)
    monkeypatch.setattr(time, "perf_counter", lambda: state[0])

    def advance(seconds: float) -> None:
        state[0] += seconds

    return advance


def test_turns_are_interleaved_in_shifting_order(clock: Callable[[float], None]) -> None:
    order: list[str] = []

    def call(name: str) -> Callable[[], None]:
        return lambda: (order.append(name), clock(1.0))[1]

    roles = {"ours": "ours", "a": "peer", "b": "peer"}
    ways = {name: Way(role, [call(name)]) for name, role in roles.items()}
    interleave(ways, Effort(3, 3, 1e9, 0.0, 1e-6))
    assert order[3:] == ["ours", "a", "b", "a", "b", "ours", "b", "ours", "a"]
    assert all(len(way.samples) == 3 for way in ways.values())


def test_a_hopeless_peer_leaves_after_a_round(clock: Callable[[float], None]) -> None:
    ways = {
        "ours": Way("ours", [lambda: clock(1.0)]),
        "near": Way("peer", [lambda: clock(1.2)]),
        "far": Way("peer", [lambda: clock(9.0)]),
        "ceiling": Way("ceiling", [lambda: clock(50.0)]),
    }
    interleave(ways, Effort(3, 3, 1e9, 0.0, 1e-6))
    assert {name: len(way.samples) for name, way in ways.items()} == {
        "ours": 3,
        "near": 3,
        "far": 1,
        "ceiling": 3,
    }
    assert best_peer(ways) == "near"
    assert ratios(ways["ours"], ways["near"]) == pytest.approx([1.2] * 3)


@pytest.mark.parametrize(
    ("spread", "seconds", "rounds"),
    [(0.02, 1e9, 3), (0.0, 1e9, 12), (0.0, 1e-9, 3)],
    ids=["the ratio is known", "never known", "out of time"],
)
def test_rounds_end(clock: Callable[[float], None], spread: float, seconds: float, rounds: int) -> None:
    jitter = itertools.cycle([1.0, 1.01])
    ways = {
        "ours": Way("ours", [lambda: clock(next(jitter))]),
        "peer": Way("peer", [lambda: clock(2.0)]),
    }
    interleave(ways, Effort(3, 12, seconds, spread, 1e-6))
    assert len(ways["ours"].samples) == rounds


def test_short_calls_are_repeated_and_go_around(clock: Callable[[float], None]) -> None:
    counts = [0, 0]

    def call(i: int) -> Callable[[], None]:
        def run() -> None:
            counts[i] += 1
            clock(0.001)

        return run

    way = Way("ours", [call(0), call(1)])
    way.turn(0.1, 0.001)
    assert counts == [51, 50]  # one to wake up, and a hundred timed
    assert way.samples == pytest.approx([0.001])


def test_interval_covers_the_median_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    runs = 2000
    for n in (6, 9, 20):
        inside = sum(
            low <= 0 <= high for low, high in (interval(rng.standard_cauchy(n)) for _ in range(runs))
        )
        deviation = math.sqrt(0.95 * 0.05 / runs)
        assert inside / runs > 0.95 - 4 * deviation


@pytest.mark.parametrize("n", [1, 2, 5])
def test_interval_of_few_samples_is_their_range(n: int) -> None:
    samples = [3.0, 1.0, 2.0, 9.0, 4.0][:n]
    assert interval(samples) == (min(samples), max(samples))


def test_settle_waits_for_spinning_threads() -> None:
    start = time.perf_counter()
    timing.settle()
    assert time.perf_counter() - start < 1.0


def test_median_is_of_the_rounds() -> None:
    assert Way("ours", [], samples=[3.0, 1.0, 2.0]).median == statistics.median([3.0, 1.0, 2.0])
