"""Tile classes in compiled code: the algebra of instructions gives what that of numbers gives."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anyflash.kernels.llvm.bounds import Instructions
from anyflash.kernels.llvm.ir import DOUBLE, I64, Builder
from anyflash.kernels.llvm.launch import block_bounds
from anyflash.semantics.expr import VARIABLES, Expr
from anyflash.semantics.interval import Numbers, bound
from anyflash.semantics.limits import LIMIT
from anyflash.semantics.text import show
from kernels.cases import Array
from kernels.functions import compiled, pointer, usable
from semantics import expressions

TOGETHER = 8
BOXES = 6


class Narrow(Numbers):
    """The integers of kernels."""

    LIMIT = LIMIT

    def const(self, value: float | int | bool, kind: Any) -> Any:
        return super().const(max(-LIMIT, min(LIMIT, value)) if kind == "int" else value, kind)


def boxes(rng: np.random.Generator) -> dict[str, tuple[Array, Array]]:
    """Lowest and highest value of each variable, for several boxes."""
    box: dict[str, tuple[Array, Array]] = {}
    for name, kind in VARIABLES.items():
        if kind == "float":
            low = rng.choice([-1.5, 0.0, 2.0, -math.inf], BOXES)
            box[name] = (
                low,
                np.where(rng.random(BOXES) < 0.3, math.inf, np.maximum(low, -3) + rng.random(BOXES)),
            )
        else:
            low = rng.integers(-7, 8, BOXES)
            box[name] = low, low + rng.choice([0, 1, 5, 40, 2**30], BOXES)
    return box


def emitted(exprs: list[Expr], box: dict[str, tuple[Array, Array]]) -> list[tuple[Array, Array]]:
    inputs = [np.stack(ends) for ends in box.values()]
    outputs = [np.zeros((2, BOXES), np.float64 if e.kind == "float" else np.int64) for e in exprs]

    def emit(b: Builder, words) -> None:
        places = [pointer(b, w) for w in words]
        with b.loop(0, 8 * BOXES, 8) as i:
            env = {}
            for (name, kind), place in zip(VARIABLES.items(), places, strict=False):
                type_ = DOUBLE if kind == "float" else I64
                env[name] = tuple(b.load(type_, b.at(b.at(place, 8 * BOXES * end), i)) for end in range(2))
            for e, place in zip(exprs, places[len(inputs) :], strict=True):
                ends = bound(e, env, Instructions(b), None)
                for n, value in enumerate(ends):
                    value = b.cast("zext", value, I64) if e.kind == "bool" else value
                    b.store(value, b.at(b.at(place, 8 * BOXES * n), i))

    compiled("avx2", len(inputs) + len(outputs), emit)(*inputs, *outputs)
    return [(out[0], out[1]) for out in outputs]


@pytest.mark.skipif(not usable("avx2"), reason="emits AVX2 code")
@given(st.lists(expressions.any_kind(4), min_size=TOGETHER, max_size=TOGETHER), st.integers(0, 1000))
@settings(max_examples=60)
def test_as_numbers(exprs: list[Expr], seed: int) -> None:
    box = boxes(np.random.default_rng(seed))
    for e, got in zip(exprs, emitted(exprs, box), strict=True):
        want = bound(e, box, Narrow(), None)
        for side, a, b in zip(("lowest", "highest"), got, want, strict=True):
            assert np.array_equal(a, np.broadcast_to(b, a.shape)), (side, show(e))


@pytest.mark.parametrize("shape", [(1,), (64,), (65,), (200,), (3, 130), (130, 3), (2, 64, 5)])
@pytest.mark.parametrize("dtype", ["bool", "uint8", "int32"])
def test_bounds_of_table_blocks(shape: tuple[int, ...], dtype: str) -> None:
    table = np.random.default_rng(0).integers(0, 2 if dtype == "bool" else 200, shape).astype(dtype)
    for axis, length in enumerate(shape):
        found = block_bounds(table, axis, 64)
        for block in range(-(-length // 64)):
            part = table.take(range(64 * block, min(64 * block + 64, length)), axis).astype(np.int64)
            assert np.array_equal(found.take(block, axis)[..., 0], part.min(axis))
            assert np.array_equal(found.take(block, axis)[..., 1], part.max(axis))
