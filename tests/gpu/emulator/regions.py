"""Which memory an address lies in: how far a pointer may go."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from gpu.emulator.errors import OutOfBounds

Region = tuple[int, int]


def region_of(array: Any) -> Region:
    """First address, and the one behind the last, of the storage of a torch tensor or of a numpy array."""
    if isinstance(array, torch.Tensor):
        storage = array.untyped_storage()
        return storage.data_ptr(), storage.data_ptr() + storage.nbytes()
    first = int(array.__array_interface__["data"][0])
    return first, first + int(array.nbytes)


def _mapping(address: int) -> Region:
    """The pages of this process around an address that belongs to no known array."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, high = (int(end, 16) for end in line.split()[0].split("-"))
        if low <= address < high:
            return low, high
    raise OutOfBounds(f"nothing lies at address {address:#x}")


def _united(regions: Iterable[Region]) -> list[Region]:
    """Those that overlap as one: views of one array."""
    found: list[Region] = []
    for low, high in sorted(regions):
        if found and low < found[-1][1]:
            first, last = found.pop()
            low, high = first, max(high, last)
        found.append((low, high))
    return found


class Regions:
    def __init__(self, arrays: Iterable[Any]) -> None:
        self._known = _united(region_of(array) for array in arrays)
        self._flat: dict[tuple[int, torch.dtype], torch.Tensor] = {}

    def at(self, address: int, dtype: torch.dtype) -> tuple[torch.Tensor, int]:
        """All elements of this type that lie in the same array, and the place of one among them."""
        found = [region for region in self._known if region[0] <= address < region[1]]
        if not found:
            self._known.append(_mapping(address))
            found = self._known[-1:]
        low, high = found[0]
        low += (address - low) % dtype.itemsize
        if (low, dtype) not in self._flat:
            size = (high - low) // dtype.itemsize * dtype.itemsize
            self._flat[low, dtype] = torch.frombuffer((ctypes.c_char * size).from_address(low), dtype=dtype)
        return self._flat[low, dtype], (address - low) // dtype.itemsize
