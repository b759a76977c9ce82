"""Small functions of emitted code, to be called with arrays and numbers."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from anyflash.kernels.llvm import engine
from anyflash.kernels.llvm.ir import I64, PTR, Builder, Value
from anyflash.kernels.llvm.target import get_target, why_not

Emit = Callable[[Builder, Sequence[Value]], None]


def module(emit: Emit, count: int) -> str:
    """Text of `void f(ptr words, i64)`; `emit` gets the `count` words that it is called with."""
    b = Builder("f")
    words = [b.load(I64, b.at(b.parameters["args"], 8 * i), 8) for i in range(count)]
    emit(b, words)
    return b.text()


def compiled(target_name: str, count: int, emit: Emit) -> Callable[..., None]:
    """The function for a target of this machine. It takes `count` numbers, or arrays, of which it gets the
    address."""
    kernel = engine.compile_module(module(emit, count), get_target(target_name), None, ["f"])
    function = kernel.function("f", ctypes.c_void_p, ctypes.c_int64)

    def call(*arguments: Any) -> None:
        words = [a.ctypes.data if isinstance(a, np.ndarray) else int(a) for a in arguments]
        assert len(words) == count
        block = (ctypes.c_int64 * count)(*words)
        function(ctypes.addressof(block), 0)

    return call


def pointer(b: Builder, word: Value) -> Value:
    return b.cast("inttoptr", word, PTR)


def usable(*names: str) -> tuple[str, ...]:
    """Those of the targets that this machine runs."""
    return tuple(name for name in names if why_not(name) is None)
