"""The launch that is being emulated: exactly one at a time in a process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from gpu.emulator.errors import EmulationError
from gpu.emulator.scheduler import Scheduler, Task


@dataclass(eq=False)
class Program:
    """One block of threads: its place in the grid, and what lives in its shared memory."""

    number: int
    place: tuple[int, int, int]
    grid: tuple[int, int, int]
    body: Any
    partitions: int = 1
    operations: int = 0
    buffers: int = 0
    loads: set[Any] = field(default_factory=set)
    named: dict[int, Any] = field(default_factory=dict)
    shared_bytes: int = 0
    specialized: bool = False

    def new_operation(self) -> int:
        self.operations += 1
        return self.operations


_running: list[Scheduler] = []


def scheduler() -> Scheduler:
    if not _running:
        raise EmulationError("this runs only inside emulate()")
    return _running[-1]


def task() -> Task:
    current = scheduler().current
    assert current is not None
    return current


@contextmanager
def installed(new: Scheduler) -> Iterator[None]:
    if _running:
        raise EmulationError("an emulated kernel cannot launch another")
    _running.append(new)
    try:
        yield
    finally:
        _running.pop()
