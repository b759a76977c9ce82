"""The variants of `bench.parts` lack just the part that they name."""

from __future__ import annotations

import re

import pytest

from anyflash.bench import parts
from anyflash.kernels.llvm import launch, schedule
from anyflash.kernels.llvm.target import get_target
from anyflash.semantics.problem import Problem, Program

CASES = [
    (direction, dtype, part.name)
    for direction, listed in (("forward", parts.FORWARD), ("backward", parts.BACKWARD))
    for dtype in ("float32", "bfloat16")
    for part in listed
]
PRODUCTS = re.compile(r"llvm\.fma\.v\d+f32|dpbf16ps")
ROUNDING = "llvm.roundeven"


def text(direction: str, dtype: str) -> str:
    problem = Problem(Program(), dtype, 1, 2, 2, 64, 64, 64, 64)
    target = get_target("avx512bf16")
    every = frozenset(("q", "k", "v", "out", "dout", "dq", "dk", "dv"))
    spec = schedule.make_spec(problem, direction, target, every, False, (), frozenset())
    return launch.emitted(spec, target)


@pytest.mark.parametrize(("direction", "dtype", "name"), CASES)
def test_variant(direction: str, dtype: str, name: str) -> None:
    listed = parts.FORWARD if direction == "forward" else parts.BACKWARD
    part = next(p for p in listed if p.name == name)
    whole = text(direction, dtype)
    with part.leave_out():
        without = text(direction, dtype)
    assert text(direction, dtype) == whole
    if name == "exponentials":
        assert without.count(ROUNDING) < whole.count(ROUNDING)
    elif name == "packing and turning":
        assert without.count("masked.load") <= whole.count("masked.load")
        assert len(without) < len(whole)
    else:
        others = [p for p in listed if p.name not in (name, "exponentials", "packing and turning")]
        assert len(without) < len(whole) or "i64 0" in without
        assert without not in [_left_out(other, direction, dtype) for other in others]
        assert len(PRODUCTS.findall(without)) <= len(PRODUCTS.findall(whole))


def _left_out(part: parts.Part, direction: str, dtype: str) -> str:
    with part.leave_out():
        return text(direction, dtype)


def test_measure() -> None:
    found = parts.measure(Problem(Program(), "float32", 1, 1, 1, 64, 64, 16, 16), repeats=1)
    assert list(found) == ["forward", "backward"]
    for direction, listed in (("forward", parts.FORWARD), ("backward", parts.BACKWARD)):
        assert list(found[direction]) == ["whole", *(part.name for part in listed)]
        assert found[direction]["whole"] > 0
