"""Dense tables, one tile at a time.

A bias or dense mask is read as table[.., row, k] with keys contiguous, while a tile's vectors run along the
queries. So before a tile's scores are touched, its piece of the table is read row by row and transposed once
into scratch [key, query]; its gradient goes the same way back. Costs two passes over block_q x block_k
numbers, where reading lane by lane would cost a load and an insert for each of them. Rows lie far apart, each
in pages of its own, so the machine does not see the next tile coming: it is asked for, row by row.

A load is staged where the indices `row` and `k` stand by themselves, the others are the same for the whole
tile, and the launch found the keys contiguous (`TableCode.staged`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from anyflash.kernels.llvm import layout
from anyflash.kernels.llvm.emit import MEMORY, Emitter
from anyflash.kernels.llvm.ir import BYTES, I8, I64, Builder, Value, Var, vec
from anyflash.kernels.llvm.loads import loads_of, staged_axes
from anyflash.semantics.expr import Expr
from anyflash.semantics.text import show

if TYPE_CHECKING:
    from anyflash.kernels.llvm.frame import Frame

_LINE = 64


@dataclass
class _Piece:
    """Equal loads (of different trees), and where their tile lies."""

    loads: list[Expr]
    place: Value
    axes: tuple[int, int]


class Staging:
    """The staged loads of one kernel. Reads them for a tile and hands their vectors to emitters."""

    def __init__(self, frame: Frame, *trees: Expr | None) -> None:
        self.frame, self.b = frame, frame.b
        size = frame.block_q * frame.spec.block_k * frame.size
        found: dict[str, _Piece] = {}
        for load in (x for tree in trees for x in loads_of(tree)):
            axes = staged_axes(load)
            if axes is not None and axes == frame.spec.tables[load.value].staged:
                if show(load) not in found:
                    found[show(load)] = _Piece([], frame.scratch(size), axes)
                found[show(load)].loads.append(load)
        self.pieces = list(found.values())
        self.rows = frame.scratch(size) if self.pieces else None
        self.width = frame.spec.block_k * frame.size

    def read(self, variables: dict[str, Value], row: Value, rows: Value, key: Value, keys: Value) -> None:
        """Bring the tile's pieces into scratch. What lies past `rows` or `keys` there means nothing."""
        frame, b = self.frame, self.b
        if self.rows is None:
            return
        for piece in self.pieces:
            table = frame.tables[piece.loads[0].value]
            memory = MEMORY[table.dtype]
            source = corner(frame, table.pointer, table.strides, piece, variables, row, key)
            row_stride = table.strides[piece.axes[0]]
            with b.loop(0, rows) as r:
                row_at = b.at(source, r * row_stride)
                fetch_next(b, row_at, frame.spec.block_k * BYTES[memory])
                copy_row(b, row_at, memory, b.at(self.rows, r * self.width), frame, keys)
            layout.transpose(
                b, self.rows, self.width, piece.place, frame.row, frame.spec.query_vectors,
                frame.spec.block_k, frame.element, frame.lanes,
            )  # fmt: skip

    def supply(self, emit: Emitter, j: Value, vector: int) -> None:
        """Let `emit` take the staged vectors of one key."""
        b, frame = self.b, self.frame
        for piece in self.pieces:
            place = b.at(b.at(piece.place, j * frame.row), vector * frame.step)
            value = b.load(frame.vector, place, frame.size)
            for load in piece.loads:
                emit.override(load, b.compare("ne", value, 0.0) if load.kind == "bool" else value)


class StagedGradient:
    """The way back: one tile of a table's gradient, gathered as [key, query] and added row by row."""

    def __init__(self, frame: Frame, slot: int, load: Expr) -> None:
        axes = staged_axes(load)
        assert axes is not None
        self.frame, self.b, self.slot, self.axes = frame, frame.b, slot, axes
        size = frame.block_q * frame.spec.block_k * frame.size
        self.piece = _Piece([load], frame.scratch(size), axes)
        self.rows = frame.scratch(size)

    def put(self, j: Value, vector: int, part: Value) -> None:
        b, frame = self.b, self.frame
        b.store(part, b.at(b.at(self.piece.place, j * frame.row), vector * frame.step), frame.size)

    def add(
        self, base: Var, variables: dict[str, Value], row: Value, rows: Value, key: Value, keys: Value
    ) -> None:
        """Add the tile to the gradient; elements outside the sequence are not touched."""
        frame, b = self.frame, self.b
        width = frame.spec.block_k * frame.size
        layout.transpose(
            b, self.piece.place, frame.row, self.rows, width, frame.spec.block_k // frame.lanes,
            frame.block_q, frame.element, frame.lanes,
        )  # fmt: skip
        rank = len(self.piece.loads[0].args)
        strides = tuple(frame.word(f"grad{self.slot}_stride{a}") for a in range(rank))
        target = corner(frame, base.get(), strides, self.piece, variables, row, key)
        with b.loop(0, rows) as r:
            out, part = b.at(target, r * strides[self.axes[0]]), b.at(self.rows, r * width)
            fetch_next(b, out, width)
            whole = keys / frame.lanes * frame.lanes
            with b.loop(0, whole, frame.lanes) as c:
                place = b.at(out, c * frame.size)
                value = b.load(frame.vector, b.at(part, c * frame.size), frame.size)
                b.store(b.load(frame.vector, place, frame.size) + value, place, frame.size)
            with b.loop(whole, keys) as c:
                place = b.at(out, c * frame.size)
                value = b.load(frame.element, b.at(part, c * frame.size), frame.size)
                b.store(b.load(frame.element, place, frame.size) + value, place, frame.size)


def corner(
    frame: Frame, base: Value, strides: tuple[Value, ...], piece: _Piece, variables: dict[str, Value], row:
    Value, key: Value,
) -> Value:  # fmt: skip
    """Address of a tile's first element in an array with the extents of the piece's table."""
    b, emit = frame.b, frame.emitter(variables)
    at = dict(zip(piece.axes, (row, key), strict=True))
    extents = frame.tables[piece.loads[0].value].extents
    for axis, (index, stride) in enumerate(zip(piece.loads[0].args, strides, strict=True)):
        if axis in at:
            where = at[axis]
        else:
            last = extents[axis] - 1
            where = b.max(b.const(0, I64), b.min(last, b.to_int(emit(index), I64)))
        base = b.at(base, where * stride)
    return base


def fetch_next(b: Builder, row: Value, size: int) -> None:
    """Ask for the `size` bytes that follow those of this tile."""
    for line in range(0, size, _LINE):
        b.prefetch(b.at(row, size + line))


def copy_row(b: Builder, source: Value, memory: str, target: Value, frame: Frame, keys: Value) -> None:
    """target[c] = source[c] as numbers, c < keys."""
    lanes, number = frame.lanes, frame.element

    def convert(value: Value) -> Value:
        return b.cast("uitofp", value, number) if memory == I8 else layout.convert(b, value, number)

    whole = keys / lanes * lanes
    with b.loop(0, whole, lanes) as c:
        value = b.load(vec(memory, lanes), b.at(source, c * BYTES[memory]))
        b.store(convert(value), b.at(target, c * frame.size), frame.size)
    with b.loop(whole, keys) as c:
        value = b.load(memory, b.at(source, c * BYTES[memory]))
        b.store(convert(value), b.at(target, c * frame.size), frame.size)
