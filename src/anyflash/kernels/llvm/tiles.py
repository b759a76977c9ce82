"""The products of gemm on AMX tiles: 16 x 16 float sums of 16 x 32 by 32 x 16 bfloat16 products.

    C[16 rows, 16 lanes] += A[16 rows, 16 words] B[16 words, 16 lanes]

A tile of A is 16 rows of 64 contiguous bytes, one of B 16 rows of 16 words: the pair form of `form`. Register
plan, 8 tiles: C 0-3 (2 x 2), A 4-5, B 6-7, so that 4 loads serve 4 products. Sums leave through memory, where
`start` and `finish` see them as vectors.

With `target.amx_emulated` each instruction is written out as vector code on a tile file in memory, so that
the kernels that this schedule makes are tested on machines without AMX. The sums of a pair are then not
fused; nothing else differs.
"""

from __future__ import annotations

from anyflash.kernels.llvm.gemm import Finish, Matrix, Start
from anyflash.kernels.llvm.ir import FLOAT, I8, I32, I64, PTR, Builder, Scalar, Value, vec
from anyflash.kernels.llvm.target import Target

ROWS = 16
LANES = 16
DEPTH = 16  # words
KEY_GRANULE = 32  # keys of a tile of scores: whole tiles over keys, whole tiles of pairs of keys
MOST_KEYS = 64
_TILE_BYTES = 1024
_CONFIG_BYTES = 64


def configure(b: Builder, target: Target) -> None:
    """Set all eight tiles to 16 rows of 64 bytes. Once a thread, at the start of the function."""
    if not target.amx:
        return
    b.allocas.append(f"  %tileconfig = alloca [{_CONFIG_BYTES} x i8], align 64")
    config = Value(b, "%tileconfig", PTR)
    b.store(b.const(0, vec(I64, 8)), config, 64)
    b.store(b.const(1, I8), config)
    for tile in range(8):
        b.store(b.const(64, "i16"), b.at(config, 16 + 2 * tile))
        b.store(b.const(ROWS, I8), b.at(config, 48 + tile))
    b.call("void", "llvm.x86.ldtilecfg", config)


def release(b: Builder, target: Target) -> None:
    """Give the tile state back before returning, so that the thread's context is small again."""
    if target.amx:
        b.call("void", "llvm.x86.tilerelease")


class _Tiles:
    """Tile instructions, or their meaning."""

    def __init__(self, b: Builder, target: Target) -> None:
        self.b, self.native = b, target.amx
        if not self.native:
            name = "%tilefile"
            alloca = f"  {name} = alloca [{8 * _TILE_BYTES} x i8], align 64"
            if alloca not in b.allocas:
                b.allocas.append(alloca)
            self.file = Value(b, name, PTR)

    def _place(self, tile: int, row: Scalar) -> Value:
        return self.b.at(self.b.at(self.file, tile * _TILE_BYTES), row * 64)

    def zero(self, tile: int) -> None:
        b = self.b
        if self.native:
            b.emit(f"call void @llvm.x86.tilezero(i8 {tile})")
            b.declarations.add("declare void @llvm.x86.tilezero(i8 immarg)")
            return
        with b.loop(0, ROWS) as r:
            b.store(b.const(0.0, vec(FLOAT, LANES)), self._place(tile, r), 4)

    def load(self, tile: int, pointer: Value, stride: Scalar) -> None:
        self._move("tileloadd64", tile, pointer, stride)

    def store(self, tile: int, pointer: Value, stride: Scalar) -> None:
        self._move("tilestored64", tile, pointer, stride)

    def _move(self, instruction: str, tile: int, pointer: Value, stride: Scalar) -> None:
        b = self.b
        if self.native:
            wide = b.as_type(stride, I64)
            b.emit(f"call void @llvm.x86.{instruction}(i8 {tile}, ptr {pointer.name}, i64 {wide.name})")
            b.declarations.add(f"declare void @llvm.x86.{instruction}(i8 immarg, ptr, i64)")
            return
        words = vec(I32, LANES)
        with b.loop(0, ROWS) as r:
            memory, register = b.at(pointer, r * stride), self._place(tile, r)
            if instruction == "tileloadd64":
                b.store(b.load(words, memory, 4), register, 4)
            else:
                b.store(b.load(words, register, 4), memory, 4)

    def multiply_add(self, c: int, a: int, y: int) -> None:
        b = self.b
        if self.native:
            b.emit(f"call void @llvm.x86.tdpbf16ps(i8 {c}, i8 {a}, i8 {y})")
            b.declarations.add("declare void @llvm.x86.tdpbf16ps(i8 immarg, i8 immarg, i8 immarg)")
            return
        with b.loop(0, ROWS) as m:
            sums = b.var(vec(FLOAT, LANES), b.load(vec(FLOAT, LANES), self._place(c, m), 4))
            with b.loop(0, DEPTH) as k:
                word = b.load(I32, b.at(self._place(a, m), k * 4), 4)
                row = b.load(vec(I32, LANES), self._place(y, k), 4)
                for shift in (0, 16):
                    left, right = (
                        b.bitcast((x >> shift) << 16, vec(FLOAT, n)) for x, n in ((word, 1), (row, LANES))
                    )
                    sums.set(b.fma(b.splat(left, LANES), right, sums.get()))
            b.store(sums.get(), self._place(c, m), 4)


def product(
    b: Builder,
    target: Target,
    a: Matrix,
    y: Matrix,
    rows: Scalar,
    vectors: int,
    depth: Scalar,
    *,
    start: Start,
    finish: Finish,
) -> None:
    """As gemm.product; `depth` is a multiple of 16 words, and the operands are readable up to whole tiles."""
    unit = _Tiles(b, target)
    b.allocas.append(f"  %sums{b.count} = alloca [{4 * _TILE_BYTES} x i8], align 64")
    sums = Value(b, f"%sums{b.count}", PTR)
    last = rows if isinstance(rows, Value) else b.const(rows, I64)
    for first in range(0, vectors, 2):
        width = min(2, vectors - first)
        with b.loop(0, last, 2 * ROWS) as row:
            for c in range(4):
                unit.zero(c)
            with b.loop(0, depth, DEPTH) as k:
                for v in range(width):
                    unit.load(
                        6 + v, b.at(b.at(y.pointer, k * y.row_stride), (first + v) * 4 * LANES), y.row_stride
                    )
                for x in range(2):
                    place = b.at(b.at(a.pointer, (row + ROWS * x) * a.row_stride), k * a.column_stride)
                    unit.load(4 + x, place, a.row_stride)
                    for v in range(width):
                        unit.multiply_add(2 * x + v, 4 + x, 6 + v)
            for x in range(2):
                for v in range(width):
                    unit.store(2 * x + v, b.at(sums, (2 * x * ROWS + v) * 64), 128)
            count = b.min(b.const(2 * ROWS, I64), last - row)
            with b.loop(0, count) as r:
                for v in range(width):
                    value = b.load(vec(FLOAT, LANES), b.at(b.at(sums, r * 128), v * 64), 4)
                    finish(row + r, first + v, start(row + r, first + v) + value)
