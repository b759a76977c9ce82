"""Attention backward, by recomputing each tile's probabilities.

    delta   = sum_d dO[i, d] out[i, d] - dlse[i]
    S       as in the forward;   P = exp(S - m) / l
    dP      = V dO^T                             [block_k, block_q], as S
    dS      = P (dP - delta) * dprogram/dscore
    dV[j]  += P dO        dK[j] += dS (scale Q)  rows of keys, head_dim along the lanes
    dQ[d]  += K^T dS                             queries along the lanes, as O
    table  += dS' * dprogram/dload               at the load's index
    dsink   = -sum_i P_sink delta

One task walks a range of query blocks against a range of keys, for a range of batch entries and key heads,
its sums in order: query heads of the group, then query blocks, then keys. `backward` does all five products
in one walk; where there are too few heads for the threads, `backward_dq` (ranges of queries) and
`backward_dkv` (ranges of keys) share the work at the price of two products more. Each gradient is added up in
the same order either way, so a result depends neither on the ranges nor on the threads.

Scratch of a thread: Q and dO as rows and as columns, S, dP, dQ^T, packed K and V, and the sums dK and dV of
the range.
"""

from __future__ import annotations

import math

from anyflash.kernels.llvm import layout, philox, tiles, vmath
from anyflash.kernels.llvm.dots import KeyRows, columns_of_products
from anyflash.kernels.llvm.frame import Frame, Sequence
from anyflash.kernels.llvm.gemm import Matrix
from anyflash.kernels.llvm.ir import BYTES, I1, I32, I64, Builder, Scalar, Value, Var, vec
from anyflash.kernels.llvm.keys import Keys
from anyflash.kernels.llvm.scatter import Scatter
from anyflash.kernels.llvm.spec import DECODE_QUERIES, TASK_WORDS, RegisterTile, Spec
from anyflash.kernels.llvm.staging import Staging
from anyflash.kernels.llvm.target import Target
from anyflash.semantics.derivative import derivative


def emit_backward(spec: Spec, target: Target) -> tuple[str, int, int]:
    """The function's IR, and the bytes of scratch that a thread needs beside the sums of dK and dV: fixed,
    and for each block of keys."""
    b = Builder(spec.part)
    kernel = _Backward(b, spec, target)
    if spec.dot == "tiles":
        tiles.configure(b, target)
    with b.forever() as done:
        kernel.task(b.atomic_increment(kernel.pointer("counter")), done)
    if spec.dot == "tiles":
        tiles.release(b, target)
    return b.text(), kernel.scratch_bytes, kernel.keys.ahead_bytes()


class _Backward(Frame):
    def __init__(self, b: Builder, spec: Spec, target: Target) -> None:
        super().__init__(b, spec, target)
        self.vectors = range(spec.query_vectors)
        self.want_dq = spec.part in ("backward", "backward_dq")
        self.want_dkv = spec.part in ("backward", "backward_dkv")
        self.slope = None if self.score is None else derivative(self.score)
        self.width, self.width_v = self.dim * self.size, self.dim_v * self.size
        form, block_q, block_k = self.form, self.block_q, spec.block_k
        dim, dim_v = spec.head_dim, spec.head_dim_v
        self.q_rows = self.scratch(block_q * form.row_bytes(dim))
        self.do_rows = self.scratch(block_q * form.row_bytes(dim_v))
        self.q_t = self.scratch(form.depth(dim) * self.row)
        self.do_t = self.scratch(form.depth(dim_v) * self.row)
        self.q_pairs = self.scratch(form.token_bytes(block_q, dim))
        self.do_pairs = self.scratch(form.token_bytes(block_q, dim_v))
        self.dq_t = self.scratch(self.dim * self.row)
        self.s = self.scratch(block_k * self.row)
        self.ds = self.scratch(block_k * self.row)
        # dS again, for the product that contracts keys, where the two products read different layouts.
        self.ds_keys = self.scratch(block_k * self.row) if form.keys_together > 1 else self.ds
        self.keys = Keys(self, frozenset("k") if self.want_dq else frozenset())
        self.spare = self.scratch(block_q * max(self.width, self.width_v, form.row_bytes(dim_v)))
        self.m, self.log2_l, self.delta = (self.scratch(self.row) for _ in range(3))
        # A decoded sequence has DECODE_QUERIES queries at most.
        self.few = min(spec.decode_rows, DECODE_QUERIES)
        self.by_row = self.scratch(self.few * block_k * self.size)
        self.partial_sums = self.scratch(self.few * self.lanes * self.step)
        self.bad_q, self.bad_do = b.var(I1, False), b.var(I1, False)
        self.scatter = Scatter(self, spec) if self.want_dq else None
        slopes = [] if self.scatter is None else [term.slope for term in self.scatter.terms]
        self.staging = Staging(self, self.score, self.mask, self.slope, *slopes)
        # The sums of dK and dV lie behind everything of fixed size.
        self.dk_sums = b.at(self._scratch, self.scratch_bytes)
        self.dv_sums = b.at(self.dk_sums, self.word("acc_keys") * self.width)
        self.ahead = b.at(self.dv_sums, self.word("acc_keys") * self.width_v)

    def task(self, number: Value, done: str) -> None:
        b = self.b
        b.leave_if(number >= self.word("num_tasks"), done)
        record = b.at(self.pointer("tasks"), number * (8 * len(TASK_WORDS)))
        task = {name: b.load(I64, b.at(record, 8 * i), 8) for i, name in enumerate(TASK_WORDS)}
        if self.scatter is not None:
            self.scatter.begin(task["partial"])
        with b.loop(task["batch_begin"], task["batch_end"]) as batch:
            seq = self.sequence(batch)
            # Decoded sequences have a kernel of their own.
            compare = "le" if self.spec.decode_rows else "gt"
            with (
                b.when(b.compare(compare, seq.q_len * self.word("group"), self.word("decoded_rows"))),
                b.loop(task["head_begin"], task["head_end"]) as kv_head,
            ):
                self.walk(seq, kv_head, task)

    def walk(self, seq: Sequence, kv_head: Value, task: dict[str, Value]) -> None:
        """All queries of the range against all keys of the range, for the query heads of one key head."""
        b, group = self.b, self.word("group")
        blocks = (seq.q_len + (self.block_q - 1)) / self.block_q
        last_block = b.min(task["block_end"], blocks)
        key_end = b.min(task["key_end"], seq.k_len)
        keys = b.max(b.const(0, I64), key_end - task["key_begin"])
        if self.want_dkv:
            whole = self.whole_keys(keys)
            layout.zero(b, self.dk_sums, whole * self.width, self.element, self.lanes)
            layout.zero(b, self.dv_sums, whole * self.width_v, self.element, self.lanes)
        self.keys.prepare(seq, kv_head, task["key_begin"], key_end, self.ahead)
        with b.loop(0, group) as g:
            head = kv_head * group + g
            with b.loop(task["block_begin"], last_block) as block:
                row = block * self.block_q
                rows = b.min(b.const(self.block_q, I64), seq.q_len - row)
                self.begin(seq, head, row, rows, block)
                with b.loop(task["key_begin"], key_end, self.spec.block_k) as key:
                    count = b.min(b.const(self.spec.block_k, I64), key_end - key)
                    surely, possibly = self.tile_class(seq, head, row, rows, key, count)
                    with b.when(possibly):
                        self.tile(seq, head, kv_head, row, rows, key, count, surely, key - task["key_begin"])
                if self.want_dq:
                    self.finish_queries(seq, head, row, rows)
        if self.want_dkv:
            self.finish_keys(seq, kv_head, task["key_begin"], keys)

    def begin(self, seq: Sequence, head: Value, row: Value, rows: Value, block: Value) -> None:
        b, spec = self.b, self.spec
        token = seq.q_start + row
        form, block_q = self.form, self.block_q
        # As in the forward: the scale goes into Q where its rows can hold it.
        scale = self.number("scale") * self.unit if spec.dot == "number" else None
        made: list[tuple[Matrix, Matrix]] = []
        for name, dim, rows_at, columns_at, pairs_at, bad, factor in (
            ("q", spec.head_dim, self.q_rows, self.q_t, self.q_pairs, self.bad_q, scale),
            ("dout", spec.head_dim_v, self.do_rows, self.do_t, self.do_pairs, self.bad_do, None),
        ):
            stride = form.row_bytes(dim)
            layout.pack_rows(
                b, self.rows(name, seq.batch, token, head), rows_at, stride, rows, block_q, form.row_element,
                form.row_lanes, factor,
            )  # fmt: skip
            columns = form.columns(rows_at, dim, columns_at)
            made.append((columns, form.tokens_b(rows_at, dim, b.const(block_q, I64), pairs_at)))
            bad.set(self.not_finite(rows_at, block_q * stride))
        (self.q_columns, self.q_tokens), (self.do_columns, self.do_tokens) = made
        self.load_rows(seq, head, token, rows)
        if self.want_dq:
            layout.zero(b, self.dq_t, self.dim * self.row, self.element, self.lanes)
            if spec.sinks:
                self.sink_gradient(seq, head, block)

    def load_rows(self, seq: Sequence, head: Value, token: Value, rows: Value) -> None:
        """m, log2 l and delta of every row; past the end, a row whose probabilities are all 0."""
        b = self.b
        form = self.form
        source = self.rows("out", seq.batch, token, head)
        stride = form.row_bytes(source.columns)
        layout.pack_rows(b, source, self.spare, stride, rows, self.block_q, form.row_element, form.row_lanes)
        stored = vec(form.row_element, self.lanes)
        bytes_at_once = self.lanes * BYTES[form.row_element]
        for place, value in ((self.m, 0.0), (self.log2_l, math.inf), (self.delta, 0.0)):
            with b.loop(0, self.row, self.step) as offset:
                b.store(b.const(value, self.vector), b.at(place, offset), self.size)
        stats = self.row_scalar("stats", seq.batch, head, token)
        dlse = self.row_scalar("dlse", seq.batch, head, token) if self.spec.dlse else None
        with b.loop(0, rows) as r:
            at = b.at(stats, r * self.word("stats_token"))
            b.store(b.load(self.element, at), b.at(self.m, r * self.size), self.size)
            log2_l = b.load(self.element, b.at(at, self.word("stats_plane")))
            b.store(log2_l, b.at(self.log2_l, r * self.size), self.size)
            total = b.var(self.vector, b.const(0.0, self.vector))
            with b.loop(0, stride, bytes_at_once) as offset:
                out, dout = (
                    layout.convert(b, b.load(stored, b.at(b.at(x, r * stride), offset)), self.element)
                    for x in (self.spare, self.do_rows)
                )
                # A row that sees nothing has out 0, and then dout may be anything.
                dout = b.select(b.compare("eq", out, 0.0), b.const(0.0, self.vector), dout)
                total.set(b.fma(out, dout, total.get()))
            delta = b.reduce("add", total.get())
            if dlse is not None:
                delta = delta - b.load(self.element, b.at(dlse, r * self.word("dlse_token")))
            b.store(delta, b.at(self.delta, r * self.size), self.size)

    def per_row(self, place: Value, vector: int) -> Value:
        return self.b.load(self.vector, self.b.at(place, vector * self.step), self.size)

    def sink_gradient(self, seq: Sequence, head: Value, block: Value) -> None:
        """One partial sum a query block; the caller adds them up in order."""
        b = self.b
        sink = b.load(self.element, b.at(self.pointer("sinks"), head * self.word("sinks_stride"))) * self.unit
        total = b.const(0.0, self.vector)
        for v in self.vectors:
            p = self.exp(sink - self.per_row(self.m, v), self.per_row(self.log2_l, v))
            term = p * self.per_row(self.delta, v)
            total = total - b.select(b.compare("eq", p, 0.0), b.const(0.0, self.vector), term)
        index = (seq.batch * self.word("heads_q") + head) * self.word("num_q_blocks") + block
        b.store(b.reduce("add", total), b.at(self.pointer("dsinks"), index * self.size))

    def finish_queries(self, seq: Sequence, head: Value, row: Value, rows: Value) -> None:
        b = self.b
        layout.transpose(
            b, self.dq_t, self.row, self.spare, self.width, self.dim // self.lanes, self.block_q,
            self.element, self.lanes,
        )  # fmt: skip
        target = self.rows("dq", seq.batch, seq.q_start + row, head)
        layout.unpack_rows(
            b, self.spare, self.width, target, rows, self.element, self.lanes, self.number("scale")
        )

    def finish_keys(self, seq: Sequence, kv_head: Value, first: Value, keys: Value) -> None:
        # Where Q was packed with its scale, log2(e) is still to be taken out.
        if self.spec.dot == "number":
            factor = self.b.const(vmath.LN_2, self.element) if self.plain else None
        else:
            factor = self.number("scale")
        for name, sums, width, scale in (
            ("dk", self.dk_sums, self.width, factor),
            ("dv", self.dv_sums, self.width_v, None),
        ):
            target = self.rows(name, seq.batch, seq.k_start + first, kv_head)
            layout.unpack_rows(self.b, sums, width, target, keys, self.element, self.lanes, scale)

    def tile(
        self, seq: Sequence, head: Value, kv_head: Value, row: Value, rows: Value, key: Value, keys: Value,
        surely: Value, place: Value,
    ) -> None:  # fmt: skip
        b, spec = self.b, self.spec
        whole = self.whole_keys(keys)
        partial = (surely ^ True) | b.compare("lt", keys, whole) | b.compare("lt", rows, self.block_q)
        first = key - place
        k, k_words = self.keys.tile("k", seq, kv_head, first, key, keys, whole)
        v, _ = self.keys.tile("v", seq, kv_head, first, key, keys, whole)
        self.staging.read(self.variables(seq, head, row, 0), row, rows, key, keys)
        form = self.form
        factor = None if spec.dot == "number" else self.number("scale") * self.unit
        for source, dim, columns, target, scale in (
            (k, spec.head_dim, self.q_columns, self.s, factor),
            (v, spec.head_dim_v, self.do_columns, self.ds, None),
        ):

            def store(j: Scalar, vector: int, x: Value, t: Value = target, f: Value | None = scale) -> None:
                b.store(x if f is None else x * f, self.at(t, j, vector), self.size)

            if spec.decode_rows and target is self.s:
                self.decoded_scores(k, whole)
                continue

            form.product(
                form.dims_a(source, dim), columns, whole, spec.query_vectors, form.depth(dim),
                lambda j, vector: b.const(0.0, self.vector), store,
            )  # fmt: skip
        if self.scatter is not None:
            self.scatter.begin_tile()
        b.choose(
            partial,
            lambda: self.probabilities(seq, head, row, rows, key, whole, masked=True),
            lambda: self.probabilities(seq, head, row, rows, key, whole, masked=False),
        )
        if self.scatter is not None:
            self.scatter.finish_tile(self.variables(seq, head, row, 0), row, rows, key, keys)
        if self.want_dkv:
            for left, right, width, sums, bad in (
                (self.s, self.do_tokens, self.width_v, self.dv_sums, self.bad_do),
                (self.ds, self.q_tokens, self.width, self.dk_sums, self.bad_q),
            ):
                self.add_keys(left, right, width, b.at(sums, place * width), whole, bad, partial)
        if self.want_dq:
            self.add_queries(k, k_words, whole, partial)

    def decoded_scores(self, k: Value, whole: Value) -> None:
        """S of the few rows of a decode, bit for bit as it formed them; of all other rows, 0."""
        tile = RegisterTile(self.few, 1, self.spec.tile.accumulators)
        layout.zero(self.b, self.s, whole * self.row, self.element, self.lanes)
        columns_of_products(
            self.b, KeyRows(self.q_rows, self.width, self.element),
            KeyRows(k, self.width, self.element), whole, self.dim, self.lanes, tile=tile,
            spare=self.partial_sums, by_row=self.by_row, target=self.s,
            target_stride=self.row, rows=min(tile.rows, self.block_q),
        )  # fmt: skip

    def at(self, matrix: Value, j: Scalar, vector: int) -> Value:
        return self.b.at(self.b.at(matrix, j * self.row), vector * self.step)

    def probabilities(
        self, seq: Sequence, head: Value, row: Value, rows: Value, key: Value, whole: Value, masked: bool
    ) -> None:
        """P in place of S (dropped where dropout drops), dS in place of dP; gradients of tables."""
        b = self.b
        fixed = [self.variables(seq, head, row, v) for v in self.vectors]
        words: dict[int, list[Value]] = {}
        zero = b.const(0.0, self.vector)
        together = self.form.keys_together
        waiting: dict[int, list[tuple[Value, Value]]] = {v: [] for v in self.vectors}

        def valid_rows(v: int) -> Value:
            lanes = b.iota(I64, self.lanes) + v * self.lanes
            return b.compare("lt", lanes, rows)

        def pair(j: Value, u: int) -> None:
            k = b.to_int(key + j, I32)
            emitters = []
            grads = []
            for v in self.vectors:
                s, dp = (b.load(self.vector, self.at(x, j, v), self.size) for x in (self.s, self.ds))
                emit = self.emitter({**fixed[v], "k": b.min(k, b.to_int(seq.k_len, I32) - 1), "score": s})
                self.staging.supply(emit, j, v)
                if self.score is not None:
                    s = b.splat(emit(self.score), self.lanes)
                live = self.allowed(emit, seq, k, valid_rows(v)) if masked else None
                p = self.exp(s - self.per_row(self.m, v), self.per_row(self.log2_l, v))
                if self.hides:
                    # Hidden, or as good as: there the slope may be infinite.
                    visible = b.compare("ne", p, 0.0)
                    live = visible if live is None else live & visible
                kept_p = p
                if self.spec.dropout:
                    if u == 0:
                        words[v] = self.random(seq, head, row, key + j, v)
                    keep = philox.kept(b, words[v][u], b.to_int(self.word("drop_threshold"), I32))
                    factor = b.select(keep, b.splat(self.number("keep_scale"), self.lanes), zero)
                    kept_p, dp = p * factor, b.select(keep, dp * factor, zero)
                ds = p * (dp - self.per_row(self.delta, v))
                if live is not None:
                    kept_p, ds = b.select(live, kept_p, zero), b.select(live, ds, zero)
                emitters.append(emit)
                grads.append((ds, live))
                if self.slope is not None:
                    through = ds * b.splat(emit(self.slope), self.lanes)
                    ds = through if live is None else b.select(live, through, zero)
                waiting[v].append((kept_p, ds))
                if len(waiting[v]) == together:
                    self.put(j - (together - 1), v, waiting[v])
                    waiting[v] = []
            if self.scatter is not None:
                self.scatter.add(j, emitters, grads)

        self.each_pair(whole, 4 if self.spec.dropout else together, pair)

    def put(self, key: Value, vector: int, values: list[tuple[Value, Value]]) -> None:
        """P and dS of neighbouring keys, as the products read them."""
        p, ds = [x for x, _ in values], [x for _, x in values]
        if self.want_dkv:
            self.form.put_a(self.s, key, vector, p)
            self.form.put_a(self.ds, key, vector, ds)
        if self.want_dq and (self.ds_keys is not self.ds or not self.want_dkv):
            self.form.put_b(self.ds_keys, key, vector, ds)

    def add_keys(
        self, left: Value, right: Matrix, width: int, sums: Value, whole: Value, bad: Var, partial: Value
    ) -> None:
        """sums[j] += sum_i left[j, i] * right[i]: rows of dK or dV."""
        b, form, vectors = self.b, self.form, width // self.step
        a, depth = form.queries_a(left), form.token_words(self.block_q)

        def place(j: Scalar, vector: int) -> Value:
            return b.at(b.at(sums, j * width), vector * self.step)

        def start(j: Scalar, vector: int) -> Value:
            return b.load(self.vector, place(j, vector), self.size)

        def finish(j: Scalar, vector: int, value: Value) -> None:
            b.store(value, place(j, vector), self.size)

        self.with_guard(
            lambda: form.product(a, right, whole, vectors, depth, start, finish),
            lambda: form.guarded(a, right, whole, vectors, depth, "a", start, finish),
            bad.get,
            partial,
        )

    def add_queries(self, k_rows: Value, a: Matrix, whole: Value, partial: Value) -> None:
        """dQ^T += K^T dS."""
        b, form, dim, vectors = self.b, self.form, self.spec.head_dim, self.spec.query_vectors
        y, depth = form.keys_b(self.ds_keys), form.token_words(whole)

        def start(d: Scalar, vector: int) -> Value:
            return b.load(self.vector, self.at(self.dq_t, d, vector), self.size)

        def finish(d: Scalar, vector: int, value: Value) -> None:
            b.store(value, self.at(self.dq_t, d, vector), self.size)

        self.with_guard(
            lambda: form.product(a, y, dim, vectors, depth, start, finish),
            lambda: form.guarded(a, y, dim, vectors, depth, "y", start, finish),
            lambda: self.not_finite(k_rows, whole * form.row_bytes(dim)),
            partial,
        )
