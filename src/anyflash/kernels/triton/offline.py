"""Kernels for a device that is not here: what a call would launch there, compiled, and what came of it.

Launches are those of launch.py, caught on their way to the device with the arguments that they have, so a
kernel is specialised as it would be. It takes no GPU; `create_function_from_signature` and `_pack_args` are
Triton's own, of 3.6 to 3.9. Tests and the tuner use this, no call does.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import JITFunction, create_function_from_signature

from anyflash.kernels.triton.device import pretended

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
# Products on tensor cores, as PTX and as AMD's assembler spell them.
_PTX_PRODUCTS = re.compile(r"^\s*(?:@\S+\s+)?(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)\b", re.MULTILINE)
_AMD_PRODUCTS = re.compile(r"^\s*v_mfma_", re.MULTILINE)


@dataclass(frozen=True)
class Launch:
    """One launch as launch.py makes it; `constants` hold warps and stages, too."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]

    @property
    def name(self) -> str:
        careful = " careful" if self.constants.get("CAREFUL") else ""
        return f"{self.kernel.__name__}{careful}"


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


@contextmanager
def recorded(arch: str) -> Iterator[list[Launch]]:
    """While it lasts, launches are prepared for `arch` and noted in the list, and nothing runs."""
    launches: list[Launch] = []
    own = JITFunction.run

    def note(self: Any, *arguments: Any, grid: tuple[int, ...], warmup: bool, **constants: Any) -> None:
        launches.append(Launch(self, grid, arguments, constants))

    JITFunction.run = note
    try:
        with pretended(arch):
            yield launches
    finally:
        JITFunction.run = own


def compiled(kernel: Any, arch: str, *arguments: Any, **constants: Any) -> Made:
    """Compile one launch for `arch`."""
    return figures(binary(kernel, arch, *arguments, **constants))


def binary(kernel: Any, arch: str, *arguments: Any, **constants: Any) -> Any:
    """Triton's compiled kernel; `.asm` holds it in every form, "ptx" and "cubin", or "amdgcn"."""
    target = TARGETS[arch]
    backend, binder = _binder(kernel, arch)
    bound, specialization, options = binder(*arguments, **constants)
    options, signature, constexprs, attributes = kernel._pack_args(
        backend, constants, bound, specialization, options
    )
    kind = GluonASTSource if kernel.is_gluon() else ASTSource
    source = kind(kernel, signature, constexprs, attributes)
    return triton.compile(source, target=target, options=options.__dict__)


@cache
def _binder(kernel: Any, arch: str) -> tuple[Any, Any]:
    backend = make_backend(TARGETS[arch])
    return backend, create_function_from_signature(kernel.signature, kernel.params, backend)


def figures(made: Any) -> Made:
    """What a compiled kernel takes."""
    return _of_amd(made) if "amdgcn" in made.asm else _of_nvidia(made)


def _of_nvidia(made: Any) -> Made:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [str(_TOOLS / "cuobjdump"), "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    products = len(_PTX_PRODUCTS.findall(made.asm["ptx"]))
    return Made(made.metadata.shared, found["REG"], found["STACK"], products)


def _of_amd(made: Any) -> Made:
    code = made.asm["amdgcn"]
    registers = max(int(n) for n in re.findall(r"\.vgpr_count:\s+(\d+)", code))
    spilled = sum(int(n) for n in re.findall(r"\.vgpr_spill_count:\s+(\d+)", code))
    return Made(made.metadata.shared, registers, 4 * spilled, len(_AMD_PRODUCTS.findall(code)))
