"""Score and mask expressions as vector code.

Each node becomes one `Value`: a scalar where it is the same for all lanes (a vector of queries stands against
one key), a vector otherwise. Integers are 32 bit in the lanes; `backends` declines a problem whose integers
could need more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from anyflash.kernels.llvm import vmath
from anyflash.kernels.llvm.ir import (
    BFLOAT,
    DOUBLE,
    FLOAT,
    HALF,
    I1,
    I8,
    I16,
    I32,
    I64,
    PTR,
    Builder,
    Value,
    element_of,
    lanes_of,
    mangle,
    vec,
)
from anyflash.semantics.expr import Expr

MEMORY = {
    "float16": HALF,
    "bfloat16": BFLOAT,
    "float32": FLOAT,
    "float64": DOUBLE,
    "int8": I8,
    "uint8": I8,
    "int16": I16,
    "int32": I32,
    "int64": I64,
    "bool": I8,
}


@dataclass(frozen=True)
class TableAccess:
    """One table at run time: address, byte stride and extent of every axis."""

    pointer: Value
    dtype: str
    strides: tuple[Value, ...]
    extents: tuple[Value, ...]

    def offset(self, b: Builder, index: list[Value]) -> Value:
        """Byte offset (64 bit, scalar or vector) of an element; every index is clamped to its axis."""
        total: Value | None = None
        for i, stride, extent in zip(index, self.strides, self.extents, strict=True):
            wide = b.to_int(i, I64)
            wide = b.max(b.const(0, wide.type), b.min(extent - 1, wide))
            term = wide * stride
            total = term if total is None else total + term
        return b.const(0, I64) if total is None else total

    def load(self, b: Builder, index: list[Value], number: str) -> Value:
        """The elements as `number` (float or double), i32 or i1, by the table's kind."""
        memory = MEMORY[self.dtype]
        offset = self.offset(b, index)
        lanes = lanes_of(offset.type)
        if lanes == 1:
            raw = b.load(memory, b.at(self.pointer, offset))
        else:
            raw = gather(b, self.pointer, offset, memory)
        if self.dtype == "bool":
            return b.compare("ne", raw, 0)
        if memory in (HALF, BFLOAT, FLOAT, DOUBLE):
            return b.to_float(raw, number)
        if self.dtype == "uint8":
            return b.cast("zext", raw, I32)
        return b.to_int(raw, I32) if memory != I32 else raw


def gather(b: Builder, pointer: Value, offsets: Value, memory: str) -> Value:
    """One element a lane. Every address is valid, so no lane is masked."""
    lanes = lanes_of(offsets.type)
    pointers = b.value(
        f"getelementptr i8, ptr {pointer.name}, {offsets.type} {offsets.name}", vec(PTR, lanes)
    )
    type_ = vec(memory, lanes)
    name = f"llvm.masked.gather.{mangle(type_)}.v{lanes}p0"
    b.declarations.add(f"declare {type_} @{name}(<{lanes} x ptr>, <{lanes} x i1>, {type_})")
    return b.value(
        f"call {type_} @{name}(<{lanes} x ptr> align 1 {pointers.name}, <{lanes} x i1> splat (i1 true), "
        f"{type_} zeroinitializer)",
        type_,
    )


class Emitter:
    """Emits expressions at one point of the code, each distinct node once."""

    def __init__(
        self, b: Builder, number: str, variables: Mapping[str, Value], tables: tuple[TableAccess, ...]
    ) -> None:
        self.b = b
        self.number = number
        self.variables = variables
        self.tables = tables
        self._done: dict[int, Value] = {}
        self._kept: list[Expr] = []

    def __call__(self, expr: Expr) -> Value:
        value = self._done.get(id(expr))
        if value is None:
            value = self._emit(expr)
            self._done[id(expr)] = value
            self._kept.append(expr)
        return value

    def override(self, expr: Expr, value: Value) -> None:
        """Use `value` for this node."""
        self._done[id(expr)] = value
        self._kept.append(expr)

    def _emit(self, e: Expr) -> Value:
        b = self.b
        if e.op == "const":
            type_ = {"float": self.number, "int": I32, "bool": I1}[e.kind]
            return b.const(e.value, type_)
        if e.op == "var":
            return self.variables[e.value]
        if e.op == "load":
            return self.tables[e.value].load(b, [self(a) for a in e.args], self.number)
        args = [self(a) for a in e.args]
        if e.op in ("add", "sub", "mul", "div"):
            return b.binary("fdiv" if e.op == "div" else e.op, *args)
        if e.op in ("lt", "le", "eq", "ne"):
            return b.compare(e.op, *args)
        if e.op in ("and", "or"):
            return b.binary(e.op, *args)
        return getattr(self, f"_{e.op}")(*args)

    def _neg(self, a: Value) -> Value:
        return self.b.negate(a)

    def _abs(self, a: Value) -> Value:
        return self.b.abs(a)

    def _not(self, a: Value) -> Value:
        return a ^ True

    def _where(self, condition: Value, x: Value, y: Value) -> Value:
        return self.b.select(condition, x, y)

    def _float(self, a: Value) -> Value:
        return self.b.to_float(a, self.number)

    def _exp(self, a: Value) -> Value:
        return vmath.exp(self.b, a)

    def _log(self, a: Value) -> Value:
        return vmath.log(self.b, a)

    def _tanh(self, a: Value) -> Value:
        return vmath.tanh(self.b, a)

    def _min(self, x: Value, y: Value) -> Value:
        return self._extreme(self.b.min, x, y)

    def _max(self, x: Value, y: Value) -> Value:
        return self._extreme(self.b.max, x, y)

    def _extreme(self, choose: Callable[[Value, Value], Value], x: Value, y: Value) -> Value:
        chosen = choose(x, y)  # y where either is NaN
        if not x.floating:
            return chosen
        return self.b.select(self.b.compare("ne", x, x), x, chosen)

    def _floordiv(self, x: Value, y: Value) -> Value:
        quotient, remainder, y = self._divide(x, y)
        # Rounded towards zero; one less where the remainder has the divisor's opposite sign.
        down = self.b.compare("ne", remainder, 0) & self.b.compare("lt", remainder ^ y, 0)
        return quotient - self.b.cast("zext", down, element_of(quotient.type))

    def _mod(self, x: Value, y: Value) -> Value:
        _, remainder, y = self._divide(x, y)
        down = self.b.compare("ne", remainder, 0) & self.b.compare("lt", remainder ^ y, 0)
        return remainder + self.b.select(down, y, 0)

    def _divide(self, x: Value, y: Value) -> tuple[Value, Value, Value]:
        """Truncating quotient and remainder. Division by 0 gives 0, 0; by -1 never traps."""
        b = self.b
        if y.name[0] == "%" or y.name == "0":
            minus = b.compare("eq", y, -1)
            absent = b.compare("eq", y, 0)
            safe = b.select(minus | absent, b.const(1, y.type), y)
            quotient = x / safe
            remainder = b.select(absent, 0, x - quotient * safe)
            quotient = b.select(absent, 0, b.select(minus, b.negate(x), quotient))
            return quotient, remainder, y
        quotient = x / y
        return quotient, x - quotient * y, y
