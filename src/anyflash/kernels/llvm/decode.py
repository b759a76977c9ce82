"""Attention forward for few queries: one pass over K and V at the speed of memory.

    S[r, j] = scale * Q[r, :] . K[j, :]          head_dim along the lanes (see dots)
    P, m, l as in the forward, a row at a time   keys along the lanes
    O[r, d] = a O[r, d] + sum_j P[r, j] V[j, d]  head_dim along the lanes

K and V are read as they lie, in the user's dtype, where their rows are whole vectors.

A row r is one (query head of the group, query): all rows that read a key head are computed together, a
register tile of them at a time, so each key is read once for the whole group. With a query a lane, as in the
forward, most lanes would be idle here.

Keys are cut into splits of `SPLIT_KEYS`, so that one long sequence keeps several threads busy. A split leaves
(O, m, l) in shared memory; whichever thread ends a row group's last split adds them up, in the order of the
keys. The cuts depend on nothing but the positions, so a result depends neither on threads nor on what else is
in the batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from anyflash.core.dtypes import FLOATS8
from anyflash.kernels.llvm import layout, vmath
from anyflash.kernels.llvm.dots import KeyRows, row_products
from anyflash.kernels.llvm.frame import Frame, Sequence
from anyflash.kernels.llvm.gemm import Matrix, guarded_product, product
from anyflash.kernels.llvm.ir import BYTES, FLOAT, I32, I64, PTR, Builder, Scalar, Value
from anyflash.kernels.llvm.layout import ELEMENT, UserRows
from anyflash.kernels.llvm.spec import SPLIT_KEYS, Spec, partial_bytes
from anyflash.kernels.llvm.target import Target


def emit_decode(spec: Spec, target: Target) -> tuple[str, int, int]:
    """The function's IR, and the bytes of scratch that a thread needs: fixed, and for each block of keys."""
    b = Builder(spec.part)
    kernel = _Decode(b, spec, target)
    with b.forever() as done:
        kernel.task(b.atomic_increment(kernel.pointer("counter")), done)
    return b.text(), kernel.scratch_bytes, 0


@dataclass(frozen=True)
class _Rows:
    """What one task computes: the queries of one sequence that read one key head."""

    seq: Sequence
    kv_head: Value
    count: Value  # group * q_len
    group: Value

    def head(self, r: Value) -> Value:
        return self.kv_head * self.group + r / self.seq.q_len

    def query(self, r: Value) -> Value:
        return r % self.seq.q_len


class _Decode(Frame):
    def __init__(self, b: Builder, spec: Spec, target: Target) -> None:
        super().__init__(b, spec, target)
        rows, at_once, block_k = spec.decode_rows, spec.tile.rows, spec.block_k
        self.vectors = range(block_k // self.lanes)
        # 8-bit floats are made numbers tile by tile.
        self.stored = FLOAT if spec.dtype_kv in FLOATS8 else ELEMENT[spec.dtype_kv]
        self.width, self.width_v = self.dim * self.size, self.dim_v * self.size
        self.keys_row = block_k * self.size
        self.q_rows = self.scratch(rows * self.width)
        self.k_rows = self.scratch(block_k * self.dim * BYTES[self.stored])
        self.v_rows = self.scratch(block_k * self.dim_v * BYTES[self.stored])
        self.partial_sums = self.scratch(at_once * self.lanes * self.step)
        self.s = self.scratch(at_once * self.keys_row)
        # O, m, l of the rows, laid out as a split's partial result.
        self.o = self.scratch(partial_bytes(rows, self.dim_v, self.size))
        self.sums = self.scratch(rows * self.step)
        self.rescale = self.scratch(at_once * self.size)
        self.rows_static = rows
        self.rows_at_once = at_once

    def m_at(self, state: Value, r: Value) -> Value:
        return self.b.at(self.b.at(state, self.rows_static * self.width_v), r * self.size)

    def l_at(self, state: Value, r: Value) -> Value:
        return self.b.at(self.b.at(state, self.rows_static * (self.width_v + self.size)), r * self.size)

    def task(self, number: Value, done: str) -> None:
        b, splits = self.b, self.word("splits")
        b.leave_if(number >= self.word("num_tasks"), done)
        group = self.word("group")
        kv_heads = self.word("heads_q") / group
        index, split = number / splits, number % splits
        seq = self.sequence(index / kv_heads)
        first = split * SPLIT_KEYS
        rows = _Rows(seq, index % kv_heads, group * seq.q_len, group)
        mine = b.compare("gt", rows.count, 0) & b.compare("le", rows.count, self.rows_static)
        # The first split also answers for a sequence without keys.
        with b.when(mine & (b.compare("lt", first, seq.k_len) | b.compare("eq", split, 0))):
            self.begin(rows, split)
            last = b.min(first + SPLIT_KEYS, seq.k_len)
            with b.loop(first, last, self.spec.block_k) as key:
                keys = b.min(b.const(self.spec.block_k, I64), last - key)
                surely, possibly = self.rows_class(rows, key, keys)
                with b.when(possibly):
                    self.tile(rows, key, keys, surely, last)
            self.end_split(rows, index, number, split)

    def user_row(self, array: str, rows: _Rows, r: Value) -> UserRows:
        return self.rows(array, rows.seq.batch, rows.seq.q_start + rows.query(r), rows.head(r))

    def begin(self, rows: _Rows, split: Value) -> None:
        """Q, scaled; rows past the last are zero. The empty state, or the sink's in the first split."""
        b, spec = self.b, self.spec
        layout.zero(b, self.q_rows, self.rows_static * self.width, self.element, self.lanes)
        layout.zero(b, self.o, self.rows_static * self.width_v, self.element, self.lanes)
        layout.zero(b, self.sums, self.rows_static * self.step, self.element, self.lanes)
        factor = self.number("scale") * self.unit
        one = b.const(1, I64)
        with b.loop(0, rows.count) as r:
            layout.pack_rows(
                b, self.user_row("q", rows, r), b.at(self.q_rows, r * self.width), self.width, one, one,
                self.element, self.lanes, factor,
            )  # fmt: skip
            m = b.const(-math.inf, self.element)
            if spec.sinks:
                place = b.at(self.pointer("sinks"), rows.head(r) * self.word("sinks_stride"))
                sink = b.load(self.element, place)
                here = b.compare("eq", split, 0)
                m = b.select(here, sink * self.unit, m)
                counted = here & b.compare("ne", sink, -math.inf)
                l = b.select(counted, b.const(1.0, self.element), b.const(0.0, self.element))
                b.store(l, b.at(self.sums, r * self.step), self.size)
            b.store(m, self.m_at(self.o, r), self.size)

    def rows_class(self, rows: _Rows, key: Value, keys: Value) -> tuple[Value, Value]:
        first = rows.kv_head * rows.group
        return self.box_class(rows.seq, (first, first + rows.group - 1), (self.b.const(0, I64), rows.seq.q_len
        - 1),
                              (key, key + keys - 1))  # fmt: skip

    def tile(self, rows: _Rows, key: Value, keys: Value, surely: Value, last: Value) -> None:
        b, spec = self.b, self.spec
        partial = (surely ^ True) | b.compare("lt", keys, spec.block_k)
        k = self.keys_rows("k", rows, key, keys, self.k_rows)
        v = self.keys_rows("v", rows, key, keys, self.v_rows)
        if self.rows_static == self.rows_at_once:
            self.some_rows(rows, b.const(0, I64), key, k, v, partial, last)
            return
        # Many rows take longer to compute than a tile to arrive: nothing is asked for ahead.
        with b.loop(0, rows.count, self.rows_at_once) as first:
            self.some_rows(rows, first, key, k, v, partial, None)

    def some_rows(
        self,
        rows: _Rows,
        first: Value,
        key: Value,
        k: KeyRows,
        v: KeyRows,
        partial: Value,
        last: Value | None,
    ) -> None:
        """`rows_at_once` rows from `first` on against one tile. `last` is the end of the keys, where the next
        tile is to be asked for."""
        b, spec = self.b, self.spec

        def store(r: int, j: Value, x: Value) -> None:
            b.store(x, b.at(b.at(self.s, r * self.keys_row), j * self.size), self.size)

        def upcoming(j: Value) -> list[tuple[Value, Scalar, int]]:
            if last is None:
                return []
            token = rows.seq.k_start + b.min(key + (j + spec.block_k), last - 1)
            sources = [self.rows(array, rows.seq.batch, token, rows.kv_head) for array in ("k", "v")]
            return [(x.row(b, 0), x.row_stride, x.columns * BYTES[ELEMENT[x.dtype]]) for x in sources]

        row_products(
            b, KeyRows(b.at(self.q_rows, first * self.width), self.width, self.element), k, spec.block_k,
            self.dim, self.lanes, tile=spec.tile, spare=self.partial_sums, store=store, upcoming=upcoming,
        )  # fmt: skip
        with b.loop(0, b.min(rows.count - first, self.rows_at_once)) as r:
            b.choose(
                partial,
                lambda: self.softmax(rows, first, r, key, masked=True),
                lambda: self.softmax(rows, first, r, key, masked=False),
            )
        self.accumulate(first, v, partial)

    def keys_rows(self, array: str, rows: _Rows, key: Value, keys: Value, spare: Value) -> KeyRows:
        """A whole block of rows of k or v: in place where they can be read as vectors."""
        b = self.b
        source = self.rows(array, rows.seq.batch, rows.seq.k_start + key, rows.kv_head)
        stride = (self.dim if array == "k" else self.dim_v) * BYTES[self.stored]
        place, step = b.var(PTR, spare), b.var(I64, stride)

        def pack() -> None:
            layout.pack_rows(b, source, spare, stride, keys, self.spec.block_k, self.stored, self.lanes)

        if source.dense and source.columns % self.lanes == 0 and self.stored == ELEMENT[source.dtype]:

            def in_place() -> None:
                place.set(source.row(b, 0))
                step.set(source.row_stride)

            whole = b.compare("eq", keys, self.spec.block_k) & source.evenly(b, self.spec.block_k)
            b.choose(whole, in_place, pack)
        else:
            pack()
        return KeyRows(place.get(), step.get(), self.stored)

    def softmax(self, rows: _Rows, first: Value, at: Value, key: Value, masked: bool) -> None:
        """P of row first + at in place of S, its maximum, sum and the factor for what was accumulated."""
        b, seq, r = self.b, rows.seq, first + at
        scores: list[Value] = []
        for v in self.vectors:
            s = b.load(self.vector, b.at(b.at(self.s, at * self.keys_row), v * self.step), self.size)
            if self.score is not None or masked:
                keys = b.iota(I32, self.lanes) + (b.to_int(key, I32) + v * self.lanes)
                query = b.to_int(rows.query(r), I32)
                emit = self.emitter(
                    {
                        "batch": b.to_int(seq.batch, I32),
                        "head": b.to_int(rows.head(r), I32),
                        "row": query,
                        "q": query + b.to_int(seq.offset, I32),
                        "k": b.min(keys, b.to_int(seq.k_len, I32) - 1),
                        "q_len": b.to_int(seq.q_len, I32),
                        "k_len": b.to_int(seq.k_len, I32),
                        "score": s,
                    }
                )
                if self.score is not None:
                    s = b.splat(emit(self.score), self.lanes)
                if masked:
                    keep = b.compare("lt", keys, b.to_int(seq.k_len, I32))
                    keep = keep if self.mask is None else keep & b.splat(emit(self.mask), self.lanes)
                    s = b.select(keep, s, b.const(-math.inf, self.vector))
            scores.append(s)
        best = scores[0]
        for s in scores[1:]:
            best = b.max(s, best)
        old = b.load(self.element, self.m_at(self.o, r), self.size)
        m = b.max(b.reduce("max", best), old)
        b.store(m, self.m_at(self.o, r), self.size)
        pivot = b.splat(b.select(b.compare("eq", m, -math.inf), b.const(0.0, self.element), m), self.lanes)
        rescale = self.exp(b.splat(old, self.lanes) - pivot)
        b.store(b.lane(rescale, 0), b.at(self.rescale, at * self.size), self.size)
        place = b.at(self.sums, r * self.step)
        total = b.load(self.vector, place, self.size) * rescale
        for v, s in enumerate(scores):
            p = self.exp(s - pivot)
            total = total + p
            b.store(p, b.at(b.at(self.s, at * self.keys_row), v * self.step), self.size)
        b.store(total, place, self.size)

    def accumulate(self, first: Value, rows: KeyRows, partial: Value) -> None:
        """O = rescale * O + P V. Rows past the last hold what nobody reads."""
        b, spec = self.b, self.spec
        p = Matrix(self.s, self.keys_row, self.size)
        v = Matrix(rows.pointer, rows.stride, self.lanes * BYTES[self.stored], self.stored)
        vectors = self.dim_v // self.lanes
        o = b.at(self.o, first * self.width_v)

        def place(r: Scalar, vector: int) -> Value:
            return b.at(b.at(o, r * self.width_v), vector * self.step)

        def start(r: Scalar, vector: int) -> Value:
            factor = b.load(self.element, b.at(self.rescale, r * self.size), self.size)
            return b.load(self.vector, place(r, vector), self.size) * factor

        def finish(r: Scalar, vector: int, value: Value) -> None:
            b.store(value, place(r, vector), self.size)

        self.with_guard(
            lambda: product(
                b, self.form.dot, p, v, self.rows_at_once, vectors, spec.block_k, tile=spec.tile,
                start=start, finish=finish,
            ),
            lambda: guarded_product(
                b, self.form.dot, p, v, self.rows_at_once, vectors, spec.block_k, probability="a",
                start=start, finish=finish,
            ),
            lambda: self.rows_not_finite(rows),
            partial,
        )  # fmt: skip

    def rows_not_finite(self, rows: KeyRows) -> Value:
        b = self.b
        bad = b.var("i1", False)
        with b.loop(0, self.spec.block_k) as j:
            size = self.dim_v * BYTES[self.stored]
            clean = layout.all_finite(b, b.at(rows.pointer, j * rows.stride), size, self.stored, self.lanes)
            bad.set(bad.get() | (clean ^ True))
        return bad.get()

    def end_split(self, rows: _Rows, index: Value, number: Value, split: Value) -> None:
        b = self.b
        with b.loop(0, rows.count) as r:
            total = b.reduce("add", b.load(self.vector, b.at(self.sums, r * self.step), self.size))
            b.store(total, self.l_at(self.o, r), self.size)
        count = b.max(b.const(1, I64), (rows.seq.k_len + (SPLIT_KEYS - 1)) / SPLIT_KEYS)
        with b.when(b.compare("eq", count, 1)):
            self.finish(rows)
        with b.when(b.compare("gt", count, 1)):
            size = partial_bytes(self.rows_static, self.dim_v, self.size)
            shared = self.pointer("partials")
            mine = b.at(shared, number * size)
            with b.loop(0, size, self.size) as offset:
                b.store(b.load(self.element, b.at(self.o, offset), self.size), b.at(mine, offset), self.size)
            arrived = b.atomic_increment(b.at(self.pointer("arrivals"), index * 8), "acq_rel")
            with b.when(b.compare("eq", arrived, count - 1)):
                self.combine(rows, b.at(shared, (number - split) * size), count, size)
                self.finish(rows)

    def combine(self, rows: _Rows, first: Value, count: Value, size: int) -> None:
        """(O, m, l) of all splits in the order of the keys, into this thread's state."""
        b = self.b
        with b.loop(0, rows.count) as r:
            m, l = b.var(self.element, b.const(-math.inf, self.element)), b.var(self.element, 0.0)
            with b.loop(0, count) as i:
                part = b.at(first, i * size)
                m.set(b.max(b.load(self.element, self.m_at(part, r), self.size), m.get()))
            best = m.get()
            pivot = b.select(b.compare("eq", best, -math.inf), b.const(0.0, self.element), best)
            layout.zero(b, b.at(self.o, r * self.width_v), self.width_v, self.element, self.lanes)
            with b.loop(0, count) as i:
                part = b.at(first, i * size)
                weight = self.exp(
                    b.splat(b.load(self.element, self.m_at(part, r), self.size) - pivot, self.lanes)
                )
                part_l = b.load(self.element, self.l_at(part, r), self.size)
                l.set(b.fma(part_l, b.lane(weight, 0), l.get()))
                with b.loop(0, self.width_v, self.step) as offset:
                    place = b.at(b.at(self.o, r * self.width_v), offset)
                    theirs = b.load(self.vector, b.at(b.at(part, r * self.width_v), offset), self.size)
                    # A split without keys for this row has weight 0 and a finite O.
                    b.store(b.fma(theirs, weight, b.load(self.vector, place, self.size)), place, self.size)
            b.store(best, self.m_at(self.o, r), self.size)
            b.store(l.get(), self.l_at(self.o, r), self.size)

    def finish(self, rows: _Rows) -> None:
        b, zero, one = self.b, self.b.const(0.0, self.element), self.b.const(1.0, self.element)
        with b.loop(0, rows.count) as r:
            m, l = (b.load(self.element, at(self.o, r), self.size) for at in (self.m_at, self.l_at))
            none = b.compare("eq", l, 0.0)
            pivot = b.select(b.compare("eq", m, -math.inf), zero, m)
            log2_l = b.lane(vmath.log2(b, b.splat(l, self.lanes)), 0)
            lse = b.select(none, b.const(-math.inf, self.element), self.lse(pivot, log2_l))
            token, head = rows.seq.q_start + rows.query(r), rows.head(r)
            b.store(lse, self.row_scalar("lse", rows.seq.batch, head, token))
            stats = self.row_scalar("stats", rows.seq.batch, head, token)
            b.store(pivot, stats)
            b.store(
                b.select(none, b.const(math.inf, self.element), log2_l), b.at(stats, self.word("stats_plane"))
            )
            inverse = self.factored(b.select(none, zero, one / l), rows.seq, head)
            layout.unpack_rows(
                b, b.at(self.o, r * self.width_v), self.width_v, self.user_row("out", rows, r), b.const(1,
                I64), self.element, self.lanes, inverse,
            )  # fmt: skip
