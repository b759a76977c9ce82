"""Where Triton's kernels run here, and memory for them."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

from anyflash.core.device import Device
from anyflash.core.dtypes import ITEMSIZE
from anyflash.core.view import View

if TYPE_CHECKING:
    import torch

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


def pointer(view: View) -> Any:
    """A kernel's argument for the memory of a view."""
    import torch

    dtype = getattr(torch, _STORED.get(view.dtype, view.dtype))
    assert view.ptr is not None
    if not interpreted():
        return Pointer(view.ptr, dtype)
    # The interpreter takes tensors, and reads and writes at their address whatever their extent.
    return torch.frombuffer((ctypes.c_char * ITEMSIZE[view.dtype]).from_address(view.ptr), dtype=dtype)


def steps(view: View) -> tuple[int, ...]:
    """Strides in elements."""
    size = view.itemsize
    return tuple([stride // size for stride in view.strides])


def uneven(view: View) -> bool:
    """Does a stride fall between elements, as device code cannot address them?"""
    return any(stride % view.itemsize for stride in view.strides)


def empty(shape: tuple[int, ...], device: Device, dtype: str = "float32") -> torch.Tensor:
    """Working memory."""
    import torch

    return torch.empty(shape, dtype=getattr(torch, dtype), device=_torch_device(device))


def _torch_device(device: Device) -> str:
    return "cpu" if device.kind == "cpu" else f"cuda:{device.index}"


@contextmanager
def current(device: Device) -> Iterator[None]:
    """Launches go to this device, on torch's current stream there."""
    if device.kind == "cpu":
        yield
        return
    import torch

    with torch.cuda.device(device.index):
        yield


def present() -> str:
    """The architecture of torch's current device."""
    if interpreted():
        return "interpreter"
    import torch

    return architecture(Device("cuda", torch.cuda.current_device()))


@lru_cache(maxsize=16)
def architecture(device: Device) -> str:
    """ "sm_90", "gfx942", or "interpreter"."""
    if interpreted():
        return "interpreter"
    import torch

    properties = torch.cuda.get_device_properties(device.index)
    named = getattr(properties, "gcnArchName", "")
    if torch.version.hip and named:
        return str(named).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"
