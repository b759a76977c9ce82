"""Which ptxas turns a kernel into machine code, and which ones are not trusted with masked kernels.

Versions from CUDA 12.8 on and before 12.9.86 (CUDA 12.9.1) miscompiled the causal form of JAX's attention for
Hopper, whose tests leave it out with them (tests/pallas/mgpu_attention_test.py of jax-ml/jax). These kernels
are built alike, and nobody has seen them run: with such a ptxas, masked calls are left to others. Triton 3.6
brings 12.8.93 for Hopper, and beside it, for newer GPUs, one that will do.
"""

from __future__ import annotations

import functools
import re
import subprocess
from pathlib import Path

_FIRST_BAD, _FIRST_GOOD = (12, 8, 0), (12, 9, 86)


def doubtful() -> str | None:
    """Why the ptxas that Triton would use for Hopper is not trusted with a mask, or None."""
    from triton.backends.nvidia.compiler import get_ptxas

    path = Path(get_ptxas(90).path)
    found = version(path)
    if not _FIRST_BAD <= found < _FIRST_GOOD:
        return None
    other = path.with_name("ptxas-blackwell")
    better = f"{other} is {_text(version(other))}" if other.exists() else "none other is beside it"
    return (
        f"ptxas {_text(found)} may miscompile masked kernels: set TRITON_PTXAS_PATH to one of "
        f"{_text(_FIRST_GOOD)} or newer ({better})"
    )


@functools.lru_cache(maxsize=8)
def version(path: Path) -> tuple[int, ...]:
    """The version of a ptxas, as it says itself. Raises ValueError if it does not say."""
    said = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"\bV(\d+)\.(\d+)\.(\d+)", said)
    if found is None:
        raise ValueError(f"{path} --version prints {said!r}, which has no version")
    return tuple(map(int, found.groups()))


def _text(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))
