"""Register-tiled products, the one place where multiply-adds are emitted.

    C[m, n] = start[m, n] + sum_k A[m, k] * B[k, n]        n along the vector lanes

A is read one word at a time and broadcast, so its strides are free and nothing of it is packed. B is read in
vectors of consecutive words. A word is one number of the accumulator's type (`FMA`), or two neighbouring
bfloat16 of the contracted axis (`BF16_PAIR`, one dot-product instruction with float sums).

Register budget: rows x columns accumulators, `columns` vectors of B, one broadcast of A; of 32 registers 8 x
3 fills 28 and 4 x 4 fills 21, of 16 registers 4 x 3 fills all. A multiply-add costs 1 / rows + 1 / columns
loads, about half a load for each of these. The contracted axis is walked in order whatever the tile, so a
result does not depend on the tile: a configuration may change speed, never a bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from anyflash.kernels.llvm.ir import BYTES, FLOAT, I32, Builder, Scalar, Value, Var, size_of, vec
from anyflash.kernels.llvm.spec import RegisterTile


@dataclass(frozen=True)
class Dot:
    """How two words are multiplied and added: word type, accumulator type, lanes of the accumulator."""

    kind: str
    word: str
    accumulator: str
    lanes: int

    @property
    def vector(self) -> str:
        return vec(self.accumulator, self.lanes)

    @property
    def word_bytes(self) -> int:
        return BYTES[self.word]

    @property
    def vector_bytes(self) -> int:
        return size_of(self.vector)

    def multiply_add(self, b: Builder, x: Value, y: Value, acc: Value) -> Value:
        """acc + x * y for vectors of words."""
        if self.kind == "fma":
            return b.fma(x, y, acc)
        if self.kind == "bf16_pair_written_out":
            for shift in (0, 16):
                left, right = (b.bitcast((word >> shift) << 16, self.vector) for word in (x, y))
                acc = b.fma(left, right, acc)
            return acc
        pairs = f"<{2 * self.lanes} x bfloat>"
        return b.call(
            self.vector,
            f"llvm.x86.avx512bf16.dpbf16ps.{32 * self.lanes}",
            acc,
            b.bitcast(x, pairs),
            b.bitcast(y, pairs),
        )


def fma_dot(element: str, lanes: int) -> Dot:
    """One multiply-add of numbers."""
    return Dot("fma", element, element, lanes)


def bf16_pair_dot(lanes: int, native: bool) -> Dot:
    """Without the instruction (`native`), two multiply-adds of the pair's halves."""
    return Dot("bf16_pair" if native else "bf16_pair_written_out", I32, FLOAT, lanes)


@dataclass(frozen=True)
class Matrix:
    """Words at pointer + row * row_stride + column * column_stride, in bytes; as B of a product, a column is
    a vector of words. `element` is the type in memory where that is another than the words'."""

    pointer: Value
    row_stride: Scalar
    column_stride: Scalar
    element: str | None = None

    def at(self, b: Builder, row: Scalar, column: Scalar) -> Value:
        return b.at(
            b.at(self.pointer, _times(b, row, self.row_stride)), _times(b, column, self.column_stride)
        )

    def vector(self, b: Builder, dot: Dot, row: Scalar, column: Scalar) -> Value:
        """One vector of words."""
        value = b.load(vec(self.element or dot.word, dot.lanes), self.at(b, row, column))
        return value if self.element is None else b.to_float(value, dot.word)


def _times(b: Builder, a: Scalar, c: Scalar) -> Scalar:
    if not isinstance(a, Value) and not isinstance(c, Value):
        return a * c
    if not isinstance(c, Value) and c == 1:
        return a
    return b.binary("mul", a, c)


Start = Callable[[Scalar, int], Value]
"""start(row, vector) -> the accumulator's first value."""

Finish = Callable[[Scalar, int, Value], None]
"""finish(row, vector, sum): store or use one vector of the result."""


def product(
    b: Builder,
    dot: Dot,
    a: Matrix,
    y: Matrix,
    rows: Scalar,
    vectors: int,
    depth: Scalar,
    *,
    tile: RegisterTile,
    start: Start,
    finish: Finish,
    unroll: int = 4,
) -> None:
    """The product over `rows` rows and `vectors` vectors of columns.

    `rows` is a number, or a Value that is a multiple of the tile's rows; `depth` likewise of `unroll`.
    """
    for first, width, tile_rows in tile.cut(vectors):
        whole = rows if isinstance(rows, Value) else rows - rows % tile_rows
        if isinstance(whole, Value) or whole > tile_rows:
            with b.loop(0, whole, tile_rows) as row:
                _tile(b, dot, a, y, row, tile_rows, first, width, depth, start, finish, unroll)
        elif whole:
            _tile(b, dot, a, y, 0, tile_rows, first, width, depth, start, finish, unroll)
        rest = 0 if isinstance(rows, Value) else rows % tile_rows
        if rest:
            _tile(b, dot, a, y, whole, rest, first, width, depth, start, finish, unroll)


def _tile(
    b: Builder,
    dot: Dot,
    a: Matrix,
    y: Matrix,
    row: Scalar,
    rows: int,
    first: int,
    width: int,
    depth: Scalar,
    start: Start,
    finish: Finish,
    unroll: int,
) -> None:
    """One register tile: `rows` x `width` vectors."""
    row_of = [row + x for x in range(rows)]
    acc: list[list[Var]] = [[b.var(dot.vector, start(r, first + v)) for v in range(width)] for r in row_of]
    a_rows = [a.at(b, r, 0) for r in row_of]

    def step(k: Scalar) -> None:
        b_vectors = [y.vector(b, dot, k, first + v) for v in range(width)]
        for x in range(rows):
            word = b.load(dot.word, b.at(a_rows[x], _times(b, k, a.column_stride)))
            broadcast = b.splat(word, dot.lanes)
            for v in range(width):
                acc[x][v].set(dot.multiply_add(b, broadcast, b_vectors[v], acc[x][v].get()))

    _walk(b, depth, unroll, step)
    for x, r in enumerate(row_of):
        for v in range(width):
            finish(r, first + v, acc[x][v].get())


def _walk(b: Builder, depth: Scalar, unroll: int, step: Callable[[Scalar], None]) -> None:
    whole = depth if isinstance(depth, Value) else depth - depth % unroll
    if isinstance(whole, Value) or whole > unroll:
        with b.loop(0, whole, unroll) as k:
            for u in range(unroll):
                step(k + u if u else k)
    else:
        for u in range(whole):
            step(u)
    if not isinstance(depth, Value):
        for k in range(int(whole), depth):
            step(k)


def guarded_product(
    b: Builder,
    dot: Dot,
    a: Matrix,
    y: Matrix,
    rows: Scalar,
    vectors: int,
    depth: Scalar,
    *,
    probability: str,
    start: Start,
    finish: Finish,
) -> None:
    """The same product where the other operand may hold NaN or inf under a probability of zero.

    `probability` names the operand, "a" or "y", whose zeros remove a term whatever it would be multiplied
    with. Slow and small: it runs only for tiles in which a mask meets values that are not finite.
    """
    for v in range(vectors):
        with b.loop(0, rows) as row:
            acc = b.var(dot.vector, start(row, v))
            with b.loop(0, depth) as k:
                y_vector = y.vector(b, dot, k, v)
                a_vector = b.splat(b.load(dot.word, a.at(b, row, k)), dot.lanes)
                acc.set(_guarded(b, dot, a_vector, y_vector, probability == "a", acc.get()))
            finish(row, v, acc.get())


def _guarded(b: Builder, dot: Dot, a: Value, y: Value, guard_a: bool, acc: Value) -> Value:
    if dot.kind == "fma":
        term = dot.multiply_add(b, a, y, acc)
        return b.select(b.compare("eq", a if guard_a else y, 0.0), acc, term)
    # Each half of a pair has a probability of its own: clear the partner's half where that is zero (of either
    # sign).
    guard, other = (a, y) if guard_a else (y, a)
    for half in (0xFFFF, 0xFFFF0000 - (1 << 32)):
        magnitude = guard & (half & 0x7FFF7FFF)
        other = b.select(b.compare("eq", magnitude, 0), other & ~half, other)
    pair = (guard, other) if guard_a else (other, guard)
    return dot.multiply_add(b, *pair, acc)
