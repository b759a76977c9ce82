"""Compiling a Triton kernel for a GPU that is not here, as its launch would, and what came out.

Arguments are stand-ins: a launch's own specialisation (alignment, divisibility, constants) is made from them.
`create_function_from_signature` and `_pack_args` are Triton's own, of 3.6 to 3.9.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx90a": GPUTarget("hip", "gfx90a", 64),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Stand:
    """A tensor argument, aligned to 16 bytes, without memory."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def data_ptr(self) -> int:
        return 0

    def ptr_range(self) -> int:
        return 0


@dataclass(frozen=True)
class Made:
    """Of one compiled kernel: bytes of shared memory, registers a thread, bytes spilled a thread, and how
    many instructions multiply on tensor cores."""

    shared: int
    registers: int
    spilled: int
    products: int

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


def compiled(kernel: Any, arch: str, *arguments: Any, **constants: Any) -> Made:
    made = binary(kernel, arch, *arguments, **constants)
    return _of_amd(made) if TARGETS[arch].backend == "hip" else _of_nvidia(made)


def binary(kernel: Any, arch: str, *arguments: Any, **constants: Any) -> Any:
    """Triton's compiled kernel; `asm` has every stage of it."""
    target = TARGETS[arch]
    backend = make_backend(target)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = binder(*arguments, **constants)
    options, signature, constexprs, attributes = kernel._pack_args(
        backend, constants, bound, specialization, options
    )
    source = ASTSource(kernel, signature, constexprs, attributes)
    return triton.compile(source, target=target, options=options.__dict__)


def _of_nvidia(made: Any) -> Made:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        code = _run("nvdisasm", "-c", file.name)
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    products = len(re.findall(r"\b(?:HGMMA|HMMA|UTCHMMA|UTCQMMA)\b", code))
    return Made(made.metadata.shared, found["REG"], found["STACK"], products)


def _of_amd(made: Any) -> Made:
    code = made.asm["amdgcn"]
    registers = max(int(n) for n in re.findall(r"\.vgpr_count:\s+(\d+)", code))
    spilled = sum(int(n) for n in re.findall(r"\.vgpr_spill_count:\s+(\d+)", code))
    return Made(made.metadata.shared, registers, 4 * spilled, len(re.findall(r"\bv_mfma_", code)))


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run([str(_TOOLS / tool), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
