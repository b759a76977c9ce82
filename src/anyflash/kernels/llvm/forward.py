"""Attention forward.

    S[j, i] = scale * K[j, :] . Q[i, :]          a tile, queries along the lanes
    S       = mask ? program(S) : -inf
    m'      = max(m, max_j S);  a = exp(m - m')
    P       = exp(S - m');  l = a l + sum_j P
    O[d, i] = a O[d, i] + sum_j V[j, d] P[j, i]
    out     = (O / l)^T;  lse = m + ln l

exp(x) is 2**(x log2 e). Without a score program the factor log2 e is part of the scale, and S and m are in
units of log2. With one they are as the program left them: a product could overflow where a program uses the
least finite number as a mask, and would round apart scores that are huge and near each other.

Layout, in each thread's scratch: Q^T [D, block_q], S [block_k, block_q], O^T [Dv, block_q], and rows of K and
V where the user's cannot be read as they lie. K and V are read by broadcast, so nothing is shuffled in the
inner loops and there is no horizontal step: each lane is one query from start to end.

Registers: see gemm. Keys are walked in blocks of block_k from first to last, and each query's arithmetic does
not depend on its block, so `query_vectors` and `tile` may change speed, never a bit; `block_k` changes
rounding.
"""

from __future__ import annotations

import math

from anyflash.kernels.llvm import layout, philox, tiles, vmath
from anyflash.kernels.llvm.frame import Frame, Sequence
from anyflash.kernels.llvm.gemm import Matrix
from anyflash.kernels.llvm.ir import I32, I64, Builder, Scalar, Value, Var
from anyflash.kernels.llvm.keys import Keys
from anyflash.kernels.llvm.spec import Spec
from anyflash.kernels.llvm.staging import Staging
from anyflash.kernels.llvm.target import Target

NAME = "forward"


def emit_forward(spec: Spec, target: Target) -> tuple[str, int, int]:
    """The function's IR, and the bytes of scratch that a thread needs: fixed, and for each block of keys."""
    b = Builder(NAME)
    kernel = _Forward(b, spec, target)
    if spec.dot == "tiles":
        tiles.configure(b, target)
    with b.forever() as done:
        kernel.task(b.atomic_increment(kernel.pointer("counter")), done)
    if spec.dot == "tiles":
        tiles.release(b, target)
    return b.text(), kernel.scratch_bytes, kernel.keys.ahead_bytes()


class _Forward(Frame):
    def __init__(self, b: Builder, spec: Spec, target: Target) -> None:
        super().__init__(b, spec, target)
        self.vectors = range(spec.query_vectors)
        form, dim, block_k = self.form, spec.head_dim, spec.block_k
        self.q_rows = self.scratch(self.block_q * max(form.row_bytes(dim), self.dim_v * self.size))
        self.q_t = self.scratch(form.depth(dim) * self.row)
        self.s = self.scratch(block_k * self.row)
        self.o_t = self.scratch(self.dim_v * self.row)
        self.keys = Keys(self, frozenset("v"))
        self.per_row = self.scratch(4 * self.row)  # 1 / l, lse, pivot, log2 l
        self.staging = Staging(self, self.score, self.mask)
        self.m = [b.var(self.vector) for _ in self.vectors]
        self.l = [b.var(self.vector) for _ in self.vectors]
        self.best = [b.var(self.vector) for _ in self.vectors]

        # What is made ahead lies behind everything of fixed size.
        self.ahead = b.at(self._scratch, self.scratch_bytes)

    def task(self, number: Value, done: str) -> None:
        b, blocks = self.b, self.word("num_q_blocks")
        b.leave_if(number >= self.word("num_tasks"), done)
        # The last block of a sequence first: under a causal mask it is the longest.
        block = blocks - 1 - number % blocks
        index = number / blocks
        head, batch = index % self.word("heads_q"), index / self.word("heads_q")
        seq = self.sequence(batch)
        row = block * self.block_q
        # Shorter sequences of a packed call are left to the decode.
        long_enough = b.compare("gt", seq.q_len * self.word("group"), self.word("decoded_rows"))
        with b.when((row < seq.q_len) & long_enough):
            rows = b.min(b.const(self.block_q, I64), seq.q_len - row)
            self.begin(seq, head, row, rows)
            self.keys.prepare(seq, head / self.word("group"), 0, seq.k_len, self.ahead)
            with b.loop(0, seq.k_len, self.spec.block_k) as key:
                keys = b.min(b.const(self.spec.block_k, I64), seq.k_len - key)
                surely, possibly = self.tile_class(seq, head, row, rows, key, keys)
                with b.when(possibly):
                    self.tile(seq, head, row, rows, key, keys, surely)
            self.finish(seq, head, row, rows)

    def begin(self, seq: Sequence, head: Value, row: Value, rows: Value) -> None:
        """Q^T, scaled; the empty softmax state, or that of the sink."""
        b = self.b
        source = self.rows("q", seq.batch, seq.q_start + row, head)
        scale = None if self.spec.dot != "number" else self.number("scale") * self.unit
        form = self.form
        layout.pack_rows(
            b, source, self.q_rows, form.row_bytes(source.columns), rows, self.block_q, form.row_element,
            form.row_lanes, scale,
        )  # fmt: skip
        self.q_columns = form.columns(self.q_rows, source.columns, self.q_t)
        layout.zero(b, self.o_t, self.dim_v * self.row, self.element, self.lanes)
        m: Value = b.const(-math.inf, self.element)
        l: Value = b.const(0.0, self.element)
        if self.spec.sinks:
            sink = b.load(self.element, b.at(self.pointer("sinks"), head * self.word("sinks_stride")))
            m = sink * self.unit
            l = b.select(
                b.compare("eq", sink, -math.inf), b.const(0.0, self.element), b.const(1.0, self.element)
            )
        for v in self.vectors:
            self.m[v].set(m)
            self.l[v].set(l)

    def tile(
        self, seq: Sequence, head: Value, row: Value, rows: Value, key: Value, keys: Value, surely: Value
    ) -> None:
        b = self.b
        whole = self.whole_keys(keys)
        kv_head = head / self.word("group")
        partial = (surely ^ True) | b.compare("lt", keys, whole)
        k, _ = self.keys.tile("k", seq, kv_head, 0, key, keys, whole)
        v_rows, v = self.keys.tile("v", seq, kv_head, 0, key, keys, whole)
        self.staging.read(self.variables(seq, head, row, 0), row, rows, key, keys)
        for best, m in zip(self.best, self.m, strict=True):
            best.set(m.get())

        # Rows in the pair form cannot hold the scale.
        factor = None if self.spec.dot == "number" else self.number("scale") * self.unit

        def store_score(j: Scalar, vector: int, s: Value) -> None:
            s = s if factor is None else s * factor
            if self.plain:
                self.best[vector].set(b.max(s, self.best[vector].get()))
            b.store(s, self.score_at(j, vector), self.size)

        self.form.product(
            self.form.dims_a(k, self.spec.head_dim), self.q_columns, whole, self.spec.query_vectors,
            self.form.depth(self.spec.head_dim), lambda j, v: b.const(0.0, self.vector), store_score,
        )  # fmt: skip
        if self.plain:
            with b.when(partial):
                for best, m in zip(self.best, self.m, strict=True):
                    best.set(m.get())
                self.programs(seq, head, row, key, whole, masked=True)
        else:
            b.choose(
                partial,
                lambda: self.programs(seq, head, row, key, whole, masked=True),
                lambda: self.programs(seq, head, row, key, whole, masked=False),
            )
        rescale = self.softmax(seq, head, row, key, whole)
        self.accumulate(v_rows, v, whole, rescale, partial)

    def score_at(self, j: Scalar, vector: int) -> Value:
        return self.b.at(self.b.at(self.s, j * self.row), vector * self.step)

    def programs(
        self, seq: Sequence, head: Value, row: Value, key: Value, whole: Value, masked: bool
    ) -> None:
        """The score program and the mask over the tile, and each query's maximum."""
        b = self.b
        fixed = [self.variables(seq, head, row, v) for v in self.vectors]

        def pair(j: Value, u: int) -> None:
            k = b.to_int(key + j, I32)
            for v in self.vectors:
                place = self.score_at(j, v)
                s = b.load(self.vector, place, self.size)
                emit = self.emitter({**fixed[v], "k": b.min(k, b.to_int(seq.k_len, I32) - 1), "score": s})
                self.staging.supply(emit, j, v)
                if self.score is not None:
                    s = b.splat(emit(self.score), self.lanes)
                if masked:
                    s = b.select(self.allowed(emit, seq, k, None), s, b.const(-math.inf, self.vector))
                self.best[v].set(b.max(s, self.best[v].get()))
                b.store(s, place, self.size)

        self.each_pair(whole, 1, pair)

    def softmax(self, seq: Sequence, head: Value, row: Value, key: Value, whole: Value) -> list[Value]:
        """P in place of S; returns the factor by which what was accumulated shrinks."""
        b = self.b
        pivots: list[Value] = []
        rescale: list[Value] = []
        sums: list[Var] = []
        for v in self.vectors:
            best, m = self.best[v].get(), self.m[v].get()
            pivot = b.select(b.compare("eq", best, -math.inf), b.const(0.0, self.vector), best)
            rescale.append(self.exp(m - pivot))
            self.m[v].set(best)
            pivots.append(pivot)
            sums.append(b.var(self.vector, b.const(0.0, self.vector)))
        words: dict[int, list[Value]] = {}
        together = self.form.keys_together
        waiting: dict[int, list[Value]] = {v: [] for v in self.vectors}

        def pair(j: Value, u: int) -> None:
            for v in self.vectors:
                p = self.exp(b.load(self.vector, self.score_at(j, v), self.size) - pivots[v])
                sums[v].set(sums[v].get() + p)
                if self.spec.dropout:
                    if u == 0:
                        words[v] = self.random(seq, head, row, key + j, v)
                    keep = philox.kept(b, words[v][u], b.to_int(self.word("drop_threshold"), I32))
                    p = b.select(keep, p, b.const(0.0, self.vector))
                waiting[v].append(p)
                if len(waiting[v]) == together:
                    self.form.put_b(self.s, j - (together - 1), v, waiting[v])
                    waiting[v] = []

        self.each_pair(whole, 4, pair)
        for v in self.vectors:
            self.l[v].set(b.fma(self.l[v].get(), rescale[v], sums[v].get()))
        return rescale

    def accumulate(
        self, v_rows: Value, v: Matrix, whole: Value, rescale: list[Value], partial: Value
    ) -> None:
        """O = rescale * O + V^T P."""
        b = self.b
        form, dim_v = self.form, self.spec.head_dim_v
        p, depth = form.keys_b(self.s), form.token_words(whole)

        def place(d: Scalar, vector: int) -> Value:
            return b.at(b.at(self.o_t, d * self.row), vector * self.step)

        def start(d: Scalar, vector: int) -> Value:
            return b.load(self.vector, place(d, vector), self.size) * rescale[vector]

        def finish(d: Scalar, vector: int, value: Value) -> None:
            b.store(value, place(d, vector), self.size)

        self.with_guard(
            lambda: form.product(v, p, dim_v, self.spec.query_vectors, depth, start, finish),
            lambda: form.guarded(v, p, dim_v, self.spec.query_vectors, depth, "y", start, finish),
            lambda: self.not_finite(v_rows, whole * form.row_bytes(dim_v)),
            partial,
        )

    def finish(self, seq: Sequence, head: Value, row: Value, rows: Value) -> None:
        b = self.b
        for v in self.vectors:
            m, l = self.m[v].get(), self.l[v].get()
            none = b.compare("eq", l, 0.0)
            inverse = b.select(none, b.const(0.0, self.vector), b.const(1.0, self.vector) / l)
            if self.spec.dropout:
                inverse = inverse * self.number("keep_scale")
            inverse = self.factored(inverse, seq, head)
            pivot = b.select(b.compare("eq", m, -math.inf), b.const(0.0, self.vector), m)
            log2_l = vmath.log2(b, l)
            lse = b.select(none, b.const(-math.inf, self.vector), self.lse(pivot, log2_l))
            log2_l = b.select(none, b.const(math.inf, self.vector), log2_l)
            for i, value in enumerate((inverse, lse, pivot, log2_l)):
                b.store(value, b.at(self.per_row, i * self.row + v * self.step), self.size)
        width = self.dim_v * self.size
        layout.transpose(
            b, self.o_t, self.row, self.q_rows, width, self.dim_v // self.lanes, self.block_q, self.element,
            self.lanes, self.per_row,
        )  # fmt: skip
        token = seq.q_start + row
        target = self.rows("out", seq.batch, token, head)
        layout.unpack_rows(b, self.q_rows, width, target, rows, self.element, self.lanes)
        lse = self.row_scalar("lse", seq.batch, head, token)
        stats = self.row_scalar("stats", seq.batch, head, token)
        with b.loop(0, rows) as r:
            for i, place in (
                (1, b.at(lse, r * self.word("lse_token"))),
                (2, b.at(stats, r * self.word("stats_token"))),
                (3, b.at(b.at(stats, r * self.word("stats_token")), self.word("stats_plane"))),
            ):
                value = b.load(self.element, b.at(b.at(self.per_row, i * self.row), r * self.size), self.size)
                b.store(value, place)
