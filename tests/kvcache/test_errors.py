"""Every way to call `attention_kvcache` wrongly: what is said (messages.txt), and that nothing was
written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import anyflash as af
from anyflash.frontends.numpy_ import FRONTEND
from anyflash.frontends.registry import frameworks
from anyflash.semantics.arrays import as_numpy
from anyflash.semantics.cache import Integers, describe_cache
from anyflash.semantics.problem import Program

B, T, HQ, HK, D, P, PAGES = 2, 3, 4, 2, 8, 4, 6
F32 = np.float32
TABLE = np.array([[3, 1, -1], [0, 5, 2]], np.int32)
LENS = np.array([5, 9], np.int32)
COS = np.ones((32, 2), F32)


def call() -> dict[str, Any]:
    """A correct one: pages, new keys, rotary."""
    return {
        "q": np.zeros((B, T, HQ, D), F32),
        "k": np.ones((B, T, HK, D), F32),
        "v": np.ones((B, T, HK, D), F32),
        "cache.k": np.zeros((PAGES, P, HK, D), F32),
        "cache.v": np.zeros((PAGES, P, HK, D), F32),
        "cache.seqlens": LENS,
        "cache.block_table": TABLE,
        "rotary": (COS, COS),
        "causal": True,
        "backend": "reference",
    }


def dense(**changes: Any) -> dict[str, Any]:
    """The same over a dense cache with room for 12 keys."""
    arrays = {"cache.k": np.zeros((B, 12, HK, D), F32), "cache.v": np.zeros((B, 12, HK, D), F32)}
    return {**arrays, "cache.block_table": None, **changes}


def packed(**changes: Any) -> dict[str, Any]:
    arrays = {name: np.ones((B * T, heads, D), F32) for name, heads in (("q", HQ), ("k", HK), ("v", HK))}
    return {**arrays, "cu_seqlens_q": np.array([0, 3, 6], np.int32), **changes}


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def read_only(shape: tuple[int, ...]) -> np.ndarray:
    array = np.zeros(shape, F32)
    array.flags.writeable = False
    return array


WRONG: dict[str, Callable[[], dict[str, Any]]] = {
    # the three promises
    "page_beyond": lambda: {"cache.block_table": np.array([[3, 6, -1], [0, 5, 2]], np.int32)},
    "page_negative": lambda: {"cache.block_table": np.array([[3, 1, -1], [0, 5, -2]], np.int64)},
    "page_for_new_keys": lambda: {
        "cache.block_table": np.array([[3, -1, -1], [0, 5, 2]], np.int32),
        "cache.seqlens": ints(4, 9),
    },
    "length_beyond": lambda: {"cache.seqlens": ints(5, 13)},
    "length_negative": lambda: {"cache.seqlens": ints(-1, 9)},
    "no_room": lambda: {"cache.seqlens": ints(5, 10)},
    "no_room_dense": lambda: dense(**{"cache.seqlens": ints(12, 0)}),
    # two sequences in one place
    "same_slot": lambda: {
        "cache.block_table": np.array([[3, 1, -1], [3, 1, 2]], np.int32),
        "cache.seqlens": ints(5, 5),
    },
    "same_entry": lambda: dense(**{"cache.batch_idx": ints(1, 1)}),
    "a_key_of_another": lambda: {"cache.block_table": np.array([[3, 1, -1], [0, 1, 2]], np.int32)},
    # integers
    "lengths_shape": lambda: {"cache.seqlens": ints(5)},
    "lengths_dtype": lambda: {"cache.seqlens": np.array([5.0, 9.0])},
    "lengths_missing": lambda: {"cache.seqlens": None},
    "lengths_list": lambda: {"cache.seqlens": [5, 9]},
    "table_rank": lambda: {"cache.block_table": ints(3, 1)},
    "table_rows": lambda: {"cache.block_table": TABLE[:1]},
    "table_and_batch_idx": lambda: {"cache.batch_idx": ints(0, 1)},
    "no_table": lambda: {"cache.block_table": None},
    "batch_idx": lambda: dense(**{"cache.batch_idx": ints(0, 2)}),
    "leftpad": lambda: {"cache.leftpad": ints(6, 0)},
    "leftpad_negative": lambda: {"cache.leftpad": ints(0, -1)},
    # arrays
    "k_alone": lambda: {"v": None},
    "v_alone": lambda: {"k": None},
    "k_dtype": lambda: {"k": np.ones((B, T, HK, D))},
    "k_heads": lambda: {"k": np.ones((B, T, HQ, D), F32)},
    "k_batch": lambda: {"k": np.ones((1, T, HK, D), F32)},
    "v_rows": lambda: {"v": np.ones((B, 2, HK, D), F32)},
    "cache_dtype": lambda: {"cache.k": np.zeros((PAGES, P, HK, D), np.float16)},
    "cache_rank": lambda: {"cache.v": np.zeros((PAGES, P, HK), F32)},
    "cache_heads": lambda: {"cache.k": np.zeros((PAGES, P, 3, D), F32)},
    "cache_pages": lambda: {"cache.v": np.zeros((PAGES - 1, P, HK, D), F32)},
    "cache_slots": lambda: {"cache.v": np.zeros((PAGES, P + 1, HK, D), F32)},
    "no_slots": lambda: {"cache.k": np.zeros((PAGES, 0, HK, D), F32)},
    "cache_read_only": lambda: {"cache.v": read_only((PAGES, P, HK, D))},
    "cache_none": lambda: {"cache.k": None},
    # packed
    "packed_layout": lambda: packed(layout="bshd"),
    "packed_without_lengths": lambda: {"q": np.zeros((6, HQ, D), F32), "layout": "thd"},
    "packed_starts": lambda: packed(cu_seqlens_q=ints(0, 4, 2)),
    "packed_number": lambda: packed(cu_seqlens_q=np.array(6)),
    "packed_nothing": lambda: packed(cu_seqlens_q=ints()),
    "packed_new": lambda: packed(cu_seqlens_k=ints(0, 6)),
    # rotary
    "rotary_alone": lambda: {"rotary": COS},
    "rotary_wide": lambda: {"rotary": (np.ones((32, 5), F32), np.ones((32, 5), F32))},
    "rotary_shapes": lambda: {"rotary": (COS, COS[:, :1])},
    "rotary_dtype": lambda: {"rotary": (COS.astype(np.int32), COS)},
    "rotary_short": lambda: {"rotary": (COS[:11], COS[:11])},
    "rotary_before_the_first": lambda: {"rotary_positions": np.full((B, T), -1)},
    "rotary_queries": lambda: {"q": np.zeros((B, 9, HQ, D), F32)},
    "positions_shape": lambda: {"rotary_positions": ints(0, 1)},
    "positions_of_too_few": lambda: {
        "q": np.zeros((B, 4, HQ, D), F32),
        "rotary_positions": np.ones((B, T), int),
    },
    "positions_alone": lambda: {"rotary": None, "rotary_positions": ints(0, 1)},
    # programs
    "bias_keys": lambda: {"bias": np.zeros((11,), F32)},
    "bias_heads": lambda: {"bias": np.zeros((3, 1, 1), F32)},
    "sinks": lambda: {"sinks": np.zeros(2, F32)},
    "backend": lambda: {"backend": 3},
}
MESSAGES = dict(
    line.split(": ", 1)
    for line in (Path(__file__).parent / "messages.txt").read_text(encoding="utf-8").splitlines()
)


def run(arguments: dict[str, Any]) -> Any:
    given = dict(arguments)
    cache = af.KVCache(**{n.partition(".")[2]: given.pop(n) for n in list(given) if n.startswith("cache.")})
    return af.attention_kvcache(given.pop("q"), cache, given.pop("k"), given.pop("v"), **given)


def test_every_case_has_a_message() -> None:
    assert list(WRONG) == list(MESSAGES)


def test_the_call_itself_is_right() -> None:
    for changes in ({}, dense(), packed()):
        arguments = call() | changes
        run(arguments)
        assert arguments["cache.k"].any()
        assert arguments["cache.v"].any()


@pytest.mark.parametrize("name", WRONG)
def test_said_and_nothing_written(name: str) -> None:
    arguments = call() | WRONG[name]()
    with pytest.raises(af.InvalidCall) as caught:
        run(arguments)
    assert str(caught.value) == MESSAGES[name].replace("{frameworks}", " or ".join(frameworks()))
    for array in ("cache.k", "cache.v"):
        assert arguments[array] is None or not arguments[array].any()


def test_nothing_written_where_nothing_can_run() -> None:
    """Unsupported comes before the first write."""
    arguments = call() | {"backend": None}
    try:
        run(arguments)
    except af.Unsupported:
        assert not arguments["cache.k"].any()


def test_a_pair_is_a_cache_in_full_use() -> None:
    """(k, v) instead of a KVCache."""
    r = np.random.default_rng(0)
    q, k, v = (r.standard_normal((B, n, heads, D)).astype(F32) for n, heads in ((T, HQ), (9, HK), (9, HK)))
    out = af.attention_kvcache(q, (k, v), causal=True, backend="reference")
    assert (out == af.attention(q, k, v, causal=True, backend="reference")).all()
    with pytest.raises(af.InvalidCall, match=r"^cache.seqlens: None; expected \(2,\) lengths"):
        af.attention_kvcache(q, (k, v), q[:, :, :HK], q[:, :, :HK], backend="reference")


def test_wrong_cache() -> None:
    with pytest.raises(af.InvalidCall, match=r"^cache: type ndarray; expected an anyflash.KVCache, or"):
        af.attention_kvcache(call()["q"], call()["cache.k"])  # type: ignore[arg-type]


def test_what_nobody_reads_may_be_anything() -> None:
    """Entries of the table behind the last key, and in front of the left padding."""
    arguments = call() | {
        "cache.block_table": np.array([[-9, 1, 99], [0, 5, 2]]),
        "cache.leftpad": ints(4, 0),
    }
    assert np.isfinite(run(arguments)).all()


def test_shared_pages_that_are_only_read() -> None:
    """Sequences may share the pages that are not written."""
    arguments = call() | {"cache.block_table": np.array([[0, 1, -1], [0, 5, 2]], np.int32)}
    assert np.isfinite(run(arguments)).all()
    arguments = call() | {"k": None, "v": None, "cache.block_table": np.array([[0, 5, 2], [0, 5, 2]])}
    assert np.isfinite(run(arguments)).all()


def test_table_of_an_empty_sequence() -> None:
    """Nothing of it is looked at, even where its left padding is not empty."""
    arguments = call() | {"k": None, "v": None, "rotary": None, "cache.leftpad": ints(5, 0)}
    arguments["cache.block_table"] = np.array([[99, -1, -1], [0, 5, 2]])
    assert (run(arguments)[0] == 0).all()


def test_backends_get_page_numbers_only() -> None:
    """Entries that nothing needs are made into some page's number."""
    views = {name: FRONTEND.view(call()[name]) for name in ("q", "cache.k", "cache.v")}
    table = np.array([[3, 1, -1], [0, 5, 10**9]])
    integers = Integers(seqlens=FRONTEND.view(ints(5, 7)), block_table=FRONTEND.view(table))
    made = describe_cache(Program(), *views.values(), integers=integers)
    assert made.operands.block_table is not None
    found = as_numpy(made.operands.block_table)
    assert found.dtype == np.int32
    assert found.flags.c_contiguous
    assert found[:, :2].tolist() == [[3, 1], [0, 5]]
    assert ((found >= 0) & (found < PAGES)).all()


def test_a_bias_is_checked_against_each_calls_lengths() -> None:
    """Calls that differ in lengths alone are one problem without tables, but not with them."""
    arguments = call() | {"bias": np.zeros(11, F32), "cache.seqlens": ints(5, 8)}
    run(arguments)
    with pytest.raises(
        af.InvalidCall, match=r"^bias: shape \(11,\) is indexed along axis 0 by k, from 0 to 11"
    ):
        run(arguments | {"cache.seqlens": ints(5, 9)})
