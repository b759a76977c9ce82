"""Views read as numpy arrays: same memory, any strides, any dtype."""

from __future__ import annotations

import gc

import ml_dtypes
import numpy as np
import pytest

from anyflash.core.device import Device
from anyflash.core.dtypes import ITEMSIZE
from anyflash.core.view import View
from anyflash.semantics.arrays import as_numpy, numpy_dtype


def view_of(array, writable=True):
    return View(
        array.ctypes.data, array.shape, array.strides, array.dtype.name, writable=writable, owner=array
    )


def base(dtype):
    return (np.arange(24).reshape(2, 3, 4) % 7).astype(dtype)


LAYOUTS = {
    "contiguous": lambda a: a,
    "permuted": lambda a: a.transpose(2, 0, 1),
    "stepped": lambda a: a[:, ::2, 1::2],
    "reversed": lambda a: a[::-1, :, ::-1],
    "stretched": lambda a: np.broadcast_to(a[:, :1], (5, 2, 3, 4)),
    "scalar": lambda a: a[0, 0, 0, ...],
    "empty": lambda a: a[:0],
}


@pytest.mark.parametrize("dtype", ITEMSIZE)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_reads_the_same_values(dtype, layout):
    array = LAYOUTS[layout](base(numpy_dtype(dtype)))
    got = as_numpy(view_of(array))
    assert got.dtype == array.dtype
    assert got.shape == array.shape
    np.testing.assert_array_equal(got.astype(np.float64), array.astype(np.float64))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_shares_memory_and_keeps_it_alive(dtype):
    array = base(dtype)
    got = as_numpy(view_of(array[:, ::-1]))
    got[0, 0, 0] = 42
    assert array[0, 2, 0] == 42
    del array
    gc.collect()
    assert got[0, 0, 0] == 42


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_read_only_view_cannot_be_written(dtype):
    got = as_numpy(view_of(base(dtype), writable=False))
    with pytest.raises(ValueError, match="read-only"):
        got[0, 0, 0] = 1


def test_what_numpy_cannot_read_is_refused():
    with pytest.raises(ValueError, match="cannot be read"):
        as_numpy(View(None, (2,), (4,), "float32"))
    with pytest.raises(ValueError, match="cuda:1"):
        as_numpy(View(4096, (2,), (4,), "float32", Device("cuda", 1)))
