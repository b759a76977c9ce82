"""NaN and infinity where a mask, a length or a score of -inf hides them; and where nothing does."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from anyflash.semantics import expr as ex
from kernels.cases import Array, Case, Program
from kernels.programs import floats, table
from kernels.run import COMBINATIONS, check

QUERIES, KEYS, HEADS = 49, 130, (6, 2)
# The forms of the products, and another width of vectors.
AT = tuple(dict.fromkeys((*COMBINATIONS[:3], *[c for c in COMBINATIONS if c == ("float64", "avx2")])))


def put(
    bad: float, rows: tuple[int, ...] = (), keys: tuple[int, ...] = ()
) -> Callable[[dict[str, Array]], None]:
    """`bad` in q and dout of some rows, in k and v of some keys."""

    def edit(arrays: dict[str, Array]) -> None:
        for names, places in ((("q", "dout"), rows), (("k", "v"), keys)):
            for name in names:
                arrays[name][:, list(places)] = bad

    return edit


def case(name: str, dtype: str, program: Program, edit: Callable[[dict[str, Array]], None]) -> Case:
    return Case(
        name, dtype, dims=(24, 19), heads=HEADS, batch=2, lens=(QUERIES, KEYS), program=program, edit=edit,
    )  # fmt: skip


def masked(rng: np.random.Generator):
    """Hides some rows and keys within tiles, and the last of them."""
    return {"mask": lambda at: (at.k != 3) & (at.k < 120) & (at.row != 3) & (at.row < 47)}


def by_score(rng: np.random.Generator):
    return {"score": lambda s, at: ex.where((at.k != 3) & (at.row != 3), s, -np.inf)}


def by_table(rng: np.random.Generator):
    hidden = np.zeros(KEYS, np.float32)
    hidden[[3, 64]] = 1
    found, slopes = table(hidden), table(floats(rng, HEADS[0]))
    return {"score": lambda s, at: ex.where(found[at.k] > 0, ex.log(0 * found[at.k]), s * slopes[at.head])}


def beside_sinks(rng: np.random.Generator):
    return {"sinks": floats(rng, HEADS[0]), "mask": lambda at: at.row != 3}


HIDDEN: dict[str, tuple[Program, tuple[int, ...], tuple[int, ...]]] = {
    "by a mask": (masked, (3, 47, 48), (3, 120, 129)),
    "by a score of -inf": (by_score, (3,), (3,)),
    "by a logarithm": (by_table, (), (3, 64)),
    "by causality": (lambda rng: {"mask": lambda at: at.k < at.row + 70}, (), (129,)),
    "beside sinks": (beside_sinks, (3,), ()),
}


@pytest.mark.parametrize("bad", [np.nan, np.inf], ids=str)
@pytest.mark.parametrize("at", AT, ids=str)
@pytest.mark.parametrize("name", HIDDEN)
def test_what_is_hidden_takes_no_part(name: str, at: tuple[str, str], bad: float) -> None:
    dtype, target = at
    program, rows, keys = HIDDEN[name]
    got = check(case(name, dtype, program, put(bad, rows, keys)), target)
    assert all(np.isfinite(got[n].astype(np.float64)).all() for n in got if n not in ("lse", "stats"))


@pytest.mark.parametrize("at", AT[:3], ids=str)
@pytest.mark.parametrize("queries", [1, 2])
def test_what_is_hidden_from_a_decode(at: tuple[str, str], queries: int) -> None:
    dtype, target = at
    hide = lambda rng: {"mask": lambda at: (at.k != 3) & (at.k < 1100)}
    given = Case(
        "hidden", dtype, dims=(32, 19), heads=(6, 2), lens=(queries, 1300), program=hide,
        edit=put(np.nan, keys=(3, 1100, 1200, 1299)),
    )  # fmt: skip
    got = check(given, target)
    assert np.isfinite(got["out"].astype(np.float32)).all()


@pytest.mark.parametrize("at", AT, ids=str)
@pytest.mark.parametrize(("rows", "keys"), [((5,), ()), ((), (40,)), ((5,), (40,))], ids=str)
def test_what_is_seen_shows(at: tuple[str, str], rows: tuple[int, ...], keys: tuple[int, ...]) -> None:
    """NaN in an element that some pair sees reaches just the results that depend on it."""
    dtype, target = at
    program = lambda rng: {"mask": lambda at: at.k < at.row + 20}
    got = check(case("seen", dtype, program, put(np.nan, rows, keys)), target)
    blind = np.arange(QUERIES) + 20 <= 40
    if keys:
        assert np.isnan(got["out"].astype(np.float32)[:, ~blind]).all()
    if not rows:
        assert not np.isnan(got["out"].astype(np.float32)[:, blind]).any()
    if rows and not keys:
        assert np.isnan(got["dq"].astype(np.float32)[:, 5]).all()


@pytest.mark.parametrize("at", AT[:3], ids=str)
def test_what_lies_behind_the_lengths(at: tuple[str, str]) -> None:
    """Tokens past seqused_k, and rows of no sequence, hold NaN."""
    dtype, target = at

    def edit(arrays: dict[str, Array]) -> None:
        for first, last in ((5, 9), (39, 79), (149, 155)):
            arrays["k"][first:last] = arrays["v"][first:last] = np.nan
        arrays["q"][43:] = arrays["dout"][43:] = np.nan
        arrays["dlse"][:, 43:] = np.nan

    given = Case(
        "behind", dtype, dims=(24, 19), heads=(2, 1), packed=((10, 9), (33, 70), (0, 70)),
        used=(5, 30, 70), slack=6, edit=edit, program=lambda rng: {"causal": True},
    )  # fmt: skip
    got = check(given, target)
    assert not any(np.isnan(got[name].astype(np.float32)).any() for name in got)
