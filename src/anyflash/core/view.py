"""A framework-free look at one array: where it is and how it is laid out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from anyflash.core.device import CPU, Device
from anyflash.core.dtypes import ITEMSIZE


@dataclass(slots=True)
class View:
    """Strided memory. `strides` are in bytes and may be zero or negative.

    `ptr` is the address of element [0, ..., 0], or None for a traced array that has no memory yet.
    `owner` keeps the memory alive for as long as the view is. Nothing changes a view once it is made; it is
    not declared frozen because that makes construction nine times slower, and a call makes six.
    """

    ptr: int | None
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    device: Device = CPU
    writable: bool = True
    owner: object = None

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.dtype]

    @property
    def size(self) -> int:
        n = 1
        for extent in self.shape:
            n *= extent
        return n

    def permute(self, axes: Sequence[int]) -> View:
        shape, strides = self.shape, self.strides
        return View(
            self.ptr,
            tuple([shape[a] for a in axes]),
            tuple([strides[a] for a in axes]),
            self.dtype,
            self.device,
            self.writable,
            self.owner,
        )

    def broadcast_to(self, shape: Sequence[int]) -> View:
        """Numpy's rule; new and stretched axes get stride 0. Raises ValueError if impossible."""
        shape = tuple(shape)
        missing = len(shape) - self.ndim
        if missing < 0:
            raise ValueError(f"{self.shape} has more axes than {shape}")
        strides = [0] * missing
        for have, want, stride in zip(self.shape, shape[missing:], self.strides, strict=True):
            if have != want and have != 1:
                raise ValueError(f"{self.shape} does not broadcast to {shape}")
            strides.append(stride if have == want else 0)
        return View(self.ptr, shape, tuple(strides), self.dtype, self.device, self.writable, self.owner)


def contiguous_strides(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """Row-major byte strides."""
    strides: list[int] = []
    step = itemsize
    for extent in reversed(shape):
        strides.append(step)
        step *= max(extent, 1)
    return tuple(reversed(strides))
