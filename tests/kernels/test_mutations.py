"""The comparisons of this folder notice when an emitter does something else than it should.

Each mutation breaks one step; the results must then differ from the truth by more than they may. The unbroken
kernel passes the same case.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest

from anyflash.kernels.llvm import (
    backward,
    decode,
    dots,
    emit,
    engine,
    form,
    forward,
    frame,
    gemm,
    keys,
    launch,
    layout,
    philox,
    scatter,
    vmath,
)
from anyflash.kernels.llvm.ir import Builder, Value
from anyflash.kernels.llvm.spec import Spec
from anyflash.kernels.llvm.target import Target
from anyflash.semantics import expr as ex
from kernels.cases import Array, Case, Program
from kernels.functions import usable
from kernels.programs import BATCH, HEADS, KEYS, PROGRAMS, QUERIES
from kernels.run import check, ratios, run

pytestmark = pytest.mark.skipif(not usable("avx512bf16"), reason="needs AVX512-BF16, to break its pairs too")


def hidden(rng: np.random.Generator) -> dict[str, Any]:
    return {"score": lambda s, at: ex.where((at.k != 3) & (at.row != 3), s, -np.inf)}


def with_nan(arrays: dict[str, Array]) -> None:
    for name, place in (("k", 3), ("v", 3), ("q", 3), ("dout", 3)):
        arrays[name][:, place] = np.nan


def a_case(name: str, **options: Any) -> Case:
    shape: dict[str, Any] = {"dims": (24, 19), "heads": (HEADS, 2), "batch": BATCH, "lens": (QUERIES, KEYS)}
    program: Program = PROGRAMS.get(name, hidden)
    return Case(name, **(shape | {"program": program} | options))


CASES: dict[str, Case] = {
    **{n: a_case(n) for n in ("causal", "documents", "dropout", "sinks", "softcap")},
    **{n: a_case(n) for n in ("two loads", "relative bias", "alibi")},
    # Enough blocks of queries for K and V to be made ahead.
    "long": a_case("causal", lens=(300, KEYS)),
    "hidden": a_case("hidden", edit=with_nan),
    "pairs": a_case("causal", dtype="bfloat16"),
    "pairs hidden": a_case("hidden", dtype="bfloat16", edit=with_nan),
    "decode": a_case("causal", dims=(32, 16), heads=(4, 2), lens=(2, 1300)),
}


Make = Callable[[], Any]
"""Gives the context manager within which kernels are emitted wrong."""


def replaced(owner: Any, name: str, new: Callable[[Any], Any]) -> Make:
    """`owner.name` replaced by `new(owner.name)`."""
    return lambda: mock.patch.object(owner, name, new(getattr(owner, name)))


def spec_with(**changes: Any) -> Make:
    """Kernels emitted for another Spec than the launch asks for."""
    emitted = launch.emitted

    def other(spec: Spec, target: Target) -> str:
        found = {n: new(getattr(spec, n)) for n, new in changes.items()}
        return emitted(dataclasses.replace(spec, **found), target)

    return lambda: mock.patch.object(launch, "emitted", other)


def no_rescale(whole: Any) -> Any:
    def softmax(self: Any, *arguments: Any) -> list[Value]:
        return [self.b.const(1.0, x.type) for x in whole(self, *arguments)]

    return softmax


def whole_vector(whole: Any) -> Any:
    return lambda b, type_, pointer, count: b.load(type_, pointer)


def swapped(whole: Any) -> Any:
    def transposed(b: Any, rows: list[Value]) -> list[Value]:
        first, second, *rest = whole(b, rows)
        return [second, first, *rest]

    return transposed


def turned(whole: Any) -> Any:
    return lambda b, vectors: whole(b, [*vectors[1:], vectors[0]])


def no_delta(whole: Any) -> Any:
    def per_row(self: Any, place: Value, vector: int) -> Value:
        value = whole(self, place, vector)
        return self.b.const(0.0, value.type) if place is self.delta else value

    return per_row


def unguarded(whole: Any) -> Any:
    return lambda self, fast, guarded, suspect, partial: fast()


def other_counter(whole: Any) -> Any:
    return lambda b, group, rows, head, batch, key: whole(b, group, rows, batch, head, key)


def late_words(whole: Any) -> Any:
    return lambda self, seq, head, row, key, vector: whole(self, seq, head, row, key + 4, vector)


def signed(whole: Any) -> Any:
    return lambda b, word, threshold: b.compare("ge", word, b.splat(threshold, 16))


def one_less(whole: Any) -> Any:
    """The last element of each axis is never reached."""

    def offset(self: Any, b: Builder, index: list[Value]) -> Value:
        short = dataclasses.replace(self, extents=tuple(x - 1 for x in self.extents))
        return whole(short, b, index)

    return offset


def top_left(whole: Any) -> Any:
    def sequence(self: Any, batch: Value) -> Any:
        found = whole(self, batch)
        return dataclasses.replace(found, offset=self.b.const(0, "i64") + found.q_len * 0)

    return sequence


def never_partial(whole: Any) -> Any:
    def box_class(self: Any, *box: Any) -> Any:
        _, possibly = whole(self, *box)
        return possibly, possibly

    return box_class


def partial_is_empty(whole: Any) -> Any:
    def box_class(self: Any, *box: Any) -> Any:
        surely, _ = whole(self, *box)
        return surely, surely

    return box_class


def words_swapped(whole: Any) -> Any:
    return lambda self, matrix, key, vector, values: whole(self, matrix, key, vector, values[::-1])


def first_head_only(whole: Any) -> Any:
    """Blocks made ahead are taken for those of every head."""

    def prepare(self: Any, seq: Any, head: Value, *rest: Any) -> None:
        whole(self, seq, head * 0, *rest)

    return prepare


def guard_of_fast(whole: Any) -> Any:
    return lambda b, dot, a, y, guard_a, acc: dot.multiply_add(b, a, y, acc)


def no_greatest(whole: Any) -> Any:
    def block_bounds(table: Any, axis: int, block: int) -> Any:
        found = whole(table, axis, block)
        found[..., 1] = found[..., 0]
        return found

    return block_bounds


def nothing(whole: Any) -> Any:
    return lambda *arguments: None


def constant_slope(whole: Any) -> Any:
    return lambda score: ex.const(1.0)


def constant_slopes(whole: Any) -> Any:
    return lambda score, slot: [(ex.const(1.0), index) for _, index in whole(score, slot)]


def other_lane(whole: Any) -> Any:
    """The first lane is added where the second belongs, and the other way round."""

    def offset(self: Any, term: Any, emitter: Any) -> Value:
        offsets = whole(self, term, emitter)
        if offsets.type == "i64":
            return offsets
        return self.b.shuffle(offsets, offsets, [1, 0, *range(2, self.frame.lanes)])

    return offset


def one_word_less(whole: Any) -> Any:
    return lambda self, dim: whole(self, dim) - 1


def without_log(whole: Any) -> Any:
    return lambda self, m, log2_l: whole(self, m, log2_l * 0.0)


def lower_degree(whole: Any) -> Any:
    return lambda b, x, degree=None: whole(b, x, 4)


# what is broken: (case, how)
MUTATIONS: dict[str, tuple[str, Make]] = {
    "what was accumulated is not rescaled": ("causal", replaced(forward._Forward, "softmax", no_rescale)),
    "the mask is strict": ("causal", spec_with(mask=lambda m: m.replace("(le k q)", "(lt k q)"))),
    "columns past the end are not zeroed": ("causal", replaced(layout, "load_first", whole_vector)),
    "a transposition swaps two lanes": ("causal", replaced(layout, "transposed", swapped)),
    "delta is forgotten": ("causal", replaced(backward._Backward, "per_row", no_delta)),
    "dlse is forgotten": ("causal", spec_with(dlse=lambda _: False)),
    "queries stand at the top left": ("causal", replaced(frame.Frame, "sequence", top_left)),
    "partial tiles are not masked": ("causal", replaced(frame.Frame, "box_class", never_partial)),
    "partial tiles are skipped": ("causal", replaced(frame.Frame, "box_class", partial_is_empty)),
    "bounds miss the greatest element": ("documents", replaced(launch, "block_bounds", no_greatest)),
    "lse lacks the logarithm": ("causal", replaced(frame.Frame, "lse", without_log)),
    "a polynomial of lower degree": ("causal", replaced(vmath, "exp2", lower_degree)),
    "blocks of another head": ("long", replaced(keys.Keys, "prepare", first_head_only)),
    "no guard": ("hidden", replaced(frame.Frame, "with_guard", unguarded)),
    "no guard of pairs": ("pairs hidden", replaced(frame.Frame, "with_guard", unguarded)),
    "a guard that lets pass": ("hidden", replaced(gemm, "_guarded", guard_of_fast)),
    "a guard of pairs that lets pass": ("pairs hidden", replaced(gemm, "_guarded", guard_of_fast)),
    "a score of -inf is no mask": ("hidden", replaced(frame, "hides_pairs", lambda _: lambda s: False)),
    "another counter of random words": ("dropout", replaced(philox, "words", other_counter)),
    "one round less": ("dropout", lambda: mock.patch.object(philox, "ROUNDS", 6)),
    "words of other keys": ("dropout", replaced(frame.Frame, "random", late_words)),
    "kept by a signed comparison": ("dropout", replaced(philox, "kept", signed)),
    "sinks are not counted": ("sinks", spec_with(sinks=lambda _: False)),
    "the slope of a score is 1": ("softcap", replaced(backward, "derivative", constant_slope)),
    "the slope of a table is 1": ("two loads", replaced(scatter, "table_derivatives", constant_slopes)),
    "lanes added in each other's place": ("relative bias", replaced(scatter.Scatter, "_offset", other_lane)),
    "sums of a tile are not begun anew": ("alibi", replaced(scatter.Scatter, "begin_tile", nothing)),
    "a table ends too early": ("relative bias", replaced(emit.TableAccess, "offset", one_less)),
    "pairs in the wrong order": ("pairs", replaced(form.PairForm, "put_b", words_swapped)),
    "keys of dS in the wrong order": ("pairs", replaced(form.PairForm, "put_a", words_swapped)),
    "a word less of head_dim": ("pairs", replaced(form.PairForm, "depth", one_word_less)),
    "scores of neighbouring keys": ("decode", replaced(dots, "sums_of_lanes", turned)),
    "splits are not combined": ("decode", replaced(decode._Decode, "combine", nothing)),
}


def compiled_apart(spec: Spec, target: Target) -> launch.Code:
    """As launch.compiled, but found again by the text: what is broken has the key of the real kernel."""
    kernel = engine.compile_module(launch.emitted(spec, target), target, None, [spec.part, *launch.SIZES])
    return launch.Code(kernel.addresses[spec.part], *(kernel.integer(size) for size in launch.SIZES))


def target_of(name: str) -> str:
    return "avx512bf16" if name.startswith("pairs") else "avx512"


@pytest.mark.parametrize("name", CASES)
def test_unbroken(name: str) -> None:
    check(CASES[name], target_of(name), backward=name != "decode")


@pytest.mark.parametrize("broken", MUTATIONS)
def test_noticed(broken: str) -> None:
    name, make = MUTATIONS[broken]
    case, target = CASES[name], target_of(name)
    with mock.patch.object(launch, "compiled", compiled_apart), make():
        got = run(case, target, backward=name != "decode")
    assert not all(value <= 1 for value in ratios(case, target, got).values())
