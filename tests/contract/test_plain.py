"""The suite's own attention: its gradients are those of its forward, and its Philox is the published one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from anyflash.contract.arithmetic import Arithmetic
from anyflash.contract.cases import Case
from anyflash.contract.philox import philox
from anyflash.contract.plain import OneSequence, attend
from anyflash.contract.table import table
from anyflash.contract.truth import formula
from anyflash.contract.values import draw, sequence, spans

WIDE = Arithmetic(np.dtype(np.longdouble))
SMALL = [
    c for c in table() if c.dtype == "float32" and c.terms + c.rules and not c.packed and 0 not in c.lens
]


def loss(case: Case, given: OneSequence, batch: int) -> np.longdouble:
    answer = attend(formula(case), replace(given, dout=None, dlse=None), batch, WIDE)
    lse = np.where(answer.lse == -np.inf, 0, answer.lse)
    return (answer.out * given.dout).sum() + (lse * given.dlse).sum()


def moved(given: OneSequence, name: str, by: np.ndarray) -> OneSequence:
    if name in given.tables:
        return replace(given, tables={**given.tables, name: given.tables[name] + by})
    return replace(given, **{name: getattr(given, name) + by})


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.id)
def test_gradients_are_the_slopes_of_the_loss(case):
    """Along a random direction of each input, analytic against central differences in the widest float."""
    case = replace(case, lens=(min(case.lens[0], 11), min(case.lens[1], 13)), dims=(4, 5), dtype="float64")
    rng = np.random.default_rng(0)
    span = next(iter(spans(case)))
    given = sequence(case, draw(case), span)
    answer = attend(formula(case), given, span.batch, WIDE)
    grads = {"q": answer.dq, "k": answer.dk, "v": answer.dv, **answer.tables}
    if given.sinks is not None and np.isfinite(given.sinks).all():
        grads["sinks"] = answer.sinks
    step = np.longdouble(2.0) ** -17
    for name, grad in grads.items():
        direction = rng.standard_normal(grad.shape) * step
        slope = loss(case, moved(given, name, direction), span.batch)
        slope = (slope - loss(case, moved(given, name, -direction), span.batch)) / 2
        expected = (grad * direction).sum()
        truncated = np.abs(grad * direction).sum() * step
        rounded = 16 * np.finfo(np.longdouble).eps * abs(loss(case, given, span.batch))
        assert abs(slope - expected) <= truncated + rounded, name


def test_philox_gives_the_published_words():
    """The known-answer tests of the authors' Random123 for a zero counter and key, 7 and 10 rounds."""
    zero = (0, 0, 0, 0)
    assert [int(w) for w in philox(zero, (0, 0))] == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
    assert [int(w) for w in philox(zero, (0, 0), 10)] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
