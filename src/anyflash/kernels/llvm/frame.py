"""What forward and backward share: arguments, scratch, sequences, tables, and one tile's scores.

Vocabulary of every kernel here: a *query block* is `block_q` queries, one SIMD lane each; a *tile* is a query
block against `block_k` keys. Scratch matrices are transposed, keys or head_dim outside and queries along the
lanes: S[key, query], O[dim, query].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from anyflash.kernels.llvm import philox, vmath
from anyflash.kernels.llvm.bounds import Instructions
from anyflash.kernels.llvm.emit import Emitter, TableAccess
from anyflash.kernels.llvm.form import Form, PairForm
from anyflash.kernels.llvm.ir import BYTES, DOUBLE, FLOAT, I1, I32, I64, PTR, Builder, Scalar, Value, vec
from anyflash.kernels.llvm.layout import Pages, UserRows, padded
from anyflash.kernels.llvm.spec import Spec, argument_names
from anyflash.kernels.llvm.target import Target
from anyflash.semantics.expr import Expr, walk
from anyflash.semantics.interval import Interval, bound
from anyflash.semantics.text import parse

ALIGN = 64


@dataclass(frozen=True)
class Sequence:
    """Where one batch entry's tokens lie, and how many there are."""

    batch: Value
    q_start: Value
    q_len: Value
    k_start: Value
    k_len: Value
    offset: Value  # k_len - q_len: the position of query row 0


class Frame:
    """The state of one emitted function."""

    def __init__(self, b: Builder, spec: Spec, target: Target) -> None:
        self.b, self.spec, self.target = b, spec, target
        self.element = DOUBLE if spec.dtype == "float64" else FLOAT
        self.size = BYTES[self.element]
        self.lanes = target.vector_bytes // self.size
        self.vector = vec(self.element, self.lanes)
        self.step = self.lanes * self.size
        self.block_q = spec.query_vectors * self.lanes
        self.row = self.block_q * self.size  # bytes of one row of a transposed scratch matrix
        common = b, self.element, self.lanes, self.row, spec.tile
        self.form = (
            Form(*common)
            if spec.dot == "number"
            else PairForm(*common, target=target, tiled=spec.dot == "tiles")
        )
        self.dim = padded(spec.head_dim, self.lanes)
        self.dim_v = padded(spec.head_dim_v, self.lanes)
        self.score = parse(spec.score) if spec.score else None
        self.mask = parse(spec.mask) if spec.mask else None
        self.factor = parse(spec.factor) if spec.factor else None
        self.hides = hides_pairs(self.score)
        # Without a program the products give S in units of log2.
        self.plain = self.score is None
        self.unit = vmath.LOG2_E if self.plain else 1.0
        names = argument_names(spec)
        self._word = {name: b.load(I64, b.at(b.parameters["args"], 8 * i), 8) for i, name in enumerate(names)}
        self.scratch_bytes = 0
        own = b.load(I64, b.at(self.pointer("scratch"), b.parameters["thread"] * 8), 8)
        self._scratch = b.cast("inttoptr", own, PTR)
        self.tables = tuple(self._table(i) for i in range(len(spec.tables)))

    def word(self, name: str) -> Value:
        return self._word[name]

    def pointer(self, name: str) -> Value:
        return self.b.cast("inttoptr", self.word(name), PTR)

    def number(self, name: str) -> Value:
        """A double argument in the accumulator's type."""
        return self.b.to_float(self.b.bitcast(self.word(name), DOUBLE), self.element)

    def scratch(self, size: int) -> Value:
        """`size` bytes of this thread's scratch, aligned."""
        place = self.b.at(self._scratch, self.scratch_bytes)
        self.scratch_bytes += -(-size // ALIGN) * ALIGN
        return place

    def _table(self, i: int) -> TableAccess:
        table = self.spec.tables[i]
        return TableAccess(
            self.pointer(f"table{i}"),
            table.dtype,
            tuple(self.word(f"table{i}_stride{a}") for a in range(table.rank)),
            tuple(self.word(f"table{i}_extent{a}") for a in range(table.rank)),
        )

    def sequence(self, batch: Value) -> Sequence:
        record = self.b.at(self.pointer("sequences"), batch * 32)
        q_start, q_len, k_start, k_len = (self.b.load(I64, self.b.at(record, 8 * i), 8) for i in range(4))
        return Sequence(batch, q_start, q_len, k_start, k_len, k_len - q_len)

    def rows(self, array: str, batch: Value, token: Value, head: Value) -> UserRows:
        """Rows of q, k, v, out or a gradient from `token` on."""
        offset = head * self.word(f"{array}_head")
        pages = None
        if self.spec.paged and array in ("k", "v"):
            table = self.b.at(self.pointer("block_table"), batch * self.word("block_table_stride"))
            pages = Pages(table, self.word("page_size"), self.word(f"{array}_batch"), token)
        else:
            offset = offset + batch * self.word(f"{array}_batch") + token * self.word(f"{array}_token")
        columns = self.spec.head_dim if array in ("q", "k", "dq", "dk") else self.spec.head_dim_v
        dtype = {"k": self.spec.dtype_kv, "v": self.spec.dtype_kv, "out": self.spec.dtype_out}.get(array)
        return UserRows(
            self.b.at(self.pointer(array), offset),
            self.word(f"{array}_token"),
            self.word(f"{array}_dim"),
            dtype or self.spec.dtype,
            columns,
            array in self.spec.dense,
            pages,
        )

    def row_scalar(self, array: str, batch: Value, head: Value, token: Value) -> Value:
        """Address of one row's number in lse, stats or dlse."""
        offset = batch * self.word(f"{array}_batch") + head * self.word(f"{array}_head")
        return self.b.at(self.pointer(array), offset + token * self.word(f"{array}_token"))

    def whole_keys(self, keys: Value) -> Value:
        """`keys` rounded up to what the products take."""
        granule = max(self.form.key_granule, self.lanes) if self.spec.decode_rows else self.form.key_granule
        return (keys + (granule - 1)) / granule * granule

    def tile_class(
        self, seq: Sequence, head: Value, row: Value, rows: Value, key: Value, keys: Value
    ) -> Interval[Value]:
        """(every pair of the tile is allowed, some pair may be) for `rows` x `keys` valid pairs."""
        return self.box_class(seq, (head, head), (row, row + rows - 1), (key, key + keys - 1))

    def box_class(
        self, seq: Sequence, heads: Interval[Value], rows: Interval[Value], keys: Interval[Value]
    ) -> Interval[Value]:
        """The same for inclusive ranges."""
        b = self.b
        if self.mask is None:
            return b.const(True, "i1"), b.const(True, "i1")
        env = {
            "batch": (seq.batch, seq.batch),
            "head": heads,
            "row": rows,
            "q": (rows[0] + seq.offset, rows[1] + seq.offset),
            "k": keys,
            "q_len": (seq.q_len, seq.q_len),
            "k_len": (seq.k_len, seq.k_len),
        }
        return bound(self.mask, env, Instructions(b), self._load_bounds)

    def _load_bounds(self, node: Expr, index: tuple[Interval[Value], ...]) -> Interval[Value] | None:
        """Bounds of a table over at most two of its blocks along the bounded axis, at points of the
        others."""
        b, slot = self.b, node.value
        axis = self.spec.tables[slot].bounded_axis
        if axis is None:
            return self._entry(node, index)
        algebra = Instructions(b)
        access = self.tables[slot]
        offset = b.const(0, I64)
        known = b.const(True, "i1")
        for a, (low, high) in enumerate(index):
            last = access.extents[a] - 1
            low, high = (b.max(b.const(0, I64), b.min(last, x)) for x in (low, high))
            if a != axis:
                known = known & b.compare("eq", low, high)
                offset = offset + low * self.word(f"bounds{slot}_stride{a}")
        low, high = (
            b.max(b.const(0, I64), b.min(access.extents[axis] - 1, x)) / self.spec.bounds_block
            for x in index[axis]
        )
        known = known & b.compare("le", high - low, 1)
        stride = self.word(f"bounds{slot}_stride{axis}")
        base = b.at(self.pointer(f"bounds{slot}"), offset)
        pairs = [b.at(base, block * stride) for block in (low, b.min(high, low + 1))]
        lows = [b.load(I64, p, 8) for p in pairs]
        highs = [b.load(I64, b.at(p, 8), 8) for p in pairs]
        least, most = b.min(*lows), b.max(*highs)
        if node.kind == "bool":
            surely, possibly = b.compare("ne", least, 0), b.compare("ne", most, 0)
            return surely & known, possibly | (known ^ True)
        unknown = algebra.limits("int")
        return b.select(known, least, unknown[0]), b.select(known, most, unknown[1])

    def _entry(self, node: Expr, index: tuple[Interval[Value], ...]) -> Interval[Value] | None:
        """The entry itself where the whole tile reads one, such as a length by batch entry."""
        b = self.b
        if node.kind == "float":
            return None
        known = b.const(True, "i1")
        for low, high in index:
            known = known & b.compare("eq", low, high)
        value = self.tables[node.value].load(b, [low for low, _ in index], self.element)
        if node.kind == "bool":
            return value & known, value | (known ^ True)
        value, (low, high) = b.to_int(value, I64), Instructions(b).limits("int")
        return b.select(known, value, low), b.select(known, value, high)

    def variables(self, seq: Sequence, head: Value, row: Value, vector: int) -> dict[str, Value]:
        """The expression variables for the queries of one vector; `k` and `score` are added by the caller.

        Rows past the end stand for the last row, so that every table load stays inside.
        """
        b = self.b

        def narrow(x: Value) -> Value:
            return b.to_int(x, I32)

        first = narrow(row) + vector * self.lanes
        rows = b.iota(I32, self.lanes) + first
        rows = b.min(rows, narrow(seq.q_len) - 1)
        return {
            "batch": narrow(seq.batch),
            "head": narrow(head),
            "row": rows,
            "q": rows + narrow(seq.offset),
            "q_len": narrow(seq.q_len),
            "k_len": narrow(seq.k_len),
        }

    def emitter(self, variables: dict[str, Value]) -> Emitter:
        return Emitter(self.b, self.element, variables, self.tables)

    def allowed(self, emit: Emitter, seq: Sequence, key: Value, valid_rows: Value | None) -> Value:
        """The mask of one vector of pairs: the program's mask and what lies inside the sequence."""
        b = self.b
        inside = b.compare("lt", key, b.to_int(seq.k_len, I32))
        keep = b.splat(inside, self.lanes)
        if valid_rows is not None:
            keep = keep & valid_rows
        return keep if self.mask is None else keep & emit(self.mask)

    def each_pair(self, keys: Value, unroll: int, body: Callable[[Value, int], None]) -> None:
        """body(key, u) for every key of the tile, `unroll` at a time; u counts within the group."""
        with self.b.loop(0, keys, unroll) as j:
            for u in range(unroll):
                body(j + u if u else j, u)

    def random(self, seq: Sequence, head: Value, row: Value, key: Value, vector: int) -> list[Value]:
        """Dropout words of keys key .. key + 3 (key divisible by 4) for the queries of one vector."""
        b = self.b
        rows = b.iota(I32, self.lanes) + (b.to_int(row, I32) + vector * self.lanes)
        group, head, batch = (b.to_int(x, I32) for x in (key >> 2, head, seq.batch))
        seed = b.to_int(self.word("seed_low"), I32), b.to_int(self.word("seed_high"), I32)
        return philox.words(b, group, rows, head, batch, seed)

    def with_guard(
        self,
        fast: Callable[[], None],
        guarded: Callable[[], None],
        suspect: Callable[[], Value],
        partial: Value,
    ) -> None:
        """The fast product, unless a mask meets values that are not finite: 0 * NaN must not be added.

        `suspect()` emits the test of the values; it runs only where a score may be masked.
        """
        b = self.b
        guard = b.var(I1, False)
        with b.when(b.const(True, I1) if self.hides else partial):
            guard.set(suspect())
        b.choose(guard.get(), guarded, fast)

    def not_finite(self, rows: Value, size: Scalar) -> Value:
        return self.form.finite(rows, size) ^ True

    def factored(self, inverse: Value, seq: Sequence, head: Value) -> Value:
        """The reciprocal of a row's sum, times the program's factor of out."""
        if self.factor is None:
            return inverse
        emit = self.emitter({"batch": self.b.to_int(seq.batch, I32), "head": self.b.to_int(head, I32)})
        return inverse * emit(self.factor)

    def lse(self, m: Value, log2_l: Value) -> Value:
        """Of a row, from its maximum in the unit of scores."""
        return (m + log2_l) * vmath.LN_2 if self.plain else self.b.fma(log2_l, vmath.LN_2, m)

    def exp(self, x: Value, log2_l: Value | None = None) -> Value:
        """exp(x) of softmax for `x` in the unit of scores, divided by l.

        A degree less than full accuracy is below the rounding of the sum.
        """
        if log2_l is None:
            x = x if self.plain else x * vmath.LOG2_E
        else:
            x = x - log2_l if self.plain else self.b.fma(x, vmath.LOG2_E, self.b.negate(log2_l))
        return vmath.exp2(self.b, x, 5 if self.element == FLOAT else None)


def hides_pairs(score: Expr | None) -> bool:
    """Whether a score may become -inf, and so be masked, by a constant, by what a table holds, or by a
    function that leaves the finite numbers."""
    found: list[Expr] = []

    def visit(e: Expr) -> None:
        if e.op in ("load", "log", "div", "exp") or (e.op == "const" and e.value in (math.inf, -math.inf)):
            found.append(e)

    if score is not None:
        walk(score, visit)
    return bool(found)
