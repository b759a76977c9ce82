"""Operands of a case in the memory of a GPU.

A case lies in poisoned host memory (`memory`), and is judged there. A backend that runs elsewhere is given
copies: every buffer as a whole, margins and gaps included, aligned as its original, and taken back after the
run, so that a byte written outside an array shows on the host as it would have there.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any, TypeVar

import numpy as np

from anyflash.contract.poison import ALIGNMENT
from anyflash.core.device import Device
from anyflash.core.view import View

Bundle = TypeVar("Bundle")


class Elsewhere:
    """Copies of host memory on one device, found by address."""

    def __init__(self, device: Device, buffers: Iterable[np.ndarray]) -> None:
        """buffers: the bytes that views may lie in, none within another; what else comes, such as lengths
        that `describe` has copied, is found when it is sent."""
        self.device = device
        self._copies: list[tuple[np.ndarray, Any]] = []
        for host in buffers:
            self._add(host)

    def _add(self, host: np.ndarray) -> Any:
        import torch

        where = torch.device("cpu" if self.device.kind == "cpu" else f"cuda:{self.device.index}")
        made = torch.empty(host.nbytes + 2 * ALIGNMENT, dtype=torch.uint8, device=where)
        first = (host.ctypes.data - made.data_ptr()) % ALIGNMENT
        copy = made[first : first + host.nbytes]
        copy.copy_(torch.from_numpy(host))
        self._copies.append((host, copy))
        return copy

    def send(self, bundle: Bundle) -> Bundle:
        """Operands, results, what is saved or gradients, with every view of host memory moved."""
        moved = {field.name: self._moved(getattr(bundle, field.name)) for field in fields(bundle)}  # type: ignore[arg-type]
        return replace(bundle, **moved)  # type: ignore[type-var]

    def _moved(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple([self._moved(each) for each in value])
        return self.view(value) if isinstance(value, View) else value

    def view(self, view: View) -> View:
        """The same look at the copy."""
        address = view.ptr
        assert address is not None
        if view.size:
            address = self._address(view)
        return View(address, view.shape, view.strides, view.dtype, self.device, view.writable, self)

    def _address(self, view: View) -> int:
        assert view.ptr is not None
        for host, copy in self._copies:
            offset = view.ptr - host.ctypes.data
            if 0 <= offset < host.nbytes:
                return int(copy.data_ptr()) + offset
        first, end = _span(view)
        return int(self._add(_bytes(first, end)).data_ptr()) + view.ptr - first

    def take_back(self) -> None:
        """What the copies hold now, into the host's buffers. Waits for the device."""
        for host, copy in self._copies:
            ctypes.memmove(host.ctypes.data, copy.cpu().data_ptr(), host.nbytes)


def spans(*bundles: Any) -> list[np.ndarray]:
    """The bytes that the views of operands, results and the like cover; those that overlap as one."""
    covered = sorted(_span(view) for bundle in bundles for view in _views(bundle) if view.size)
    merged: list[tuple[int, int]] = []
    for first, end in covered:
        if merged and first < merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((first, end))
    return [_bytes(first, end) for first, end in merged]


def _bytes(first: int, end: int) -> np.ndarray:
    return np.frombuffer((ctypes.c_uint8 * (end - first)).from_address(first), np.uint8)


def _views(bundle: Any) -> list[View]:
    found: list[View] = []
    for field in fields(bundle):
        value = getattr(bundle, field.name)
        found += [
            each for each in (value if isinstance(value, tuple) else (value,)) if isinstance(each, View)
        ]
    return found


def _span(view: View) -> tuple[int, int]:
    assert view.ptr is not None
    reach = [stride * (extent - 1) for stride, extent in zip(view.strides, view.shape, strict=True)]
    return view.ptr + sum(min(r, 0) for r in reach), view.ptr + sum(max(r, 0) for r in reach) + view.itemsize
