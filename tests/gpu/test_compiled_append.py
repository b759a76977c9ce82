"""The kernel that writes into a KV cache compiles, in the forms that calls give it."""

from __future__ import annotations

import os
from typing import Any

import pytest

pytest.importorskip("triton", reason="needs triton: nox -s 'systems(triton39)'")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted in this process", allow_module_level=True)
pytest.importorskip("torch")

import torch

from anyflash.kernels.triton import append, offline, vectors
from gpu.stand import Stand

TARGETS = ("sm_80", "sm_90", "gfx942")
X, F, I, L = (Stand(kind) for kind in (torch.bfloat16, torch.float32, torch.int32, torch.int64))
HEADS, KV_HEADS, DIM, PAGE = 32, 8, 128, 16
ROWS = (4 * KV_HEADS * DIM, KV_HEADS * DIM, DIM, 1)
CACHE = (PAGE * KV_HEADS * DIM, KV_HEADS * DIM, DIM, 1)
WIDTHS = {"DIM": DIM, "DIM_V": DIM, "WIDTH": DIM, "WIDTH_V": DIM, "BLOCK": 8, "num_warps": 4}
COUNTS = (1, 16, KV_HEADS, 16, HEADS, 64, 4, 256, 4, 256, 7, PAGE, 1000, 4096)

# counts, page table, leftpad, positions, cumulative lengths, table of angles, interleaved
FORMS: dict[str, tuple[Any, ...]] = {
    "decode": (I, I, None, None, None, X, False),
    "plain": (I, I, None, None, None, None, False),
    "packed": (I, L, I, L, I, F, True),
    "lengths known": (None, None, None, None, None, F, False),
}


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("name", FORMS)
def test_append(name: str, arch: str) -> None:
    counts, table, leftpad, positions, starts, angles, interleaved = FORMS[name]
    rotary = (angles, angles, (64, 1), (64, 1), 8192) if angles else (None, None, (0, 0), (0, 0), 0)
    found = offline.compiled(
        append.append, arch, counts, (X, X), (X, X), X, X if angles else None, starts, starts, I, leftpad,
        table, positions, *rotary, (ROWS, ROWS), (CACHE, CACHE), ROWS, (256, 1), (0, 1), *COUNTS,
        COUNT=counts is not None, NEW=True, ROTARY=angles is not None, INTERLEAVED=interleaved,
        PAIRS=64 if angles else 0, **WIDTHS,
    )  # fmt: skip
    assert found.spilled == 0
    assert found.registers <= 128


@pytest.mark.parametrize("arch", TARGETS)
def test_queries_alone(arch: str) -> None:
    found = offline.compiled(
        append.append, arch, None, (), (X, X), X, X, None, None, I, None, I, None,
        F, F, (64, 1), (64, 1), 8192, (), (CACHE, CACHE), ROWS, (256, 1), (0, 1), *COUNTS,
        COUNT=False, NEW=False, ROTARY=True, INTERLEAVED=False, PAIRS=64, **WIDTHS,
    )  # fmt: skip
    assert found.spilled == 0


@pytest.mark.parametrize("arch", TARGETS)
def test_copy(arch: str) -> None:
    assert offline.compiled(vectors.copy, arch, L, L, 3, 65, BLOCK=256).spilled == 0
