"""A small typed builder for textual LLVM IR.

`Value`s carry their type and know their builder, so kernels read as arithmetic: `s * scale + bias`. Python
numbers become constants of the other operand's type, and a scalar meeting a vector is broadcast. Loop-carried
state lives in `Var`s (an alloca each); LLVM's mem2reg turns them into registers. Integers are signed; all
memory offsets are in bytes and 64 bit.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from anyflash.kernels.llvm.values import (
    BFLOAT,
    BYTES,
    DOUBLE,
    FLOAT,
    FLOATING,
    HALF,
    I1,
    I8,
    I16,
    I32,
    I64,
    LARGEST,
    PTR,
    Scalar,
    Value,
    Var,
    element_of,
    lanes_of,
    mangle,
    size_of,
    vec,
)

__all__ = [
    "BFLOAT",
    "BYTES",
    "DOUBLE",
    "FLOAT",
    "FLOATING",
    "HALF",
    "I1",
    "I8",
    "I16",
    "I32",
    "I64",
    "PTR",
    "Builder",
    "Scalar",
    "Value",
    "Var",
    "element_of",
    "lanes_of",
    "mangle",
    "size_of",
    "vec",
]


class Builder:
    """Text of one function, `void name(ptr %args, i64 %thread)` unless said otherwise."""

    def __init__(
        self, name: str, parameters: Sequence[tuple[str, str]] = ((PTR, "args"), (I64, "thread"))
    ) -> None:
        self.name = name
        self.parameters = {n: Value(self, f"%{n}", t) for t, n in parameters}
        self.lines: list[str] = []
        self.allocas: list[str] = []
        self.declarations: set[str] = set()
        self.count = 0

    def text(self) -> str:
        """The function and the declarations it needs."""
        parameters = ", ".join(f"{v.type} {v.name}" for v in self.parameters.values())
        body = "\n".join(["entry:", *self.allocas, *self.lines, "  ret void"])
        return (
            "\n".join(sorted(self.declarations))
            + f"\ndefine void @{self.name}({parameters}) {{\n{body}\n}}\n"
        )

    def emit(self, line: str) -> None:
        self.lines.append("  " + line)

    def value(self, expression: str, type_: str) -> Value:
        self.count += 1
        self.emit(f"%t{self.count} = {expression}")
        return Value(self, f"%t{self.count}", type_)

    def label(self, stem: str) -> str:
        self.count += 1
        return f"{stem}{self.count}"

    def place(self, label: str) -> None:
        self.lines.append(f"{label}:")

    def call(self, type_: str, function: str, *args: Value) -> Value:
        """Call an intrinsic or declared function; declares it from the argument types."""
        types = ", ".join(a.type for a in args)
        self.declarations.add(f"declare {type_} @{function}({types})")
        passed = ", ".join(f"{a.type} {a.name}" for a in args)
        if type_ == "void":
            self.emit(f"call void @{function}({passed})")
            return Value(self, "void", "void")
        return self.value(f"call {type_} @{function}({passed})", type_)

    def const(self, value: float | int | bool, type_: str) -> Value:
        element = element_of(type_)
        if element in FLOATING:
            if element == FLOAT and math.isfinite(value):
                # What is finite stays so: a score of -1e300 is not yet a mask.
                value = max(-LARGEST[FLOAT], min(LARGEST[FLOAT], value))
                value = struct.unpack("<f", struct.pack("<f", value))[0]
            text = f"0x{struct.unpack('<Q', struct.pack('<d', float(value)))[0]:016X}"
        elif element == I1:
            text = "true" if value else "false"
        elif element == PTR:
            text = "null"
        else:
            text = str(int(value))
        return Value(self, f"splat ({element} {text})" if type_[0] == "<" else text, type_)

    def as_type(self, value: Scalar, type_: str) -> Value:
        """A Python number as a constant, or a scalar broadcast to a vector; nothing is converted."""
        if not isinstance(value, Value):
            return self.const(value, type_)
        if value.type == type_:
            return value
        assert element_of(value.type) == element_of(type_) and lanes_of(value.type) == 1, (value.type, type_)
        return self.splat(value, lanes_of(type_))

    def splat(self, value: Value, lanes: int) -> Value:
        if lanes == 1 or value.type[0] == "<":
            return value
        if value.name[0] != "%":
            return Value(self, f"splat ({value.type} {value.name})", vec(value.type, lanes))
        type_ = vec(value.type, lanes)
        one = self.value(f"insertelement {type_} poison, {value.type} {value.name}, i64 0", type_)
        return self.value(
            f"shufflevector {type_} {one.name}, {type_} poison, <{lanes} x i32> zeroinitializer", type_
        )

    def _match(self, a: Scalar, b: Scalar) -> tuple[Value, Value]:
        if isinstance(a, Value) and isinstance(b, Value):
            lanes = max(lanes_of(a.type), lanes_of(b.type))
            return self.splat(a, lanes), self.splat(b, lanes)
        if isinstance(a, Value):
            return a, self.const(b, a.type)  # type: ignore[arg-type]
        assert isinstance(b, Value)
        return self.const(a, b.type), b

    def cast(self, op: str, value: Value, element: str) -> Value:
        type_ = vec(element, lanes_of(value.type))
        return (
            value if type_ == value.type else self.value(f"{op} {value.type} {value.name} to {type_}", type_)
        )

    def bitcast(self, value: Value, type_: str) -> Value:
        return self.value(f"bitcast {value.type} {value.name} to {type_}", type_)

    def to_float(self, value: Value, element: str) -> Value:
        """Any number as `element` (float or double)."""
        have = element_of(value.type)
        if have in FLOATING:
            if BYTES[have] == BYTES[element]:
                return value
            return self.cast("fpext" if BYTES[have] < BYTES[element] else "fptrunc", value, element)
        return self.cast("uitofp" if have == I1 else "sitofp", value, element)

    def to_int(self, value: Value, element: str) -> Value:
        have = element_of(value.type)
        if have == I1:
            return self.cast("zext", value, element)
        return self.cast("sext" if BYTES[have] < BYTES[element] else "trunc", value, element)

    def binary(self, op: str, a: Scalar, b: Scalar) -> Value:
        a, b = self._match(a, b)
        if op in ("add", "sub", "mul") and a.floating:
            op = "f" + op
        return self.value(f"{op} {a.type} {a.name}, {b.name}", a.type)

    def compare(self, op: str, a: Scalar, b: Scalar) -> Value:
        """Ordered for floats: false if either is NaN; `ne` is its negation's opposite (true for NaN)."""
        a, b = self._match(a, b)
        if a.floating:
            predicate = "fcmp une" if op == "ne" else f"fcmp o{op}"
        else:
            predicate = f"icmp {op}" if op in ("eq", "ne") else f"icmp s{op}"
        return self.value(f"{predicate} {a.type} {a.name}, {b.name}", vec(I1, lanes_of(a.type)))

    def select(self, condition: Value, a: Scalar, b: Scalar) -> Value:
        if not isinstance(a, Value) and not isinstance(b, Value):
            raise TypeError("one of the choices must be a Value")
        a, b = self._match(a, b)
        if lanes_of(condition.type) > lanes_of(a.type):
            lanes = lanes_of(condition.type)
            a, b = self.splat(a, lanes), self.splat(b, lanes)
        return self.value(
            f"select {condition.type} {condition.name}, {a.type} {a.name}, {b.type} {b.name}", a.type
        )

    def fma(self, a: Scalar, b: Scalar, c: Value) -> Value:
        a, b = self.as_type(a, c.type), self.as_type(b, c.type)
        return self.call(c.type, f"llvm.fma.{mangle(c.type)}", a, b, c)

    def max(self, a: Scalar, b: Scalar) -> Value:
        """`b` where either float is NaN: one machine instruction."""
        a, b = self._match(a, b)
        return self.select(self.compare("gt", a, b), a, b)

    def min(self, a: Scalar, b: Scalar) -> Value:
        a, b = self._match(a, b)
        return self.select(self.compare("lt", a, b), a, b)

    def abs(self, a: Value) -> Value:
        if a.floating:
            return self.call(a.type, f"llvm.fabs.{mangle(a.type)}", a)
        return self.max(a, self.binary("sub", 0, a))

    def negate(self, a: Value) -> Value:
        return self.value(f"fneg {a.type} {a.name}", a.type) if a.floating else self.binary("sub", 0, a)

    def reduce(self, op: str, a: Value) -> Value:
        """Pairwise tree over the lanes: `add` or `max`, always in the same order."""
        lanes = lanes_of(a.type)
        while lanes > 1:
            half = lanes // 2
            low = self.shuffle(a, a, range(half))
            high = self.shuffle(a, a, range(half, lanes))
            a = self.binary("add", low, high) if op == "add" else self.max(low, high)
            lanes = half
        return a

    def shuffle(self, a: Value, b: Value, lanes: Sequence[int]) -> Value:
        """Lanes of `a` then `b`, numbered through. One lane gives a scalar."""
        lanes = list(lanes)
        if len(lanes) == 1:
            source, index = (a, lanes[0]) if lanes[0] < lanes_of(a.type) else (b, lanes[0] - lanes_of(a.type))
            return self.lane(source, index)
        picks = ", ".join(f"i32 {i}" for i in lanes)
        type_ = vec(element_of(a.type), len(lanes))
        return self.value(
            f"shufflevector {a.type} {a.name}, {b.type} {b.name}, <{len(lanes)} x i32> <{picks}>", type_
        )

    def lane(self, a: Value, index: int | Value) -> Value:
        if a.type[0] != "<":
            return a
        index_text = f"i64 {index.name if isinstance(index, Value) else index}"
        return self.value(f"extractelement {a.type} {a.name}, {index_text}", element_of(a.type))

    def insert(self, a: Value, item: Value, index: int) -> Value:
        if a.type[0] != "<":
            return item
        return self.value(f"insertelement {a.type} {a.name}, {item.type} {item.name}, i64 {index}", a.type)

    def iota(self, element: str, lanes: int) -> Value:
        """0, 1, 2, ..."""
        if lanes == 1:
            return self.const(0, element)
        return Value(self, "<" + ", ".join(f"{element} {i}" for i in range(lanes)) + ">", vec(element, lanes))

    def at(self, pointer: Value, offset: Scalar) -> Value:
        """`pointer` moved by `offset` bytes."""
        if not isinstance(offset, Value) and offset == 0:
            return pointer
        offset = self.as_type(offset, I64)
        return self.value(f"getelementptr i8, ptr {pointer.name}, i64 {offset.name}", PTR)

    def load(self, type_: str, pointer: Value, align: int = 1) -> Value:
        return self.value(f"load {type_}, ptr {pointer.name}, align {align}", type_)

    def prefetch(self, pointer: Value) -> None:
        """Ask for a cache line, into the second level, that will be read. Any address will do."""
        self.declarations.add("declare void @llvm.prefetch.p0(ptr, i32 immarg, i32 immarg, i32 immarg)")
        self.emit(f"call void @llvm.prefetch.p0(ptr {pointer.name}, i32 0, i32 2, i32 1)")

    def store(self, value: Value, pointer: Value, align: int = 1) -> None:
        self.emit(f"store {value.type} {value.name}, ptr {pointer.name}, align {align}")

    def var(self, type_: str, value: Scalar | None = None) -> Var:
        self.count += 1
        self.allocas.append(f"  %v{self.count} = alloca {type_}")
        variable = Var(self, f"%v{self.count}", type_)
        if value is not None:
            variable.set(value)
        return variable

    def atomic_increment(self, pointer: Value, ordering: str = "monotonic") -> Value:
        """The counter's value before it is raised by one."""
        return self.value(f"atomicrmw add ptr {pointer.name}, i64 1 {ordering}", I64)

    def jump(self, label: str) -> None:
        self.emit(f"br label %{label}")

    def branch(self, condition: Value, yes: str, no: str) -> None:
        self.emit(f"br i1 {condition.name}, label %{yes}, label %{no}")

    @contextmanager
    def loop(self, start: Scalar, stop: Scalar, step: int = 1) -> Iterator[Value]:
        """for i in range(start, stop, step), 64 bit; the trip count may be zero."""
        counter = self.var(I64, start)
        head, body, tail, done = (self.label(x) for x in ("head", "body", "tail", "done"))
        self.jump(head)
        self.place(head)
        i = counter.get()
        self.branch(self.compare("lt", i, stop), body, done)
        self.place(body)
        yield i
        self.jump(tail)
        self.place(tail)
        counter.set(i + step)
        self.jump(head)
        self.place(done)

    @contextmanager
    def when(self, condition: Value) -> Iterator[None]:
        then, after = self.label("then"), self.label("after")
        self.branch(condition, then, after)
        self.place(then)
        yield
        self.jump(after)
        self.place(after)

    def choose(self, condition: Value, yes: Callable[[], None], no: Callable[[], None]) -> None:
        """Emit both sides; one runs."""
        then, otherwise, after = self.label("then"), self.label("else"), self.label("after")
        self.branch(condition, then, otherwise)
        for label, side in ((then, yes), (otherwise, no)):
            self.place(label)
            side()
            self.jump(after)
        self.place(after)

    @contextmanager
    def forever(self) -> Iterator[str]:
        """Loop until a jump to the label it gives."""
        head, done = self.label("again"), self.label("left")
        self.jump(head)
        self.place(head)
        yield done
        self.jump(head)
        self.place(done)

    def leave_if(self, condition: Value, label: str) -> None:
        stay = self.label("stay")
        self.branch(condition, label, stay)
        self.place(stay)
