"""What kernels call as `gl`: shapes, arithmetic, reductions. Layouts and types are Gluon's own.

Names that are neither here nor Gluon's types and layouts are refused as unknown.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from triton.experimental.gluon import language as gl

from gpu.emulator import machine
from gpu.emulator.barriers import Barrier, Barriers
from gpu.emulator.dtypes import to_torch
from gpu.emulator.errors import EmulationError, Mismatch
from gpu.emulator.memory import SharedMemory
from gpu.emulator.scheduler import Task
from gpu.emulator.source import assigned_name
from gpu.emulator.tensor import Int, Tensor, as_value, binary, common_layout, raw
from gpu.emulator.tensor import expand_dims as expand_dims

_FLOATS = (torch.float32, torch.float64)


def _warps(layout: Any) -> int | None:
    while hasattr(layout, "parent"):
        layout = layout.parent
    if hasattr(layout, "warp_bases"):
        return 2 ** len(layout.warp_bases)
    per_axis = getattr(layout, "warps_per_cta", None)
    return None if per_axis is None else torch.Size(per_axis).numel()


def made(data: torch.Tensor, layout: Any) -> Tensor:
    """A new block: its layout is of this partition's warps, and its extents are powers of two."""
    if data.dim():
        if any(extent & (extent - 1) or extent < 1 for extent in data.shape):
            raise Mismatch(f"extents are powers of two, not {list(data.shape)}")
        if isinstance(layout, gl.AutoLayout):
            layout = None
        if layout is not None:
            warps, mine = _warps(layout), machine.task().num_warps
            if warps is not None and warps != mine:
                raise Mismatch(f"a layout of {warps} warps in a partition of {mine}: {layout}")
            if layout.rank != data.dim():
                raise Mismatch(f"a layout of {layout.rank} axes for {list(data.shape)}")
    return Tensor(data, layout)


def full(shape: Any, value: Any, dtype: Any, layout: Any = None) -> Any:
    element = to_torch(dtype)
    number = value.data.item() if isinstance(value, Tensor) else value
    extents = [int(extent) for extent in shape]
    if not extents and not element.is_floating_point:
        return Int(int(number), 1 if element == torch.bool else 8 * element.itemsize)
    return made(torch.full(extents, number, dtype=element), layout)


def zeros(shape: Any, dtype: Any, layout: Any = None) -> Any:
    return full(shape, 0, dtype, layout)


def full_like(value: Tensor, number: Any, shape: Any = None, dtype: Any = None, layout: Any = None) -> Any:
    return full(shape or value.shape, number, dtype or value.dtype, layout or value.layout)


def zeros_like(value: Tensor, shape: Any = None, dtype: Any = None, layout: Any = None) -> Any:
    return full_like(value, 0, shape, dtype, layout)


def arange(start: Any, end: Any, layout: Any = None) -> Tensor:
    return made(torch.arange(int(start), int(end), dtype=torch.int32), layout)


def convert_layout(value: Tensor, layout: Any, assert_trivial: Any = False) -> Tensor:
    if not isinstance(value, Tensor):
        raise Mismatch(f"convert_layout of {value!r}")
    return made(value.data, layout)


def set_auto_layout(value: Tensor, layout: Any) -> Tensor:
    return made(value.data, layout)


def _loose(value: Tensor, data: torch.Tensor) -> Tensor:
    """A result whose layout is not worked out."""
    return Tensor(data, None if data.shape != value.data.shape else value.layout)


def reshape(value: Tensor, *shape: Any) -> Tensor:
    extents = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
    return _loose(value, value.data.reshape([int(extent) for extent in extents]))


def permute(value: Tensor, *dims: Any) -> Tensor:
    order = dims[0] if len(dims) == 1 and not isinstance(dims[0], int) else dims
    return Tensor(value.data.permute([int(axis) for axis in order]), None)


def broadcast(value: Any, other: Any) -> tuple[Tensor, Tensor]:
    layout = common_layout(value, other)
    return tuple(Tensor(data, layout) for data in torch.broadcast_tensors(raw(value), raw(other)))  # type: ignore[return-value]


def join(a: Tensor, b: Tensor) -> Tensor:
    return Tensor(torch.stack((a.data, b.data), -1), None)


def split(value: Tensor) -> tuple[Tensor, Tensor]:
    if value.shape[-1] != 2:
        raise Mismatch(f"split wants a last axis of 2, not {value.shape}")
    return Tensor(value.data[..., 0], None), Tensor(value.data[..., 1], None)


def gather(value: Tensor, index: Tensor, axis: Any) -> Tensor:
    return Tensor(value.data.gather(int(axis), index.data.long()), index.layout)


def where(condition: Any, a: Any, b: Any) -> Any:
    if not any(isinstance(x, Tensor) for x in (condition, a, b)):
        chosen = a if bool(condition) else b
        bits = [x.bits for x in (a, b) if isinstance(x, Int)]
        if isinstance(a, float) or isinstance(b, float):
            return Tensor(torch.tensor(float(chosen)))
        return Int(chosen, max(bits or [32]))
    layout = common_layout(condition, a, b)
    mask = raw(condition)
    mask = mask if isinstance(mask, torch.Tensor) else torch.tensor(bool(mask))
    left, right = (_operand(x, y) for x, y in ((a, b), (b, a)))
    return Tensor(torch.where(mask.bool(), left, right), layout)


def _operand(value: Any, other: Any) -> torch.Tensor:
    """A literal takes the other's type, and is a float32 or an int32 beside another literal."""
    found = raw(value, other if isinstance(other, Tensor | Int) else None)
    if isinstance(found, torch.Tensor):
        return found
    beside = raw(other) if isinstance(other, Tensor | Int) else None
    if beside is not None and (beside.is_floating_point() or not isinstance(value, float)):
        return torch.tensor(value, dtype=beside.dtype)
    return torch.tensor(value, dtype=torch.float32 if isinstance(value, float) else torch.int32)


def _extreme(of_tensors: Callable[..., torch.Tensor], of_ints: Callable[..., int]) -> Callable[..., Any]:
    def chosen(a: Any, b: Any, propagate_nan: Any = None) -> Any:
        if not isinstance(a, Tensor) and not isinstance(b, Tensor):
            if isinstance(a, float) or isinstance(b, float):
                return of_ints(a, b)
            bits = [x.bits for x in (a, b) if isinstance(x, Int)]
            return Int(of_ints(a, b), max(bits)) if bits else of_ints(a, b)
        layout = common_layout(a, b)
        return Tensor(of_tensors(_operand(a, b), _operand(b, a)), layout)

    return chosen


# Of a number and a NaN, Gluon gives the number.
maximum = _extreme(torch.fmax, max)
minimum = _extreme(torch.fmin, min)


def _elementwise(name: str, apply: Callable[[torch.Tensor], torch.Tensor], only_floats: bool = True) -> Any:
    def function(value: Any) -> Any:
        data = raw(value)
        if not isinstance(data, torch.Tensor):
            data = torch.tensor(data)
        if only_floats and data.dtype not in _FLOATS:
            raise Mismatch(f"{name} wants float32 or float64, not {data.dtype}")
        return Tensor(apply(data), common_layout(value))

    return function


_UNARY = {
    "exp": torch.exp,
    "exp2": torch.exp2,
    "log": torch.log,
    "log2": torch.log2,
    "sin": torch.sin,
    "cos": torch.cos,
    "sqrt": torch.sqrt,
    "sqrt_rn": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "erf": torch.erf,
    "floor": torch.floor,
    "ceil": torch.ceil,
}


def absolute(value: Any) -> Any:
    return abs(value) if isinstance(value, int | float) else Tensor(value.data.abs(), value.layout)


def fma(a: Any, b: Any, c: Any) -> Any:
    """Rounded once."""
    exact = binary(operator.mul, *(cast(x, gl.float64) if isinstance(x, Tensor) else x for x in (a, b)))
    return binary(operator.add, exact, cast(c, gl.float64) if isinstance(c, Tensor) else c).to(gl.float32)


def umulhi(a: Any, b: Any) -> Any:
    product = binary(operator.mul, *(as_unsigned(x) for x in (a, b)))
    return Tensor(product.data >> 32, product.layout)


def as_unsigned(value: Any) -> Tensor:
    """Bits of 32 as a number, in 64 bits; the product of two needs all of them."""
    data = raw(value)
    return Tensor(torch.as_tensor(data).to(torch.int64) & 0xFFFFFFFF, common_layout(value))


def _reduction(of: Callable[[torch.Tensor, Any, bool], torch.Tensor]) -> Callable[..., Any]:
    def reduced(value: Tensor, axis: Any = None, keep_dims: Any = False, **_hints: Any) -> Any:
        if not isinstance(value, Tensor):
            raise Mismatch(f"a reduction of {value!r}")
        data = value.data
        if data.dtype in (torch.bfloat16, torch.float16):
            data = data.float()
        if axis is None:
            return as_value(of(data.flatten(), 0, False))
        layout = value.layout
        if layout is not None and not keep_dims:
            layout = gl.SliceLayout(int(axis), layout) if data.dim() > 1 else None
        return as_value(of(data, int(axis), bool(keep_dims)), layout)

    return reduced


def _maximum_along(data: torch.Tensor, axis: int, keep: bool) -> torch.Tensor:
    if data.is_floating_point() and bool(torch.isnan(data).any()):
        numbers = torch.where(torch.isnan(data), float("-inf"), data).amax(axis, keep)
        return torch.where(torch.isnan(data).all(axis, keep), float("nan"), numbers)
    return data.amax(axis, keep)


def _total(data: torch.Tensor, axis: int, keep: bool) -> torch.Tensor:
    whole = torch.int32 if data.dtype in (torch.bool, torch.int8, torch.int16, torch.int32) else data.dtype
    return data.sum(axis, keep, dtype=whole)


def reduce(value: Any, axis: Any, combine_fn: Any, keep_dims: Any = False) -> Any:
    """Pairs are combined in a tree of halves."""

    def reduced(data: torch.Tensor, axis: int, keep: bool) -> torch.Tensor:
        while data.shape[axis] > 1:
            halves = data.chunk(2, axis)
            data = raw(combine_fn(*(Tensor(half, None) for half in halves)))
        return data if keep else data.squeeze(axis)

    return _reduction(reduced)(value, axis, keep_dims)


def associative_scan(value: Tensor, axis: Any, combine_fn: Any, reverse: Any = False) -> Tensor:
    parts = list(value.data.unbind(int(axis)))
    if reverse:
        parts.reverse()
    done = parts[:1]
    for part in parts[1:]:
        done.append(raw(combine_fn(Tensor(done[-1], None), Tensor(part, None))))
    if reverse:
        done.reverse()
    return Tensor(torch.stack(done, int(axis)), value.layout)


def cdiv(a: Any, b: Any) -> Any:
    return (a + (b - 1)) // b


def program_id(axis: Any) -> Int:
    return Int(machine.task().program.place[int(axis)])


def num_programs(axis: Any) -> Int:
    return Int(machine.task().program.grid[int(axis)])


def num_warps() -> int:
    return machine.task().num_warps


def allocate_shared_memory(element_ty: Any, shape: Any, layout: Any, value: Any = None) -> Any:
    extents = [int(extent) for extent in shape]
    if element_ty.name == "int64" and type(layout).__name__ == "MBarrierLayout":
        program = machine.task().program
        program.shared_bytes += 16 * torch.Size(extents).numel()
        program.buffers += 1
        name = assigned_name(f"barrier {program.buffers}")
        return Barriers(name, extents) if len(extents) > 1 else Barrier(name)
    memory = SharedMemory.allocated(element_ty, extents, layout)
    if value is not None:
        memory.store(value)
    return memory


def static_assert(condition: Any, message: Any = "") -> None:
    if not bool(condition):
        raise Mismatch(f"static_assert: {message}")


def device_assert(condition: Any, message: Any = "", mask: Any = None) -> None:
    held = raw(condition)
    if not bool(torch.as_tensor(held).all()):
        raise EmulationError(f"device_assert: {message}")


def cast(value: Any, dtype: Any, fp_downcast_rounding: Any = None, bitcast: bool = False) -> Any:
    return value.to(dtype, bitcast=bitcast)


def to_tensor(value: Any) -> Any:
    if isinstance(value, float):
        return Tensor(torch.tensor(value))
    return Int(value, 1 if isinstance(value, bool) else 32) if isinstance(value, int) else value


def warp_specialize(functions_and_args: Any, worker_num_warps: Any, worker_num_regs: Any) -> Any:
    """The default partition goes on in the caller; the others start with what it knows, and it ends with what
    they know."""
    run, parent = machine.scheduler(), machine.task()
    program = parent.program
    if program.specialized:
        raise Mismatch("warp_specialize inside a partition")
    workers = functions_and_args[1:]
    if not len(workers) == len(worker_num_warps) == len(worker_num_regs):
        raise Mismatch(f"{len(workers)} workers, {worker_num_warps} warps, {worker_num_regs} registers")
    if any(r % 8 or not 24 <= r <= 256 for r in worker_num_regs):
        raise Mismatch(f"registers are multiples of 8 from 24 to 256, not {worker_num_regs}")
    known = parent.publish()
    started = []
    for (function, args), warps in zip(workers, worker_num_warps, strict=True):
        index = program.partitions
        program.partitions += 1
        task = Task(f"partition {index} ({function.__name__})", index, program, int(warps), known.copy())
        task.clock.tick(index)
        started.append(task)
        run.spawn(task, lambda task=task, function=function, args=args: program.body(task, function, args))
    program.specialized = True
    function, args = functions_and_args[0]
    name, parent.name = parent.name, f"partition 0 ({function.__name__})"
    result = function(*args)
    run.pause(lambda: all(task.over for task in started), "the other partitions")
    parent.name = name
    program.specialized = False
    for task in started:
        parent.clock.join(task.clock)
    return result


FUNCTIONS: dict[str, Any] = {
    name: globals()[name]
    for name in (
        "allocate_shared_memory", "arange", "associative_scan", "broadcast", "cast", "cdiv", "convert_layout",
        "device_assert", "expand_dims", "fma", "full", "full_like", "gather", "join", "maximum", "minimum",
        "num_programs", "num_warps", "permute", "program_id", "reduce", "reshape", "set_auto_layout", "split",
        "static_assert", "to_tensor", "umulhi", "warp_specialize", "where", "zeros", "zeros_like",
    )
}  # fmt: skip
FUNCTIONS |= {name: _elementwise(name, apply) for name, apply in _UNARY.items()}
FUNCTIONS |= {
    "abs": absolute,
    "max": _reduction(_maximum_along),
    "min": _reduction(lambda data, axis, keep: -_maximum_along(-data, axis, keep)),
    "sum": _reduction(_total),
    "static_range": range,
    "constexpr": lambda value: value,
    "num_ctas": lambda: 1,
    "div_rn": lambda a, b: binary(operator.truediv, a, b),
    "fdiv": lambda a, b: binary(operator.truediv, a, b),
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "assume": lambda condition: static_assert(condition, "an assumption does not hold"),
    "multiple_of": lambda value, _: value,
    "max_contiguous": lambda value, _: value,
    "max_constancy": lambda value, _: value,
    "static_print": lambda *_: None,
    "device_print": lambda *_: None,
    "barrier": lambda: machine.scheduler().publication.met(machine.task()),
    "thread_barrier": lambda: machine.scheduler().publication.met(machine.task()),
}
