"""Where Triton's kernels run here, and memory for them.

`pretended` is for offline.py: launches are then prepared as for a device that is not there, and their working
memory has no bytes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

from anyflash.core.device import Device
from anyflash.core.dtypes import ITEMSIZE
from anyflash.core.errors import Unsupported
from anyflash.core.view import View

if TYPE_CHECKING:
    import torch

_pretended: list[str] = []


@contextmanager
def pretended(arch: str) -> Iterator[None]:
    """Launches are prepared for a device of architecture `arch`."""
    _pretended.append(arch)
    try:
        yield
    finally:
        _pretended.pop()


def on_host() -> bool:
    """Are the arrays of calls in host memory: for the interpreter, or for launches that are only prepared?"""
    return bool(_pretended) or interpreted()


# Elements as device code reads them; a bool is a byte.
_STORED = {"bool": "int8"}


@cache
def interpreted() -> bool:
    """Are kernels run by Triton's interpreter, on the CPU? TRITON_INTERPRET=1 must be set before they are
    imported."""
    import triton.knobs

    if not triton.knobs.runtime.interpret:
        return False
    from anyflash.kernels.triton.interpreter import mend

    mend()
    return True


class Pointer:
    """The address of a view as an argument of a compiled kernel."""

    __slots__ = ("_address", "dtype")

    def __init__(self, address: int, dtype: torch.dtype) -> None:
        self._address = address
        self.dtype = dtype

    def data_ptr(self) -> int:
        return self._address


def pointer(view: View, stored: str | None = None) -> Any:
    """A kernel's argument for the memory of a view, as elements of type `stored` where that is given.

    Raises Unsupported if its elements do not lie at multiples of their size, where a GPU finds none.
    """
    import torch

    dtype = getattr(torch, stored or _STORED.get(view.dtype, view.dtype))
    assert view.ptr is not None
    if not interpreted():
        if view.ptr % view.itemsize:
            raise _between(view, f"at address {view.ptr:#x}")
        return Pointer(view.ptr, dtype)
    # The interpreter takes tensors, and reads and writes at their address whatever their extent.
    return torch.frombuffer((ctypes.c_char * ITEMSIZE[view.dtype]).from_address(view.ptr), dtype=dtype)


def steps(view: View) -> tuple[int, ...]:
    """Strides in elements. Raises Unsupported if one falls between them."""
    size = view.itemsize
    if any(stride % size for stride in view.strides):
        raise _between(view, f"{view.strides} bytes apart")
    return tuple([stride // size for stride in view.strides])


def _between(view: View, where: str) -> Unsupported:
    return Unsupported(
        f"an array of shape {tuple(view.shape)} whose elements lie {where}",
        {"triton": [f"a GPU reads elements of {view.itemsize} bytes at multiples of that"]},
        "Make it contiguous",
    )


def empty(shape: tuple[int, ...], device: Device, dtype: str = "float32") -> torch.Tensor:
    """Working memory."""
    import torch

    return torch.empty(shape, dtype=getattr(torch, dtype), device=_torch_device(device))


def _torch_device(device: Device) -> str:
    if _pretended:
        return "meta"
    return "cpu" if device.kind == "cpu" else f"cuda:{device.index}"


@contextmanager
def current(device: Device) -> Iterator[None]:
    """Launches go to this device, on torch's current stream there."""
    if device.kind == "cpu" or _pretended:
        yield
        return
    import torch

    with torch.cuda.device(device.index):
        yield


def present() -> str:
    """The architecture of torch's current device."""
    if _pretended or interpreted():
        return architecture(Device("cpu"))
    import torch

    return architecture(Device("cuda", torch.cuda.current_device()))


def architecture(device: Device) -> str:
    """ "sm_90", "gfx942", or "interpreter"."""
    if _pretended:
        return _pretended[-1]
    return "interpreter" if interpreted() else _architecture(device)


@lru_cache(maxsize=16)
def _architecture(device: Device) -> str:
    import torch

    properties = torch.cuda.get_device_properties(device.index)
    named = getattr(properties, "gcnArchName", "")
    if torch.version.hip and named:
        return str(named).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"
