"""numpy arrays. Forward only: numpy has no way to ask for a gradient."""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anyflash.core.device import CPU
from anyflash.core.dtypes import ITEMSIZE
from anyflash.core.view import View
from anyflash.frontends import base
from anyflash.frontends.cache import CacheRequest, begin
from anyflash.semantics import lse as partial
from anyflash.semantics.arrays import numpy_dtype

_names: dict[np.dtype[Any], str] = {}
_dtypes: dict[str, np.dtype[Any]] = {}
SEED_BITS = 63


def _name(dtype: np.dtype[Any]) -> str:
    """The dtype's name; one that anyflash lacks keeps numpy's spelling, and `describe` refuses it."""
    name = dtype.name if dtype.isnative and dtype.name in ITEMSIZE else str(dtype)
    _names[dtype] = name
    return name


def _dtype(name: str) -> np.dtype[Any]:
    found = _dtypes[name] = numpy_dtype(name)
    return found


def _direct_address() -> Any:
    """A quick reader of an array's data pointer, or None where the interpreter lays objects out differently.

    `array.ctypes.data` takes 1.4 us and one call needs six of them. The pointer is the first field behind the
    object header, fixed by numpy's binary interface.
    """
    header, read = object.__basicsize__, ctypes.c_void_p.from_address
    probe = np.arange(12.0).reshape(3, 4)[1:, ::2]
    if not hasattr(ctypes, "pythonapi") or read(id(probe) + header).value != probe.ctypes.data:
        return None
    return lambda array: read(id(array) + header).value


_address = _direct_address() or (lambda array: array.ctypes.data)


class Numpy:
    name = "numpy"

    def owns(self, kind: type) -> bool:
        # A masked array exists only once numpy.ma does, whose import would be a third of a first call.
        masked = sys.modules.get("numpy.ma")
        return issubclass(kind, np.ndarray) and not (masked and issubclass(kind, masked.MaskedArray))

    def dtype(self, array: NDArray[Any]) -> str:
        dtype = array.dtype
        return _names.get(dtype) or _name(dtype)

    def view(self, array: NDArray[Any]) -> View:
        dtype = array.dtype
        return View(
            _address(array) or 0,
            array.shape,
            array.strides,
            _names.get(dtype) or _name(dtype),
            CPU,
            array.flags.writeable,
            array,
        )

    def empty(self, shape: tuple[int, ...], dtype: str, like: Any) -> tuple[NDArray[Any], View]:
        array = np.empty(shape, _dtypes.get(dtype) or _dtype(dtype))
        return array, View(_address(array) or 0, shape, array.strides, dtype, CPU, True, array)

    def integers(self, values: NDArray[np.int32], like: Any) -> NDArray[np.int32]:
        return values.copy()

    def attend(self, request: base.Request) -> tuple[NDArray[Any], NDArray[Any]]:
        if request.seed is None and request.dropout:
            request.seed = int.from_bytes(os.urandom(8), "little") >> (64 - SEED_BITS)
        found = base.forward(self, request)
        return found.out, found.lse

    def attend_cache(self, request: CacheRequest) -> tuple[NDArray[Any], NDArray[Any]]:
        made, operands = begin(self.view, self.empty, request)
        found = base.execute(self, made, operands, request.layout, request.q)
        return found.out, found.lse

    def merge(
        self,
        out_a: NDArray[Any],
        lse_a: NDArray[Any],
        out_b: NDArray[Any],
        lse_b: NDArray[Any],
        layout: str,
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        return partial.merge(out_a, lse_a, out_b, lse_b, layout)


FRONTEND = Numpy()
