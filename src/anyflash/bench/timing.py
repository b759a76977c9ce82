"""Times of several ways to do the same thing, measured in turns in one process.

A round gives each way one turn; the order shifts by one from round to round. Before a turn the process is
left alone until no thread of another library spins any more, and a short call is repeated until the turn is
long enough to be timed. Rounds go on until the ratio between ours and the best peer is known well or time is
up; ways that are far behind drop out early, since more of their samples change nothing.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Literal

Call = Callable[[], object]
Role = Literal["ours", "peer", "ceiling"]

# Threads that still spin use processor time: the process is settled once it uses less than this part of it.
_SETTLED = 0.1
_SETTLE_STEP, _SETTLE_MOST = 1e-3, 0.05
_CONFIDENCE = 0.95
_LONG = 0.5
# A peer drops out if its best turn is this much behind the best peer's, early and once there are enough
# rounds.
_HOPELESS, _BEHIND = 3.0, 1.3


@dataclass(frozen=True, slots=True)
class Effort:
    """When to stop: after `most` rounds, after `seconds`, or once the ratio's interval is narrower than
    `spread` times the ratio on either side; never before `least` rounds. A turn lasts `turn` seconds or one
    call."""

    least: int
    most: int
    seconds: float
    spread: float
    turn: float


FULL = Effort(least=7, most=60, seconds=8.0, spread=0.02, turn=0.01)
QUICK = Effort(least=3, most=15, seconds=3.0, spread=0.05, turn=0.005)


@dataclass(slots=True)
class Way:
    """`calls` are made one after the other, around and around: several of them stand for cold inputs.

    `context` is entered around a turn, outside the time. `samples` are seconds of one call, one a round.
    """

    role: Role
    calls: Sequence[Call]
    context: Callable[[], AbstractContextManager[object]] = nullcontext
    samples: list[float] = field(default_factory=list)
    _next: int = 0

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    def estimate(self) -> float:
        """Seconds of a call: the second, unless the first was long enough for its extra work not to
        matter."""
        with self.context():
            first = self._make_calls(1)
            return first if first > _LONG else self._make_calls(1)

    def turn(self, seconds: float, estimate: float) -> None:
        """Add a sample: the mean of as many calls as fill `seconds`."""
        settle()
        with self.context(), _no_collection():
            if estimate < seconds:
                # Wakes its threads, and brings back into cache what the others displaced.
                self._make_calls(1)
            self.samples.append(self._make_calls(max(1, math.ceil(seconds / estimate))))

    def _make_calls(self, count: int) -> float:
        calls = [self.calls[(self._next + i) % len(self.calls)] for i in range(count)]
        self._next += count
        start = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - start) / count


def interleave(
    ways: Mapping[str, Way], effort: Effort, progress: Callable[[float], None] = lambda part: None
) -> None:
    """Fill the samples of the ways, of which one is ours."""
    estimates = {name: way.estimate() for name, way in ways.items()}
    start = time.perf_counter()
    for done in range(effort.most):
        running = [name for name in ways if not done or _contends(ways[name], ways, done >= effort.least)]
        shift = done % len(running)
        for name in running[shift:] + running[:shift]:
            ways[name].turn(effort.turn, estimates[name])
        spent = time.perf_counter() - start
        progress(min(1.0, max(spent / effort.seconds, (done + 1) / effort.most)))
        if done + 1 >= effort.least and (spent > effort.seconds or _known(ways, effort.spread)):
            return


def best_peer(ways: Mapping[str, Way]) -> str | None:
    """The peer with the smallest median; None without peers."""
    peers = {name: way.median for name, way in ways.items() if way.role == "peer"}
    return min(peers, key=peers.__getitem__, default=None)


def ratios(ours: Way, other: Way) -> list[float]:
    """Of each round: how often ours fits into the other's time."""
    return [theirs / own for own, theirs in zip(ours.samples, other.samples, strict=False)]


def interval(samples: Sequence[float]) -> tuple[float, float]:
    """Where the median lies with 95 % confidence, whatever the distribution: two of the samples, by rank.

    With fewer than six samples no ranks reach that confidence, and it is the whole range.
    """
    ordered = sorted(samples)
    n, outside, rank = len(ordered), 0.0, 0
    while rank < n // 2:
        outside += 2 * math.comb(n, rank) / 2**n
        if outside > 1 - _CONFIDENCE:
            break
        rank += 1
    low = max(rank - 1, 0)
    return ordered[low], ordered[n - 1 - low]


def settle() -> None:
    """Wait until the process is idle, at most 50 ms: thread pools keep spinning for some time after a
    call."""
    for _ in range(round(_SETTLE_MOST / _SETTLE_STEP)):
        busy, start = time.process_time(), time.perf_counter()
        time.sleep(_SETTLE_STEP)
        if time.process_time() - busy < _SETTLED * (time.perf_counter() - start):
            return


def _contends(way: Way, ways: Mapping[str, Way], enough: bool) -> bool:
    if way.role != "peer":
        return True
    fastest = min(min(other.samples) for other in ways.values() if other.role == "peer")
    return min(way.samples) <= (_BEHIND if enough else _HOPELESS) * fastest


def _known(ways: Mapping[str, Way], spread: float) -> bool:
    ours = next(way for way in ways.values() if way.role == "ours")
    best = best_peer(ways)
    samples = ours.samples if best is None else ratios(ours, ways[best])
    low, high = interval(samples)
    middle = statistics.median(samples)
    return high - middle <= spread * middle and middle - low <= spread * middle


class _no_collection:
    """Garbage is not collected while a turn is timed."""

    def __enter__(self) -> None:
        self._enabled = gc.isenabled()
        gc.disable()

    def __exit__(self, *_: object) -> None:
        if self._enabled:
            gc.enable()
