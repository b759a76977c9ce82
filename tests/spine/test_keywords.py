"""Keyword arguments are short spellings of programs: each has the same text as the function it stands for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import anyflash as af
from anyflash.frontends.numpy_ import FRONTEND
from anyflash.semantics import text
from anyflash.semantics.describe import Described, describe_program
from anyflash.semantics.expr import At, Expr
from anyflash.semantics.problem import Program

Q_SHAPE, K_SHAPE = (2, 5, 4, 8), (2, 7, 2, 8)
SLOPES = np.linspace(0.5, 0.1, 4, dtype=np.float32)
BATCH_SLOPES = np.stack([SLOPES, SLOPES])
PAIR = np.zeros((1, 4, 5, 7), np.float32)
KEYS = np.zeros((2, 1, 1, 7), np.float64)
DENSE = np.ones((2, 1, 5, 7), bool)
ONE = np.ones((1, 1, 1, 1), np.float32)


def described(**keywords: Any) -> Described:
    return describe_program(Q_SHAPE, K_SHAPE, lambda _, array: FRONTEND.dtype(array), **keywords)


def softcapped(s: Expr) -> Expr:
    return 30.0 * af.tanh(s / 30.0)


def alibi(at: At) -> Expr:
    return af.table(SLOPES)[at.head] * abs(at.q - at.k)


def pair(at: At) -> Expr:
    return af.table(PAIR)[at.batch * 0, at.head, at.row, at.k]


SCORES: dict[str, tuple[dict[str, Any], Callable[[Expr, At], Any]]] = {
    "softcap": ({"softcap": 30}, lambda s, at: softcapped(s)),
    "alibi": ({"alibi_slopes": SLOPES}, lambda s, at: s - alibi(at)),
    "alibi per batch": (
        {"alibi_slopes": BATCH_SLOPES},
        lambda s, at: s - af.table(BATCH_SLOPES)[at.batch, at.head] * abs(at.q - at.k),
    ),
    "bias": ({"bias": PAIR}, lambda s, at: s + af.table(PAIR[0])[at.head, at.row, at.k]),
    "bias of few axes": ({"bias": PAIR[0, 0]}, lambda s, at: s + af.table(PAIR[0, 0])[at.row, at.k]),
    "one number": ({"bias": ONE}, lambda s, at: s + af.table(ONE.reshape(()))[()]),
    "two biases": (
        {"bias": [KEYS, PAIR]},
        lambda s, at: s + af.table(KEYS[:, 0, 0])[at.batch, at.k] + af.table(PAIR[0])[at.head, at.row, at.k],
    ),
    "fixed order": (
        {"bias": (KEYS,), "softcap": 30.0, "alibi_slopes": SLOPES, "score": lambda s, at: s * 2.0},
        lambda s, at: softcapped(s * 2.0) - alibi(at) + af.table(KEYS[:, 0, 0])[at.batch, at.k],
    ),
    "identity": ({}, lambda s, at: s),
    "a number": ({"score": lambda s, at: 3}, lambda s, at: 3.0),
    "numpy's number": ({"score": lambda s, at: s * np.float32(0.5)}, lambda s, at: s * 0.5),
}


@pytest.mark.parametrize("case", SCORES)
def test_score(case: str) -> None:
    keywords, function = SCORES[case]
    short, spelled = described(**keywords), described(score=function)
    assert short.program == spelled.program
    assert [table.shape for table in short.tables] == [table.shape for table in spelled.tables]
    assert all((a == b).all() for a, b in zip(short.tables, spelled.tables, strict=True))


MASKS: dict[str, tuple[dict[str, Any], Callable[[At], Any] | None]] = {
    "none": ({}, None),
    "always": ({"mask": lambda at: True}, None),
    "causal": ({"causal": True}, lambda at: at.k <= at.q),
    "window": ({"window": (3, 0)}, lambda at: (at.q - 3 <= at.k) & (at.k <= at.q + 0)),
    "left": ({"window": [2, None]}, lambda at: at.q - 2 <= at.k),
    "right": ({"window": (None, np.int64(1))}, lambda at: at.k <= at.q + 1),
    "unbounded": ({"window": (None, None)}, None),
    "masks.causal": ({"mask": af.masks.causal()}, lambda at: at.k <= at.q),
    "dense": ({"mask": DENSE}, lambda at: af.table(DENSE[:, 0])[at.batch, at.row, at.k]),
    "all": (
        {"causal": True, "window": (3, None), "mask": lambda at: at.head < 2},
        lambda at: (at.k <= at.q) & (at.q - 3 <= at.k) & (at.head < 2),
    ),
}


@pytest.mark.parametrize("case", MASKS)
def test_mask(case: str) -> None:
    keywords, function = MASKS[case]
    assert described(**keywords).program == described(mask=function).program


def test_defaults_are_no_program() -> None:
    assert described().program == str(Program())


def test_plain_values_travel() -> None:
    made = described(scale=np.float32(0.5), dropout_p=0.25, sinks=SLOPES, causal=np.True_)
    assert Program.parse(made.program) == Program(None, "(le k q)", 0.5, 0.25, True)


def test_slots_name_their_arguments() -> None:
    made = described(bias=[KEYS, PAIR], alibi_slopes=SLOPES, mask=DENSE)
    assert made.names == ("alibi_slopes", "bias[0]", "bias[1]", "mask")
    assert [table.shape for table in made.tables] == [(4,), (2, 7), (4, 5, 7), (2, 5, 7)]
    with_function = described(bias=KEYS, score=lambda s, at: s + af.table(SLOPES)[at.head])
    assert with_function.names == ("table 0", "bias")


def test_one_array_is_one_slot() -> None:
    table = af.table(SLOPES)
    made = described(score=lambda s, at: s * table[at.head] + table[at.head])
    assert len(made.tables) == 1
    assert made.tables[0] is SLOPES


def test_function_is_called_once_a_call() -> None:
    calls: list[At] = []

    def score(s: Expr, at: At) -> Expr:
        calls.append(at)
        return s + at.k

    q = np.ones(Q_SHAPE, np.float32)
    k = np.ones(K_SHAPE, np.float32)
    for count in (1, 2):
        af.attention(q, k, k, score=score, backend="reference")
        assert len(calls) == count


def test_own_errors_of_a_function_pass() -> None:
    def score(s: Expr, at: At) -> Expr:
        return s if at.q > at.k else -s

    with pytest.raises(TypeError, match=r"anyflash\.where"):
        described(score=score)


def test_cached_program_keeps_no_array() -> None:
    """Only shapes are remembered: a second array of the same shape is read itself."""
    other = PAIR + 1
    assert described(bias=PAIR).tables[0].base is PAIR
    assert described(bias=other).tables[0].base is other


def test_text_parses() -> None:
    program = Program.parse(described(bias=[KEYS, PAIR], softcap=3, mask=DENSE, causal=True).program)
    assert program.score is not None
    assert program.mask is not None
    for source in (program.score, program.mask):
        assert text.show(text.parse(source)) == source
    assert Program.parse(str(program)) == program
