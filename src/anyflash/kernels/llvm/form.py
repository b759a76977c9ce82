"""How matrices are laid out for the products: as numbers of the accumulator's type, or as pairs of bfloat16.

Every product contracts words (see gemm). In the *number* form a word is one float or double: rows of K, V, Q
and dO are converted once when they are packed. In the *pair* form a word is two neighbouring bfloat16 of the
contracted axis, for the dot-product instructions of AVX512-BF16 and AMX: rows stay as they are (pairs along
head_dim lie together), what is contracted over tokens is interleaved two rows at a time, and P and dS are
rounded to bfloat16.

A form answers, for rows in scratch or in place:

    dims_a      A[token, word of head_dim]      K and V where scores are formed
    columns     B[word of head_dim, query]      Q^T, dO^T
    tokens_a    A[dim, word of tokens]          V^T in the forward, K^T in dQ
    tokens_b    B[word of tokens, dim]          dO, Q in dV, dK
    put         a vector of P or dS for one key, where a product will read it
"""

from __future__ import annotations

from dataclasses import dataclass, field

from anyflash.kernels.llvm import gemm, layout, tiles
from anyflash.kernels.llvm.gemm import Dot, Finish, Matrix, RegisterTile, Start
from anyflash.kernels.llvm.ir import (
    BFLOAT,
    BYTES,
    DOUBLE,
    FLOAT,
    I1,
    I16,
    I32,
    Builder,
    Scalar,
    Value,
    vec,
)
from anyflash.kernels.llvm.layout import padded
from anyflash.kernels.llvm.target import Target


@dataclass
class Form:
    """The number form. `row` is the byte stride of a transposed scratch matrix, block_q numbers."""

    b: Builder
    element: str
    lanes: int
    row: int
    tile: RegisterTile
    dot: Dot = field(init=False)
    row_element: str = field(init=False)
    row_lanes: int = field(init=False)
    # Keys of a tile are rounded up to this: whole register tiles, whole words.
    key_granule: int = field(init=False)
    # How many keys `put` takes at a time.
    keys_together = 1

    def __post_init__(self) -> None:
        self.dot = gemm.fma_dot(self.element, self.lanes)
        self.row_element, self.row_lanes = self.element, self.lanes
        self.key_granule = self.tile.rows

    @property
    def step(self) -> int:
        """Bytes of one vector of words, and of accumulators."""
        return self.dot.vector_bytes

    def row_bytes(self, dim: int) -> int:
        """Stride of packed rows of `dim` elements."""
        return padded(dim, self.row_lanes) * BYTES[self.row_element]

    def depth(self, dim: int) -> int:
        """Words of head_dim."""
        return dim

    def token_words(self, tokens: Scalar) -> Scalar:
        """Words of `tokens` tokens."""
        return tokens

    def token_bytes(self, tokens: int, dim: int) -> int:
        """Scratch that tokens_a or tokens_b need."""
        return 0

    def same_memory(self, dtype: str, columns: int) -> bool:
        """Whether user rows of this dtype and length can be packed rows already."""
        same = {"float32": FLOAT, "float64": DOUBLE, "bfloat16": BFLOAT}.get(dtype) == self.row_element
        return same and columns * BYTES[self.row_element] == self.row_bytes(columns)

    def dims_a(self, rows: Value, dim: int) -> Matrix:
        return Matrix(rows, self.row_bytes(dim), self.dot.word_bytes)

    def columns(self, rows: Value, dim: int, target: Value) -> Matrix:
        """Transposes words of block_q rows."""
        word = FLOAT if BYTES[self.dot.word] == 4 else DOUBLE
        layout.transpose(
            self.b, rows, self.row_bytes(dim), target, self.row, self.row // self.step, self.depth(dim), word,
            self.lanes,
        )  # fmt: skip
        return Matrix(target, self.row, self.step)

    def make_tokens_a(self, rows: Value, dim: int, tokens: Scalar, words: Value) -> None:
        """Write the words that `tokens_a` reads."""

    def tokens_a(self, rows: Value, dim: int, words: Value) -> Matrix:
        return Matrix(rows, BYTES[self.element], self.row_bytes(dim))

    def tokens_b(self, rows: Value, dim: int, tokens: Scalar, spare: Value) -> Matrix:
        return Matrix(rows, self.row_bytes(dim), self.step)

    def finite(self, rows: Value, size: Scalar) -> Value:
        """Whether packed rows hold no NaN or infinity (i1)."""
        return layout.all_finite(self.b, rows, size, self.element, self.lanes)

    def put_b(self, matrix: Value, key: Scalar, vector: int, values: list[Value]) -> None:
        """Store P or dS of `keys_together` keys from `key` on as B[word of keys, query]."""
        self.b.store(values[0], self._at(matrix, key, vector * self.step), self.step // self.lanes)

    def put_a(self, matrix: Value, key: Scalar, vector: int, values: list[Value]) -> None:
        """The same as A[key, word of queries]."""
        self.put_b(matrix, key, vector, values)

    def queries_a(self, matrix: Value) -> Matrix:
        """What `put_a` stored."""
        return Matrix(matrix, self.row, self.dot.word_bytes)

    def keys_b(self, matrix: Value) -> Matrix:
        """What `put_b` stored."""
        return Matrix(matrix, self.row, self.step)

    def _at(self, matrix: Value, row: Scalar, offset: int) -> Value:
        return self.b.at(self.b.at(matrix, row * self.row), offset)

    def product(
        self, a: Matrix, y: Matrix, rows: Scalar, vectors: int, depth: Scalar, start: Start, finish: Finish
    ) -> None:
        gemm.product(self.b, self.dot, a, y, rows, vectors, depth, tile=self.tile, start=start, finish=finish)

    def guarded(
        self, a: Matrix, y: Matrix, rows: Scalar, vectors: int, depth: Scalar, probability: str, start: Start,
        finish: Finish,
    ) -> None:  # fmt: skip
        gemm.guarded_product(
            self.b, self.dot, a, y, rows, vectors, depth, probability=probability, start=start, finish=finish
        )


@dataclass
class PairForm(Form):
    """bfloat16 pairs. `target` decides between the dot-product instruction and tiles."""

    target: Target = field(kw_only=True)
    tiled: bool = field(kw_only=True)
    keys_together = 2

    def __post_init__(self) -> None:
        self.dot = gemm.bf16_pair_dot(self.lanes, native=self.target.bf16_dot)
        self.row_element, self.row_lanes = BFLOAT, 2 * self.lanes
        self.key_granule = tiles.KEY_GRANULE if self.tiled else self.tile.rows

    def depth(self, dim: int) -> int:
        return padded(dim, self.row_lanes) // 2 if self.tiled else -(-dim // 2)

    def token_words(self, tokens: Scalar) -> Scalar:
        return tokens >> 1 if isinstance(tokens, Value) else tokens // 2

    def token_bytes(self, tokens: int, dim: int) -> int:
        width = padded(dim, self.lanes)
        if self.tiled:
            width += padded(dim, 2 * tiles.ROWS)  # turned for tokens_a; products read whole pairs of tiles
        return 4 * (tokens // 2) * width

    def make_tokens_a(self, rows: Value, dim: int, tokens: Scalar, words: Value) -> None:
        self.tokens_b(rows, dim, tokens, words)
        if self.tiled:
            # A tile reads words of the contracted axis side by side.
            groups = self.token_words(tokens) / self.lanes  # type: ignore[operator]
            width, stride = padded(dim, self.lanes), 2 * tiles.MOST_KEYS
            turned = self._turned(words, dim)
            layout.transpose(self.b, words, 4 * width, turned, stride, groups, width, FLOAT, self.lanes)

    def tokens_a(self, rows: Value, dim: int, words: Value) -> Matrix:
        if self.tiled:
            return Matrix(self._turned(words, dim), 2 * tiles.MOST_KEYS, 4)
        return Matrix(words, 4, 4 * padded(dim, self.lanes))

    def _turned(self, words: Value, dim: int) -> Value:
        return self.b.at(words, tiles.MOST_KEYS // 2 * 4 * padded(dim, self.lanes))

    def tokens_b(self, rows: Value, dim: int, tokens: Scalar, spare: Value) -> Matrix:
        """Interleaves rows 2t and 2t + 1 into words."""
        b, width = self.b, padded(dim, self.lanes) * 4
        half = vec(I16, self.lanes)
        with b.loop(0, self.token_words(tokens)) as t:
            pair = b.at(rows, t * (2 * self.row_bytes(dim)))
            out = b.at(spare, t * width)
            with b.loop(0, padded(dim, self.lanes), self.lanes) as d:
                first = b.cast("zext", b.load(half, b.at(pair, d * 2), 2), I32)
                second = b.cast("zext", b.load(half, b.at(b.at(pair, self.row_bytes(dim)), d * 2), 2), I32)
                b.store(first | (second << 16), b.at(out, d * 4), 4)
        return Matrix(spare, width, self.step)

    def finite(self, rows: Value, size: Scalar) -> Value:
        """No bfloat16 has all exponent bits set."""
        b, words = self.b, vec(I32, self.lanes)
        bad = b.var(vec(I1, self.lanes), b.const(False, vec(I1, self.lanes)))
        with b.loop(0, size, 4 * self.lanes) as offset:
            word = b.load(words, b.at(rows, offset), 4)
            low = b.compare("eq", word & 0x7F80, 0x7F80)
            high = b.compare("eq", word & 0x7F800000, 0x7F800000)
            bad.set(bad.get() | low | high)
        lanes = b.bitcast(bad.get(), f"i{self.lanes}") if self.lanes > 1 else bad.get()
        return b.compare("eq", lanes, 0)

    def _round(self, values: list[Value]) -> Value:
        """Two vectors as bfloat16, one after the other."""
        b, pair = self.b, vec(BFLOAT, 2 * self.lanes)
        if self.target.bf16_dot:
            return b.call(pair, "llvm.x86.avx512bf16.cvtne2ps2bf16.512", values[1], values[0])
        first, second = (layout.convert(b, x, BFLOAT) for x in values)
        return b.shuffle(first, second, range(2 * self.lanes))

    def put_b(self, matrix: Value, key: Scalar, vector: int, values: list[Value]) -> None:
        """Words (key, key + 1), in row key / 2 of the matrix."""
        b, lanes = self.b, self.lanes
        both = self._round(values)
        words = b.shuffle(both, both, [i // 2 + lanes * (i % 2) for i in range(2 * lanes)])
        row = key >> 1 if isinstance(key, Value) else key // 2
        b.store(words, self._at(matrix, row, vector * self.step), 4)

    def put_a(self, matrix: Value, key: Scalar, vector: int, values: list[Value]) -> None:
        """Each key a row of bfloat16, at the start of the matrix's row."""
        b, lanes = self.b, self.lanes
        both = self._round(values)
        for i in range(2):
            half = b.shuffle(both, both, range(i * lanes, (i + 1) * lanes))
            b.store(half, self._at(matrix, key + i, vector * self.step // 2), 2)

    def product(
        self, a: Matrix, y: Matrix, rows: Scalar, vectors: int, depth: Scalar, start: Start, finish: Finish
    ) -> None:
        if self.tiled:
            tiles.product(self.b, self.target, a, y, rows, vectors, depth, start=start, finish=finish)
        else:
            super().product(a, y, rows, vectors, depth, start, finish)
