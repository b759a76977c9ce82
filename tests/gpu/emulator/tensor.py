"""Values of a kernel: tensors with a layout, integers of 1, 32 and 64 bits, pointers.

Gluon's rules are kept where a wrong program would break them: operands of a binary operation have the same
rank and the same layout, or one is a scalar; integer division rounds towards zero; types are promoted
without looking at values; a literal takes the type of the other operand. A scalar float is a tensor of no
axes. `layout` None stands for one that the emulator does not work out: it agrees with all.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from gpu.emulator.dtypes import to_gluon, to_torch
from gpu.emulator.errors import InFlight, Mismatch, OutOfBounds

_BITS = {1: torch.bool, 32: torch.int32, 64: torch.int64}


def _truncated(a: int, b: int) -> int:
    quotient = abs(a) // abs(b)
    return quotient if (a < 0) == (b < 0) else -quotient


class Int(int):
    """An integer that a kernel computes at run time. It checks that it fits its bits."""

    bits: int

    def __new__(cls, value: int, bits: int = 32) -> Int:
        value = int(value)
        if bits == 1:
            value = int(value != 0)
        elif not -(1 << bits - 1) <= value < 1 << bits - 1:
            raise OutOfBounds(f"{value} does not fit {bits} bits")
        made = super().__new__(cls, value)
        made.bits = bits
        return made

    @property
    def dtype(self) -> Any:
        return to_gluon(_BITS[self.bits])

    @property
    def shape(self) -> list[int]:
        return []

    @property
    def type(self) -> Any:
        return self.dtype

    def to(self, dtype: Any, **_ignored: Any) -> Any:
        wanted = to_torch(dtype)
        for bits, candidate in _BITS.items():
            if candidate == wanted:
                return Int(int(self), bits)
        return Tensor(torch.tensor(int(self)).to(wanted))

    def __invert__(self) -> Int:
        return Int(1 - int(self), 1) if self.bits == 1 else Int(~int(self), self.bits)

    def __neg__(self) -> Int:
        return Int(-int(self), self.bits)

    def __abs__(self) -> Int:
        return Int(abs(int(self)), self.bits)

    def __truediv__(self, other: Any) -> Any:
        return binary(operator.truediv, self, other)

    def __rtruediv__(self, other: Any) -> Any:
        return binary(operator.truediv, other, self)

    def __hash__(self) -> int:
        return int.__hash__(self)


def _literal_bits(value: int) -> int:
    return 1 if isinstance(value, bool) else 32 if -(1 << 31) <= value < 1 << 31 else 64


def _of_ints(name: str, apply: Callable[[int, int], int], bits: int | None = None) -> None:
    def forward(self: Int, other: Any) -> Any:
        if isinstance(other, float):
            return binary(getattr(operator, name), self, other)
        if not isinstance(other, int):
            return NotImplemented
        mine, theirs = int(self), int(other)
        theirs_bits = other.bits if isinstance(other, Int) else _literal_bits(other)
        wide = max(self.bits, theirs_bits)
        arithmetic = name not in ("and_", "or_", "xor") and wide == 1
        return Int(apply(mine, theirs), bits or (32 if arithmetic else wide))

    def backward(self: Int, other: Any) -> Any:
        if isinstance(other, float):
            return binary(getattr(operator, name), other, self)
        return forward(Int(other, _literal_bits(other)), self) if isinstance(other, int) else NotImplemented

    plain = name.rstrip("_")
    setattr(Int, f"__{plain}__", forward)
    if bits is None:
        setattr(Int, f"__r{plain}__", backward)


for _name, _apply in (
    ("add", operator.add),
    ("sub", operator.sub),
    ("mul", operator.mul),
    ("floordiv", _truncated),
    ("mod", lambda a, b: a - b * _truncated(a, b)),
    ("and_", operator.and_),
    ("or_", operator.or_),
    ("xor", operator.xor),
    ("lshift", operator.lshift),
    ("rshift", operator.rshift),
):
    _of_ints(_name, _apply)
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    _of_ints(_name, getattr(operator, _name), 1)


class Tensor:
    """A block of values, spread over the threads of a partition as `layout` says."""

    __slots__ = ("data", "layout")

    def __init__(self, data: torch.Tensor, layout: Any = None) -> None:
        self.data = data
        self.layout = layout

    @property
    def dtype(self) -> Any:
        return to_gluon(self.data.dtype)

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    @property
    def numel(self) -> int:
        return self.data.numel()

    @property
    def type(self) -> Any:
        return SimpleNamespace(layout=self.layout, element_ty=self.dtype, scalar=self.dtype, shape=self.shape)

    def to(self, dtype: Any, fp_downcast_rounding: Any = None, bitcast: bool = False) -> Tensor:
        wanted = to_torch(dtype)
        if bitcast:
            return Tensor(self.data.view(wanted), self.layout)
        if self.data.dtype.is_floating_point and not wanted.is_floating_point and wanted != torch.bool:
            return Tensor(self.data.trunc().to(wanted), self.layout)
        return Tensor(self.data.to(wanted), self.layout)

    def _scalar(self) -> Any:
        if self.data.dim():
            raise Mismatch(f"a tensor of shape {self.shape} where one value is wanted")
        return self.data.item()

    def __bool__(self) -> bool:
        return bool(self._scalar())

    def __index__(self) -> int:
        return operator.index(self._scalar())

    def __getitem__(self, places: Any) -> Tensor:
        result = self
        for axis, place in enumerate(places if isinstance(places, tuple) else (places,)):
            if place is None:
                result = expand_dims(result, axis)
            elif place != slice(None):
                raise Mismatch(f"a tensor can be indexed by None and `:` only, not by {place!r}")
        return result

    def __neg__(self) -> Tensor:
        return Tensor(-self.data, self.layout)

    def __invert__(self) -> Tensor:
        return Tensor(~self.data, self.layout)

    __hash__ = None  # type: ignore[assignment]


def expand_dims(value: Tensor, axis: int) -> Tensor:
    layout = value.layout
    if layout is not None and value.data.dim():
        if type(layout).__name__ != "SliceLayout":
            raise Mismatch(f"expand_dims wants a SliceLayout, not {layout}")
        if layout.dim != axis:
            raise Mismatch(f"expand_dims along {axis} of a layout sliced along {layout.dim}")
        layout = layout.parent
    return Tensor(value.data.unsqueeze(axis), layout)


def common_layout(*values: Any) -> Any:
    """The layout of a result of these operands; an error if ranks or layouts differ, as Gluon's is."""
    ranks = {value.data.dim() for value in values if isinstance(value, Tensor)} - {0}
    if len(ranks) > 1:
        shapes = [value.shape for value in values if isinstance(value, Tensor)]
        raise Mismatch(f"operands of different ranks: {shapes}")
    found: Any = None
    for value in values:
        if not isinstance(value, Tensor) or value.layout is None or not value.data.dim():
            continue
        if found is not None and found != value.layout:
            raise Mismatch(f"operands have different layouts: {found} and {value.layout}")
        found = value.layout
    return found


def raw(value: Any, other: Any = None) -> Any:
    """What torch is given: a number that a literal is, else a tensor of the promoted type."""
    if not isinstance(value, Tensor):
        if not isinstance(value, Int):
            if not isinstance(value, int | float | bool):
                raise InFlight(f"{value!r} is used where a tensor is wanted")
            return value
        value = Tensor(torch.tensor(int(value), dtype=_BITS[value.bits]))
    data = value.data
    theirs = _dtype(other)
    if theirs is not None and theirs != data.dtype:
        data = data.to(torch.promote_types(data.dtype, theirs))
    return data


def _dtype(value: Any) -> torch.dtype | None:
    if isinstance(value, Tensor):
        return value.data.dtype
    if isinstance(value, Int):
        return _BITS[value.bits]
    # A literal float makes an integer a float; a literal integer takes the other's type.
    return torch.float32 if isinstance(value, float) else None


def binary(apply: Callable[[Any, Any], Any], a: Any, b: Any) -> Tensor:
    layout = common_layout(a, b)
    float_literal = (isinstance(a, float), isinstance(b, float))
    left = raw(a, None if float_literal[1] and _floating(a) else b)
    right = raw(b, None if float_literal[0] and _floating(b) else a)
    if apply is operator.floordiv:
        result = torch.div(left, right, rounding_mode="trunc")
    elif apply is operator.mod:
        result = torch.fmod(_tensor(left), right)
    elif apply is operator.pow:
        raise Mismatch("Gluon has no power of tensors")
    else:
        result = apply(left, right)
    return Tensor(_tensor(result), layout)


def _tensor(value: Any) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else torch.tensor(value)


def _floating(value: Any) -> bool:
    dtype = _dtype(value)
    return dtype is not None and dtype.is_floating_point


def _of_tensors(name: str, reflected: bool) -> None:
    apply = getattr(operator, name)
    plain = name.rstrip("_")

    def forward(self: Tensor, other: Any) -> Any:
        return NotImplemented if isinstance(other, Pointer) else binary(apply, self, other)

    setattr(Tensor, f"__{plain}__", forward)
    if reflected:
        setattr(Tensor, f"__r{plain}__", lambda self, other: binary(apply, other, self))


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "and_", "or_", "xor", "lshift", "rshift"):
    _of_tensors(_name, True)
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    _of_tensors(_name, False)


class Pointer:
    """An address, or a block of them: elements counted from the start of a flat tensor."""

    __slots__ = ("flat", "offsets")

    def __init__(self, flat: torch.Tensor, offsets: Any) -> None:
        self.flat = flat
        self.offsets = offsets

    @property
    def dtype(self) -> Any:
        return SimpleNamespace(element_ty=to_gluon(self.flat.dtype))

    @property
    def shape(self) -> list[int]:
        return self.offsets.shape if isinstance(self.offsets, Tensor) else []

    @property
    def type(self) -> Any:
        return SimpleNamespace(element_ty=self.dtype, scalar=self.dtype, shape=self.shape)

    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.flat, self.offsets + more)

    __radd__ = __add__

    def __sub__(self, less: Any) -> Pointer:
        return Pointer(self.flat, self.offsets - less)


def as_value(data: torch.Tensor, layout: Any = None) -> Any:
    """A scalar integer as Int, all else as a tensor."""
    if data.dim() == 0 and not data.dtype.is_floating_point:
        bits = 1 if data.dtype == torch.bool else max(32, 8 * data.element_size())
        return Int(int(data), bits)
    return Tensor(data, layout)
