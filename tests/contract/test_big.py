"""Offsets beyond 2 ** 31 and 2 ** 32 elements, and more keys than 16 bits can count.

The arrays are windows on virtual memory that is never touched: only the rows that a call uses become real.
"""

from __future__ import annotations

import mmap
import sys

import numpy as np
import pytest

from anyflash.contract.direct import attend
from anyflash.contract.poison import numpy_dtype
from anyflash.core.view import View
from anyflash.dispatch.plan import run_backward, run_forward
from anyflash.semantics.describe import describe, describe_program
from anyflash.semantics.operands import Gradients, Results, Saved
from contract.calls import BITWISE, assert_same_bits, operands, run

each_backend = pytest.mark.parametrize("backend", BITWISE)
FAR = 2**32 + 24
"""Elements between neighbours along the stretched axis: beyond 32 bits, signed or not."""
_NORESERVE = 0x4000  # Linux's MAP_NORESERVE, which Python 3.11 does not name


class Reserved:
    """An array with one axis stretched over virtual memory."""

    def __init__(self, shape, dtype, axis, backwards=False):
        kind = numpy_dtype(dtype)
        strides, step = [0] * len(shape), 1
        for i in reversed(range(len(shape))):
            if i != axis:
                strides[i], step = step, step * shape[i]
        strides[axis] = FAR
        span = (shape[axis] - 1) * FAR + step
        reserve = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
        memory = mmap.mmap(-1, span * kind.itemsize, flags=reserve)
        start = 0
        if backwards:
            start, strides[axis] = (shape[axis] - 1) * FAR, -FAR
        strides = tuple(s * kind.itemsize for s in strides)
        self.array = np.ndarray(shape, kind, memory, start * kind.itemsize, strides)
        address = self.array.__array_interface__["data"][0]
        self.view = View(address, tuple(shape), strides, dtype, owner=self)

    @classmethod
    def of(cls, array, axis, backwards=False):
        made = cls(array.shape, array.dtype.name, axis, backwards)
        made.array[...] = array
        return made


@pytest.mark.skipif(sys.platform != "linux", reason="reserves memory without committing it, as Linux can")
@each_backend
@pytest.mark.parametrize("backwards", [False, True], ids=["forwards", "backwards"])
@pytest.mark.parametrize("axis", range(4), ids=["batch", "tokens", "heads", "dim"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_strides_beyond_32_bits(backend, dtype, axis, backwards):
    """Every array of the call, inputs and results, lies 16 GiB (8 GiB) a step apart along one axis."""
    arrays = operands(dtype, (2, 3), (2, 4), dim=2)
    arrays = {name: a[:, :, :2] if name in ("q", "dout") else a for name, a in arrays.items()}
    arrays["dlse"] = arrays["dlse"][:, :2]
    expected = run(backend, {name: np.ascontiguousarray(a) for name, a in arrays.items()}, causal=True)
    far = {name: Reserved.of(a, min(axis, a.ndim - 1), backwards) for name, a in arrays.items()}
    made = describe_program((2, 3, 2, 2), (2, 4, 2, 2), lambda _, a: a.dtype.name, causal=True)
    problem, given = describe(made.program, far["q"].view, far["k"].view, far["v"].view)

    def output(shape, kind):
        return Reserved(shape, kind, min(axis, len(shape) - 1), backwards)

    out = output(problem.out_shape, dtype)
    lse = output(problem.lse_shape, "float32")
    stats = output((2, *problem.lse_shape), "float32")
    run_forward(problem, given, Results(out.view, lse.view, stats.view), backend)
    grads = {
        name: output(shape, dtype)
        for name, shape in (("dq", problem.q_shape), ("dk", problem.k_shape), ("dv", problem.v_shape))
    }
    saved = Saved(out.view, stats.view, far["dout"].view, far["dlse"].view)
    run_backward(problem, given, saved, Gradients(*(made.view for made in grads.values())), backend)
    found = {"out": out, "lse": lse} | grads
    assert_same_bits(expected, {name: made.array.copy() for name, made in found.items()})


@each_backend
@pytest.mark.parametrize("k_len", [2**15 + 3, 2**16 + 5, 2**17 + 1])
def test_more_keys_than_16_bits(backend, k_len):
    """q = 0 and v counts: the mean over the keys that each of the last queries sees is exact in float64."""
    q_len = 3
    q, k = np.zeros((1, q_len, 1, 4)), np.ones((1, k_len, 1, 4))
    v = np.arange(k_len, dtype=np.float64)[None, :, None, None]
    for keywords, first in (({}, 0), ({"causal": True}, 0), ({"window": (1000, 0)}, k_len - 1003)):
        found = attend(backend, q, k, v, **keywords)
        for row in range(q_len):
            last = k_len - q_len + row if keywords else k_len - 1
            start = max(first + row, 0) if "window" in keywords else 0
            count = last - start + 1
            assert abs(found.out[0, row, 0, 0] - (start + last) / 2) <= k_len * np.finfo(np.float64).eps * 4
            assert np.rint(np.exp(found.lse[0, 0, row])) == count


@each_backend
def test_gradients_of_many_keys(backend):
    """dv shows the mask at every one of 70,000 keys: q = 0, dout = 1."""
    q_len, k_len = 5, 70_000
    q, k = np.zeros((1, q_len, 1, 4), np.float32), np.ones((1, k_len, 1, 4), np.float32)
    v, dout = np.ones((1, k_len, 1, 1), np.float32), np.ones((1, q_len, 1, 1), np.float32)
    found = attend(backend, q, k, v, dout=dout, causal=True)
    counts = k_len - q_len + 1 + np.arange(q_len)
    expected = np.array([(1 / counts[max(0, j - (k_len - q_len)) :]).sum() for j in range(k_len)])
    assert np.abs(found.dv[0, :, 0, 0] / expected - 1).max() <= 32 * np.finfo(np.float32).eps
