"""Scores that are huge, finite masks, slopes that are infinite, chances near 0 and 1, sinks at infinity."""

from __future__ import annotations

import numpy as np
import pytest

from anyflash.semantics import expr as ex
from kernels.cases import Case, Program
from kernels.programs import floats
from kernels.run import COMBINATIONS, check, ratios, run

QUERIES, KEYS, HEADS, BATCH = 49, 130, (6, 2), 2
LEAST = float(np.finfo(np.float32).min)
AT = COMBINATIONS[:2]
# Half of the rows see no key but through the finite mask.
SEES = lambda at: at.k <= at.q - 100


def least_bias(rng: np.random.Generator):
    """As transformers mask: whole rows, and every second key."""
    bias = np.zeros((BATCH, 1, QUERIES, KEYS), np.float32)
    bias[..., ::2], bias[:, :, 5] = LEAST, LEAST
    return {"bias": bias}


PROGRAMS: dict[str, Program] = {
    "the least float for a mask": lambda rng: {"score": lambda s, at: ex.where(SEES(at), s, LEAST)},
    "-1e9 for a mask": lambda rng: {"score": lambda s, at: ex.where(SEES(at), s, -1e9)},
    "-1e9 added": lambda rng: {"score": lambda s, at: 1000 * s + ex.where(SEES(at), 0.0, -1e9)},
    "scores near -1e9": lambda rng: {"score": lambda s, at: 40 * s - 1e9},
    "the least float added": least_bias,
    "an infinite slope": lambda rng: {"score": lambda s, at: -ex.exp(100 * s)},
    "a slope of 1 / 0": lambda rng: {"score": lambda s, at: ex.log(ex.maximum(s, 0.0))},
    "kept for certain": lambda rng: {"dropout_p": 1e-12},
    "dropped for certain": lambda rng: {"dropout_p": 1 - 1e-12},
    "nearly all dropped": lambda rng: {"dropout_p": 0.99},
    "sinks at infinity": lambda rng: {"sinks": np.where(np.arange(6) % 2, np.inf, 0.5).astype(np.float32)},
    "no sinks": lambda rng: {"sinks": np.full(6, -np.inf, np.float32), "mask": lambda at: at.k < at.row - 20},
    "huge sinks": lambda rng: {"sinks": (1e30 * floats(rng, 6)).astype(np.float32)},
    "scale 0": lambda rng: {"scale": 0.0},
    "a large scale": lambda rng: {"scale": 1e6},
    "a tiny scale": lambda rng: {"scale": 1e-30},
}


def case(name: str, dtype: str, program: Program, **options) -> Case:
    shape = {"dims": (24, 19), "heads": HEADS, "batch": BATCH, "lens": (QUERIES, KEYS)}
    return Case(name, dtype, program=program, **(shape | options))


@pytest.mark.parametrize("at", AT, ids=str)
@pytest.mark.parametrize("name", PROGRAMS)
def test_extremes(name: str, at: tuple[str, str]) -> None:
    dtype, target = at
    check(case(name, dtype, PROGRAMS[name]), target)


@pytest.mark.parametrize("at", AT, ids=str)
@pytest.mark.parametrize("name", ["the least float for a mask", "-1e9 added", "huge sinks"])
def test_extremes_of_a_decode(name: str, at: tuple[str, str]) -> None:
    dtype, target = at
    check(case(name, dtype, PROGRAMS[name], lens=(2, KEYS)), target)


@pytest.mark.parametrize("constant", [-1e39, -1e300])
def test_constants_beyond_float32_are_finite(constant: float) -> None:
    """A row that sees only them has the mean of its values, whatever its lse is called."""
    given = case("beyond", "float32", lambda rng: {"score": lambda s, at: ex.where(SEES(at), s, constant)})
    got = run(given, AT[0][1])
    found = ratios(given, AT[0][1], got)
    assert all(found[name] <= 1 for name in found if name != "lse"), found


@pytest.mark.parametrize("amplitude", [300.0, 3000.0, 1e5])
@pytest.mark.parametrize("queries", [2, QUERIES])
@pytest.mark.parametrize("at", COMBINATIONS[:3], ids=str)
def test_large_scores_have_the_gradients_of_their_maximum(
    at: tuple[str, str], queries: int, amplitude: float
) -> None:
    """Rounding moves such scores by more than 1, so a backward must form just those of the forward."""
    dtype, target = at
    check(case("large", dtype, lambda rng: {}, lens=(queries, KEYS), amplitude=amplitude), target)


@pytest.mark.parametrize("at", COMBINATIONS[:3], ids=str)
@pytest.mark.parametrize("packed", [((1, 70), (2, 100)), ((1, 70), (49, 130), (2, 100))], ids=str)
def test_large_scores_of_short_and_long_sequences(
    packed: tuple[tuple[int, int], ...], at: tuple[str, str]
) -> None:
    """The short ones are decoded, and have a backward of their own where pairs are multiplied."""
    dtype, target = at
    given = Case("large", dtype, dims=(24, 19), heads=HEADS, packed=packed, amplitude=3000.0)
    check(given, target, threads=3)
