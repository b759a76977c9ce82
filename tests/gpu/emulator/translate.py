"""From `gluon.jit` functions to plain Python functions that reach the emulator instead of the hardware.

A function is kept as it is: same code, same lines. Only what its global names stand for is replaced, by
identity: Gluon's own operations, the names of `kernels/gluon/hopper.py` that are not Gluon's, other
`gluon.jit` functions, constants, and `range`, whose numbers are run-time integers.
"""

from __future__ import annotations

import builtins
import functools
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper as hardware
from triton.runtime.jit import JITFunction

from anyflash.kernels.gluon import hopper
from gpu.emulator import barriers, device_memory, language, tma, wgmma
from gpu.emulator.errors import Mismatch, Unknown
from gpu.emulator.source import MARK
from gpu.emulator.tensor import Int, Pointer, Tensor

# Names of Gluon that mean the same here.
_OWN_TYPES = (type, gl.dtype)


class _Namespace:
    """A module of Gluon's: what is modelled, Gluon's own types and layouts, and nothing else."""

    def __init__(self, name: str, original: Any, functions: Mapping[str, Any]) -> None:
        self._name, self._original, self._functions = name, original, functions

    def __getattr__(self, name: str) -> Any:
        if name in self._functions:
            return self._functions[name]
        found = getattr(self._original, name, None)
        if isinstance(found, _OWN_TYPES):
            return found
        raise Unknown(f"{self._name}.{name} is not modelled")


def _barrier_expect(barrier: Any, size: Any, pred: Any = True, **_clusters: Any) -> None:
    _at_barrier(barrier, pred, lambda: barrier.expect(size))


def _barrier_arrive(barrier: Any, *, count: Any = 1, pred: Any = True, **_clusters: Any) -> None:
    _at_barrier(barrier, pred, lambda: barrier.arrive(count))


def _at_barrier(barrier: Any, pred: Any, act: Callable[[], None]) -> None:
    if not isinstance(barrier, barriers.Barrier):
        raise Mismatch(f"one barrier is wanted, not {barrier!r}")
    language.machine.scheduler().pause()
    if bool(pred):
        act()


def _barrier_wait(barrier: Any, phase: Any, pred: Any = True, deps: Any = ()) -> None:
    if not isinstance(barrier, barriers.Barrier):
        raise Mismatch(f"one barrier is wanted, not {barrier!r}")
    if bool(pred):
        barrier.wait(phase)


def _allocate_mbarrier(batch: Any = None, two_ctas: Any = False) -> Any:
    layout = hardware.mbarrier.MBarrierLayout()
    return language.allocate_shared_memory(gl.int64, [1] if batch is None else [batch, 1], layout)


MBARRIER = {
    "init": lambda barrier, count: barrier.init(count),
    "invalidate": lambda barrier: barrier.invalidate(),
    "expect": _barrier_expect,
    "arrive": _barrier_arrive,
    "wait": _barrier_wait,
    "allocate_mbarrier": _allocate_mbarrier,
}
TMA = {
    "async_load": tma.load,
    "async_copy_global_to_shared": tma.load,
    "async_store": tma.store,
    "async_copy_shared_to_global": tma.store,
    "async_atomic_add": tma.add,
    "store_wait": tma.store_wait,
    "make_tensor_descriptor": tma.make_tensor_descriptor,
}
HOPPER = {
    "fence_async_shared": wgmma.fence,
    "warpgroup_mma": wgmma.mma,
    "warpgroup_mma_wait": wgmma.wait,
    "warpgroup_mma_init": lambda value: value,
}
LANGUAGE = language.FUNCTIONS | {
    name: getattr(device_memory, name)
    for name in ("load", "store", "atomic_add", "atomic_cas", "atomic_xchg")
}


def _pinned(value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.data.dtype != torch.float32:
        raise Mismatch(f"pin wants a float32 tensor, not {value!r}")
    return Tensor(value.data, value.layout)


def byte_planes(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Bytes of pairs along axis 1, as two permutations of bytes give them."""
    layout = language.common_layout(low, high)
    pairs = [
        x.data.movedim(1, -1).contiguous().view(torch.uint8).unflatten(-1, (-1, 2, 2)) for x in (low, high)
    ]
    # (.., pair, of low or of high, neighbour, byte)
    taken = torch.stack(pairs, -3)
    planes = [taken[..., byte].flatten(-3).contiguous().view(torch.int16) for byte in (0, 1)]
    even, odd = (Tensor(plane.movedim(-1, 1), layout) for plane in planes)
    return even, odd


def _four_e4m3(*values: Tensor) -> Tensor:
    """Beyond the range of e4m3: its end."""
    layout = language.common_layout(*values)
    each = [value.data.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8) for value in values]
    return Tensor(torch.stack(each, -1).view(torch.int32).squeeze(-1), layout)


def _same(value: Any) -> Any:
    if not isinstance(value, Int) or value.bits != 32:
        raise Mismatch(f"here wants an int32 number, not {value!r}")
    return value


# What hopper.py adds to Gluon.
_ADDED = {
    "tma_add": tma.add,
    "named_wait": lambda name, threads: barriers.named(name).wait(int(threads)),
    "named_arrive": lambda name, threads: barriers.named(name).arrive(int(threads)),
    "pin": _pinned,
    "byte_planes": byte_planes,
    "four_e4m3": _four_e4m3,
    "here": _same,
}


def _replacements() -> dict[int, Any]:
    """By identity of the original."""
    found: dict[int, Any] = {
        id(gl): _Namespace("gl", gl, LANGUAGE),
        id(hardware.mbarrier): _Namespace("mbarrier", hardware.mbarrier, MBARRIER),
        id(hardware.tma): _Namespace("tma", hardware.tma, TMA),
        id(gl.NVMMASharedLayout.get_default_for): gl.NVMMASharedLayout.get_default_for,
    }
    sources = ((gl, LANGUAGE), (hardware.mbarrier, MBARRIER), (hardware.tma, TMA), (hardware, HOPPER))
    for module, functions in (*sources, (hopper, _ADDED)):
        for name, function in functions.items():
            original = getattr(module, name, None)
            if original is not None:
                found[id(original)] = function
    return found


_BY_IDENTITY = _replacements()


def _range(*bounds: Any) -> Iterator[Int]:
    for bound in bounds:
        if not isinstance(bound, int):
            raise Mismatch(f"range wants integers, not {bound!r}")
    return (Int(i) for i in builtins.range(*bounds))


def _either(of_tensors: Callable[..., Any], of_numbers: Callable[..., Any]) -> Callable[..., Any]:
    def chosen(*values: Any) -> Any:
        if any(isinstance(value, Tensor | Int) for value in values):
            return functools.reduce(of_tensors, values)
        return of_numbers(*values)

    return chosen


_BUILTINS = {
    "range": _range,
    "min": _either(language.minimum, min),
    "max": _either(language.maximum, max),
    "abs": language.absolute,
}


class Function:
    """A `gluon.jit` function that can be called here."""

    def __init__(self, original: JITFunction[Any], plain: Callable[..., Any]) -> None:
        self.__name__ = original.fn.__name__
        self._plain = plain
        self._signature = inspect.signature(original.fn)
        self._constants = [p.name for p in original.params if p.is_constexpr]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._constants:
            given = self._signature.bind(*args, **kwargs).arguments
            for name in self._constants:
                if isinstance(given.get(name), Int | Tensor | Pointer):
                    raise Mismatch(f"{self.__name__}: {name} is a constexpr, given is {given[name]!r}")
        return self._plain(*args, **kwargs)


class Translator:
    """`replaced`: functions to run instead of others, by the identity of the original (`JITFunction`)."""

    def __init__(self, replaced: Mapping[Any, Callable[..., Any]] | None = None) -> None:
        self._replaced = {id(original): plain for original, plain in (replaced or {}).items()}
        self._functions: dict[int, Function] = {}
        self._globals: dict[int, dict[str, Any]] = {}

    def value(self, value: Any) -> Any:
        if id(value) in _BY_IDENTITY:
            return _BY_IDENTITY[id(value)]
        if isinstance(value, JITFunction):
            return self.function(value)
        if isinstance(value, gl.constexpr):
            return self.value(value.value)
        if isinstance(value, types.ModuleType) and self._holds_kernels(value):
            return types.SimpleNamespace(**self._translated(vars(value)))
        return value

    @staticmethod
    def _holds_kernels(module: types.ModuleType) -> bool:
        return any(isinstance(value, JITFunction) for value in vars(module).values())

    def function(self, original: JITFunction[Any]) -> Function:
        key = id(original)
        if key not in self._functions:
            fn = self._replaced.get(key, original.fn)
            plain = types.FunctionType(
                fn.__code__, self._translated(fn.__globals__), fn.__name__, fn.__defaults__, fn.__closure__
            )
            plain.__kwdefaults__ = fn.__kwdefaults__
            self._functions[key] = Function(original, plain)
        return self._functions[key]

    def _translated(self, names: dict[str, Any]) -> dict[str, Any]:
        key = id(names)
        if key not in self._globals:
            self._globals[key] = found = dict(_BUILTINS)
            found[MARK] = True
            found.update({name: self.value(value) for name, value in names.items()})
        return self._globals[key]
