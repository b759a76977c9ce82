"""What has happened before what: vector clocks of partitions, and sets of finished asynchronous operations.

A partition's clock has, for every partition, the latest tick that it knows to be over, and the
asynchronous operations that it knows to be complete. Clocks travel along mbarriers, named barriers and
the start and end of partitions, and nothing else. A tick ends when its partition makes its clock known to
others, so accesses of one tick stand or fall together.

`fenced` is the part of `ticks` that a proxy fence separates from what comes now: stores of those ticks
may be read by TMA and wgmma.
"""

from __future__ import annotations


class Clock:
    __slots__ = ("done", "fenced", "ticks")

    def __init__(self) -> None:
        self.ticks: dict[int, int] = {}
        self.fenced: dict[int, int] = {}
        self.done = 0

    def copy(self) -> Clock:
        other = Clock()
        other.ticks = dict(self.ticks)
        other.fenced = dict(self.fenced)
        other.done = self.done
        return other

    def join(self, other: Clock) -> None:
        for mine, theirs in ((self.ticks, other.ticks), (self.fenced, other.fenced)):
            for partition, tick in theirs.items():
                if mine.get(partition, 0) < tick:
                    mine[partition] = tick
        self.done |= other.done

    def knows(self, partition: int, tick: int) -> bool:
        return self.ticks.get(partition, 0) >= tick

    def fences(self, partition: int, tick: int) -> bool:
        return self.fenced.get(partition, 0) >= tick

    def finished(self, operation: int) -> bool:
        return bool(self.done >> operation & 1)

    def tick(self, partition: int) -> None:
        self.ticks[partition] = self.ticks.get(partition, 0) + 1

    def fence(self, partition: int) -> None:
        self.fenced = dict(self.ticks)
        self.tick(partition)
