"""What a case must give: the exact results, and how far plain attention is from them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from anyflash.contract.arithmetic import Arithmetic, accumulator, exact, plain
from anyflash.contract.cases import Case
from anyflash.contract.plain import Answer, Formula, attend
from anyflash.contract.poison import numpy_dtype
from anyflash.contract.values import Values, lse_shape, per_row, sequence, spans, token
from anyflash.core.dtypes import result

FORWARD = ("out", "lse")
ROUNDED = ("out", "dq", "dk", "dv")


@dataclass(frozen=True, slots=True)
class Truth:
    """Results by name (out, lse, dq, dk, dv, dsinks, or a table's name), in canonical axes.

    dead_*  rows whose values must not matter, because no mask lets anybody look at them: (.., tokens, heads)
    """

    exact: dict[str, np.ndarray]
    plain: dict[str, list[np.ndarray]]
    dead_q: np.ndarray
    dead_k: np.ndarray
    dead_v: np.ndarray


def formula(case: Case, values: Values | None = None) -> Formula:
    """`values` has the factors of 8-bit floats."""
    factors = values.factors(case.heads) if values is not None and values.descale else None
    return Formula(case.effective_scale, case.terms, case.rules, case.dropout_p, seed(case), factors)


def seed(case: Case) -> int:
    """Of dropout: both words of the key are in use."""
    return (case.data_seed + 1) * 0x9E3779B97F4A7C15 % 2**63


def find(
    case: Case,
    values: Values,
    gradients: bool = True,
    tf32: bool = False,
    weights: str | None = None,
    bits: int | None = None,
) -> Truth:
    """The exact results of a case and those of plain attention, over all its sequences; `tf32`, `weights` and
    `bits` as in `plain`."""
    gradients = gradients and case.differentiable
    truth, answers = _run(case, values, exact(case.dtype), gradients)
    plains: dict[str, list[np.ndarray]] = {name: [] for name in truth}
    for a in plain(case.dtype, tf32, weights, bits):
        for name, array in _run(case, values, a, gradients)[0].items():
            if name != "lse":
                plains[name].append(array)
    for a in accumulator(case.dtype, tf32, bits):
        for name, array in _run(case, values, a, gradients)[0].items():
            narrow = name in ROUNDED
            plains[name].append(
                array.astype(numpy_dtype(result(case.dtype))).astype(array.dtype) if narrow else array
            )
    return Truth(truth, plains, *_dead(case, values, answers))


def _run(
    case: Case, values: Values, a: Arithmetic, gradients: bool
) -> tuple[dict[str, np.ndarray], list[Answer]]:
    zeros = lambda like: np.zeros(like.shape, a.work)
    found = {"out": zeros(values.dout), "lse": np.full(lse_shape(case), -np.inf, a.work)}
    if gradients:
        found |= {"dq": zeros(values.q), "dk": zeros(values.k), "dv": zeros(values.v)}
        found |= {name: zeros(t) for name, t in values.tables.items() if t.dtype.kind in "fV"}
        if values.sinks is not None:
            found["dsinks"] = zeros(values.sinks)
    answers = []
    asked, program = set(found), formula(case, values)
    for span in spans(case):
        given = sequence(case, values, span)
        if not gradients:
            given = given.without_gradients()
        answer = attend(program, given, span.batch, a)
        answers.append(answer)
        per_row(case, found["lse"], span)[...] = answer.lse
        for name, part in (("out", span.q), ("dq", span.q), ("dk", span.k), ("dv", span.k)):
            if name in asked:
                token(case, found[name], span, part)[...] = getattr(answer, name).swapaxes(0, 1)
        if gradients:
            for name, grad in answer.tables.items():
                found[name] += grad
            if values.sinks is not None:
                found["dsinks"] += answer.sinks
    return found, answers


def _dead(case: Case, values: Values, answers: Iterable[Answer]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of q, k and v that nothing may read: those outside every sequence, those that no mask lets
    through, and rows of v whose scores are all -inf."""
    group = case.heads[0] // case.heads[1]
    dead_q = np.ones(values.q.shape[:-1], bool)
    dead_k = np.ones(values.k.shape[:-1], bool)
    dead_v = np.ones(values.k.shape[:-1], bool)
    for span, answer in zip(spans(case), answers, strict=True):
        over_heads = lambda seen: seen.reshape(case.heads[1], group, seen.shape[1]).any(axis=1)
        seen_k = over_heads(answer.reach.any(axis=1))
        seen_v = over_heads(answer.allowed.any(axis=1))
        token(case, dead_k, span, span.k)[...] = ~seen_k.T
        token(case, dead_v, span, span.k)[...] = ~seen_v.T
        seen_q = answer.reach.any(axis=2) | (values.sinks is not None)
        token(case, dead_q, span, span.q)[...] = ~seen_q.T
    return dead_q, dead_k, dead_v
