"""Tile classes in compiled code: the interval rules of semantics emitted as scalar instructions.

Ints are i64 that saturate at 2**31 (no integer of a kernel needs more), floats are doubles, bools i1.
"""

from __future__ import annotations

import math

from anyflash.kernels.llvm.ir import DOUBLE, I1, I64, Builder, Value
from anyflash.semantics.expr import Kind
from anyflash.semantics.interval import Interval, Number
from anyflash.semantics.limits import LIMIT

_TYPE = {"int": I64, "float": DOUBLE, "bool": I1}


class Instructions:
    """The algebra of `semantics.interval` whose end points are `Value`s."""

    def __init__(self, b: Builder) -> None:
        self.b = b

    def const(self, value: float | int | bool, kind: Kind) -> Value:
        if kind == "int":
            value = max(-LIMIT, min(LIMIT, int(value)))
        return self.b.const(value, _TYPE[kind])

    def limits(self, kind: Kind) -> Interval[Value]:
        low, high = {"int": (-LIMIT, LIMIT), "float": (-math.inf, math.inf), "bool": (False, True)}[kind]
        return self.b.const(low, _TYPE[kind]), self.b.const(high, _TYPE[kind])

    def _saturate(self, value: Value, kind: Number) -> Value:
        if kind == "float":
            return value
        return self.b.max(self.b.const(-LIMIT, I64), self.b.min(self.b.const(LIMIT, I64), value))

    def add(self, a: Value, b: Value, kind: Number) -> Value:
        return self._saturate(a + b, kind)

    def sub(self, a: Value, b: Value, kind: Number) -> Value:
        return self._saturate(a - b, kind)

    def mul(self, a: Value, b: Value, kind: Number) -> Value:
        return self._saturate(a * b, kind)

    def div(self, a: Value, b: Value) -> Value:
        return a / b

    def floordiv(self, a: Value, b: Value) -> Value:
        quotient = a / b
        remainder = a - quotient * b
        return quotient - self.b.cast("zext", self._rounded_up(remainder, b), I64)

    def mod(self, a: Value, b: Value) -> Value:
        remainder = a - (a / b) * b
        return remainder + self.b.select(self._rounded_up(remainder, b), b, 0)

    def _rounded_up(self, remainder: Value, divisor: Value) -> Value:
        return self.b.compare("ne", remainder, 0) & self.b.compare("lt", remainder ^ divisor, 0)

    def min(self, a: Value, b: Value, kind: Number) -> Value:
        return self.b.min(a, b)

    def max(self, a: Value, b: Value, kind: Number) -> Value:
        return self.b.max(a, b)

    def lt(self, a: Value, b: Value, kind: Number) -> Value:
        return self.b.compare("lt", a, b)

    def le(self, a: Value, b: Value, kind: Number) -> Value:
        return self.b.compare("le", a, b)

    def eq(self, a: Value, b: Value, kind: Number) -> Value:
        return self.b.compare("eq", a, b)

    def and_(self, a: Value, b: Value) -> Value:
        return a & b

    def or_(self, a: Value, b: Value) -> Value:
        return a | b

    def not_(self, a: Value) -> Value:
        return a ^ True

    def select(self, condition: Value, a: Value, b: Value, kind: Kind) -> Value:
        return self.b.select(condition, a, b)

    def to_float(self, a: Value) -> Value:
        return self.b.to_float(a, DOUBLE)
