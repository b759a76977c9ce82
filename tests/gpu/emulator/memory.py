"""Shared memory: bytes that start as NaN, and a record of who touched which of them and when.

Races are found by order, not by luck. An access is checked against every earlier one of the same bytes, of
which at least one is a write: the earlier one must be known to be over to the clock of the later one. For a
partition that means a chain of barriers; for an asynchronous operation, that its completion was waited for,
here or by somebody whose arrival was. Whether the two really collided in this run does not matter.

An access by TMA or wgmma counts as made with the clock of its issue, and is over when its completion is
known. What threads stored must be fenced before either reads or overwrites it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from triton.experimental.gluon import language as gl

from gpu.emulator import machine
from gpu.emulator.clocks import Clock
from gpu.emulator.dtypes import to_gluon, to_torch
from gpu.emulator.errors import Mismatch, MissingFence, Race, Unknown
from gpu.emulator.scheduler import Task
from gpu.emulator.source import assigned_name, where
from gpu.emulator.swizzle import places
from gpu.emulator.tensor import Tensor

_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
Place = tuple[int, tuple[int, ...], tuple[int, ...], int]


@dataclass(eq=False)
class Operation:
    """An asynchronous operation: `number` is its bit in the clocks of those who know that it is over."""

    what: str
    number: int
    task: Task
    clock: Clock
    where: str

    @classmethod
    def issued(cls, what: str) -> Operation:
        task = machine.task()
        return cls(what, task.program.new_operation(), task, task.clock.copy(), where())

    def __str__(self) -> str:
        return f"the {self.what} that {self.task.name} issued at {self.where}"


@dataclass(frozen=True)
class _Access:
    writes: bool
    partition: int
    tick: int
    operation: Operation | None
    said: str

    def over_for(self, clock: Clock) -> bool:
        if self.operation is not None:
            return clock.finished(self.operation.number)
        return clock.knows(self.partition, self.tick)


class Allocation:
    """One buffer, and the accesses to it that may still matter, by the bytes they touch."""

    def __init__(self, name: str, size: int) -> None:
        self.name = name
        self.bytes = torch.full((size,), 255, dtype=torch.uint8)
        self._accesses: dict[Place, dict[Any, _Access]] = {}
        self._masks: dict[Place, torch.Tensor] = {}
        # Bytes of an access that nobody has written since, where somebody wrote others of it.
        self._left: dict[Place, torch.Tensor] = {}
        # Of a pair: do they overlap, and does the first have all of the second?
        self._shared: dict[tuple[Place, Place], tuple[bool, bool]] = {}

    def _mask(self, place: Place) -> torch.Tensor:
        if place not in self._masks:
            start, shape, strides, size = place
            touched = torch.zeros_like(self.bytes)
            touched.view(_SAME_SIZE[size]).as_strided(shape, strides, start).fill_(-1 if size > 1 else 255)
            self._masks[place] = touched.bool()
        return self._masks[place]

    def _both(self, a: Place, b: Place) -> tuple[bool, bool]:
        if a == b:
            return True, True
        if (a, b) not in self._shared:
            mine, theirs = self._mask(a), self._mask(b)
            self._shared[a, b] = bool((mine & theirs).any()), not bool((theirs & ~mine).any())
        return self._shared[a, b]

    def _overwritten(self, place: Place, by: Place) -> bool:
        """Are all bytes of a place written anew, now that those of another are?"""
        touches, covers = self._both(by, place)
        if touches and not covers:
            left = self._left.get(place)
            self._left[place] = (self._mask(place) if left is None else left) & ~self._mask(by)
            covers = not bool(self._left[place].any())
        return covers

    def access(self, place: Place, name: str, writes: bool, operation: Operation | None) -> None:
        task = operation.task if operation is not None else machine.task()
        clock = operation.clock if operation is not None else task.clock
        verb = "writes" if writes else "reads"
        said = f"{operation or task.name} {verb} {name}" + ("" if operation else f" at {where()}")
        for other, accesses in self._accesses.items():
            if not self._both(place, other)[0]:
                continue
            for earlier in accesses.values():
                if not (writes or earlier.writes) or earlier.operation is operation is not None:
                    continue
                if not earlier.over_for(clock):
                    raise Race(f"{said}, and nothing orders this after: {earlier.said}")
                stored = earlier.writes and earlier.operation is None
                if operation is not None and stored and not clock.fences(earlier.partition, earlier.tick):
                    raise MissingFence(f"{said}, and no fence lies between this and: {earlier.said}")
        if writes:
            # Who is ordered after this is ordered after all that this was ordered after.
            for other in [other for other in self._accesses if self._overwritten(other, place)]:
                del self._accesses[other]
                self._left.pop(other, None)
        self._left.pop(place, None)
        records = self._accesses.setdefault(place, {})
        key = operation if operation is not None else (task.index, writes)
        tick = clock.ticks.get(task.index, 0)
        records[key] = _Access(writes, task.index, tick, operation, said)


class SharedMemory:
    """A view of a buffer. `layout` None: what a reshape makes of it is not worked out."""

    def __init__(self, memory: Allocation, data: torch.Tensor, layout: Any, name: str) -> None:
        self.memory = memory
        self.data = data
        self.layout = layout
        self.name = name

    @classmethod
    def allocated(cls, dtype: Any, shape: Sequence[int], layout: Any) -> SharedMemory:
        element = to_torch(dtype)
        extents = [int(extent) for extent in shape]
        size = torch.Size(extents).numel() * element.itemsize
        program = machine.task().program
        program.buffers += 1
        memory = Allocation(assigned_name(f"buffer {program.buffers}"), size)
        program.shared_bytes += size
        return cls(memory, memory.bytes.view(element).view(extents), layout, memory.name)

    @property
    def dtype(self) -> Any:
        return to_gluon(self.data.dtype)

    @property
    def _elements(self) -> torch.Tensor:
        """A tensor of this view's shape."""
        return self.data

    @property
    def shape(self) -> list[int]:
        return list(self._elements.shape)

    @property
    def rank(self) -> int:
        return self._elements.dim()

    @property
    def numel(self) -> int:
        return self._elements.numel()

    @property
    def nbytes_per_cta(self) -> int:
        return self.numel * self.data.element_size()

    @property
    def type(self) -> Any:
        return gl.shared_memory_descriptor_type(self.dtype, self.shape, self.layout, self.shape)

    def _view(self, turned: Callable[[torch.Tensor], torch.Tensor], layout: Any, suffix: str) -> SharedMemory:
        return SharedMemory(self.memory, turned(self.data), layout, self.name + suffix)

    def put(self, values: torch.Tensor) -> None:
        self.data.copy_(values)

    def index(self, index: Any) -> SharedMemory:
        at = int(index)
        if not 0 <= at < self.shape[0]:
            raise Mismatch(f"{self.name} has {self.shape[0]} stages; stage {at} is asked for")
        return self._view(lambda data: data[at], self.layout, f"[{at}]")

    def slice(self, start: Any, length: Any, dim: Any = 0) -> SharedMemory:
        low, extent, axis = int(start), int(length), int(dim)
        if low < 0 or low + extent > self.shape[axis]:
            raise Mismatch(f"slice {low} to {low + extent} of axis {axis} of {self.name}{self.shape}")
        suffix = f"[{', '.join([':'] * axis + [f'{low}:{low + extent}'])}]"
        return self._view(lambda data: data.narrow(axis, low, extent), self.layout, suffix)

    def permute(self, order: Sequence[Any]) -> SharedMemory:
        layout = self.layout
        turned = [int(axis) for axis in order]
        if isinstance(layout, gl.NVMMASharedLayout) and turned == [1, 0]:
            layout = gl.NVMMASharedLayout(
                layout.swizzle_byte_width, layout.element_bitwidth, layout.rank, not layout.transposed
            )
        elif turned != sorted(turned):
            layout = None
        return self._view(lambda data: data.permute(turned), layout, "^T")

    def reshape(self, shape: Sequence[Any]) -> SharedMemory:
        extents = [int(extent) for extent in shape]
        return self._view(lambda data: data.view(extents), self.layout if extents == self.shape else None, "")

    def reinterpret(self, dtype: Any = None, shape: Any = None, layout: Any = None) -> SharedMemory:
        element = self.data.dtype if dtype is None else to_torch(dtype)
        extents = self.shape if shape is None else [int(extent) for extent in shape]
        if isinstance(layout, gl.NVMMASharedLayout):
            return _recast(self, element, extents, layout)
        flat = self.data.view(-1).view(torch.uint8).view(element)
        return self._view(lambda _: flat[: torch.Size(extents).numel()].view(extents), self.layout, "")

    _reinterpret = reinterpret

    @property
    def _place(self) -> Place:
        data = self.data
        return data.storage_offset(), tuple(data.shape), data.stride(), data.element_size()

    def touch(self, writes: bool, operation: Operation | None = None) -> None:
        self.memory.access(self._place, self.name, writes, operation)

    def poison(self) -> None:
        bits = ~torch.zeros_like(self.data.view(_SAME_SIZE[self.data.element_size()]))
        self.put(bits.view(self.data.dtype))

    def load(self, layout: Any = None) -> Tensor:
        machine.scheduler().pause()
        self.touch(False)
        return Tensor(self.data.clone(), layout)

    def store(self, value: Any) -> None:
        machine.scheduler().pause()
        if not isinstance(value, Tensor):
            raise Mismatch(f"{self.name}.store wants a tensor, not {value!r}")
        if value.shape != self.shape or value.data.dtype != self.data.dtype:
            wanted = f"{self.shape} {self.data.dtype}"
            raise Mismatch(f"{self.name} is {wanted}; stored is {value.shape} {value.data.dtype}")
        self.touch(True)
        self.put(value.data)

    def _keep_alive(self) -> None:
        pass


class Recast(SharedMemory):
    """A view of a buffer in another layout: `at` are the elements of `flat`, the buffer as it was."""

    def __init__(
        self, memory: Allocation, flat: torch.Tensor, at: torch.Tensor, layout: Any, name: str
    ) -> None:
        self.memory, self.layout, self.name = memory, layout, name
        self._flat, self._at = flat, at

    @property
    def data(self) -> torch.Tensor:
        return self._flat[self._at]

    @property
    def dtype(self) -> Any:
        return to_gluon(self._flat.dtype)

    @property
    def _elements(self) -> torch.Tensor:
        return self._at

    def _view(self, turned: Callable[[torch.Tensor], torch.Tensor], layout: Any, suffix: str) -> Recast:
        return Recast(self.memory, self._flat, turned(self._at), layout, self.name + suffix)

    def put(self, values: torch.Tensor) -> None:
        self._flat[self._at] = values

    @property
    def _place(self) -> Place:
        first, count = int(self._at.min()), self._at.numel()
        if int(self._at.max()) - first + 1 != count:
            raise Unknown(f"which bytes a part of {self.name} touches")
        return first, (count,), (1,), self._flat.element_size()


def _recast(buffer: SharedMemory, dtype: torch.dtype, shape: Sequence[int], layout: Any) -> SharedMemory:
    """The buffer's bytes, from its first on, as tiles of another shape and layout."""
    if dtype != buffer.data.dtype:
        return _regrouped(buffer, dtype, shape, layout)
    size = torch.Size(shape).numel()
    if size > buffer.numel or not buffer.data.is_contiguous():
        raise Mismatch(f"{buffer.name} of {buffer.shape} as {list(shape)}")
    lying = torch.empty(buffer.numel, dtype=torch.int64)
    lying[places(buffer.layout, buffer.shape).flatten()] = torch.arange(buffer.numel)
    first = buffer.data.storage_offset()
    at = lying[places(layout, shape).flatten()].view(list(shape)) + first
    return Recast(buffer.memory, buffer.memory.bytes.view(buffer.data.dtype), at, layout, buffer.name)


def _regrouped(buffer: SharedMemory, dtype: torch.dtype, shape: Sequence[int], layout: Any) -> SharedMemory:
    """The buffer's bytes as elements of another size, where these lie as their bytes did."""
    if torch.Size(shape).numel() * dtype.itemsize != buffer.nbytes_per_cta or not buffer.data.is_contiguous():
        raise Mismatch(f"{buffer.name} of {buffer.shape} {buffer.data.dtype} as {list(shape)} {dtype}")
    before, after = (
        (places(of, extents).flatten()[:, None] * size + torch.arange(size)).flatten()
        for of, extents, size in (
            (buffer.layout, buffer.shape, buffer.data.element_size()),
            (layout, shape, dtype.itemsize),
        )
    )
    if not torch.equal(before, after):
        raise Mismatch(
            f"{buffer.name} in {buffer.layout}: as {list(shape)} {dtype} in {layout} it lies otherwise"
        )
    return SharedMemory(buffer.memory, buffer.data.view(dtype).view(list(shape)), layout, buffer.name)
