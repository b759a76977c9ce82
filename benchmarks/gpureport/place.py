"""The device, the time that is left, and medians of repeats."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

Item = TypeVar("Item")


@dataclass
class Place:
    """Where calls run. `dry`: on the CPU, by Triton's interpreter, where times mean nothing."""

    dry: bool
    quick: bool
    backend: str = "triton"
    _flush: Any = field(default=None, repr=False)

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    def wait(self) -> None:
        if not self.dry:
            torch.cuda.synchronize()

    def forget(self) -> None:
        """Give memory that no tensor uses back, so that the next cell has it."""
        if not self.dry:
            torch.cuda.empty_cache()

    def milliseconds(self, calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
        """Medians by name; the calls take turns until the time is up, at least five times each."""
        least = 1 if self.dry else 5
        for call in calls.values():
            call()
        taken: dict[str, list[float]] = {name: [] for name in calls}
        self.wait()
        end = time.perf_counter() + (0 if self.dry else seconds)
        while time.perf_counter() < end or len(next(iter(taken.values()))) < least:
            for name, call in calls.items():
                taken[name].append(self._once(call))
        return {name: statistics.median(values) for name, values in taken.items()}

    def _once(self, call: Callable[[], object]) -> float:
        if self.dry:
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) * 1e3
        if self._flush is None:
            self._flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
        # What the last call left in L2 is overwritten.
        self._flush.zero_()
        begin, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        stop.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(stop))


class Clock:
    """Shares out the seconds of a run. A part may use what earlier ones left, and what is its own share."""

    def __init__(self, seconds: float, shares: dict[str, float]) -> None:
        self._start = time.perf_counter()
        total = sum(shares.values())
        ends, end = {}, 0.0
        for name, share in shares.items():
            end += share
            ends[name] = end / total * seconds
        self._ends = ends

    def left(self, part: str) -> float:
        return self._ends[part] - (time.perf_counter() - self._start)

    def while_time(self, part: str, items: Iterable[Item], skipped: list[str]) -> Iterator[Item]:
        """The items until the part's time is up; the others' names go to `skipped`."""
        for item in items:
            if self.left(part) > 0:
                yield item
            else:
                skipped.append(str(item))
