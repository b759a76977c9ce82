"""Blocks of K and V as the products read them.

A product wants packed rows (see layout) or words of tokens (see form). Where the user's rows already look so
they are read in place. Everything else is made once a key head, ahead of its first query block, if several
query blocks will read it (`Spec.ahead`), and otherwise anew for each tile. What is made ahead lies behind the
scratch of fixed size, block after block: O(Tk x D) a thread.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from anyflash.kernels.llvm import layout
from anyflash.kernels.llvm.gemm import Matrix
from anyflash.kernels.llvm.ir import I64, PTR, Scalar, Value

if TYPE_CHECKING:
    from anyflash.kernels.llvm.frame import Frame, Sequence


@dataclass(frozen=True)
class _Array:
    """k or v: its dim, spare room for one block's rows and words, and where its blocks made ahead begin."""

    name: str
    dim: int
    rows: Value
    words: Value
    row_bytes: int
    word_bytes: int


class Keys:
    """`words` names the arrays that are contracted over tokens as well."""

    def __init__(self, frame: Frame, words: frozenset[str]) -> None:
        self.frame, self.b, self.form = frame, frame.b, frame.form
        self.block = frame.spec.block_k
        self.arrays: dict[str, _Array] = {}
        for name, dim in (("k", frame.spec.head_dim), ("v", frame.spec.head_dim_v)):
            rows = self.block * self.form.row_bytes(dim)
            made = self.form.token_bytes(self.block, dim) if name in words else 0
            self.arrays[name] = _Array(name, dim, frame.scratch(rows), frame.scratch(made), rows, made)
        self.last = self.b.var(I64, -1)
        self.area = self.b.var(PTR)

    def ahead_bytes(self) -> int:
        """Bytes of one block of what is made ahead."""
        return sum(
            a.row_bytes + a.word_bytes for a in self.arrays.values() if a.name in self.frame.spec.ahead
        )

    def prepare(self, seq: Sequence, head: Value, first: Scalar, last: Value, area: Value) -> None:
        """Make the blocks of keys first .. last ahead, unless this thread's last call was for the same."""
        b, frame = self.b, self.frame
        if not frame.spec.ahead:
            return
        self.area.set(area)
        kv_heads = frame.word("heads_q") / frame.word("group")
        start = b.as_type(first, I64)
        tag = ((seq.batch * kv_heads + head) << 40) + start
        with b.when(b.compare("ne", tag, self.last.get())):
            self.last.set(tag)
            with b.loop(start, last, self.block) as key:
                keys = b.min(b.const(self.block, I64), last - key)
                whole = frame.whole_keys(keys)
                for array in (self.arrays[name] for name in sorted(frame.spec.ahead)):
                    rows, words = self._places(array, (key - start) / self.block)
                    source = frame.rows(array.name, seq.batch, seq.k_start + key, head)
                    layout.pack_rows(
                        b, source, rows, self.form.row_bytes(array.dim), keys, whole, self.form.row_element,
                        self.form.row_lanes,
                    )  # fmt: skip
                    if array.word_bytes:
                        self.form.make_tokens_a(rows, array.dim, whole, words)

    def _places(self, array: _Array, index: Value) -> tuple[Value, Value]:
        """Where a block's rows and words are when made ahead."""
        offset = index * self.ahead_bytes()
        for name in sorted(self.frame.spec.ahead):
            if name == array.name:
                break
            offset = offset + (self.arrays[name].row_bytes + self.arrays[name].word_bytes)
        rows = self.b.at(self.area.get(), offset)
        return rows, self.b.at(rows, array.row_bytes)

    def tile(
        self, name: str, seq: Sequence, head: Value, first: Scalar, key: Value, keys: Value, whole: Value
    ) -> tuple[Value, Matrix]:
        """(packed rows, A[dim, word of tokens]) of one block; `first` as given to `prepare`."""
        array, form = self.arrays[name], self.form
        if name in self.frame.spec.ahead:
            rows, words = self._places(array, (key - first) / self.block)
        else:
            rows, words = self._rows(array, seq, head, key, keys, whole), array.words
            if array.word_bytes:
                form.make_tokens_a(rows, array.dim, whole, words)
        return rows, form.tokens_a(rows, array.dim, words)

    def _rows(
        self, array: _Array, seq: Sequence, head: Value, key: Value, keys: Value, whole: Value
    ) -> Value:
        """In place where that reads nothing past the last key, else packed."""
        b, form = self.b, self.form
        source = self.frame.rows(array.name, seq.batch, seq.k_start + key, head)
        stride = form.row_bytes(array.dim)

        def pack() -> None:
            layout.pack_rows(b, source, array.rows, stride, keys, whole, form.row_element, form.row_lanes)

        if not source.dense or not form.same_memory(source.dtype, source.columns):
            pack()
            return array.rows
        place = b.var(PTR, source.row(b, 0))
        in_place = b.compare("eq", source.row_stride, stride) & b.compare("eq", keys, whole)
        in_place = in_place & source.evenly(b, whole)
        with b.when(in_place ^ True):
            pack()
            place.set(array.rows)
        return place.get()
