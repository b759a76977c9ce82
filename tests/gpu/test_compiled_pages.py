"""Gluon's own word on pages.py: chunks and panels lie where wgmma looks for the tile; and the forward over a
cache, compiled for sm_90a, within budgets as test_compiled_hopper.py's.

`python tests/gpu/test_compiled_pages.py` writes the figures of the installed Triton into them.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="needs triton: nox -s 'systems(triton39)'")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted in this process", allow_module_level=True)
pytest.importorskip("torch")

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import triton
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from anyflash.kernels.triton import offline
from gpu import emulated_pages as kernels
from gpu import hopper_budgets
from gpu.emulator.swizzle import places
from gpu.machine_code import hopper_warnings, printed
from gpu.stand import Stand
from gpu.test_compiled_hopper import kept, wrong

BUDGETS = Path(__file__).parent / "budgets_hopper_prefill.json"
# All configurations with the newer Triton, () for short; one with the older.
NAMES = {"3.9.0": (), "3.6.0": ("128 packed causal pages of 16",)}

_GLUON = {torch.float16: gl.float16, torch.float32: gl.float32}


def boxes(shape: list[int], block: list[int], dtype: torch.dtype = torch.float16) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout.get_default_for(block, _GLUON[dtype])
    return TensorDescriptor(Stand(dtype), shape, [shape[1], 1], block, layout)


def compiled(rows: int, chunked: bool) -> Any:
    tile = boxes([64, 128], [64, 128])
    out = boxes([64, 64], [64, 64], torch.float32)
    arguments = tile, boxes([64, 128], [rows, 64]), tile, out, chunked, True
    return offline.binary(kernels.boxes_or_tile, "sm_90", *arguments, num_warps=4)


def descriptors(ptx: str) -> list[str]:
    """What makes wgmma's descriptors of an address, in their order."""
    return re.findall(r"(?:add|or)\.[bs]64 \s*%rd\d+, %rd\d+, (-?\d+)", ptx)


@pytest.mark.parametrize("rows", [8, 16, 64])
def test_chunks_are_multiplied_as_the_tile(rows: int) -> None:
    made = compiled(rows, True)
    loaded, whole = made.asm["ptx"], compiled(rows, False).asm["ptx"]
    assert descriptors(loaded) == descriptors(whole) != []
    assert hopper_warnings(made) == 0
    places = [int(n) for n in re.findall(r"add\.s32 \s*%r\d+, %r\d+, (\d+);", loaded)]
    first = 64 * 128 * 2 + 64 * 64 * 4
    assert [n for n in places if first <= n < first + 64 * 128 * 2] == [
        *range(first, first + 64 * 128 * 2, rows * 128)
    ]


@pytest.mark.parametrize(("bytes_of_a_row", "shape"), [(128, [32, 128]), (128, [16, 64]), (64, [16, 64])])
def test_the_emulator_lays_tiles_out_as_the_compiler(bytes_of_a_row: int, shape: list[int]) -> None:
    if triton.__version__ < "3.9":
        pytest.skip("this Triton does not say how it lays shared memory out")
    from triton._C.libtriton import gluon_ir, ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    context = ir.context()
    ir.load_dialects(context)
    make_backend(GPUTarget("cuda", 90, 32)).load_dialects(context)
    builder = gluon_ir.GluonOpBuilder(context)
    layout = gl.NVMMASharedLayout(bytes_of_a_row, 16)
    bases = builder.to_linear_layout(layout._to_ir(builder), shape).offset_bases
    found = places(layout, shape)
    for offset in range(found.numel()):
        row = column = 0
        for bit, (by_row, by_column) in enumerate(bases):
            if offset >> bit & 1:
                row, column = row ^ by_row, column ^ by_column
        assert found[row, column] == offset


def measured(version: str) -> dict[str, dict[str, Any]]:
    return printed("shipped_prefill.py", *NAMES[version])


@pytest.mark.timeout(2400)
def test_budgets() -> None:
    hopper_budgets.check(BUDGETS, measured, wrong)


if __name__ == "__main__":
    hopper_budgets.write(BUDGETS, measured(triton.__version__), wrong, kept)
