"""Runs kernels on arrays and scratch that end at a page nobody may touch. A program of its own: it may crash.

python -m kernels.fenced
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from anyflash.kernels.llvm import scratch
from kernels import run as runner
from kernels.cases import Array, Case, draw
from kernels.memory import Block
from kernels.programs import BATCH, HEADS, KEYS, PROGRAMS, QUERIES
from kernels.run import COMBINATIONS

_kept: list[Any] = []
_PAGE = mmap.PAGESIZE
_PROT_NONE = 0
CAUSAL = lambda rng: {"causal": True}


def fenced(nbytes: int, at_end: bool) -> int:
    """An address of `nbytes` bytes, behind which (or before which) lies a page that cannot be touched."""
    size = -(-max(nbytes, 1) // _PAGE) * _PAGE
    memory = mmap.mmap(-1, size + 2 * _PAGE)
    _kept.append(memory)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    for fence in (start, start + _PAGE + size):
        if libc.mprotect(ctypes.c_void_p(fence), ctypes.c_size_t(_PAGE), _PROT_NONE):
            raise OSError(ctypes.get_errno(), "mprotect")
    return start + _PAGE + (size - nbytes if at_end else 0)


def fenced_copy(array: Array, at_end: bool) -> Array:
    address = fenced(array.nbytes, at_end)
    memory = (ctypes.c_uint8 * array.nbytes).from_address(address)
    found = np.frombuffer(memory, array.dtype).reshape(array.shape) if array.size else array.copy()
    found[...] = array
    return found


class _Buffer(scratch.Buffer):
    """Scratch that ends at the fence."""

    def reserve(self, nbytes: int) -> int:
        rounded = -(-nbytes // scratch.ALIGNMENT) * scratch.ALIGNMENT
        return fenced(rounded, True)


def cases() -> Iterator[tuple[Case, str]]:
    """Odd and whole head dims, rows in place and packed, the last tile full and not; tables; and a target."""
    shapes = [((40, 72), (35, 70)), ((19, 33), (2, 65)), ((64, 32), (96, 128)), ((96, 96), (33, 64))]
    for i, (dtype, target) in enumerate(COMBINATIONS):
        for dims, lens in shapes if i < 3 else shapes[:2]:
            yield Case(f"{dims} {lens}", dtype, dims=dims, heads=(2, 1), lens=lens, program=CAUSAL), target
    for name in ("two biases", "dense mask", "documents", "score of every dtype"):
        dtype, target = COMBINATIONS[0]
        yield (
            Case(
                name, dtype, dims=(24, 19), heads=(HEADS, 2), batch=BATCH, lens=(QUERIES, KEYS),
                program=PROGRAMS[name],
            ),
            target,
        )  # fmt: skip


def main() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scratch, "Buffer", _Buffer)
        for at_end in (True, False):
            patch.setattr(
                runner, "place", lambda array, layout, end=at_end: Block(fenced_copy(array, end), np.empty(0))
            )
            patch.setattr(Block, "intact", lambda self: True)
            for case, target in cases():
                sys.stdout.write(f"{target} {case.id} arrays at the {'end' if at_end else 'start'}\n")
                sys.stdout.flush()
                given = draw(case)
                tables = tuple(fenced_copy(np.ascontiguousarray(t), at_end) for t in given.tables)
                object.__setattr__(given, "tables", tables)
                runner.run(case, target, threads=2)
                _kept.clear()


if __name__ == "__main__":
    main()
