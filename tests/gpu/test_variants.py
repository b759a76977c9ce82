"""Alignment, strides and the precision of float32 choose the code: what launches compile to, without a GPU.

Triton specialises a kernel by its arguments: an address or a stride that 16 divides, a stride of 1. Our views
reach it as `Pointer`s and integers, so this asks what code comes of views that lie well or badly.
"""

from __future__ import annotations

import os
import re
from typing import Any

import pytest

pytest.importorskip("triton", reason="needs triton: nox -s 'systems(triton39)'")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted in this process", allow_module_level=True)
pytest.importorskip("torch")

import numpy as np

from anyflash.contract import direct
from anyflash.contract.poison import Layout, Poisoned, numpy_dtype
from anyflash.core.errors import Unsupported
from anyflash.kernels.triton import launch, offline
from anyflash.kernels.triton.device import pointer, steps
from anyflash.semantics.operands import Results

SHAPE = (2, 512, 4, 32)
SMALL = {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2}
# Bytes of one copy to shared memory, and of one load to registers: elements of a vector, bits of one.
COPY = re.compile(r"cp\.async\.c[ag]\.shared\.global[^;]*?,\s*(0x[0-9a-f]+|\d+)")
LOAD = re.compile(r"ld\.global\S*?(?:\.v([248]))?\.[bfu](\d+)")


def forward(layout: Layout, arch: str, dtype: str = "float16", **constants: Any) -> Any:
    """The compiled forward of a call whose arrays lie as `layout` says."""
    q, k, v = (Poisoned(SHAPE, dtype, layout).array for _ in range(3))
    problem, operands = direct.prepare(q, k, v)
    out, stats = (
        np.empty(problem.out_shape, numpy_dtype(dtype)),
        np.empty((2, *problem.lse_shape), np.float32),
    )
    results = Results(
        *(direct.view_of(x, True) for x in (out, np.empty(problem.lse_shape, np.float32), stats))
    )
    with offline.recorded(arch) as found:
        launch.forward(problem, operands, results)
    (made,) = found
    return offline.binary(made.kernel, arch, *made.arguments, **(made.constants | SMALL | constants))


def widths(ptx: str) -> tuple[set[int], set[int]]:
    """Bytes that copies move, and that loads do."""
    copies = {int(size, 0) for size in COPY.findall(ptx)}
    loads = {int(vector or 1) * int(bits) // 8 for vector, bits in LOAD.findall(ptx)}
    return copies, loads


# Layout, and whether tiles are copied by 16 bytes.
LAYOUTS: dict[str, tuple[Layout, bool]] = {
    "aligned": (Layout(), True),
    "wide_rows": (Layout(gap=16), True),
    "heads_first": (Layout((0, 2, 1, 3)), True),
    "misaligned_by_an_element": (Layout(shift=2), False),
    "misaligned_by_8_bytes": (Layout(shift=8), False),
    "odd_rows": (Layout(gap=1), False),
    "every_other": (Layout(step=2), False),
    # Rows are neighbours here, and are copied together.
    "columns": (Layout((0, 2, 3, 1)), True),
    "backwards": (Layout(reverse=(1, 3)), False),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_width_of_loads(name: str) -> None:
    layout, wide = LAYOUTS[name]
    copies, loads = widths(forward(layout, "sm_80").asm["ptx"])
    if wide:
        assert copies == {16}
    else:
        assert max(copies | loads) < 16


def test_what_is_multiplied_in_tf32() -> None:
    """tf32 takes tensor cores; float32 as it is takes none."""
    for arch, spelled in (("sm_80", "mma.sync"), ("sm_90", "wgmma.mma_async")):
        tf32 = forward(Layout(), arch, "float32", PRECISION="tf32").asm["ptx"]
        assert re.search(rf"{spelled}\S*\.tf32\.tf32", tf32), arch
        ieee = forward(Layout(), arch, "float32", PRECISION="ieee").asm["ptx"]
        assert "tf32" not in ieee, arch
        assert "fma.rn.f32" in ieee, arch


@pytest.mark.parametrize("shift", [1, 3])
def test_between_elements(shift: int) -> None:
    made = Poisoned((1, 4, 1, 16), "float32", Layout(shift=shift))
    with pytest.raises(Unsupported, match="multiples of that"):
        pointer(made.view)


def test_strides_between_elements() -> None:
    wide = np.zeros((4, 18), np.uint8)[:, :16].view(np.float32)
    with pytest.raises(Unsupported, match="Make it contiguous"):
        steps(direct.view_of(wide))
