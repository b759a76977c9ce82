"""Gluon's own word on the emulator's kernels: what is right there compiles for Hopper, and types that the
emulator refuses Gluon refuses too."""

from __future__ import annotations

import itertools
import os
import re
from typing import Any

import pytest

pytest.importorskip("triton", reason="needs triton: nox -s 'systems(triton39)'")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted in this process", allow_module_level=True)
pytest.importorskip("torch")

import torch
import triton
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from anyflash.kernels.triton import offline
from gpu import emulated_faults as faults
from gpu import emulated_kernels as kernels
from gpu.stand import Stand

_GLUON = {torch.bfloat16: gl.bfloat16, torch.float32: gl.float32, torch.float8_e4m3fn: gl.float8e4nv}


def compile_for_hopper(kernel: Any, *arguments: Any) -> Any:
    return offline.binary(kernel, "sm_90", *arguments, num_warps=4)


def boxes(shape: list[int], block: list[int], dtype: torch.dtype = torch.bfloat16) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout.get_default_for(block, _GLUON[dtype])
    return TensorDescriptor(Stand(dtype), shape, [shape[1], 1], block, layout)


SQUARE = boxes([256, 64], [64, 64])
FLOATS, INTEGERS = Stand(torch.float32), Stand(torch.int32)
RIGHT: dict[str, tuple[Any, ...]] = {
    "copy": (kernels.copy, SQUARE, SQUARE),
    "ring": (kernels.double, SQUARE, SQUARE, 5, 2),
    "product": (
        kernels.product,
        boxes([128, 320], [64, 64]),
        boxes([320, 64], [64, 64]),
        boxes([128, 64], [64, 64], torch.float32),
        5,
        2,
    ),
    "8 bits": (
        kernels.product_of_8_bits,
        *[boxes([64, 64], [64, 64], torch.float8_e4m3fn)] * 2,
        Stand(torch.float32),
        True,
    ),
    "turns": (kernels.in_turn, INTEGERS, INTEGERS, True),
    "pointers": (kernels.row_sums, FLOATS, FLOATS, INTEGERS, 32, 16),
}
# A register operand or a sum in a wrong layout are refused, too, but by the end of the process.
REFUSED: dict[str, tuple[Any, ...]] = {
    fault: (faults.values, FLOATS, fault)
    for fault in ("layouts", "layouts of where", "ranks", "expanded axis", "warps", "extents", "constexpr")
}
REFUSED |= {"half exponent": (faults.values, FLOATS, "half exponent")}
REFUSED |= {
    fault: (faults.memory, SQUARE, SQUARE, fault)
    for fault in ("stored shape", "stored type", "box of another shape", "product used in flight")
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_kernels_compile(name: str) -> None:
    assert compile_for_hopper(*RIGHT[name]).asm["cubin"]


_STEPS = {
    "mbarrier.try_wait": "wait",
    "ld.shared.v4": "read",
    "mbarrier.arrive.shared": "arrive",
    "cp.async.bulk.wait_group.read": "stores read",
    "st.shared.v4": "write",
    "fence.proxy.async": "fence",
    "cp.async.bulk.tensor.2d.global": "store",
    "bar.sync": "together",
}


def test_a_partition_may_be_thought_one_thread() -> None:
    """The emulator thinks so: before an arrival or a store by TMA, and after a wait that one thread makes,
    the compiler brings the threads of a partition together."""
    text = compile_for_hopper(*RIGHT["ring"]).asm["ptx"]
    found = re.findall("|".join(map(re.escape, _STEPS)), text)
    steps = [_STEPS[step] for step, _ in itertools.groupby(found)]
    loop = [
        "wait",
        "read",
        "together",
        "arrive",
        "stores read",
        "together",
        "write",
        "fence",
        "together",
        "store",
    ]
    start = steps.index("read") - 1
    assert steps[start : start + len(loop)] == loop


@pytest.mark.parametrize("fault", REFUSED)
def test_refused_by_gluon_too(fault: str) -> None:
    with pytest.raises((triton.CompilationError, RuntimeError)):
        compile_for_hopper(*REFUSED[fault])
