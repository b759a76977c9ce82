"""Exponentials, logarithms and tanh against numpy's widest float, in units of the last place."""

from __future__ import annotations

import numpy as np
import pytest

from anyflash.kernels.llvm import vmath
from anyflash.kernels.llvm.ir import DOUBLE, FLOAT, vec
from kernels.cases import Array
from kernels.functions import compiled, pointer, usable

# What the docstring of vmath promises.
ULP = {"exp2": 1.25, "exp": 1.25, "log2": 1.25, "log": 1.25, "tanh": 3.0}
DTYPE = {FLOAT: np.dtype(np.float32), DOUBLE: np.dtype(np.float64)}
FUNCTIONS = {
    "exp2": (vmath.exp2, np.exp2),
    "exp": (vmath.exp, np.exp),
    "log2": (vmath.log2, np.log2),
    "log": (vmath.log, np.log),
    "tanh": (vmath.tanh, np.tanh),
}
WIDTHS = [
    (target, element, lanes)
    for target, widths in {
        "avx512": ((FLOAT, 16), (DOUBLE, 8), (FLOAT, 1)),
        "avx2": ((FLOAT, 8), (DOUBLE, 4), (DOUBLE, 1)),
        "neon": ((FLOAT, 4), (DOUBLE, 2), (FLOAT, 1)),
    }.items()
    for element, lanes in widths
    if target in usable(target)
]
pytestmark = pytest.mark.skipif(
    np.finfo(np.longdouble).nmant < 60, reason="no float here is wider than float64 to compare it with"
)


def arguments(element: str) -> Array:
    """Every magnitude there is, dense where results are ordinary, and special values; a multiple of 16."""
    dtype, rng = DTYPE[element], np.random.default_rng(0)
    info = np.finfo(dtype)
    edge = float(np.log2(info.max))
    some = [
        rng.uniform(-1.2 * edge, 1.2 * edge, 20000),
        rng.uniform(-2, 2, 20000),
        1 + rng.uniform(-1, 1, 10000) * 2.0 ** rng.uniform(-info.nmant, 0, 10000),
        np.arange(-edge - 30, edge + 3),
        np.arange(-300, 300) / 2,
        2.0 ** np.arange(int(info.minexp) - info.nmant, int(info.maxexp)),
        rng.standard_normal(10000) * 2.0 ** rng.uniform(info.minexp - 20, info.maxexp - 2, 10000),
        [0.0, -0.0, np.inf, -np.inf, np.nan, info.max, -info.max, info.tiny, -info.tiny],
        [info.smallest_subnormal],
    ]  # fmt: skip
    x = np.concatenate(some).astype(dtype)
    return np.concatenate([x, np.ones(-len(x) % 16, dtype)])


@pytest.mark.parametrize(("target", "element", "lanes"), WIDTHS)
def test_within_the_promised_units_of_the_last_place(target: str, element: str, lanes: int) -> None:
    dtype, vector = DTYPE[element], vec(element, lanes)
    x = arguments(element)
    outputs = {name: np.empty_like(x) for name in FUNCTIONS}

    def emit(b, words) -> None:
        source, *targets = (pointer(b, w) for w in words)
        with b.loop(0, x.nbytes, lanes * dtype.itemsize) as offset:
            value = b.load(vector, b.at(source, offset), dtype.itemsize)
            for place, (function, _) in zip(targets, FUNCTIONS.values(), strict=True):
                b.store(function(b, value), b.at(place, offset), dtype.itemsize)

    compiled(target, 1 + len(FUNCTIONS), emit)(x, *outputs.values())
    for name, (_, exact) in FUNCTIONS.items():
        check(name, x, outputs[name], exact, lanes * dtype.itemsize == 64)


@np.errstate(all="ignore")
def check(name: str, x: Array, got: Array, exact, scalef: bool) -> None:
    info = np.finfo(x.dtype)
    truth = exact(x.astype(np.longdouble))
    if name == "exp2":
        # A weight of softmax: never above 1 but for rounding, and 0 below the normal numbers where there is
        # no instruction that scales.
        keep = ~(x > 1)
        x, got, truth = x[keep], got[keep], truth[keep]
        tiny = x < info.minexp
        zero = (x < info.minexp - 1) if not scalef else np.zeros_like(tiny)
        assert (got[zero] == 0).all()
        assert (got[tiny] <= info.tiny).all()
        x, got, truth = x[~tiny], got[~tiny], truth[~tiny]
    rounded = truth.astype(x.dtype)
    special = ~np.isfinite(rounded)
    same = np.where(np.isnan(rounded), np.isnan(got), got == rounded)
    wrong = special & ~same & ~(np.abs(truth) < np.inf)  # overflow may be rounded to the largest number
    assert not wrong.any(), (name, x[wrong][:5], got[wrong][:5], rounded[wrong][:5])
    ordinary = ~special
    error = np.abs(got.astype(np.longdouble) - truth)[ordinary]
    units = (error / np.spacing(np.abs(rounded[ordinary]))).astype(np.float64)
    worst = int(units.argmax())
    assert units[worst] <= ULP[name], (name, units[worst], x[ordinary][worst], got[ordinary][worst])


@pytest.mark.parametrize("element", [FLOAT, DOUBLE])
@pytest.mark.parametrize("degree", [3, 4, 5, 6, 7])
def test_two_to_the_power_0_is_1(element: str, degree: int) -> None:
    if not usable("avx2"):
        pytest.skip("emits AVX2 code")
    dtype = DTYPE[element]
    got = np.zeros(1, dtype)
    compiled("avx2", 1, lambda b, w: b.store(vmath.exp2(b, b.const(0.0, element), degree), pointer(b, w[0])))(
        got
    )
    assert got[0] == 1
