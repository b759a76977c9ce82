"""One partition runs at a time; at every operation that others may notice, a seeded policy says who goes on.

Partitions are threads that hand over a baton, because a kernel's functions are plain Python functions and
cannot be suspended otherwise. Nothing runs concurrently and nothing depends on time, so a run is a function
of its seed, and a deadlock is known at once: nobody is ready and nothing is in flight.

An event is the completion of an asynchronous operation. The hardware may choose its moment freely, and so
does the policy.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from gpu.emulator.clocks import Clock
from gpu.emulator.errors import Deadlock

TIMINGS = ("late", "early", "any")
ORDERS = ("stay", "any", "starve")


@dataclass
class Policy:
    """`timing`: when asynchronous operations complete: only if no partition can go on, as soon as they can,
    or at any time. `order`: which partition goes on: the same as long as it can, any, or any but one that
    must wait until no other can."""

    seed: int
    timing: str
    order: str
    starved: int
    random: random.Random

    @classmethod
    def of(cls, seed: int) -> Policy:
        """The nine combinations take turns, with choices of their own; so do partitions in starving."""
        starved = (seed % 3 + seed // 9) % 4
        return cls(seed, TIMINGS[seed % 3], ORDERS[seed // 3 % 3], starved, random.Random(seed))

    def __str__(self) -> str:
        starved = f" {self.starved}" if self.order == "starve" else ""
        return f"seed {self.seed}: operations complete {self.timing}, partitions: {self.order}{starved}"

    def event_now(self, ready: int, events: int) -> bool:
        if not events or not ready:
            return bool(events)
        if self.timing == "any":
            return self.random.random() < events / (2 * ready + events)
        return self.timing == "early"

    def late(self) -> bool:
        """Is this operation carried out as late as it may be?"""
        return self.timing == "late" or (self.timing == "any" and self.random.random() < 0.5)

    def partition(self, ready: list[Task], current: Task | None) -> Task:
        if self.order == "starve":
            ready = [task for task in ready if task.index != self.starved] or ready
        if current in ready and (self.order == "stay" or self.random.random() < 0.5):
            return current
        return self.random.choice(ready)


@dataclass(eq=False)
class Event:
    what: str
    fire: Callable[[], None]


@dataclass(eq=False)
class Task:
    """A partition of one program."""

    name: str
    index: int
    program: Any
    num_warps: int
    clock: Clock = field(default_factory=Clock)
    ready: Callable[[], bool] | None = None
    blocked_on: str = ""
    phase_wanted: int = 0
    over: bool = False
    spinning: Any = None
    products: list[Any] = field(default_factory=list)
    stores: list[Any] = field(default_factory=list)
    baton: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def publish(self) -> Clock:
        """The clock as others may learn it from here."""
        known = self.clock.copy()
        self.clock.tick(self.index)
        return known


class Stop(BaseException):
    """Unwinds the other partitions after one has failed."""


class Scheduler:
    def __init__(self, policy: Policy, owners: Any, publication: Any) -> None:
        self.policy = policy
        self.owners = owners
        self.publication = publication
        self.tasks: list[Task] = []
        self.events: list[Event] = []
        self.current: Task | None = None
        self.failure: BaseException | None = None
        self.writes = 0
        self._waiting: Iterator[Callable[[], None]] = iter(())
        self._finished = threading.Event()
        self._threads: list[threading.Thread] = []

    def run(self, programs: Iterator[Callable[[], None]], resident: int) -> None:
        """Each element of `programs` starts one program; at most `resident` are alive at once."""
        self._waiting = programs
        for _ in range(resident):
            self.start_next()
        if not self.tasks:
            return
        self._hand_over(None)
        self._finished.wait()
        for thread in self._threads:
            thread.join()
        if self.failure is not None:
            raise self.failure
        while self.events:
            self._take_event().fire()

    def start_next(self) -> None:
        start = next(self._waiting, None)
        if start is not None:
            start()

    def spawn(self, task: Task, body: Callable[[], None]) -> None:
        def life() -> None:
            task.baton.acquire()
            try:
                if self.failure is None:
                    body()
            except Stop:
                pass
            except BaseException as error:  # noqa: BLE001 - `run` raises it again
                self._fail(error, task)
            task.over = True
            self.tasks.remove(task)
            self._leave(task)

        self.tasks.append(task)
        self._threads.append(threading.Thread(target=life, name=task.name, daemon=True))
        self._threads[-1].start()

    def pause(self, ready: Callable[[], bool] | None = None, what: str = "") -> None:
        """Let others go on; come back when chosen, at the earliest when `ready` says so."""
        task = self.current
        assert task is not None
        task.ready, task.blocked_on = ready, what
        self._hand_over(task)
        task.ready = None
        if self.failure is not None:
            raise Stop

    def _fail(self, error: BaseException, task: Task) -> None:
        if self.failure is None:
            error.add_note(f"in {task.name}; {self.policy}")
            self.failure = error

    def _leave(self, task: Task) -> None:
        try:
            if self.failure is None and self.tasks:
                self._hand_over(None)
                return
        except BaseException as error:  # noqa: BLE001 - `run` raises it again
            self._fail(error, task)
        if self.failure is not None and self.tasks:
            # One after the other, each wakes the next when it has unwound.
            self.current = self.tasks[0]
            self.current.baton.release()
            return
        self._finished.set()

    def _hand_over(self, task: Task | None) -> None:
        chosen = self._choose(task)
        if chosen is task:
            return
        self.current = chosen
        chosen.baton.release()
        if task is not None:
            task.baton.acquire()

    def _choose(self, current: Task | None) -> Task:
        while True:
            ready = [task for task in self.tasks if task.ready is None or task.ready()]
            if self.policy.event_now(len(ready), len(self.events)):
                self._take_event().fire()
                continue
            if not ready:
                stuck = "; ".join(f"{task.name} waits for {task.blocked_on}" for task in self.tasks)
                raise Deadlock(f"nobody can go on: {stuck}")
            return self.policy.partition(ready, current)

    def _take_event(self) -> Event:
        return self.events.pop(self.policy.random.randrange(len(self.events)))
