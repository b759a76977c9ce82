"""TMA: boxes of a tensor to and from shared memory, complete at a time that the scheduler chooses.

A load's destination is NaN from its issue on; its bytes go to an mbarrier when it completes. A store reads
its source at some time up to a wait, and what it writes may reach global memory later still: waiting for the
reads, as `store_wait` does, says nothing about the writes. Both stages are events.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from gpu.emulator import machine
from gpu.emulator.barriers import Barrier
from gpu.emulator.dtypes import to_gluon
from gpu.emulator.errors import InFlight, Mismatch, OutOfBounds
from gpu.emulator.memory import Operation, SharedMemory
from gpu.emulator.scheduler import Event, Task
from gpu.emulator.source import where
from gpu.emulator.tensor import Pointer


class Descriptor:
    """A tensor descriptor: extents and steps over memory, and the extents of a box."""

    def __init__(self, memory: torch.Tensor, start: int, shape: Any, strides: Any, block_shape: Any,
                 layout: Any, padding: str = "zero") -> None:  # fmt: skip
        self._memory = memory
        self._start = start
        self.shape = [int(extent) for extent in shape]
        self.strides = [int(step) for step in strides]
        self.block_shape = [int(extent) for extent in block_shape]
        self.layout = layout
        self._padding = 0.0 if padding == "zero" else float("nan")
        size = memory.element_size()
        if any(step * size % 16 for step in self.strides[:-1]) or (memory.data_ptr() + start * size) % 16:
            raise Mismatch(
                f"TMA wants a base and steps of 16 bytes; steps are {self.strides} of {size} bytes"
            )
        if self.strides[-1] != 1 or not 1 <= len(self.shape) <= 5:
            raise Mismatch(f"TMA wants 1 to 5 axes of which the last has step 1, not steps {self.strides}")
        # What the hardware's tensor maps hold.
        if any(not 0 < step * size < 1 << 40 for step in self.strides[:-1]):
            raise Mismatch(f"TMA wants steps of 16 to 2**40 bytes, not {self.strides} of {size} bytes")
        if any(not 0 < extent <= 1 << 32 for extent in self.shape):
            raise Mismatch(f"TMA wants extents of 1 to 2**32, not {self.shape}")
        if max(self.block_shape) > 256 or self.block_shape[-1] * size < 16:
            raise Mismatch(f"a box of {self.block_shape} elements of {size} bytes")

    @property
    def dtype(self) -> Any:
        return to_gluon(self._memory.dtype)

    @property
    def nbytes(self) -> int:
        return torch.Size(self.block_shape).numel() * self._memory.element_size()

    nbytes_per_cta = nbytes

    @property
    def block_type(self) -> Any:
        return SimpleNamespace(shape=list(self.block_shape), nbytes=self.nbytes, element_ty=self.dtype)

    def box(self, places: list[int]) -> tuple[tuple[Any, Any, int] | None, tuple[slice, ...]]:
        """What of a box at `places` lies in the tensor: (extents, strides, start), and where in the box."""
        extents, steps, inner, start = [], [], [], self._start
        for place, block, extent, step in zip(
            places, self.block_shape, self.shape, self.strides, strict=True
        ):
            low, high = max(place, 0), min(place + block, extent)
            if low >= high:
                return None, ()
            extents.append(high - low)
            steps.append(step if high - low > 1 else 0)
            inner.append(slice(low - place, high - place))
            start += low * step
        # Addresses are of 64 bits, in bytes.
        wrap = (1 << 64) // self._memory.element_size()
        start = (start + wrap // 2) % wrap - wrap // 2
        last = start + sum((extent - 1) * step for extent, step in zip(extents, steps, strict=True))
        if start < 0 or last >= self._memory.numel():
            size = self._memory.numel()
            raise OutOfBounds(f"box at {places} is elements {start} to {last} of {size}, at {where()}")
        return (extents, steps, start), tuple(inner)

    def read(self, places: list[int]) -> torch.Tensor:
        part, inner = self.box(places)
        found = torch.full(self.block_shape, self._padding, dtype=torch.float32).to(self._memory.dtype)
        if part is not None:
            found[inner] = self._memory.as_strided(*part)
        return found

    def write(self, places: list[int], value: torch.Tensor, adds: bool, program: Any) -> None:
        part, inner = self.box(places)
        if part is None:
            return
        run = machine.scheduler()
        if adds:
            self._memory.as_strided(*part).add_(value[inner])
        else:
            run.owners.stored(self._memory, part, program)
            self._memory.as_strided(*part).copy_(value[inner])
        run.writes += 1


def make_tensor_descriptor(base: Any, shape: Any, strides: Any, block_shape: Any, layout: Any,
                           padding_option: str = "zero") -> Descriptor:  # fmt: skip
    """A descriptor made by the kernel."""
    if not isinstance(base, Pointer) or base.shape:
        raise Mismatch(f"a descriptor is of one pointer, not of {base!r}")
    return Descriptor(base.flat, int(base.offsets), shape, strides, block_shape, layout, padding_option)


def _checked(descriptor: Any, coordinates: Any, buffer: Any) -> list[int]:
    if not isinstance(descriptor, Descriptor) or not isinstance(buffer, SharedMemory):
        raise Mismatch(f"TMA wants a descriptor and a buffer, not {descriptor!r} and {buffer!r}")
    places = [int(place) for place in coordinates]
    if len(places) != len(descriptor.block_shape):
        raise Mismatch(f"{len(places)} coordinates for a descriptor of {len(descriptor.block_shape)} axes")
    if any(not -(2**31) <= place < 2**31 for place in places):
        raise OutOfBounds(f"coordinates {places} do not fit 32 bits, at {where()}")
    if buffer.shape != descriptor.block_shape or buffer.dtype != descriptor.dtype:
        box = f"a box of {descriptor.block_shape} {descriptor.dtype}"
        raise Mismatch(f"{box} and {buffer.name} of {buffer.shape} {buffer.dtype}, at {where()}")
    known = buffer.layout is not None and descriptor.layout is not None
    if known and buffer.layout != descriptor.layout:
        raise Mismatch(f"{buffer.name} is laid out as {buffer.layout}, the box as {descriptor.layout}")
    return places


def load(
    descriptor: Any, coordinates: Any, barrier: Any, buffer: Any, pred: Any = True, **_hints: Any
) -> None:
    places = _checked(descriptor, coordinates, buffer)
    if not isinstance(barrier, Barrier):
        raise Mismatch(f"a TMA load wants one barrier, not {barrier!r}")
    run = machine.scheduler()
    run.pause()
    if not bool(pred):
        return
    operation = Operation.issued("TMA load")
    buffer.touch(True, operation)
    buffer.poison()
    program = operation.task.program
    program.loads.add(operation)

    def complete() -> None:
        buffer.put(descriptor.read(places))
        program.loads.discard(operation)
        barrier.delivered(descriptor.nbytes, operation.number)

    run.events.append(Event(str(operation), complete))


class _Store:
    def __init__(self, descriptor: Descriptor, places: list[int], buffer: SharedMemory, adds: bool) -> None:
        self.operation = Operation.issued("TMA addition" if adds else "TMA store")
        buffer.touch(False, self.operation)
        self._descriptor, self._places, self._buffer, self._adds = descriptor, places, buffer, adds
        self._value: torch.Tensor | None = None
        self._written = False
        self._event = Event(str(self.operation), self.read)
        machine.scheduler().events.append(self._event)

    def _take(self) -> None:
        events = machine.scheduler().events
        if self._event in events:
            events.remove(self._event)

    def read(self) -> None:
        if self._value is None:
            self._take()
            self._value = self._buffer.data.clone()
            self._event = Event(str(self.operation), self.write)
            machine.scheduler().events.append(self._event)

    def write(self) -> None:
        self.read()
        if not self._written:
            self._take()
            self._written = True
            program = self.operation.task.program
            self._descriptor.write(self._places, self._value, self._adds, program)


def _start(descriptor: Any, coordinates: Any, buffer: Any, adds: bool) -> None:
    places = _checked(descriptor, coordinates, buffer)
    machine.scheduler().pause()
    machine.task().stores.append(_Store(descriptor, places, buffer, adds))


def store(descriptor: Any, coordinates: Any, buffer: Any) -> None:
    _start(descriptor, coordinates, buffer, False)


def add(descriptor: Any, coordinates: Any, buffer: Any) -> None:
    _start(descriptor, coordinates, buffer, True)


def store_wait(pendings: Any = 0, read_only: bool = True) -> None:
    task = machine.task()
    machine.scheduler().pause()
    for pending in task.stores[: max(0, len(task.stores) - int(pendings))]:
        pending.read()
        task.clock.done |= 1 << pending.operation.number
        if not read_only:
            pending.write()
    if read_only:
        task.stores = [s for s in task.stores if not task.clock.finished(s.operation.number)]


def check_over(task: Task) -> None:
    """A partition that ends has waited for the reads of all its stores."""
    unread = [s for s in task.stores if not task.clock.finished(s.operation.number)]
    if unread:
        raise InFlight(f"{task.name} ends while {unread[0].operation} may still read its source")
