"""The suite notices what is broken on purpose: in the question that a backend is asked, and in its
answers."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from anyflash.backends import registry
from anyflash.backends.base import Backend
from anyflash.contract.backends import present
from anyflash.contract.direct import view_of
from anyflash.contract.exact import by_tables, check, plain_cells
from anyflash.contract.run import run
from anyflash.contract.table import by_id
from anyflash.dispatch import plan
from anyflash.semantics.arrays import as_numpy
from anyflash.semantics.operands import Gradients, Operands, Results, Saved
from anyflash.semantics.problem import Problem

BACKEND = present()[0]


def in_mask(old: str, new: str) -> Callable[..., tuple[Problem, Operands]]:
    return in_program("mask", old, new)


def in_program(part: str, old: str, new: str) -> Callable[..., tuple[Problem, Operands]]:
    """Replace the first `old` in the text of a score or mask."""

    def alter(problem: Problem, operands: Operands) -> tuple[Problem, Operands]:
        text = getattr(problem.program, part)
        assert old in text, f"{old!r} is not in {text!r}: this mutant changes nothing"
        return with_program(problem, **{part: text.replace(old, new, 1)}), operands

    return alter


def with_program(problem: Problem, **changes: Any) -> Problem:
    return replace(problem, program=replace(problem.program, **changes))


def program(**changes: Any) -> Callable[..., tuple[Problem, Operands]]:
    return lambda problem, operands: (with_program(problem, **changes), operands)


def operand(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[..., tuple[Problem, Operands]]:
    """Give the backend a changed copy of one operand."""

    def alter(problem: Problem, operands: Operands) -> tuple[Problem, Operands]:
        array = np.ascontiguousarray(change(as_numpy(getattr(operands, name)).copy()))
        return problem, replace(operands, **{name: view_of(array)})

    return alter


def swapped_tables(problem: Problem, operands: Operands) -> tuple[Problem, Operands]:
    return problem, replace(operands, tables=operands.tables[::-1])


def next_seed(problem: Problem, operands: Operands) -> tuple[Problem, Operands]:
    return problem, replace(operands, seed=operands.seed + (1 << 33))


QUESTIONS = {
    "causal_strict": ("causal", in_mask("(le k q)", "(lt k q)")),
    "causal_one_more": ("causal", in_mask("(le k q)", "(le k (add q 1))")),
    "causal_reversed": ("causal", in_mask("(le k q)", "(le q k)")),
    "causal_top_left": ("gqa_causal", in_mask("(le k q)", "(le k row)")),
    "causal_dropped": ("causal", program(mask=None)),
    "window_left_strict": ("window", in_mask("(le (sub q 9) k)", "(lt (sub q 9) k)")),
    "window_left_wider": ("window", in_mask("(sub q 9)", "(sub q 10)")),
    "window_right_strict": ("window", in_mask("(le k (add q 4))", "(lt k (add q 4))")),
    "window_sides_swapped": ("window", program(mask="(and (le (sub q 4) k) (le k (add q 9)))")),
    "window_from_the_row": ("window", in_mask("(sub q 9)", "(sub row 9)")),
    "window_or": ("window", in_mask("(and", "(or")),
    "window_without_left": ("window", program(mask="(le k (add q 4))")),
    "documents_of_the_first": ("documents", in_mask(" batch ", " 0 ")),
    "documents_or_causal": ("documents", in_mask("(and", "(or")),
    "scale_dropped": ("plain", program(scale=1.0)),
    "scale_twice": ("head_dim_64", program(scale=1 / 64)),
    "scale_slightly": ("head_dim_64", program(scale=0.125 * (1 + 2**-12))),
    "softcap_dropped": ("softcap", program(score=None)),
    "softcap_without_factor": ("softcap", in_program("score", "(mul 2.0", "(mul 1.0")),
    "alibi_added": ("alibi", in_program("score", "(sub", "(add")),
    "alibi_of_the_row": ("alibi", in_program("score", "(sub q k)", "(sub row k)")),
    "alibi_of_the_first_head": ("alibi", in_program("score", "f head)", "f 0)")),
    "bias_subtracted": ("bias", in_program("score", "(add", "(sub")),
    "bias_one_key_on": ("bias", in_program("score", " k)", " (min (add k 1) 49))")),
    "dropout_other_seed": ("dropout", next_seed),
    "dropout_dropped": ("dropout", program(dropout_p=0.0)),
    "dropout_slightly_more": ("dropout", program(dropout_p=0.301)),
    "sinks_of_zero": ("sinks", operand("sinks", np.zeros_like)),
    "heads_reversed": ("gqa_causal", operand("k", lambda k: k[:, :, ::-1])),
    "sequence_starts_late": ("varlen", operand("cu_seqlens_k", lambda starts: np.maximum(starts - 1, 0))),
    "seqused_ignored": (
        "packed_spare",
        operand("seqused_k", lambda used: np.array([30, 40, 64], used.dtype)),
    ),
    "seqused_one_less": ("packed_spare", operand("seqused_k", lambda used: np.maximum(used - 1, 0))),
    "tables_swapped": ("mask_reach_by_batch", swapped_tables),
    "query_rounded": ("head_dim_64", operand("q", lambda q: q.astype(np.float16).astype(q.dtype))),
}


@pytest.mark.parametrize("name", QUESTIONS)
def test_another_question_is_noticed(name):
    case, alter = QUESTIONS[name]
    case = by_id(f"float32-{case}")
    assert not run(case, BACKEND).failures
    for direction in ("forward", "backward"):
        assert run(case, BACKEND, (direction,), alter).failures, f"{direction} passes with {name}"


@dataclass
class Broken:
    """A backend whose results are spoiled."""

    inner: Backend
    spoil_forward: Callable[[Operands, Results], None] | None = None
    spoil_backward: Callable[[Operands, Saved, Gradients], None] | None = None
    name: str = "broken"
    rank: int | None = None
    accepts: str = "memory"

    def available(self) -> None:
        return None

    def decline(self, *asked: Any) -> list[str]:
        return self.inner.decline(*asked)

    def configure(self, problem: Problem) -> Any:
        return self.inner.configure(problem)

    def forward(self, problem: Problem, config: Any, operands: Operands, results: Results) -> None:
        self.inner.forward(problem, config, operands, results)
        if self.spoil_forward is not None:
            self.spoil_forward(operands, results)

    def backward(
        self, problem: Problem, config: Any, operands: Operands, saved: Saved, grads: Gradients
    ) -> None:
        if self.spoil_backward is ignore_dlse:
            saved = replace(saved, dlse=None)
        self.inner.backward(problem, config, operands, saved, grads)
        if self.spoil_backward is not None:
            self.spoil_backward(operands, saved, grads)

    def explain(self, *asked: Any) -> dict[str, Any]:
        return {}


def write_after(view: Any) -> None:
    """Set the element behind the last one of a contiguous array to zero."""
    ctypes.memset(view.ptr + view.size * view.itemsize, 0, view.itemsize)


def write_before(view: Any) -> None:
    ctypes.memset(view.ptr - view.itemsize, 0, view.itemsize)


def ignore_dlse(operands: Operands, saved: Saved, grads: Gradients) -> None:
    """Done before the backward runs."""


_calls = iter(range(1_000_000))


def last_bit_of_every_other_call(operands: Operands, results: Results) -> None:
    bits = as_numpy(results.out).view(np.uint32)
    bits[0, 0, 0, 0] ^= next(_calls) & 1


def scaled(view: Any, factor: float) -> None:
    as_numpy(view)[...] *= factor


def unwritten(view: Any) -> None:
    """Put back what an output of the suite holds before it is written."""
    as_numpy(view).view(np.uint32)[..., -1] = 0x7FCA5A5A


FORWARDS = {
    "after_out": lambda o, r: write_after(r.out),
    "before_out": lambda o, r: write_before(r.out),
    "after_lse": lambda o, r: write_after(r.lse),
    "after_stats": lambda o, r: write_after(r.stats),
    "input_q": lambda o, r: scaled(replace(o.q, writable=True), 1.5),
    "column_missing": lambda o, r: unwritten(r.out),
    "lse_missing": lambda o, r: unwritten(r.lse),
    "out_a_little_large": lambda o, r: scaled(r.out, 1 + 2**-19),
    "one_element_wrong": lambda o, r: as_numpy(r.out).__setitem__((-1, -1, -1, -1), 0),
    "lse_in_base_two": lambda o, r: scaled(r.lse, np.log2(np.e)),
    "lse_of_no_key_is_inf": lambda o, r: as_numpy(r.lse).__setitem__(as_numpy(r.lse) == -np.inf, np.inf),
    "not_the_same_twice": last_bit_of_every_other_call,
}
BACKWARDS = {
    "after_dq": lambda o, s, g: write_after(g.dq),
    "before_dk": lambda o, s, g: write_before(g.dk),
    "after_dv": lambda o, s, g: write_after(g.dv),
    "after_table": lambda o, s, g: write_after(g.tables[0]),
    "input_dout": lambda o, s, g: scaled(replace(s.dout, writable=True), 1.5),
    "dk_missing": lambda o, s, g: unwritten(g.dk),
    "dq_without_scale": lambda o, s, g: scaled(g.dq, 4),
    "dv_a_little_small": lambda o, s, g: scaled(g.dv, 1 - 2**-18),
    "dk_of_one_head": lambda o, s, g: as_numpy(g.dk)[:, :, 0].fill(0),
    "table_twice": lambda o, s, g: scaled(g.tables[0], 2),
    "dlse_ignored": ignore_dlse,
    "last_key_forgotten": lambda o, s, g: as_numpy(g.dv)[:, -1].fill(0),
}


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Iterator[Broken]:
    inner = registry.entries()[BACKEND].backend
    assert inner is not None
    made = Broken(inner)
    monkeypatch.setitem(registry.entries(), "broken", registry.Entry("broken", made))
    plan.forget()
    yield made
    plan.forget()


CASE = "float32-bias"


def test_the_wrapped_backend_passes(broken):
    assert not run(by_id(CASE), "broken").failures


@pytest.mark.parametrize("name", FORWARDS)
def test_a_spoiled_forward_is_noticed(broken, name):
    broken.spoil_forward = FORWARDS[name]
    case = "float32-mask_few_rows" if "no_key" in name else CASE
    assert run(by_id(case), "broken", ("forward",)).failures


@pytest.mark.parametrize("name", BACKWARDS)
def test_a_spoiled_backward_is_noticed(broken, name):
    broken.spoil_backward = BACKWARDS[name]
    report = run(by_id(CASE), "broken", ("backward",))
    assert report.failures


@pytest.mark.parametrize("which", ["left", "right", "prefix"])
@pytest.mark.parametrize("by", [-1, 1])
def test_exact_sweep_notices_one_cell(which, by):
    """The cells are compared with bounds that are off by one in a single one of them."""
    cells = plain_cells(3, 2, 1)
    asked = replace(cells, **{which: getattr(cells, which).copy()})
    at = np.flatnonzero((cells.q_len == 9) & (cells.k_len == 9))[0]
    getattr(asked, which)[at] += by
    wrong = check(BACKEND, cells, lambda _: by_tables(asked))
    assert len(wrong) == 1
    assert wrong[0].startswith("9 queries, 9 keys")
