"""The backend hopper on the CPU: its launches run under the emulator, on numpy's memory.

What it hands to the portable kernels needs Triton's interpreter: TRITON_INTERPRET=1 before anything is
imported. Gluon's kernels are not changed by that.
"""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from triton.experimental.gluon import language as gl

from anyflash.backends import registry
from anyflash.core.view import View
from anyflash.kernels.gluon import launch
from anyflash.kernels.triton import launch as portable
from gpu.emulator import emulate

# Streaming multiprocessors: fewer than blocks, so that a program takes several work items.
PROCESSORS = 3


def memory(view: View) -> torch.Tensor:
    """All that a view reaches, as a vector of its elements."""
    last = sum(max((n - 1) * step, 0) for n, step in zip(view.shape, view.strides, strict=True))
    size = last + view.itemsize if view.size else view.itemsize
    dtype = getattr(torch, "int8" if view.dtype == "bool" else view.dtype)
    assert view.ptr is not None
    return torch.frombuffer((ctypes.c_char * size).from_address(view.ptr), dtype=dtype)


def descriptor(view: View, shape: Any, strides: Any, block: Any) -> Any:
    layout = launch.shared_layout(list(block), getattr(gl, launch.NAMES.get(view.dtype, view.dtype)))
    return launch.TensorDescriptor(memory(view), list(shape), list(strides), list(block), layout)


def install(patch: pytest.MonkeyPatch, seed: int = 0, replaced: Any = None, resident: int = 1) -> list[str]:
    """The backend serves arrays of the CPU. Returns a list of the kernels that it launches from then on."""
    launched: list[str] = []

    def start(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        launched.append(kernel.fn.__name__)
        emulate(kernel, (programs,), *arguments, seed=seed, replaced=replaced, resident=resident, **constants)

    patch.setattr(launch, "launch", start)
    patch.setattr(launch, "descriptor", descriptor)
    # The interpreter goes by the address alone.
    for module in (launch, portable):
        patch.setattr(module, "pointer", memory)
    patch.setattr(launch, "processors", lambda device: PROCESSORS)
    backend = registry.entries()["hopper"].backend
    assert backend is not None
    patch.setattr(backend, "available", lambda: None)
    patch.setattr(backend, "decline", lambda problem, device: backend.lacks(problem))
    return launched
