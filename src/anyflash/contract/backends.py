"""What the contract knows about backends beside their common interface."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from anyflash.backends.registry import entries

WITHIN_BOUNDS = frozenset({"reference"})
"""Backends that need not give the same bits in any layout: numpy's matrix product depends on strides."""

WEIGHTS = {"triton": "float8_e4m3fn"}
"""In what a backend may take the probabilities of 8-bit floats, where not in the type of the results."""


def present() -> list[str]:
    """Names of the backends that work on this machine, the preferred first."""
    return [name for name, entry in entries().items() if entry.reason is None]


def multiplies_tf32(backend: str, dtype: str) -> bool:
    """Does the backend cut factors of `dtype` to tf32, as this process is set?"""
    if backend != "triton" or dtype != "float32":
        return False
    from anyflash.kernels.triton.device import present
    from anyflash.kernels.triton.precision import float32_products

    return float32_products(present()).products == "tf32"


@contextmanager
def poisoned_scratch(backend: str) -> Iterator[None]:
    """While it lasts, the backend's working memory is NaN before each use, where the backend offers that."""
    if backend != "cpu":
        yield
        return
    from anyflash.kernels.llvm import scratch

    scratch.poison(True)
    try:
        yield
    finally:
        scratch.poison(False)
