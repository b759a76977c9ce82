"""Kernels without tensor cores, and gradients of tables, compile for one GPU of each maker."""

from __future__ import annotations

import os
from typing import Any

import pytest

pytest.importorskip("triton", reason="needs triton: nox -s 'systems(triton39)'")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted in this process", allow_module_level=True)
pytest.importorskip("torch")

import torch

from anyflash.kernels.triton import offline, prepare, scattered, tables
from anyflash.kernels.triton.program import functions
from gpu.stand import Stand

TARGETS = ("sm_90", "gfx942")
X, F = Stand(torch.bfloat16), Stand(torch.float32)
I, L = Stand(torch.int32), Stand(torch.int64)
ROWS, HEADS, DIM = 4096, 16, 64
ARRAY = (ROWS * HEADS * DIM, HEADS * DIM, DIM, 1)
LSE, STATS = (HEADS * ROWS, ROWS, 1), (HEADS * ROWS, HEADS * ROWS, ROWS, 1)
WIDTHS = {"DIM": 96, "WIDE": 64, "REST": 32}

SMALL: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {
    "delta": (
        prepare.delta,
        (X, X, F, F, F, F, F, I, ARRAY, ARRAY, LSE, STATS, LSE, 128, 4, HEADS, ROWS, 0.2),
        {"DLSE": True, "SINKS": True, "PACKED": True, "BLOCK": 32, **WIDTHS},
    ),
    "sum_sinks": (prepare.sum_sinks, (F, F, 1, 128, 4), {"BLOCK": 64}),
    "fill_rest": (
        prepare.fill_rest,
        (X, F, F, I, ARRAY, LSE, STATS, 4, ROWS),
        {"DIM": 64, "WIDTH": 64, "BLOCK": 16},
    ),
    "zero": (prepare.zero, (X, ARRAY, 12345678, ROWS, HEADS, DIM), {"BLOCK": 1024}),
    "stats_of_lse": (prepare.stats_of_lse, (F, F, LSE, STATS, 12345678, HEADS, ROWS, 0.2), {"BLOCK": 256}),
    "add_bounds": (scattered.add_bounds, (F, F, 12345), {"BLOCK": 1024}),
    "settle": (scattered.settle, (L, F, F, (0, 0, 0, 1), 12345678, 1, 1, 16), {"BLOCK": 256}),
    "add_splits": (tables.add_splits, (F, F, (16, 1), (0, 0, 0, 1), 16, 16, 1, 1, 16), {"BLOCK": 256}),
}
# A score, its table's type, strides and extents, and the axes that own an element; None: no owner.
SLOPES = "(sub score (mul (load 0:f head) (float (sub q k))))"
TABLES: dict[str, tuple[str, Any, tuple[int, ...], tuple[int, ...], tuple[bool, ...] | None]] = {
    "slopes": (SLOPES, F, (1,), (HEADS,), (False, True, False, False)),
    "bias": (
        "(add score (load 0:f head row k))",
        X,
        (ROWS * ROWS, ROWS, 1),
        (HEADS, ROWS, ROWS),
        (False, True, True, True),
    ),
    "relative": ("(add score (load 0:f (sub q k)))", F, (1,), (ROWS,), None),
}


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("name", SMALL)
def test_small(name: str, arch: str) -> None:
    kernel, arguments, constants = SMALL[name]
    assert offline.compiled(kernel, arch, *arguments, **constants).spilled == 0


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("name", TABLES)
def test_tables(name: str, arch: str) -> None:
    score, pointer, strides, extents, owners = TABLES[name]
    made = functions(score, "(le k q)", ("bfloat16" if pointer is X else "float32",))
    ((slope, place),) = made.loads[0]
    constants = {
        "SCORE": made.final_score,
        "SLOPE_OF": slope,
        "PLACE_OF": place,
        "ALLOWED": made.allowed,
        "TILE_CLASS": made.tile_class,
        "IDENTITY": False,
        "MASK": True,
        "DROPOUT": True,
        "PACKED": False,
        "USED": False,
        "PRECISION": "ieee",
        "DIM": DIM,
        "WIDE": DIM,
        "REST": 0,
        "DIM_V": DIM,
        "WIDE_V": DIM,
        "REST_V": 0,
        "BLOCK_M": 64,
        "BLOCK_N": 32,
        "num_warps": 4,
        "num_stages": 1,
    }
    arrays = (X, X, X, X, F, F, F, None, None, None, ((pointer, strides, extents),))
    layout = (ARRAY, ARRAY, ARRAY, ARRAY, STATS, LSE, strides)
    numbers = (HEADS, 1, ROWS, ROWS, 0.1, 0.2, 5, 7, 1.0)
    if owners is None:
        arrays = (*arrays[:7], L, F, F, *arrays[7:])
        for add in (False, True):
            found = offline.compiled(
                scattered.scatter, arch, *arrays, *layout, strides, 64, *numbers, ADD=add, **constants
            )
            assert found.products > 0
    else:
        by = dict(zip(("BY_BATCH", "BY_HEAD", "BY_ROW", "BY_K"), owners, strict=True))
        blocks = (16, 4, 64, 128, 16, 4, ROWS, ROWS)
        found = offline.compiled(tables.owned, arch, *arrays, *layout, *blocks, *numbers, **by, **constants)
        assert found.products > 0
