"""Calls whose lengths the host does not read, as on a device: what is refused, and what a Problem says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import anyflash as af
from anyflash.contract import direct
from anyflash.core.device import CPU, Device
from anyflash.core.errors import InvalidCall
from anyflash.dispatch.choose import summary
from anyflash.dispatch.explain import explain
from anyflash.semantics import addressing
from anyflash.semantics.cache import Integers, describe_cache
from anyflash.semantics.problem import Program
from anyflash.semantics.rotary import Rotary

F32 = np.float32


@pytest.fixture(autouse=True)
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addressing, "readable", lambda view: False)


def packed(**changes: Any) -> dict[str, Any]:
    """Three sequences in 9 rows of q and 12 of k."""
    call = {
        "q": np.zeros((9, 2, 4), F32),
        "k": np.zeros((12, 1, 4), F32),
        "v": np.zeros((12, 1, 4), F32),
        "cu_seqlens_q": np.array([0, 2, 2, 9], np.int32),
        "cu_seqlens_k": np.array([0, 5, 9, 12], np.int32),
    }
    return call | changes


def test_packed_problem_is_one_of_bounds() -> None:
    problem, operands = direct.prepare(**packed(seqused_k=np.array([1, 2, 3])))
    assert (problem.batch, problem.seqlen_q, problem.seqlen_k) == (3, 9, 12)
    assert operands.cu_seqlens_q is not None
    assert operands.seqused_k is not None
    assert operands.seqused_k.dtype == "int64"


def test_values_are_not_looked_at() -> None:
    wrong = packed(cu_seqlens_q=np.array([5, -1, 900, 3]), seqused_k=np.array([-4, 10**9, 0]))
    assert direct.prepare(**wrong)[0] == direct.prepare(**packed(seqused_k=np.array([1, 2, 3])))[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"cu_seqlens_q": np.zeros(4, F32)},
            "cu_seqlens_q: dtype float32, shape (4,); expected int32 or int64",
        ),
        (
            {"cu_seqlens_k": np.zeros((1, 4), np.int32)},
            "cu_seqlens_k: shape (1, 4); expected (sequences + 1,)",
        ),
        (
            {"cu_seqlens_k": np.zeros(3, np.int32)},
            "cu_seqlens_k: shape (3,); expected (4,) as cu_seqlens_q has",
        ),
        ({"seqused_k": np.zeros(4, np.int32)}, "seqused_k: shape (4,); expected (3,), one entry a sequence"),
        ({"seqused_k": np.zeros(3, F32)}, "seqused_k: dtype float32, shape (3,); expected int32 or int64"),
        ({"cu_seqlens_k": None}, "cu_seqlens_k: None"),
    ],
)
def test_shapes_and_dtypes_are_refused_as_ever(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidCall) as caught:
        direct.prepare(**packed(**changes))
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("bias", "refused"),
    [
        ((3, 2, 7, 5), False),  # the longest lengths
        ((3, 2, 1, 1), False),
        ((2, 2, 7, 5), True),  # two of three sequences: their number is known
        ((3, 3, 7, 5), True),
    ],
)
def test_an_index_is_refused_if_it_surely_leaves_its_table(bias: tuple[int, ...], refused: bool) -> None:
    call = packed(bias=np.zeros(bias, F32))
    if refused:
        with pytest.raises(InvalidCall):
            direct.prepare(**call)
    else:
        direct.prepare(**call)


@pytest.mark.parametrize(
    ("index", "refused"),
    [
        (lambda at: at.k, False),
        (lambda at: at.q - at.k, False),
        (lambda at: at.k - 11, False),
        (lambda at: at.k - 12, True),
        (lambda at: at.k + 6, True),
    ],
)
def test_bounds_of_an_index(index: Any, refused: bool) -> None:
    values = np.zeros(6, F32)
    call = packed(score=lambda s, at: s + af.table(values)[index(at)])
    if refused:
        with pytest.raises(InvalidCall, match="is indexed along axis 0"):
            direct.prepare(**call)
    else:
        direct.prepare(**call)


def test_explained_as_bounds() -> None:
    problem, operands = direct.prepare(**packed(causal=True))
    found = explain(problem, operands, "reference")
    assert not found.exact
    assert found.tiles is None
    # Every row against every key, of 2 heads: q . k and p . v.
    assert found.cost.flops_forward == 2 * 2 * 9 * 12 * (4 + 4)
    said = str(found)
    assert "at most 3.46 kFLOP forward" in said
    assert "unknown: the lengths lie outside host memory" in said
    assert "longest 9 and 12" in summary(problem, CPU)
    assert "of at most 9 and 12" in summary(problem, Device("cuda"))


def view(array: Any) -> Any:
    return None if array is None else direct.view_of(array, True)


def cached(**changes: Any) -> Any:
    """Two sequences, 3 new keys each, in three pages of 4 a sequence."""
    arrays = {
        "q": np.zeros((2, 3, 4, 8), F32),
        "cache_k": np.zeros((9, 4, 2, 8), F32),
        "cache_v": np.zeros((9, 4, 2, 8), F32),
        "k": np.zeros((2, 3, 2, 8), F32),
        "v": np.zeros((2, 3, 2, 8), F32),
        "seqlens": np.zeros(2, np.int64),
        "block_table": np.zeros((2, 3), np.int32),
        "cos": np.ones((40, 4), F32),
    } | changes
    rows = ("q", "cache_k", "cache_v", "k", "v")
    integers = Integers(*(view(arrays.get(name)) for name in Integers._fields))
    rotary = Rotary(view(arrays["cos"]), view(arrays["cos"]), False)
    layout = "thd" if integers.cu_seqlens_q is not None else "bshd"
    return describe_cache(
        Program(), *(view(arrays[name]) for name in rows), integers=integers, layout=layout, rotary=rotary
    )


def test_cache_problem_is_one_of_bounds() -> None:
    wrong = {"seqlens": np.array([-1, 10**9]), "block_table": np.full((2, 3), 10**9)}
    for call in (cached(), cached(**wrong)):
        problem, operands = call.problem, call.operands
        assert (problem.batch, problem.seqlen_q, problem.seqlen_k, operands.longest_k) == (2, 3, 16, 12)
        assert call.placement is None
        assert operands.seqused_k is None
    packed_q = {"q": np.zeros((7, 4, 8), F32), "cu_seqlens_q": np.zeros(3, np.int32)}
    new = {name: np.zeros((5, 2, 8), F32) for name in "kv"} | {"cu_seqlens_k": np.zeros(3, np.int64)}
    call = cached(**packed_q, **new)
    assert (call.problem.batch, call.problem.seqlen_q, call.problem.total_q) == (2, 7, 7)
    assert call.operands.cu_seqlens_q is not None


def test_what_is_given_is_handed_on() -> None:
    """Lengths that nothing is added to or taken from are the number of keys."""
    dense = {"cache_k": np.zeros((5, 30, 2, 8), F32), "cache_v": np.zeros((5, 30, 2, 8), F32)}
    picked = np.array([3, 1])
    call = cached(k=None, v=None, block_table=None, batch_idx=picked, **dense)
    assert call.operands.seqused_k.ptr == call.integers.seqlens.ptr
    assert call.operands.block_table.ptr == picked.ctypes.data
    assert call.operands.block_table.shape == (2, 1)
    whole = {name: array[:2] for name, array in dense.items()}
    call = cached(k=None, v=None, block_table=None, seqlens=None, **whole)
    assert call.operands.seqused_k is None
    assert call.operands.block_table is None
    assert (call.problem.seqlen_k, call.problem.num_pages) == (32, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seqlens": np.zeros(2, F32)}, "cache.seqlens: dtype float32, shape (2,); expected int32 or int64"),
        (
            {"seqlens": np.zeros(3, np.int32)},
            "cache.seqlens: shape (3,); expected (2,), one entry a sequence",
        ),
        ({"seqlens": None}, "cache.seqlens: None; expected (2,) lengths"),
        ({"leftpad": np.zeros((2, 1), np.int32)}, "cache.leftpad: shape (2, 1); expected (2,)"),
        ({"block_table": np.zeros((3, 3), np.int32)}, "cache.block_table: shape (3, 3); expected (2, pages)"),
        ({"block_table": None}, "cache.k: 9 sequences; expected 2, as many as q has"),
        (
            {"batch_idx": np.zeros(2, np.int32)},
            "cache.batch_idx: an array; expected None beside a block_table",
        ),
        (
            {"block_table": np.zeros((2, 0), np.int32)},
            "k: 3 new keys a sequence; expected at most 0, the slots of its cache",
        ),
        (
            {"k": np.zeros((3, 3, 2, 8), F32), "v": np.zeros((3, 3, 2, 8), F32)},
            "k: 3 sequences; expected 2, as many as q has",
        ),
        ({"rotary_positions": np.zeros((2, 4), np.int32)}, "rotary_positions: shape (2, 4); expected (2, 3)"),
        (
            {"rotary_positions": np.zeros((2, 3), np.int32), "q": np.zeros((2, 4, 4, 8), F32)},
            "rotary_positions: 3 for sequence 0, as many as new keys; expected at least 4",
        ),
        ({"cos": np.ones((0, 4), F32)}, "rotary cos: shape (0, 4); expected at least one position"),
    ],
)
def test_what_a_cache_surely_lacks(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidCall) as caught:
        cached(**changes)
    assert str(caught.value).startswith(message)
