"""What the assembly of kernels says: the instructions of its target, no calls, no spills in products."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from anyflash.core.dtypes import FLOATS
from anyflash.kernels.llvm import elf, engine, launch
from anyflash.kernels.llvm.spec import Part
from anyflash.kernels.llvm.target import get_target
from anyflash.semantics import expr as ex
from kernels.cases import Case
from kernels.emission import assembly, innermost_loops, spec_of
from kernels.programs import floats, table

PARTS: tuple[Part, ...] = ("forward", "backward", "decode")
MULTIPLY_ADD = r"\b(vfn?madd\w+|vdpbf16ps|tdpbf16ps|fmla|fmls)\b"
ROUNDING = r"\b(vrndscale\w*|vround\w*|frintn)\b"  # within exp2
STACK = r"\(%rsp|\[sp\b"


def case(dtype: str, part: Part, dim: int = 64) -> Case:
    lens = (2, 512) if part == "decode" else (512, 512)
    return Case(
        "assembly", dtype, dims=(dim, dim), heads=(4, 2), lens=lens, program=lambda rng: {"causal": True}
    )


@pytest.mark.parametrize("part", PARTS)
def test_pairs_of_bfloat16(part: Part) -> None:
    for target in ("avx512bf16", "amx"):
        text = assembly(case("bfloat16", part), part, target)
        # A decode multiplies numbers: it is as fast as memory.
        assert ("dpbf16ps" in text) == (part != "decode"), target
        tiles = part != "decode" and target == "amx"
        for instruction in ("tdpbf16ps", "tileloadd", "tilestored", "tilezero", "ldtilecfg", "tilerelease"):
            assert (instruction in text) == tiles, (target, instruction)
    assert "dpbf16ps" not in assembly(case("bfloat16", part), part, "avx512")


@pytest.mark.parametrize("part", ["forward", "backward"])
def test_tile_registers_are_configured_once_and_released(part: Part) -> None:
    text = assembly(case("bfloat16", part), part, "amx")
    assert text.count("ldtilecfg") == 1
    assert text.count("tilerelease") == 1
    # Four products of two tiles by two for four loads.
    loops = [loop for loop in innermost_loops(text) if loop.count(r"\btdpbf16ps\b") == 4]
    assert loops
    assert all(loop.count(r"\btileloadd\b") == 4 for loop in loops)


@pytest.mark.parametrize("dtype", FLOATS)
def test_avx2_is_avx2(dtype: str) -> None:
    for part in PARTS:
        text = assembly(case(dtype, part), part, "avx2")
        assert "%ymm" in text
        assert not re.search(r"%zmm|%[xy]mm(1[6-9]|2\d|3[01])|%k[0-7]\b", text), part


def everything(rng: np.random.Generator) -> dict[str, Any]:
    """Functions, integer division, tables of the types that need converting, dropout, sinks."""
    halves, brains, doubles = (table(floats(rng, 512, dtype=d)) for d in ("float16", "bfloat16", "float64"))
    bytes_ = table(rng.integers(0, 9, 512).astype(np.uint8))

    def score(s: Any, at: Any) -> Any:
        read = halves[at.k] + brains[at.k] + doubles[at.q] + bytes_[at.q] + (at.q - at.k) // bytes_[at.k]
        return ex.log(1 + ex.exp(s)) + ex.tanh(s * read)

    return {"score": score, "sinks": floats(rng, 4), "mask": lambda at: (at.q - at.k) % bytes_[at.k] < 5}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("target", ["avx2", "avx512", "avx512bf16", "amx", "neon"])
def test_nothing_is_called(target: str, dtype: str) -> None:
    """No libm, no compiler's runtime."""
    part = PARTS[(FLOATS.index(dtype) + len(target)) % len(PARTS)]
    dropout = {} if part == "decode" else {"dropout_p": 0.1}
    given = Case(
        "everything", dtype, dims=(33, 17), heads=(4, 2), lens=(2 if part == "decode" else 512, 512),
        program=lambda rng: everything(rng) | dropout,
    )  # fmt: skip
    found = get_target(target)
    data = engine.emit_object(launch.emitted(spec_of(given, part, target), found), found)
    assert elf.undefined_symbols(data) <= {"memcpy", "memset", "memmove"}, part


@pytest.mark.parametrize(
    ("target", "dtype"),
    [
        ("avx2", "float32"), ("avx2", "float64"), ("avx512", "float32"), ("avx512", "float64"),
        ("avx512bf16", "bfloat16"), ("amx", "bfloat16"), ("neon", "float32"), ("neon", "float64"),
    ],
)  # fmt: skip
@pytest.mark.parametrize(("part", "products"), [("forward", 2), ("backward", 5)])
def test_products_stay_in_registers(part: Part, products: int, target: str, dtype: str) -> None:
    loops = [
        loop
        for loop in innermost_loops(assembly(case(dtype, part, 128), part, target))
        if loop.count(MULTIPLY_ADD) >= 4 and not loop.count(ROUNDING) and not loop.count(r"\bv?f?div")
    ]
    assert len(loops) >= products
    large = [loop for loop in loops if loop.count(MULTIPLY_ADD) >= (4 if target == "amx" else 32)]
    assert len(large) >= products
    for loop in large:
        assert not loop.count(STACK), "\n".join(loop.lines)
