"""mbarriers and named barriers.

An mbarrier's phase ends when its arrivals are all in and its bytes balance. Beyond that it is checked that no
two phases can end under a partition that still waits for the first: parities would not tell the two apart,
and the partition would sleep through. This too is found by order: whoever ends phase n + 1 must know that
all waits for phase n are over.
"""

from __future__ import annotations

from typing import Any

from gpu.emulator import machine
from gpu.emulator.clocks import Clock
from gpu.emulator.errors import BarrierMisuse
from gpu.emulator.scheduler import Task
from gpu.emulator.source import where

# Arrivals, and bytes, that a phase can count.
_MOST = (1 << 20) - 1


class Barrier:
    """An mbarrier. `phase` counts those that have ended."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.count = 0
        self.pending = 0
        self.bytes = 0
        self.phase = 0
        self._made = (0, 0)
        self._known = Clock()
        self._ended = Clock()
        self._seen: list[tuple[Task, int, str]] = []
        self._blocked: list[Task] = []
        self._history: list[str] = []

    shape = (1,)

    def index(self, index: Any) -> Barrier:
        if int(index):
            raise BarrierMisuse(f"{self.name} is one barrier; index {int(index)} is asked for")
        return self

    def _live(self) -> None:
        if not self.count:
            raise BarrierMisuse(f"{self.name} is used at {where()} before it is initialised")

    def _ordered(self) -> Task:
        """This partition, which knows of the initialisation."""
        self._live()
        task = machine.task()
        if not task.clock.knows(*self._made):
            raise BarrierMisuse(
                f"{self.name} is used at {where()}, and nothing orders its initialisation before"
            )
        return task

    def init(self, count: int) -> None:
        if self.count:
            raise BarrierMisuse(f"{self.name} is initialised a second time at {where()}")
        if not 0 < int(count) <= _MOST:
            raise BarrierMisuse(f"{self.name} is initialised for {int(count)} arrivals")
        self.count = self.pending = int(count)
        task = machine.task()
        self._made = (task.index, task.clock.ticks[task.index])

    def invalidate(self) -> None:
        self._live()
        self.count = 0

    def expect(self, size: int) -> None:
        if int(size) <= 0:
            raise BarrierMisuse(f"{self.name} is told to expect {int(size)} bytes at {where()}")
        self._live()
        self.bytes += int(size)
        if self.bytes > _MOST:
            raise BarrierMisuse(f"{self.name} expects {self.bytes} bytes, of at most {_MOST}, at {where()}")
        self.arrive(1)

    def arrive(self, count: int) -> None:
        task = self._ordered()
        self.pending -= int(count)
        self._history.append(f"{task.name} at {where()}")
        if self.pending < 0:
            came = "; ".join(self._history)
            raise BarrierMisuse(f"{self.name} takes {self.count} arrivals a phase; these came: {came}")
        self._known.join(task.publish())
        self._end_if_complete()

    def delivered(self, size: int, operation: int) -> None:
        """Bytes have arrived. They may come before somebody says that they are expected."""
        self._live()
        self.bytes -= size
        self._known.done |= 1 << operation
        self._end_if_complete()

    def _end_if_complete(self) -> None:
        if self.pending or self.bytes:
            return
        for task in self._blocked:
            if task.phase_wanted < self.phase:
                raise BarrierMisuse(
                    f"{self.name} ends phase {self.phase} while {task.name} waits for phase "
                    f"{task.phase_wanted}, and its parity hides that one from it"
                )
        for task, tick, said in self._seen:
            if not self._known.knows(task.index, tick):
                raise BarrierMisuse(
                    f"{self.name} can end phase {self.phase} before {task.name} has seen the end of phase "
                    f"{self.phase - 1} at {said}: nothing orders the two"
                )
        self._ended, self._known = self._known, Clock()
        self._seen = []
        self._history = []
        self.phase += 1
        self.pending = self.count

    def wait(self, parity: int) -> None:
        """Until the current phase is not of this parity: the one before it, of this parity, has ended."""
        task = self._ordered()
        parity = int(parity)
        if parity not in (0, 1):
            raise BarrierMisuse(f"{self.name} is asked for parity {parity} at {where()}")
        if self.phase & 1 == parity:
            task.phase_wanted = self.phase
            self._blocked.append(task)
            what = f"phase {self.phase} of {self.name}, {self.pending} arrivals and {self.bytes} bytes short"
            machine.scheduler().pause(lambda: self.phase & 1 != parity, f"{what}, at {where()}")
            self._blocked.remove(task)
        else:
            machine.scheduler().pause()
            self._live()
            if self.phase & 1 == parity:
                return self.wait(parity)
        task.clock.join(self._ended)
        self._seen.append((task, task.clock.ticks.get(task.index, 0), where()))
        return None


class Barriers:
    """Several mbarriers in one buffer."""

    def __init__(self, name: str, shape: list[int]) -> None:
        self.name = name
        self.shape = shape
        inner = shape[1:]
        self._each: list[Any] = [
            Barriers(f"{name}[{i}]", inner) if len(inner) > 1 else Barrier(f"{name}[{i}]")
            for i in range(shape[0])
        ]

    def index(self, index: Any) -> Any:
        at = int(index)
        if not 0 <= at < len(self._each):
            raise BarrierMisuse(f"{self.name} has {len(self._each)} barriers; {at} is asked for")
        return self._each[at]


class Named:
    """One hardware barrier of a program."""

    def __init__(self, name: int) -> None:
        self.name = name
        self.threads = 0
        self.came = 0
        self.generation = 0
        self._here: list[Task] = []
        self._known = Clock()
        self._ended = Clock()

    def arrive(self, threads: int) -> None:
        task = machine.task()
        if self.came and threads != self.threads:
            raise BarrierMisuse(f"named barrier {self.name} is for {self.threads} and for {threads} threads")
        if task in self._here:
            raise BarrierMisuse(
                f"{task.name} comes twice to named barrier {self.name} before it opens, {where()}"
            )
        self.threads = threads
        self._here.append(task)
        self.came += 32 * task.num_warps
        if self.came > threads:
            raise BarrierMisuse(
                f"{self.came} threads come to named barrier {self.name}, which is for {threads}"
            )
        self._known.join(task.publish())
        if self.came == threads:
            self._ended, self._known = self._known, Clock()
            self.came = 0
            self._here = []
            self.generation += 1

    def wait(self, threads: int) -> None:
        before = self.generation
        self.arrive(threads)
        what = f"named barrier {self.name}, {threads - self.came} threads short, at {where()}"
        machine.scheduler().pause(lambda: self.generation > before, what)
        if self.generation > before + 1:
            raise BarrierMisuse(f"named barrier {self.name} opened twice under one wait, at {where()}")
        machine.task().clock.join(self._ended)


def named(name: Any) -> Named:
    at = int(name)
    if not 0 <= at < 16:
        raise BarrierMisuse(f"there are 16 named barriers, 0 to 15; {at} is asked for at {where()}")
    barriers = machine.task().program.named
    return barriers.setdefault(at, Named(at))
