"""What the contract knows about backends beside their common interface."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from anyflash.backends.registry import entries
from anyflash.core.device import CPU, Device
from anyflash.semantics.problem import Problem

WITHIN_BOUNDS = frozenset({"reference", "hopper"})
"""Backends that need not give the same bits in any layout: numpy's matrix product depends on strides, and
what TMA cannot move is for other kernels."""

WEIGHTS = {"triton": "float8_e4m3fn", "hopper": "float8_e4m3fn"}
"""In what a backend may take the probabilities of 8-bit floats, where not in the type of the results."""


ON_GPUS = frozenset({"triton", "hopper"})
"""Backends that work in a GPU's memory, unless Triton interprets, and that may decline a problem."""


def present() -> list[str]:
    """Names of the backends that work on this machine, the preferred first."""
    return [name for name, entry in entries().items() if entry.reason is None]


def where(backend: str) -> Device:
    """The device whose memory the backend works in; the host's for all but those of GPUs."""
    if backend not in ON_GPUS:
        return CPU
    from anyflash.kernels.triton.device import interpreted

    if interpreted():
        return CPU
    import torch

    return Device("hip" if torch.version.hip else "cuda", torch.cuda.current_device())


def declined(backend: str, problem: Problem) -> list[str]:
    """Why a backend of GPUs does not take a problem: those need not take all. Others have no such leave."""
    made = entries()[backend].backend
    return [] if made is None or backend not in ON_GPUS else made.decline(problem, where(backend))


def multiplies_tf32(backend: str, dtype: str) -> bool:
    """Does the backend cut factors of `dtype` to tf32, as this process is set?"""
    if backend != "triton" or dtype != "float32":
        return False
    from anyflash.kernels.triton.device import present
    from anyflash.kernels.triton.precision import float32_products

    return float32_products(present(), 1).products == "tf32"


def sum_bits(backend: str) -> int | None:
    """How many bits a backend's sums of 8-bit products keep, None for all: those of tensor cores about 14 (on
    H800, DeepSeek-V3, arXiv 2412.19437, 3.3.2)."""
    if backend not in ON_GPUS:
        return None
    from anyflash.kernels.triton.device import interpreted, present
    from anyflash.kernels.triton.narrow import multiplies

    return None if interpreted() or not multiplies(present()) else 14


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
