"""Moving rows between the user's memory and aligned scratch.

Scratch rows hold the accumulator's type, one row every `stride` bytes, padded with zeros to whole vectors, so
that the products read full aligned vectors whatever the user's strides, dtype, alignment or head_dim are.

    pack_rows        user rows -> scratch rows     converted, scaled, rows past the end zero
    transpose        scratch rows -> scratch columns (head_dim, queries)
    unpack_rows      scratch rows -> user rows     converted, rows past the end not written
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from anyflash.core.dtypes import FLOATS8
from anyflash.kernels.llvm.ir import (
    BFLOAT,
    BYTES,
    DOUBLE,
    FLOAT,
    HALF,
    I1,
    I8,
    I16,
    I32,
    I64,
    Builder,
    Scalar,
    Value,
    element_of,
    lanes_of,
    mangle,
    vec,
)

# In memory; 8-bit floats are bits there, which `numbers` reads.
ELEMENT = {
    "float32": FLOAT,
    "float64": DOUBLE,
    "float16": HALF,
    "bfloat16": BFLOAT,
    "float8_e4m3fn": I8,
    "float8_e5m2": I8,
}


@dataclass(frozen=True)
class Pages:
    """Where the slots of one sequence lie: slot s in page table[s / size] (i32), `stride` bytes a page."""

    table: Value
    size: Value
    stride: Value
    first: Value  # the slot of row 0


@dataclass(frozen=True)
class UserRows:
    """Rows of a user's array: `pointer` of row 0, or of slot 0 of page 0 where the rows lie in `pages`; byte
    strides, element type, elements a row.

    `dense` says that neighbouring elements of a row touch, so that vectors can be read.
    """

    pointer: Value
    row_stride: Value
    column_stride: Value
    dtype: str
    columns: int
    dense: bool
    pages: Pages | None = None

    def row(self, b: Builder, r: Scalar) -> Value:
        """Address of row r."""
        pages = self.pages
        if pages is None:
            return b.at(self.pointer, r * self.row_stride)
        slot = pages.first + r
        page = b.to_int(b.load(I32, b.at(pages.table, slot / pages.size * 4)), I64)
        return b.at(b.at(self.pointer, page * pages.stride), slot % pages.size * self.row_stride)

    def evenly(self, b: Builder, count: Scalar) -> Value:
        """Whether the first `count` rows are row_stride apart (i1)."""
        if self.pages is None:
            return b.const(True, I1)
        return b.compare("le", self.pages.first % self.pages.size + count, self.pages.size)


def padded(columns: int, lanes: int) -> int:
    """Elements of a scratch row: `columns` rounded up to whole vectors."""
    return -(-columns // lanes) * lanes


def convert(b: Builder, value: Value, element: str) -> Value:
    """Between floating types; to bfloat by rounding to nearest even in integer arithmetic, NaN kept."""
    have = element_of(value.type)
    if have == element:
        return value
    if element != BFLOAT:
        return b.to_float(value, element)
    lanes = lanes_of(value.type)
    single = b.to_float(value, FLOAT)
    bits = b.bitcast(single, vec(I32, lanes))
    odd = (bits >> 16) & 1
    rounded = (bits + odd + 0x7FFF) >> 16
    quiet = (bits >> 16) | 0x40
    high = b.select(b.compare("ne", single, single), quiet, rounded)
    return b.bitcast(b.cast("trunc", high, I16), vec(BFLOAT, lanes))


def numbers(b: Builder, value: Value, dtype: str, element: str) -> Value:
    """What was loaded of an array of `dtype`, as numbers of type `element`. Exact for 8-bit floats."""
    if dtype not in FLOATS8:
        return convert(b, value, element)
    lanes = lanes_of(value.type)
    wide = b.cast("zext", value, I16)
    if dtype == "float8_e5m2":
        # The upper half of a float16.
        return convert(b, b.bitcast(wide << 8, vec(HALF, lanes)), element)
    # Exponents of e4m3 start 8 below those of float16; all ones but the sign is its one NaN, and no infinity.
    magnitude = wide & 0x7F
    half = b.bitcast((magnitude << 7) | ((wide & 0x80) << 8), vec(HALF, lanes))
    scaled = b.to_float(half, FLOAT) * 256.0
    found = b.select(b.compare("eq", magnitude, 0x7F), b.const(math.nan, scaled.type), scaled)
    return convert(b, found, element)


def pack_rows(
    b: Builder,
    source: UserRows,
    target: Value,
    stride: int,
    valid: Value,
    rows: Scalar,
    element: str,
    lanes: int,
    scale: Value | None = None,
) -> None:
    """target[r] = scale * source[r] for r < valid, else 0, for `rows` rows of `stride` bytes each. `scale` is
    a scalar."""
    user = ELEMENT[source.dtype]
    whole, rest = divmod(source.columns, lanes)

    def finish(value: Value) -> Value:
        value = numbers(b, value, source.dtype, element)
        return value if scale is None else value * scale

    with b.loop(0, valid) as r:
        row = source.row(b, r)
        out = b.at(target, r * stride)
        if source.dense:
            with b.loop(0, whole) as c:
                value = b.load(vec(user, lanes), b.at(row, c * (lanes * BYTES[user])))
                b.store(finish(value), b.at(out, c * (lanes * BYTES[element])), BYTES[element])
            if rest:
                value = load_first(b, vec(user, lanes), b.at(row, whole * lanes * BYTES[user]), rest)
                b.store(finish(value), b.at(out, whole * lanes * BYTES[element]), BYTES[element])
        else:
            if rest:
                zero = b.const(0.0, vec(element, lanes))
                b.store(zero, b.at(out, whole * lanes * BYTES[element]), BYTES[element])
            with b.loop(0, source.columns) as c:
                value = b.load(user, b.at(row, c * source.column_stride))
                b.store(finish(value), b.at(out, c * BYTES[element]), BYTES[element])
    zero = b.const(0.0, vec(element, lanes))
    with b.loop(valid, rows) as r, b.loop(0, stride, lanes * BYTES[element]) as c:
        b.store(zero, b.at(b.at(target, r * stride), c), BYTES[element])


def load_first(b: Builder, type_: str, pointer: Value, count: int) -> Value:
    """A vector whose first `count` lanes are loaded and whose others are zero; nothing past them is read."""
    lanes = lanes_of(type_)
    mask = ", ".join(f"i1 {'true' if i < count else 'false'}" for i in range(lanes))
    name = f"llvm.masked.load.{mangle(type_)}.p0"
    zero = "zeroinitializer"
    b.declarations.add(f"declare {type_} @{name}(ptr, <{lanes} x i1>, {type_})")
    return b.value(
        f"call {type_} @{name}(ptr align 1 {pointer.name}, <{lanes} x i1> <{mask}>, {type_} {zero})", type_
    )


def store_first(b: Builder, value: Value, pointer: Value, count: int) -> None:
    """Store the first `count` lanes only."""
    lanes = lanes_of(value.type)
    mask = ", ".join(f"i1 {'true' if i < count else 'false'}" for i in range(lanes))
    name = f"llvm.masked.store.{mangle(value.type)}.p0"
    b.declarations.add(f"declare void @{name}({value.type}, ptr, <{lanes} x i1>)")
    b.emit(
        f"call void @{name}({value.type} {value.name}, ptr align 1 {pointer.name}, <{lanes} x i1> <{mask}>)"
    )


def unpack_rows(
    b: Builder,
    source: Value,
    stride: int,
    target: UserRows,
    valid: Value,
    element: str,
    lanes: int,
    scale: Value | None = None,
) -> None:
    """target[r] = scale * source[r] for r < valid. `scale` is a scalar."""

    def finish(value: Value) -> Value:
        return convert(b, value if scale is None else value * scale, user)

    user = ELEMENT[target.dtype]
    whole, rest = divmod(target.columns, lanes)
    vector = vec(element, lanes)
    with b.loop(0, valid) as r:
        row = b.at(source, r * stride)
        out = b.at(target.pointer, r * target.row_stride)
        if target.dense:
            with b.loop(0, whole) as c:
                value = b.load(vector, b.at(row, c * (lanes * BYTES[element])), BYTES[element])
                b.store(finish(value), b.at(out, c * (lanes * BYTES[user])))
            if rest:
                value = b.load(vector, b.at(row, whole * lanes * BYTES[element]), BYTES[element])
                store_first(b, finish(value), b.at(out, whole * lanes * BYTES[user]), rest)
        else:
            with b.loop(0, target.columns) as c:
                value = b.load(element, b.at(row, c * BYTES[element]), BYTES[element])
                b.store(finish(value), b.at(out, c * target.column_stride))


def transpose(
    b: Builder,
    source: Value,
    source_stride: Scalar,
    target: Value,
    target_stride: int,
    row_vectors: Scalar,
    columns: int,
    element: str,
    lanes: int,
    scale_source: Value | None = None,
) -> None:
    """target[c, r] = source[r, c] for row_vectors * lanes rows and `columns` columns.

    Both in scratch, and every source row has its columns padded to whole vectors. `scale_source` points to
    one factor a column, by which the source is multiplied on the way.
    """
    vector, step = vec(element, lanes), lanes * BYTES[element]
    whole, rest = divmod(columns, lanes)

    def block(r: Value, c: Value, kept: int) -> None:
        corner = b.at(b.at(source, r * (lanes * source_stride)), c * step)
        vectors = [b.load(vector, b.at(corner, i * source_stride), BYTES[element]) for i in range(lanes)]
        if scale_source is not None:
            factor = b.load(vector, b.at(scale_source, c * step), BYTES[element])
            vectors = [x * factor for x in vectors]
        out = b.at(b.at(target, c * (lanes * target_stride)), r * step)
        for i, value in enumerate(transposed(b, vectors)[:kept]):
            b.store(value, b.at(out, i * target_stride), BYTES[element])

    with b.loop(0, row_vectors) as r:
        with b.loop(0, whole) as c:
            block(r, c, lanes)
        if rest:
            block(r, b.const(whole, I64), rest)


def transposed(b: Builder, rows: list[Value]) -> list[Value]:
    """The transpose of a square of vectors: log2(lanes) rounds of pairwise exchanges of halves."""
    lanes = len(rows)
    distance = 1
    while distance < lanes:
        keep_low = [i if not i & distance else lanes + i - distance for i in range(lanes)]
        keep_high = [i + distance if not i & distance else lanes + i for i in range(lanes)]
        out = list(rows)
        for i in range(lanes):
            if not i & distance:
                out[i] = b.shuffle(rows[i], rows[i + distance], keep_low)
                out[i + distance] = b.shuffle(rows[i], rows[i + distance], keep_high)
        rows = out
        distance *= 2
    return rows


def zero(b: Builder, target: Value, size: Scalar, element: str, lanes: int) -> None:
    """Clear `size` bytes, a multiple of the vector."""
    value = b.const(0.0, vec(element, lanes))
    with b.loop(0, size, lanes * BYTES[element]) as offset:
        b.store(value, b.at(target, offset), BYTES[element])


def all_finite(b: Builder, source: Value, size: Scalar, element: str, lanes: int) -> Value:
    """Whether no number in `size` bytes is NaN or infinite (i1): x * 0 is 0 for the others only."""
    wide = element if element in (FLOAT, DOUBLE) else FLOAT
    vector = vec(wide, lanes)
    sums = b.var(vector, b.const(0.0, vector))
    with b.loop(0, size, lanes * BYTES[element]) as offset:
        number = convert(b, b.load(vec(element, lanes), b.at(source, offset), BYTES[element]), wide)
        sums.set(b.fma(number, 0.0, sums.get()))
    clean = b.compare("eq", sums.get(), 0.0)
    if lanes == 1:
        return clean
    bits = b.value(f"bitcast {clean.type} {clean.name} to i{lanes}", f"i{lanes}")
    return b.value(f"icmp eq i{lanes} {bits.name}, -1", "i1")
