"""Whole kernels for AArch64: forward, decode and backward under the emulator, against the reference."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from anyflash.semantics import expr as ex
from kernels.cases import Case, Program
from kernels.memory import LAYOUTS
from kernels.programs import floats, table
from kernels.run import check, run, same_bits
from neon import runner
from neon.emulation import emulated

pytestmark = pytest.mark.skipif(runner.missing() is not None, reason=str(runner.missing()))
HEADS = (4, 2)


@pytest.fixture(autouse=True)
def _emulated() -> Iterator[None]:
    with emulated():
        yield


def everything(rng: np.random.Generator):
    """Functions, integer division, tables of several dtypes, a mask with bounds, dropout, sinks."""
    slopes, halves = table(floats(rng, HEADS[0])), table(floats(rng, 70, dtype="float16"))
    ids = table(np.sort(rng.integers(0, 3, 70)).astype(np.uint8))
    score = lambda s, at: (
        ex.tanh(s * slopes[at.head]) + ex.log(1 + ex.exp(halves[at.k])) + (at.q - at.k) // 5 * 0.1
    )
    return {
        "score": score, "mask": lambda at: ids[at.k] == ids[at.q], "sinks": floats(rng, HEADS[0]),
        "dropout_p": 0.2, "bias": floats(rng, 35, 70),
    }  # fmt: skip


PROGRAMS: dict[str, Program] = {
    "plain": lambda rng: {},
    "causal": lambda rng: {"causal": True},
    "everything": everything,
}


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        *((dtype, name) for dtype in ("float32", "bfloat16") for name in PROGRAMS),
        ("float16", "plain"), ("float16", "everything"), ("float64", "plain"), ("float64", "everything"),
    ],
)  # fmt: skip
def test_forward_and_backward(dtype: str, name: str) -> None:
    check(Case(name, dtype, dims=(20, 13), heads=HEADS, lens=(35, 70), program=PROGRAMS[name]), "neon")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packed(dtype: str) -> None:
    lens = ((1, 64), (0, 5), (12, 13), (25, 65), (7, 0), (33, 129))
    check(
        Case(
            "packed", dtype, dims=(17, 24), heads=(3, 1), packed=lens, used=(60, 5, 13, 65, 0, 100), slack=2,
            program=lambda rng: {"window": (50, 4)},
        ),
        "neon",
    )  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_decode(dtype: str) -> None:
    """Over two splits, with NaN in what is hidden."""

    def edit(arrays) -> None:
        arrays["k"][:, 3] = arrays["v"][:, 1050] = np.nan

    hide = lambda rng: {"mask": lambda at: (at.k != 3) & (at.k != 1050)}
    given = Case("decode", dtype, dims=(16, 8), heads=(2, 1), lens=(2, 1100), program=hide, edit=edit)
    check(given, "neon", backward=False)


def test_hidden_memory() -> None:
    def edit(arrays) -> None:
        arrays["k"][:, 3] = arrays["v"][:, 3] = np.nan
        arrays["q"][:, 5] = arrays["dout"][:, 5] = np.inf

    hide = lambda rng: {"mask": lambda at: (at.k != 3) & (at.row != 5)}
    check(Case("hidden", dims=(8, 8), heads=(2, 1), lens=(15, 70), program=hide, edit=edit), "neon")


def test_layouts() -> None:
    given = Case("layouts", "float32", dims=(12, 8), heads=(2, 2), lens=(20, 30), program=PROGRAMS["causal"])
    plain = check(given, "neon")
    for layout in LAYOUTS[1:]:
        assert not same_bits(plain, run(given, "neon", layout=layout)), layout


def test_parts_of_a_backward_agree() -> None:
    given = Case("parts", "float32", dims=(8, 8), heads=(1, 1), lens=(60, 130), program=PROGRAMS["causal"])
    assert not same_bits(check(given, "neon"), run(given, "neon", threads=3))
