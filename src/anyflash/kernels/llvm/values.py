"""LLVM types as text, and the typed values and variables of one function."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anyflash.kernels.llvm.ir import Builder

I1, I8, I16, I32, I64, PTR, HALF, BFLOAT, FLOAT, DOUBLE = (
    "i1", "i8", "i16", "i32", "i64", "ptr", "half", "bfloat", "float", "double",
)  # fmt: skip
BYTES = {I1: 1, I8: 1, I16: 2, I32: 4, I64: 8, PTR: 8, HALF: 2, BFLOAT: 2, FLOAT: 4, DOUBLE: 8}
FLOATING = (HALF, BFLOAT, FLOAT, DOUBLE)
LARGEST = {FLOAT: (2 - 2.0**-23) * 2.0**127, DOUBLE: (2 - 2.0**-52) * 2.0**1023}
_LLVM_NAME = {FLOAT: "f32", DOUBLE: "f64", HALF: "f16", BFLOAT: "bf16"}


def vec(element: str, lanes: int) -> str:
    """The type of `lanes` elements; one lane is the scalar itself."""
    return element if lanes == 1 else f"<{lanes} x {element}>"


def element_of(type_: str) -> str:
    return type_.split(" x ")[1][:-1] if type_[0] == "<" else type_


def lanes_of(type_: str) -> int:
    return int(type_[1:].split(" ")[0]) if type_[0] == "<" else 1


def size_of(type_: str) -> int:
    return BYTES[element_of(type_)] * lanes_of(type_)


def mangle(type_: str) -> str:
    """`v16f32` for <16 x float>: the suffix of an overloaded intrinsic."""
    name = _LLVM_NAME.get(element_of(type_), element_of(type_))
    return f"v{lanes_of(type_)}{name}" if type_[0] == "<" else name


class Value:
    """An SSA value or constant: `name` as LLVM writes it, and `type`."""

    __slots__ = ("b", "name", "type")

    def __init__(self, b: Builder, name: str, type_: str) -> None:
        self.b, self.name, self.type = b, name, type_

    @property
    def floating(self) -> bool:
        return element_of(self.type) in FLOATING

    def __add__(self, o: Scalar) -> Value:
        return self.b.binary("add", self, o)

    __radd__ = __add__

    def __mul__(self, o: Scalar) -> Value:
        return self.b.binary("mul", self, o)

    __rmul__ = __mul__

    def __sub__(self, o: Scalar) -> Value:
        return self.b.binary("sub", self, o)

    def __rsub__(self, o: Scalar) -> Value:
        return self.b.binary("sub", o, self)

    def __truediv__(self, o: Scalar) -> Value:
        return self.b.binary("fdiv" if self.floating else "sdiv", self, o)

    def __mod__(self, o: Scalar) -> Value:
        return self.b.binary("srem", self, o)

    def __and__(self, o: Scalar) -> Value:
        return self.b.binary("and", self, o)

    def __or__(self, o: Scalar) -> Value:
        return self.b.binary("or", self, o)

    def __xor__(self, o: Scalar) -> Value:
        return self.b.binary("xor", self, o)

    def __lshift__(self, o: Scalar) -> Value:
        return self.b.binary("shl", self, o)

    def __rshift__(self, o: Scalar) -> Value:
        return self.b.binary("lshr", self, o)

    def __lt__(self, o: Scalar) -> Value:
        return self.b.compare("lt", self, o)

    def __le__(self, o: Scalar) -> Value:
        return self.b.compare("le", self, o)

    def __gt__(self, o: Scalar) -> Value:
        return self.b.compare("gt", self, o)

    def __ge__(self, o: Scalar) -> Value:
        return self.b.compare("ge", self, o)


Scalar = Value | int | float


class Var:
    """A mutable variable of one function."""

    __slots__ = ("b", "name", "type")

    def __init__(self, b: Builder, name: str, type_: str) -> None:
        self.b, self.name, self.type = b, name, type_

    def get(self) -> Value:
        return self.b.value(f"load {self.type}, ptr {self.name}", self.type)

    def set(self, value: Scalar) -> None:
        value = self.b.as_type(value, self.type)
        self.b.emit(f"store {self.type} {value.name}, ptr {self.name}")
