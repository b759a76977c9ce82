"""Gradients of tables: what each pair adds to the element that its score read.

How often an element is met decides how it is added up. An index that no query or key enters (a slope per
head) gathers a vector over the whole tile and is reduced once; one that only the key enters, once a key; a
dense table takes the tile as a whole (see staging); any other adds lane by lane, in the order of the lanes.
All orders are fixed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from anyflash.kernels.llvm.emit import Emitter
from anyflash.kernels.llvm.ir import I64, PTR, Value, Var
from anyflash.kernels.llvm.spec import Spec
from anyflash.kernels.llvm.staging import StagedGradient, staged_axes
from anyflash.semantics.derivative import table_derivatives
from anyflash.semantics.expr import Expr, walk

if TYPE_CHECKING:
    from anyflash.kernels.llvm.frame import Frame


@dataclass
class _Term:
    """One load whose table wants a gradient. `total` sums over a tile where the index is the same for all of
    it."""

    slot: int
    slope: Expr
    index: tuple[Expr, ...]
    variables: frozenset[str]
    total: Var | None = None
    offset: Var | None = None
    staged: StagedGradient | None = None


class Scatter:
    def __init__(self, frame: Frame, spec: Spec) -> None:
        self.frame, self.b = frame, frame.b
        self.terms: list[_Term] = []
        for slot, table in enumerate(spec.tables):
            if table.gradient and frame.score is not None:
                for slope, index in table_derivatives(frame.score, slot):
                    self.terms.append(_Term(slot, slope, index, _variables(index)))
        for term in self.terms:
            load = Expr("load", term.index, term.slot, "float")
            if spec.tables[term.slot].staged and staged_axes(load) == spec.tables[term.slot].staged:
                term.staged = StagedGradient(frame, term.slot, load)
            elif not term.variables & {"row", "q", "k", "score"}:
                term.total, term.offset = self.b.var(frame.vector), self.b.var(I64)
        self.bases = {t.slot: self.b.var(PTR) for t in self.terms}

    def begin(self, partial: Value) -> None:
        for slot, base in self.bases.items():
            base.set(
                self.b.at(self.frame.pointer(f"grad{slot}"), partial * self.frame.word(f"grad{slot}_partial"))
            )

    def begin_tile(self) -> None:
        for term in self.terms:
            if term.total is not None:
                term.total.set(0.0)

    def add(self, j: Value, emitters: list[Emitter], grads: list[tuple[Value, Value | None]]) -> None:
        """One key against all vectors of queries: `grads` are (dL / d final score, allowed or None)."""
        b, frame = self.b, self.frame
        zero = b.const(0.0, frame.vector)
        for term in self.terms:
            parts: list[tuple[Value, Value]] = []
            for v, (emit, (ds, live)) in enumerate(zip(emitters, grads, strict=True)):
                part = ds * b.splat(emit(term.slope), frame.lanes)
                if live is not None:
                    part = b.select(live, part, zero)
                if term.staged is not None:
                    term.staged.put(j, v, part)
                else:
                    parts.append((self._offset(term, emit), part))
            if not parts:
                continue
            if parts[0][0].type == I64:
                total = parts[0][1]
                for _, part in parts[1:]:
                    total = total + part
                if term.total is not None and term.offset is not None:
                    term.total.set(term.total.get() + total)
                    term.offset.set(parts[0][0])
                else:
                    self._add_to(term.slot, parts[0][0], b.reduce("add", total))
            else:
                for offsets, part in parts:
                    for lane in range(frame.lanes):
                        self._add_to(term.slot, b.lane(offsets, lane), b.lane(part, lane))

    def finish_tile(
        self, variables: dict[str, Value], row: Value, rows: Value, key: Value, keys: Value
    ) -> None:
        """`variables` are those of the tile's first queries."""
        for term in self.terms:
            if term.staged is not None:
                term.staged.add(self.bases[term.slot], variables, row, rows, key, keys)
            if term.total is not None and term.offset is not None:
                self._add_to(term.slot, term.offset.get(), self.b.reduce("add", term.total.get()))

    def _offset(self, term: _Term, emit: Emitter) -> Value:
        """Byte offset in the gradient, which has the table's extents and strides of its own."""
        rank = len(term.index)
        strides = tuple(self.frame.word(f"grad{term.slot}_stride{a}") for a in range(rank))
        access = self.frame.tables[term.slot]
        return type(access)(access.pointer, access.dtype, strides, access.extents).offset(
            self.b, [emit(e) for e in term.index]
        )

    def _add_to(self, slot: int, offset: Value, amount: Value) -> None:
        b = self.b
        place = b.at(self.bases[slot].get(), offset)
        b.store(b.load(self.frame.element, place, self.frame.size) + amount, place, self.frame.size)


def _variables(exprs: tuple[Expr, ...]) -> frozenset[str]:
    names: set[str] = set()
    for expr in exprs:
        walk(expr, lambda e: names.add(e.value) if e.op == "var" else None)
    return frozenset(names)
