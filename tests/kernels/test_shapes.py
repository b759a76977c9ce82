"""Head dims, lengths around the edges of tiles, head ratios and memory layouts, on every kind of target."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from kernels.cases import Array, Case
from kernels.memory import LAYOUTS
from kernels.run import COMBINATIONS, check, run, same_bits

CAUSAL = lambda rng: {"causal": True}
DIMS = (
    (1, 1), (3, 3), (8, 8), (17, 17), (33, 20), (40, 40), (59, 59), (80, 80), (96, 96), (111, 33), (128, 128),
    (192, 128), (256, 256), (257, 257), (576, 512),
)  # fmt: skip
# Those whose products differ in form meet every head dim; the others take turns.
EVERY, IN_TURN = COMBINATIONS[:3], COMBINATIONS[3:]
DIM_CASES = [
    (dims, at)
    for i, dims in enumerate(DIMS)
    for at in (*EVERY, *(IN_TURN[i % len(IN_TURN) : i % len(IN_TURN) + 1] if IN_TURN else ()))
]


@pytest.mark.parametrize(("dims", "at"), DIM_CASES, ids=str)
def test_head_dims(dims: tuple[int, int], at: tuple[str, str]) -> None:
    dtype, target = at
    check(Case(f"dims {dims}", dtype, dims=dims, heads=(2, 1), lens=(35, 70)), target)


EDGES = (0, 1, 2, 7, 8, 15, 16, 17, 47, 48, 49, 63, 64, 65, 95, 96, 97, 127, 129, 193)
# Each length as a number of queries and as one of keys, met with others in no order.
PAIRS = tuple(zip(EDGES, np.roll(EDGES, 7).tolist(), strict=True)) + tuple(
    zip(EDGES, np.roll(EDGES[::-1], 3).tolist(), strict=True)
)


@pytest.mark.parametrize("used", [False, True], ids=["", "seqused_k"])
@pytest.mark.parametrize("at", COMBINATIONS, ids=str)
def test_packed_lengths(at: tuple[str, str], used: bool) -> None:
    """Sequences of all lengths in one call; with `seqused_k`, fewer keys than lie there, and causal."""
    dtype, target = at
    some = np.random.default_rng(0).integers(0, [k + 1 for _, k in PAIRS]).tolist() if used else None
    check(
        Case(
            "packed", dtype, dims=(17, 24), heads=(3, 1), packed=PAIRS, used=some and tuple(some), slack=3,
            program=CAUSAL if used else lambda rng: {},
        ),
        target, threads=2,
    )  # fmt: skip


DENSE = [
    (q, k)
    for q, k in zip(
        (1, 2, 9, 16, 17, 31, 33, 49, 97, 129), (64, 65, 1, 193, 63, 96, 128, 2, 95, 127), strict=True
    )
]


@pytest.mark.parametrize("lens", DENSE, ids=str)
@pytest.mark.parametrize("at", EVERY, ids=str)
def test_dense_lengths(lens: tuple[int, int], at: tuple[str, str]) -> None:
    """Short calls have kernels with fewer vectors of queries, and their own for very few."""
    dtype, target = at
    check(Case(f"lens {lens}", dtype, dims=(40, 40), heads=(2, 2), lens=lens, program=CAUSAL), target)


def test_no_rows_at_all() -> None:
    for lens, batch in (((0, 5), 2), ((5, 0), 2), ((0, 0), 1), ((5, 5), 0)):
        got = check(Case("nothing", heads=(2, 1), lens=lens, batch=batch), COMBINATIONS[0][1])
        assert not got["out"].any() and not got["dk"].any()
        assert (got["lse"] == -np.inf).all()


@pytest.mark.parametrize("heads", [(1, 1), (3, 1), (6, 2), (7, 1), (9, 3), (5, 5)], ids=str)
@pytest.mark.parametrize("at", EVERY, ids=str)
def test_head_ratios(heads: tuple[int, int], at: tuple[str, str]) -> None:
    """One kernel for all of them."""
    dtype, target = at
    check(
        Case(f"heads {heads}", dtype, dims=(16, 16), heads=heads, batch=2, lens=(20, 70)), target, threads=3
    )


# One whose rows of K and V can be read in place, and one whose cannot.
LAYOUT_DIMS = ((64, 32), (19, 33))


@pytest.mark.parametrize("dims", LAYOUT_DIMS, ids=str)
@pytest.mark.parametrize("at", COMBINATIONS, ids=str)
def test_layouts_change_no_bit(at: tuple[str, str], dims: tuple[int, int]) -> None:
    dtype, target = at
    case = Case("layouts", dtype, dims=dims, heads=(2, 2), batch=2, lens=(50, 100), program=CAUSAL)
    plain = check(case, target)
    for layout in LAYOUTS[1:]:
        assert not same_bits(plain, run(case, target, layout=layout)), layout


def test_stretched_arrays() -> None:
    """Strides of zero give what the copies give."""

    def same(axis: int):
        def edit(arrays: dict[str, Array]) -> None:
            for name in ("q", "k", "v", "dout"):
                arrays[name] = np.broadcast_to(arrays[name].take([0], axis), arrays[name].shape)

        return edit

    for axis, (dtype, target) in itertools.product((0, 1, 2, 3), EVERY):
        case = Case("stretched", dtype, dims=(64, 32), heads=(2, 2), batch=2, lens=(40, 70), edit=same(axis))
        assert not same_bits(check(case, target), run(case, target, layout="as given"))


# Query heads that share a key head, and queries: up to 128 rows in a decode, and just too many.
ROWS = [
    ((9, 1), 1),
    ((3, 1), 5),
    ((12, 2), 7),
    ((16, 2), 8),
    ((64, 1), 2),
    ((128, 1), 1),
    ((16, 1), 9),
    ((130, 1), 1),
]


@pytest.mark.parametrize("at", COMBINATIONS, ids=str)
@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_rows_of_a_key_head(rows: tuple[tuple[int, int], int], at: tuple[str, str]) -> None:
    (heads, queries), (dtype, target) = rows, at
    check(
        Case(f"rows {rows}", dtype, dims=(24, 40), heads=heads, lens=(queries, 1100), program=CAUSAL), target
    )
    check(
        Case(
            f"packed rows {rows}",
            dtype,
            dims=(16, 16),
            heads=heads,
            packed=((queries, 70), (0, 3), (queries + 3, 90), (1, 1)),
        ),
        target,
    )
