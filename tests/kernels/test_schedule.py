"""How a backward is cut into tasks, and what is declined because its integers would not fit."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest

from anyflash.core.errors import InvalidCall
from anyflash.kernels.llvm import schedule
from anyflash.kernels.llvm.schedule import BLOCK_K, Walk, backward_walks, table_sums
from anyflash.kernels.llvm.spec import TASK_WORDS, RegisterTile
from anyflash.kernels.llvm.target import NAMES, get_target
from anyflash.semantics.limits import TABLE_LIMIT, check_table, integers_too_wide
from anyflash.semantics.problem import Problem, Program, TableSpec

BLOCK_Q = 48


def problem(
    batch: int = 2, heads: tuple[int, int] = (4, 2), lens: tuple[int, int] = (300, 700),
    score: str | None = None, tables: tuple[tuple[int, ...], ...] = (), mask: str | None = None,
) -> Problem:  # fmt: skip
    specs = tuple(TableSpec("float32", shape, True) for shape in tables)
    return Problem(Program(score, mask), "float32", batch, *heads, *lens, 64, 64, specs)


# score, table shapes
SCORES: dict[str, tuple[str | None, tuple[tuple[int, ...], ...]]] = {
    "none": (None, ()),
    "slopes": ("(add score (load 0:f head))", ((4,),)),
    "slopes per batch": ("(add score (load 0:f batch head))", ((2, 4),)),
    "bias of keys": ("(add score (load 0:f k))", ((700,),)),
    "bias": ("(add score (load 0:f batch head row k))", ((2, 4, 300, 700),)),
    "bias over batch": ("(add score (load 0:f head row k))", ((4, 300, 700),)),
    "bias over heads": ("(add score (load 0:f batch row k))", ((2, 300, 700),)),
    "large bias over all": ("(add score (load 0:f row k))", ((300, 700),)),
    "relative": ("(add score (load 0:f head (sub q k)))", ((4, 64),)),
    "two": ("(add (add score (load 0:f head)) (load 1:f batch row k))", ((4,), (2, 300, 700))),
    "two loads of one": ("(add (add score (load 0:f row k)) (load 0:f k row))", ((700, 700),)),
}
SHAPES = [(1, (1, 1)), (1, (6, 2)), (2, (4, 2)), (5, (3, 3))]
THREADS = (1, 2, 3, 8, 64)


def pieces(walk: Walk, given: Problem) -> Iterator[tuple[tuple[int, int], range, range, int]]:
    """((batch, key head), query blocks, key tiles, number of the sums) of every part of every task."""
    blocks, keys = -(-given.seqlen_q // BLOCK_Q), -(-given.seqlen_k // BLOCK_K)
    for row in walk.tasks.tolist():
        t = dict(zip(TASK_WORDS, row, strict=True))
        assert t["key_begin"] % BLOCK_K == 0
        for at in itertools.product(
            range(t["batch_begin"], t["batch_end"]), range(t["head_begin"], t["head_end"])
        ):
            yield (
                at, range(t["block_begin"], min(t["block_end"], blocks)),
                range(t["key_begin"] // BLOCK_K, min(-(-t["key_end"] // BLOCK_K), keys)), t["partial"],
            )  # fmt: skip


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_pair_of_blocks_is_walked_once(shape, threads: int, score: str) -> None:
    given = problem(shape[0], shape[1], score=SCORES[score][0], tables=SCORES[score][1])
    walks = backward_walks(given, BLOCK_Q, threads)
    assert [w.part for w in walks] in (["backward"], ["backward_dq", "backward_dkv"])
    for walk in walks:
        seen = np.zeros(
            (given.batch, given.heads_kv, -(-given.seqlen_q // BLOCK_Q), -(-given.seqlen_k // BLOCK_K)), int
        )
        for (batch, head), blocks, keys, _ in pieces(walk, given):
            seen[batch, head, blocks.start : blocks.stop, keys.start : keys.stop] += 1
            if walk.part != "backward_dq":
                # dK and dV of a task's keys are summed over all queries, and fit the sums that it has.
                assert blocks == range(seen.shape[2])
                assert len(keys) * BLOCK_K <= walk.acc_keys
            if walk.part != "backward_dkv":
                assert keys == range(seen.shape[3])
        assert (seen == 1).all(), walk.part
    if len(walks) == 2:
        assert threads > 1


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tasks_that_meet_in_a_table_share_no_element(shape, threads: int, score: str) -> None:
    """Two tasks may add to one element of a table's gradient only in sums of their own."""
    text, tables = SCORES[score]
    given = problem(shape[0], shape[1], score=text, tables=tables)
    sums = table_sums(given)
    walk = backward_walks(given, BLOCK_Q, threads)[0]
    apart = schedule._separating_axes(schedule.parse(text)) if text else {}
    for slot in range(len(tables)):
        owners: dict[tuple[int, ...], int] = {}
        for task, row in enumerate(walk.tasks.tolist()):
            t = dict(zip(TASK_WORDS, row, strict=True))
            ranges = {
                "batch": range(t["batch_begin"], t["batch_end"]),
                "head": range(t["head_begin"], t["head_end"]),
                "row": range(t["block_begin"], min(t["block_end"], -(-given.seqlen_q // BLOCK_Q))),
            }
            for place in itertools.product(
                *(ranges[axis] if axis in apart[slot] else (0,) for axis in ranges)
            ):
                place = (*place, t["partial"] if slot in sums.own else 0)
                assert owners.setdefault(place, task) == task, (slot, place)
    if sums.own:
        assert walk.tasks[:, TASK_WORDS.index("partial")].max() < sums.count
        budget = (
            given.batch
            * (given.heads_q * given.seqlen_q + 2 * given.heads_kv * given.seqlen_k)
            * given.head_dim
        )
        for slot in sums.own:
            assert sums.count * np.prod(tables[slot]) <= max(budget, 1 << 16)


def test_sums_do_not_depend_on_threads() -> None:
    """Partial sums are numbered by batch entry and head alone."""
    given = problem(2, (4, 2), score=SCORES["slopes"][0], tables=SCORES["slopes"][1])
    numbers = set()
    for threads in THREADS:
        walk = backward_walks(given, BLOCK_Q, threads)[0]
        numbers.add(frozenset((at, partial) for at, _, _, partial in pieces(walk, given)))
    assert len(numbers) == 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize("queries", [1, 2, 5, 16, 17, 33, 48, 49, 65, 97, 1000])
def test_blocks_suit_the_registers(name: str, dtype: str, queries: int) -> None:
    target = get_target(name)
    given = Problem(Program(), dtype, 1, 1, 1, queries, 100, 64, 64)
    vectors = schedule.query_vectors(target, given)
    form = schedule.dot(target, dtype)
    for _, columns, rows in schedule.tile(target).cut(vectors):
        assert rows * columns + columns + 1 <= target.num_registers
        assert schedule.BLOCK_K % rows == 0
    assert 1 <= vectors <= 8
    if form == "tiles":
        assert vectors % 2 == 0
    assert schedule.block_q(given, name) == vectors * schedule.lanes(target, dtype)
    # Short calls do not compute for absent queries.
    if form != "tiles" and -(-queries // schedule.lanes(target, dtype)) <= schedule.tile(target).columns:
        assert queries > (vectors - 1) * schedule.lanes(target, dtype)


@pytest.mark.parametrize("tile", [RegisterTile(8, 4, 24), RegisterTile(4, 3, 12), RegisterTile(2, 8, 24)])
def test_register_tiles_cover_what_they_cut(tile: RegisterTile) -> None:
    for vectors in range(1, 37):
        cuts = tile.cut(vectors)
        assert [v for first, width, _ in cuts for v in range(first, first + width)] == list(range(vectors))
        widths = [width for _, width, _ in cuts]
        assert max(widths) <= tile.columns and max(widths) - min(widths) <= 1
        for _, width, rows in cuts:
            assert rows >= 1 and tile.rows % rows == 0 and rows * width <= tile.accumulators


WIDE = {
    "(lt (mul q k) 7)": False,
    "(lt (mul (mul q k) k) 7)": True,
    "(lt (add q 2147483647) 7)": True,
    "(lt (sub -2147400000 k) 0)": False,
    "(lt (sub -2147483648 k) 0)": True,
    "(lt (mul (load 0:i k) 127) 7)": False,
    "(lt (mul (load 0:i k) 128) 7)": True,
    "(lt (floordiv (mul (mul q k) k) k) 7)": True,
    "(lt (mod k (load 0:i k)) 7)": False,
    "(eq (where (lt k 3) (mul (mul k k) k) 0) 1)": True,
    "(lt 0.5 (mul 0.3 (float (mul (mul k k) k))))": True,
    "(load 1:b (mul (mul k k) k))": True,
}


@pytest.mark.parametrize("text", WIDE)
@pytest.mark.parametrize("where", ["score", "mask"])
def test_integers_that_may_leave_32_bits_are_declined(text: str, where: str) -> None:
    program = Program(mask=text) if where == "mask" else Program(f"(where {text} score 0.0)")
    tables = (TableSpec("int32", (10000,)), TableSpec("bool", (10000,)))
    given = Problem(program, "float32", 1, 1, 1, 10000, 10000, 8, 8, tables)
    assert bool(integers_too_wide(given)) == WIDE[text]
    assert all(where in reason for reason in integers_too_wide(given))


def test_too_many_keys_are_declined() -> None:
    assert "keys" in integers_too_wide(problem(lens=(1, 2**30)))[0]
    assert "queries" in integers_too_wide(problem(lens=(2**30, 1)))[0]
    assert not integers_too_wide(problem(lens=(2**30 - 1, 2**30 - 1)))


@pytest.mark.parametrize(
    ("values", "fits"),
    [
        (np.array([TABLE_LIMIT, -TABLE_LIMIT]), True),
        (np.array([TABLE_LIMIT + 1]), False),
        (np.array([-TABLE_LIMIT - 1], np.int32), False),
        (np.array([32767, -32768], np.int16), True),
        (np.array([], np.int64), True),
        (np.array([1e30, np.nan]), True),
        (np.array([True]), True),
    ],
)
def test_tables_of_large_integers_are_refused(values: np.ndarray, fits: bool) -> None:
    if fits:
        check_table(values, 3)
    else:
        with pytest.raises(InvalidCall, match="table 3"):
            check_table(values, 3)
