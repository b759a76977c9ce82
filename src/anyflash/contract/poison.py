"""Arrays that lie in poisoned memory, so that a read or a write outside an array shows.

Every array stands alone in a buffer of its own, with 512 elements on both sides and whatever gaps its layout
asks for filled with NaN. Inputs and outputs carry different NaN payloads: an output element that still has
its payload was never written, and a byte outside an array that changed was written by mistake.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from anyflash.core.view import View
from anyflash.semantics.arrays import numpy_dtype

MARGIN = 512
"""Poisoned elements before and after each array."""

ALIGNMENT = 64

_INPUT = {
    "float8_e4m3fn": 0x7F,
    "float8_e5m2": 0x7E,
    "float16": 0x7E5A,
    "bfloat16": 0x7FDA,
    "float32": 0x7FC5A5A5,
    "float64": 0x7FF85A5A5A5A5A5A,
    "int32": 0x5A5A5A5A,
    "int64": 0x5A5A5A5A5A5A5A5A,
    "bool": 1,
}
_OUTPUT = {"float16": 0x7EA5, "bfloat16": 0x7FE5, "float32": 0x7FCA5A5A, "float64": 0x7FFA5A5A5A5A5A5A}
_JUNK = (99990001, 3331333, 0, -77777777)


@dataclass(frozen=True, slots=True)
class Layout:
    """How an array lies in its buffer.

    order    axes from outermost to innermost in memory; None keeps them as they are
    gap      unused elements after each step of every axis but the innermost
    step     distance, in elements, between neighbours along the innermost axis
    reverse  axes walked backwards (negative stride)
    expand   axes of stride 0, whose slices must be equal
    junk     axes of extent 1 get absurd strides
    shift    bytes by which the first element misses its alignment
    """

    order: tuple[int, ...] | None = None
    gap: int = 0
    step: int = 1
    reverse: tuple[int, ...] = ()
    expand: tuple[int, ...] = ()
    junk: bool = False
    shift: int = 0

    def without_first_axis(self) -> Layout:
        """The same for an array that lacks the first axis."""
        drop = lambda axes: tuple(a - 1 for a in axes if a)
        order = None if self.order is None else drop(self.order)
        return replace(self, order=order, reverse=drop(self.reverse), expand=drop(self.expand))


CONTIGUOUS = Layout()


class Poisoned:
    """One array in its buffer: `array` to read and fill, `view` to hand to a backend, `damage()`
    afterwards."""

    def __init__(
        self, shape: Sequence[int], dtype: str, layout: Layout = CONTIGUOUS, output: bool = False
    ) -> None:
        if output and layout.expand:
            raise ValueError("an output cannot have axes of stride 0")
        self.dtype = dtype
        self.output = output
        kind = numpy_dtype(dtype)
        shape = tuple(shape)
        strides, span, start = _place(shape, layout, kind.itemsize)
        self._pattern = np.array((_OUTPUT if output else _INPUT)[dtype], f"u{kind.itemsize}")
        elements = 2 * MARGIN + span
        raw = np.zeros(elements * kind.itemsize + ALIGNMENT + layout.shift, np.uint8)
        base = -raw.ctypes.data % ALIGNMENT + layout.shift
        self._bytes = raw[base : base + elements * kind.itemsize]
        self._bytes.view(self._pattern.dtype)[:] = self._pattern
        offset = (MARGIN + start) * kind.itemsize
        self.array = np.ndarray(shape, kind, self._bytes, offset, strides)
        self._bits = np.ndarray(shape, self._pattern.dtype, self._bytes, offset, strides)
        owned = np.zeros(self._bytes.shape, bool)
        np.ndarray((*shape, kind.itemsize), bool, owned, offset, (*strides, 1))[...] = True
        self._outside = ~owned
        self._before = self._bytes.copy()
        if layout.junk:
            strides = tuple(
                _JUNK[axis % len(_JUNK)] * kind.itemsize if extent == 1 else stride
                for axis, (extent, stride) in enumerate(zip(shape, strides, strict=True))
            )
        address = self.array.__array_interface__["data"][0]
        self.view = View(address, shape, strides, dtype, writable=output, owner=self)

    @classmethod
    def of(cls, values: np.ndarray, dtype: str, layout: Layout = CONTIGUOUS) -> Poisoned:
        """An input that holds `values`, rounded to `dtype`."""
        made = cls(values.shape, dtype, layout)
        made.array[...] = values.astype(made.array.dtype)
        made.seal()
        return made

    @property
    def raw(self) -> np.ndarray:
        """The whole buffer, margins included, as bytes."""
        return self._bytes

    def seal(self) -> None:
        """Take what the buffer holds now as what it must still hold later."""
        self._before = self._bytes.copy()

    def become_input(self) -> None:
        """From now on nothing of it may change."""
        self.output = False
        self.seal()

    def holds(self, address: int) -> bool:
        """Does this buffer contain the address?"""
        start = self._bytes.ctypes.data
        return start <= address < start + self._bytes.nbytes

    def damage(self) -> str | None:
        """What is wrong with the memory after a run, or None."""
        changed = self._bytes != self._before
        wrong = changed if not self.output else changed & self._outside
        if wrong.any():
            where = "outside it" if self.output else "of an input"
            first = int(np.flatnonzero(wrong)[0]) // self._pattern.itemsize - MARGIN
            return (
                f"{int(wrong.sum())} bytes {where} were written, the first at element {first} of its buffer"
            )
        if self.output and self._bits.size:
            missing = self._bits == self._pattern
            if missing.any():
                first = tuple(int(i) for i in np.argwhere(missing)[0])
                return (
                    f"{int(missing.sum())} of {missing.size} elements were not written, the first at {first}"
                )
        return None


def _place(shape: tuple[int, ...], layout: Layout, itemsize: int) -> tuple[tuple[int, ...], int, int]:
    """(byte strides, elements spanned, offset in elements of element [0, ..., 0])."""
    order = layout.order or tuple(range(len(shape)))
    strides = [0] * len(shape)
    step, start = layout.step, 0
    for depth, axis in enumerate(reversed(order)):
        if axis in layout.expand:
            continue
        strides[axis] = step
        if axis in layout.reverse:
            start += step * max(shape[axis] - 1, 0)
            strides[axis] = -step
        step = step * max(shape[axis], 1) + (layout.gap if depth < len(order) - 1 else 0)
    return tuple(s * itemsize for s in strides), step, start
