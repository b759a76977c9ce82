"""Global memory: tensors of the caller, bounded, with a note of which program wrote an element.

In one launch no element is stored by two programs, unless the caller says that programs take turns
(`exclusive=False`). Additions by TMA or atomics may meet.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from gpu.emulator import machine
from gpu.emulator.errors import OutOfBounds, Race
from gpu.emulator.publication import sem_of
from gpu.emulator.source import where
from gpu.emulator.tensor import Pointer, Tensor, as_value, common_layout


class Owners:
    """Which program has stored each element, counted from 1."""

    def __init__(self, exclusive: bool) -> None:
        self._exclusive = exclusive
        self._of: dict[tuple[int, int], torch.Tensor] = {}

    def stored(self, memory: torch.Tensor, part: Any, program: Any) -> None:
        """`part`: indices of elements, or (extents, strides, start)."""
        if not self._exclusive:
            return
        key = (memory.data_ptr(), memory.element_size())
        if key not in self._of:
            # numpy leaves pages untouched until they are written.
            self._of[key] = torch.from_numpy(np.zeros(memory.numel(), np.int32))
        owners = self._of[key]
        seen = owners[part] if isinstance(part, torch.Tensor) else owners.as_strided(*part)
        if bool(((seen != 0) & (seen != program.number)).any()):
            other = int(seen[(seen != 0) & (seen != program.number)].flatten()[0])
            raise Race(f"program {program.place} stores what program number {other} has stored, at {where()}")
        if isinstance(part, torch.Tensor):
            owners[part] = program.number
        else:
            seen.fill_(program.number)


def _indices(pointer: Pointer, mask: Any, *others: Any) -> tuple[torch.Tensor, torch.Tensor | None, Any]:
    """Elements addressed, where to, and the layout of the block; only inside the tensor."""
    offsets = pointer.offsets
    layout = common_layout(offsets, mask, *others)
    at = offsets.data.to(torch.int64) if isinstance(offsets, Tensor) else torch.tensor(int(offsets))
    chosen = None
    if mask is not None:
        chosen = mask.data if isinstance(mask, Tensor) else torch.tensor(bool(mask))
        shape = torch.broadcast_shapes(at.shape, chosen.shape)
        at, chosen = at.expand(shape), chosen.expand(shape)
    touched = at if chosen is None else at[chosen]
    size = pointer.flat.numel()
    if touched.numel() and (int(touched.min()) < 0 or int(touched.max()) >= size):
        low, high = int(touched.min()), int(touched.max())
        raise OutOfBounds(f"elements {low} to {high} of a tensor of {size} are addressed at {where()}")
    return at, chosen, layout


def load(
    pointer: Pointer, mask: Any = None, other: Any = None, volatile: Any = False, **_caching: Any
) -> Any:
    if bool(volatile):
        return _atomic(pointer, mask, lambda old: old, ("relaxed", "gpu"))
    at, chosen, layout = _indices(pointer, mask, other)
    touched = at if chosen is None else at[chosen]
    machine.scheduler().publication.loaded(pointer.flat, touched, machine.task())
    if chosen is None:
        return as_value(pointer.flat[at], layout)
    found = pointer.flat[torch.where(chosen, at, 0)]
    # Without `other` the hardware leaves anything where the mask is false.
    if other is None:
        rest = torch.full((), float("nan") if found.is_floating_point() else -1, dtype=found.dtype)
    else:
        rest = other.data if isinstance(other, Tensor) else torch.tensor(other)
    return as_value(torch.where(chosen, found, rest.to(found.dtype)), layout)


def store(pointer: Pointer, value: Any, mask: Any = None, **_caching: Any) -> None:
    at, chosen, _ = _indices(pointer, mask, value)
    data = value.data if isinstance(value, Tensor) else torch.tensor(value)
    shape = torch.broadcast_shapes(at.shape, data.shape)
    at, data = at.expand(shape), data.to(pointer.flat.dtype).expand(shape)
    if chosen is not None:
        chosen = chosen.expand(shape)
        at, data = at[chosen], data[chosen]
    run = machine.scheduler()
    run.owners.stored(pointer.flat, at, machine.task().program)
    run.publication.stored(pointer.flat, at, machine.task(), not shape)
    pointer.flat[at] = data
    run.writes += 1


def _atomic(pointer: Pointer, mask: Any, change: Any, order: tuple[str, str]) -> Any:
    """Others may go on before it. If it changed nothing the last time it was tried, at this place, they must:
    a loop that waits for another program's number is then no endless one."""
    run, task = machine.scheduler(), machine.task()
    at, chosen, layout = _indices(pointer, mask)
    touched = at if chosen is None else at[chosen]
    if touched.dim() and torch.unique(touched).numel() != touched.numel():
        raise OutOfBounds(f"an atomic that meets itself is not modelled, at {where()}")
    key = (where(), pointer.flat.data_ptr(), touched.flatten().tolist())
    if task.spinning is not None and task.spinning[0] == key:
        seen = task.spinning[1]
        run.pause(lambda: run.writes != seen, f"another value of an atomic, at {where()}")
    else:
        run.pause()
    run.publication.atomic(pointer.flat, touched, task, *order)
    before = pointer.flat[at].clone()
    after = change(pointer.flat[touched])
    task.spinning = None
    if bool((after == pointer.flat[touched]).all()):
        task.spinning = (key, run.writes)
    else:
        pointer.flat[touched] = after
        run.writes += 1
    return as_value(before, layout)


def _data(value: Any, like: torch.Tensor) -> torch.Tensor:
    data = value.data if isinstance(value, Tensor) else torch.tensor(value)
    return data.to(like.dtype)


def atomic_add(pointer: Pointer, value: Any, mask: Any = None, **order: Any) -> Any:
    chosen = mask.data if isinstance(mask, Tensor) else None

    def change(old: torch.Tensor) -> torch.Tensor:
        new = _data(value, old)
        return old + (new.expand(chosen.shape)[chosen] if chosen is not None else new)

    return _atomic(pointer, mask, change, sem_of(order))


def atomic_xchg(pointer: Pointer, value: Any, mask: Any = None, **order: Any) -> Any:
    return _atomic(pointer, mask, lambda old: _data(value, old).expand(old.shape), sem_of(order))


def atomic_cas(pointer: Pointer, compare: Any, value: Any, **order: Any) -> Any:
    def change(old: torch.Tensor) -> torch.Tensor:
        return torch.where(old == _data(compare, old), _data(value, old), old)

    return _atomic(pointer, None, change, sem_of(order))
