"""Places an array in memory: strided, reversed, misaligned, surrounded by bytes that nobody may touch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kernels.cases import Array

LAYOUTS = ("plain", "heads", "reversed", "gaps", "misaligned")
_MARGIN = 256
_FILL = 0xFF  # as a float of any type: NaN


@dataclass
class Block:
    """`array` lies in `memory`, whose other bytes have the value that they were filled with."""

    array: Array
    memory: Array

    def intact(self) -> bool:
        """Whether no byte outside the array has changed. Does not change the array."""
        kept = self.array.copy()
        self.array[...] = np.frombuffer(bytes([_FILL]) * self.array.itemsize, self.array.dtype)[0]
        clean = bool((self.memory == _FILL).all())
        self.array[...] = kept
        return clean


def place(array: Array, layout: str) -> Block:
    """A copy of `array` (last axes: tokens, heads, dim) laid out as

    plain        row-major
    heads        heads outside tokens, so that rows of one head touch
    reversed     every stride negative
    gaps         every second element along each axis of a larger array
    misaligned   row-major, at an odd address
    """
    shape, dtype = array.shape, array.dtype
    axes = list(range(array.ndim))
    if layout == "heads" and array.ndim >= 3:
        axes[-3], axes[-2] = axes[-2], axes[-3]
    wide = tuple(shape[a] * (2 if layout == "gaps" else 1) for a in axes)
    size = int(np.prod(wide, dtype=np.int64)) * dtype.itemsize
    memory = np.full(size + 2 * _MARGIN, _FILL, np.uint8)
    offset = -memory.ctypes.data % 64 + 64 + (1 if layout == "misaligned" else 0)
    found = np.ndarray(wide, dtype, memory.data, offset)
    found = found.transpose(np.argsort(axes))
    if layout == "gaps":
        found = found[tuple(slice(None, None, 2) for _ in shape)]
    if layout == "reversed":
        found = found[tuple(slice(None, None, -1) for _ in shape)]
    found[...] = array
    return Block(found, memory)
