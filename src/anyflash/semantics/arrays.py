"""Views as numpy arrays over the same memory."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anyflash.core.dtypes import FLOATS8
from anyflash.core.view import View

# Not among numpy's own.
_FOREIGN = ("bfloat16", *FLOATS8)


@cache
def numpy_dtype(name: str) -> np.dtype[Any]:
    """The numpy dtype of one of ours, those that numpy itself lacks included."""
    if name in _FOREIGN:
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, name))
    return np.dtype(name)


class _Memory:
    """Exports a view through numpy's array interface and keeps it, and so its memory, alive."""

    def __init__(self, view: View, typestr: str) -> None:
        self.view = view
        self.__array_interface__ = {
            "version": 3,
            "data": (view.ptr, not view.writable),
            "shape": view.shape,
            "strides": view.strides,
            "typestr": typestr,
        }


def as_numpy(view: View) -> NDArray[Any]:
    """An array on the memory of `view`: writing to one writes to the other.

    Any strides are kept, zero and negative ones too. A read-only view gives a read-only array. Raises
    ValueError if the view has no address or lies outside host memory.
    """
    if view.ptr is None or view.device.kind != "cpu":
        raise ValueError(f"a view on {view.device} with address {view.ptr} cannot be read by numpy")
    dtype = numpy_dtype(view.dtype)
    if not view.size:
        return np.empty(view.shape, dtype)
    # The interface has no name for these: they pass as unsigned integers and are reinterpreted.
    foreign = view.dtype in _FOREIGN
    array: NDArray[Any] = np.asarray(_Memory(view, f"<u{dtype.itemsize}" if foreign else dtype.str))
    return array.view(dtype) if foreign else array
