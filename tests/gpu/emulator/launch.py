"""A launch: arguments as a kernel sees them, and the programs of a grid."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.jit import JITFunction

from gpu.emulator import machine, tma, wgmma
from gpu.emulator.device_memory import Owners
from gpu.emulator.errors import EmulationError, InFlight
from gpu.emulator.publication import Publication
from gpu.emulator.regions import Regions
from gpu.emulator.scheduler import Policy, Scheduler, Task
from gpu.emulator.tensor import Int, Pointer, Tensor
from gpu.emulator.translate import Translator

SHARED_BYTES = 232_448


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, TensorDescriptor):
            yield from _tensors((value.base,))
        elif isinstance(value, tuple | list):
            yield from _tensors(value)
        elif isinstance(value, torch.Tensor):
            yield value


def _argument(value: Any, translator: Translator, regions: Regions, kind: str = "") -> Any:
    if isinstance(value, TensorDescriptor):
        memory, start = regions.at(value.base.data_ptr(), value.base.dtype)
        extents = value.shape, value.strides, value.block_shape
        return tma.Descriptor(memory, start, *extents, value.layout, value.padding)
    if hasattr(value, "data_ptr"):
        memory, start = regions.at(value.data_ptr(), value.dtype)
        return Pointer(memory, Int(start, 64))
    if isinstance(value, bool):
        return Int(value, 1)
    if isinstance(value, int):
        return Int(value, 64 if "64" in kind or not -(2**31) <= value < 2**31 else 32)
    if isinstance(value, float):
        return Tensor(torch.tensor(value, dtype=torch.float32))
    if isinstance(value, tuple | list):
        return tuple(_argument(part, translator, regions) for part in value)
    return translator.value(value)


def _constant(value: Any, translator: Translator) -> Any:
    if isinstance(value, tuple | list):
        return type(value)(_constant(part, translator) for part in value)
    return translator.value(value)


def emulate(
    kernel: JITFunction[Any],
    grid: Sequence[int],
    *arguments: Any,
    seed: int = 0,
    resident: int = 1,
    exclusive: bool = True,
    memory: Iterable[Any] | None = None,
    replaced: Mapping[Any, Callable[..., Any]] | None = None,
    **constants: Any,
) -> int:
    """Run a `gluon.jit` kernel on CPU tensors; an error of `gpu.emulator.errors` says what is wrong with it.

    grid: programs along up to three axes. arguments, constants: the kernel's, by place or by name: tensors on
    the CPU (or what has `data_ptr` and `dtype`), TensorDescriptors over such, numbers, tuples. `num_warps` is
    that of the default partition.
    seed: the schedule; see `scheduler.Policy`. resident: programs that run at the same time. exclusive: no
    element of global memory is stored by two programs. memory: the arrays, of torch or numpy, that bound
    addresses; without it, those of the arguments. An address in none of them is bounded by pages alone.
    replaced: functions to run instead of others.
    Returns the shared memory that the kernel allocates, in bytes.
    """
    policy = Policy.of(seed)
    # For the compiler alone.
    constants.pop("maxnreg", None)
    translator = Translator(replaced)
    function = translator.function(kernel)
    if "num_warps" not in inspect.signature(kernel.fn).parameters:
        num_warps = constants.pop("num_warps", 4)
    else:
        num_warps = constants.get("num_warps", 4)
    bound = inspect.signature(kernel.fn).bind(*arguments, **constants)
    bound.apply_defaults()
    regions = Regions(memory if memory is not None else _tensors(bound.arguments.values()))
    given = []
    for parameter in kernel.params:
        value = bound.arguments[parameter.name]
        if parameter.is_constexpr:
            given.append(_constant(value, translator))
        else:
            given.append(_argument(value, translator, regions, str(parameter.annotation_type or "")))
    extents = (*[int(extent) for extent in grid], 1, 1)[:3]
    run = Scheduler(policy, Owners(exclusive), Publication())
    used = [0]

    def start(number: int, place: tuple[int, int, int]) -> Callable[[], None]:
        def begin() -> None:
            program = machine.Program(number, place, extents, body)
            task = Task(f"program {place}", 0, program, int(num_warps))
            task.clock.tick(0)
            run.spawn(task, lambda: whole(program, task))

        return begin

    def whole(program: machine.Program, task: Task) -> None:
        body(task, function, given)
        if program.loads:
            raise InFlight(f"program {program.place} ends while {next(iter(program.loads))} is in flight")
        used[0] = max(used[0], program.shared_bytes)
        if program.shared_bytes > SHARED_BYTES:
            raise EmulationError(f"{program.shared_bytes} bytes of shared memory, of {SHARED_BYTES}")
        run.start_next()

    programs = itertools.product(*(range(extent) for extent in reversed(extents)))
    starts: Iterator[Callable[[], None]] = (
        start(number, (x, y, z)) for number, (z, y, x) in enumerate(programs, 1)
    )
    with machine.installed(run):
        run.run(starts, resident)
    return used[0]


def body(task: Task, function: Callable[..., Any], arguments: Any) -> None:
    """One partition, from its first line to its last."""
    function(*arguments)
    wgmma.check_over(task)
    tma.check_over(task)
