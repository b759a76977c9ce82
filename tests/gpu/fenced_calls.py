"""Runs calls over a cache and packed calls, with right and wrong integers, on arrays that end (or begin) at a
page nobody may touch. A program of its own: it may crash.

TRITON_INTERPRET=1 python -m gpu.fenced_calls
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np

from anyflash.backends.triton import BACKEND
from anyflash.contract import direct
from anyflash.contract.poison import Poisoned
from anyflash.semantics import addressing
from anyflash.semantics.operands import Operands, Results
from anyflash.semantics.problem import Problem
from gpu import test_interpreted_append as cache
from gpu import test_interpreted_device as packed
from kernels.fenced import fenced_copy


def fence(made: Poisoned, at_end: bool) -> None:
    """Move an array to memory with a fence."""
    moved = fenced_copy(np.ascontiguousarray(made.array), at_end)
    made.view.ptr, made.view.strides, made.view.owner = moved.ctypes.data, moved.strides, moved


def calls() -> Iterator[tuple[str, cache.Call]]:
    for form in cache.FORMS:
        yield form.id, cache.Call(form)
    for name, (id_, integers, _) in cache.WRONG.items():
        yield name, cache.Call(next(form for form in cache.FORMS if form.id == id_), **integers)


def attend(problem: Problem, operands: Operands) -> None:
    """What follows, into arrays with fences."""
    shapes = (
        (problem.out_shape, problem.dtype),
        *[(s, "float32") for s in (problem.lse_shape, (2, *problem.lse_shape))],
    )
    made = [Poisoned(shape, dtype, output=True) for shape, dtype in shapes]
    for array in made:
        fence(array, True)
    BACKEND.forward(problem, "", operands, Results(*(array.view for array in made)))


def main() -> None:
    addressing.readable = lambda view: False
    for at_end in (True, False):
        for name, call in calls():
            sys.stderr.write(f"{name}, fence {'behind' if at_end else 'before'}\n")
            arrays = [call.q, *call.cache, *(call.new or ()), *filter(None, call.integers.values())]
            for made in arrays:
                fence(made, at_end)
            described = call.describe()
            turned = call.turned(described)
            if turned is not None:
                fence(turned, at_end)
            operands = cache.kernel(described, None if turned is None else turned.view)
            if at_end:
                attend(described.problem, operands)
    call = packed.packed_call("int32")
    for name in ("beyond", "descending"):
        sys.stderr.write(f"packed, {name}\n")
        starts_q, starts_k, _ = packed.WRONG[name]
        wrong = {"cu_seqlens_q": np.array(starts_q, np.int32), "cu_seqlens_k": np.array(starts_k, np.int32)}
        direct.attend("triton", **{part: fenced_copy(x, True) for part, x in (call | wrong).items()})


if __name__ == "__main__":
    main()
