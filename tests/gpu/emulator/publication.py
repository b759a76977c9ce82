"""Order through global memory, between programs of one launch: stores, atomics, loads.

What threads of a partition stored may be read by another program once an atomic of the one has released it
and an atomic on the same element has acquired it for the other, both at the scope of the device. Threads of a
block store side by side, and one of them carries out the atomic: it releases what the others stored only if
they met it at a barrier in between. A scalar is stored by that one thread itself.

A load of anything else that another program has stored is a race, whatever value it finds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from gpu.emulator.errors import Race
from gpu.emulator.scheduler import Task
from gpu.emulator.source import where

_RELEASES, _ACQUIRES = ("acq_rel", "release"), ("acq_rel", "acquire")


@dataclass
class _Known:
    """By number of a partition, how many of its stores are known: of blocks, and of scalars."""

    blocks: dict[int, int] = field(default_factory=dict)
    scalars: dict[int, int] = field(default_factory=dict)

    def join(self, other: _Known) -> None:
        for mine, theirs in ((self.blocks, other.blocks), (self.scalars, other.scalars)):
            for writer, count in theirs.items():
                mine[writer] = max(mine.get(writer, 0), count)


@dataclass
class _Partition:
    number: int
    task: Task
    blocks: int = 0
    met: int = 0
    scalars: int = 0
    known: _Known = field(default_factory=_Known)


@dataclass
class _Stored:
    """Of each element the partition that stored it last, 0 for none, and its number among those stores."""

    writer: torch.Tensor
    count: torch.Tensor
    scalar: torch.Tensor


class Publication:
    """What has been stored in a launch, and who may know of it."""

    def __init__(self) -> None:
        self._partitions: dict[Task, _Partition] = {}
        self._stored: dict[tuple[int, int], _Stored] = {}
        self._released: dict[tuple[int, int], _Known] = {}

    def _of(self, task: Task) -> _Partition:
        return self._partitions.setdefault(task, _Partition(len(self._partitions) + 1, task))

    def stored(self, memory: torch.Tensor, at: torch.Tensor, task: Task, scalar: bool) -> None:
        key = (memory.data_ptr(), memory.element_size())
        if key not in self._stored:
            # numpy leaves pages untouched until they are written.
            made = [torch.from_numpy(np.zeros(memory.numel(), np.int32)) for _ in range(2)]
            self._stored[key] = _Stored(*made, torch.from_numpy(np.zeros(memory.numel(), bool)))
        mine, record = self._of(task), self._stored[key]
        if scalar:
            mine.scalars += 1
        else:
            mine.blocks += 1
        record.writer[at] = mine.number
        record.count[at] = mine.scalars if scalar else mine.blocks
        record.scalar[at] = scalar

    def met(self, task: Task) -> None:
        """The partition's threads wait for each other."""
        mine = self._of(task)
        mine.met = mine.blocks

    def atomic(self, memory: torch.Tensor, at: torch.Tensor, task: Task, sem: str, scope: str) -> None:
        if scope == "cta":
            return
        mine = self._of(task)
        for place in at.flatten().tolist():
            element = self._released.setdefault((memory.data_ptr(), place), _Known())
            if sem in _ACQUIRES:
                mine.known.join(element)
            if sem in _RELEASES:
                own = _Known({mine.number: mine.met}, {mine.number: mine.scalars})
                own.join(mine.known)
                element.join(own)

    def loaded(self, memory: torch.Tensor, at: torch.Tensor, task: Task) -> None:
        record = self._stored.get((memory.data_ptr(), memory.element_size()))
        if record is None:
            return
        mine = self._of(task)
        writers = record.writer[at].flatten()
        others = [int(number) for number in torch.unique(writers) if number]
        known = {partition.number: partition for partition in self._partitions.values()}
        for number in others:
            other = known[number].task
            if other.program is task.program:
                continue
            chosen = writers == number
            counts, scalar = record.count[at].flatten()[chosen], record.scalar[at].flatten()[chosen]
            for found, least in ((counts[~scalar], mine.known.blocks), (counts[scalar], mine.known.scalars)):
                if found.numel() and int(found.max()) > least.get(number, 0):
                    reader, writer = task.program.place, other.program.place
                    raise Race(
                        f"{task.name} of program {reader} reads at {where()} what {other.name} of program "
                        f"{writer} stored, and no atomics order the two"
                    )


def sem_of(order: dict[str, Any]) -> tuple[str, str]:
    """An atomic's order and scope: Triton's own where none are named."""
    return str(order.get("sem") or "acq_rel"), str(order.get("scope") or "gpu")
