"""The poisoned memory notices what it is there for."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from anyflash.contract.poison import MARGIN, Layout, Poisoned
from anyflash.contract.table import layouts

SHAPE = (2, 3, 4, 5)
ARRANGED = [pytest.param(layout, id=name) for name, chosen in layouts() for layout in set(chosen)]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("layout", ARRANGED)
def test_view_and_array_are_the_same_elements(layout, dtype):
    values = np.arange(np.prod(SHAPE), dtype=np.float64).reshape(SHAPE)
    for axis in layout.expand:
        values = np.repeat(values.take([0], axis), SHAPE[axis], axis)
    made = Poisoned.of(values, dtype, layout)
    view = made.view
    for index in np.ndindex(*SHAPE):
        address = view.ptr + sum(i * s for i, s in zip(index, view.strides, strict=True))
        raw = ctypes.string_at(address, view.itemsize)
        assert np.frombuffer(raw, made.array.dtype)[0] == values[index]
    assert made.damage() is None


@pytest.mark.parametrize("layout", [p for p in ARRANGED if not p.values[0].expand])
def test_output_must_be_written_whole_and_nothing_else(layout):
    made = Poisoned(SHAPE, "float32", layout, output=True)
    assert "were not written" in made.damage()
    made.array[...] = np.nan
    assert made.damage() is None
    made.array[1, 2, 3, 4] = made.array.copy().view(np.uint32).dtype.type(0)
    assert made.damage() is None


@pytest.mark.parametrize("output", [False, True])
@pytest.mark.parametrize("offset", [-1, -MARGIN, 1, MARGIN - 1])
def test_a_write_outside_shows(output, offset):
    made = Poisoned((7,), "float32", output=output)
    made.array[...] = 1
    if not output:
        made.seal()
    assert made.damage() is None
    at = made.view.ptr + 4 * (offset if offset < 0 else 6 + offset)
    ctypes.memset(at, 0, 4)
    assert "were written" in made.damage()


def test_a_write_into_an_input_shows():
    made = Poisoned.of(np.ones(3), "float32")
    made.array[1] = 2
    assert "were written" in made.damage()


@pytest.mark.parametrize("shift", range(16))
def test_shift_moves_the_address(shift):
    assert Poisoned((3,), "float64", Layout(shift=shift)).view.ptr % 64 == shift


def test_neighbours_are_nan():
    made = Poisoned.of(np.ones((2, 3)), "bfloat16", Layout(gap=2))
    whole = np.frombuffer(ctypes.string_at(made.view.ptr - 2 * MARGIN, 4 * MARGIN), made.array.dtype)
    assert np.isnan(whole[:MARGIN].astype(np.float32)).all()
    assert not np.isnan(whole[MARGIN].astype(np.float32))
