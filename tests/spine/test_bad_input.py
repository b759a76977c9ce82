"""Every way to call `attention` wrongly, and what the user is told: messages.txt, line by line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import anyflash as af
from anyflash.backends.registry import entries
from anyflash.core.errors import InvalidCall
from anyflash.frontends import registry
from anyflash.semantics.expr import Table

BF16 = ml_dtypes.bfloat16
Q = np.zeros((2, 5, 4, 8), np.float32)
K = np.zeros((2, 7, 2, 8), np.float32)
PACKED = np.zeros((9, 2, 8), np.float32)
STARTS = np.array([0, 3, 3, 9], np.int32)


class Foreign:
    """An array of a framework that is not that of q."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape


class Other:
    name = "other"

    def dtype(self, array: Foreign) -> str:
        return "float32"


@pytest.fixture(autouse=True)
def foreign(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._by_type, Foreign, Other())
    monkeypatch.setattr(registry, "frameworks", lambda: ("numpy", "other"))


def starts(*entries: int) -> np.ndarray:
    return np.array(entries, np.int32)


DENSE: dict[str, Callable[[], dict[str, Any]]] = {
    # q, k, v
    "q_list": lambda: {"q": [[1.0]]},
    "q_object": lambda: {"q": Q.astype(object)},
    "q_byte_swapped": lambda: {"q": Q.astype(">f4")},
    "q_integer": lambda: {"q": Q.astype(np.int32)},
    "q_complex": lambda: {"q": Q.astype(np.complex64)},
    "q_masked_array": lambda: {"q": np.ma.masked_array(Q)},
    "q_rank": lambda: {"q": Q[0]},
    "k_dtype": lambda: {"k": K.astype(np.float64)},
    "v_dtype": lambda: {"v": K.astype(BF16)},
    "v_other_framework": lambda: {"v": Foreign((2, 7, 2, 8))},
    "k_batch": lambda: {"k": K[:1]},
    "v_batch": lambda: {"v": K[:1]},
    "v_rows": lambda: {"v": K[:, :6]},
    "k_rank": lambda: {"k": K[..., None]},
    "head_ratio": lambda: {"k": np.zeros((2, 7, 3, 8), np.float32)},
    "no_heads": lambda: {"k": K[:, :, :0], "v": K[:, :, :0]},
    "v_heads": lambda: {"v": K[:, :, :1]},
    "k_head_dim": lambda: {"k": K[..., :6]},
    "head_dim_zero": lambda: {"q": Q[..., :0], "k": K[..., :0]},
    "head_dim_large": lambda: {
        "q": np.zeros((1, 1, 1, 577), np.float32),
        "k": np.zeros((1, 1, 1, 577), np.float32),
        "v": np.zeros((1, 1, 1, 8), np.float32),
    },
    "v_head_dim_large": lambda: {"v": np.zeros((2, 7, 2, 600), np.float32)},
    # words and numbers
    "layout_unknown": lambda: {"layout": "sbhd"},
    "layout_packed": lambda: {"layout": "thd"},
    "layout_wrong": lambda: {"layout": "bhsd"},
    "causal_text": lambda: {"causal": "yes"},
    "window_number": lambda: {"window": 3},
    "window_negative": lambda: {"window": (-1, 0)},
    "window_fraction": lambda: {"window": (1.5, None)},
    "window_three": lambda: {"window": (1, 2, 3)},
    "scale_nan": lambda: {"scale": float("nan")},
    "scale_inf": lambda: {"scale": float("inf")},
    "scale_array": lambda: {"scale": np.ones(3)},
    "softcap_zero": lambda: {"softcap": 0},
    "softcap_negative": lambda: {"softcap": -1.0},
    "softcap_nan": lambda: {"softcap": float("nan")},
    "dropout_one": lambda: {"dropout_p": 1.0},
    "dropout_negative": lambda: {"dropout_p": -0.1},
    "dropout_nan": lambda: {"dropout_p": float("nan")},
    "seed_negative": lambda: {"dropout_p": 0.5, "seed": -1},
    "seed_large": lambda: {"dropout_p": 0.5, "seed": 2**63},
    "seed_fraction": lambda: {"dropout_p": 0.5, "seed": 0.5},
    "deterministic_text": lambda: {"deterministic": "yes"},
    "backend_unknown": lambda: {"backend": "cuda"},
    "backend_type": lambda: {"backend": 3},
    # arrays beside them
    "bias_list_of_numbers": lambda: {"bias": [1.0]},
    "bias_integer": lambda: {"bias": np.zeros((5, 7), np.int32)},
    "bias_bool": lambda: {"bias": np.zeros((5, 7), bool)},
    "bias_keys": lambda: {"bias": np.zeros((5, 6), np.float32)},
    "bias_second": lambda: {"bias": [np.zeros((5, 7), np.float32), np.zeros((3, 1, 1, 7), np.float32)]},
    "bias_rank": lambda: {"bias": np.zeros((1, 2, 4, 5, 7), np.float32)},
    "bias_other_framework": lambda: {"bias": Foreign((5, 7))},
    "mask_float": lambda: {"mask": np.zeros((5, 7), np.float32)},
    "mask_shape": lambda: {"mask": np.ones((7, 5), bool)},
    "mask_number": lambda: {"mask": 3},
    "alibi_shape": lambda: {"alibi_slopes": np.ones(2, np.float32)},
    "alibi_dtype": lambda: {"alibi_slopes": np.ones(4, np.int64)},
    "sinks_shape": lambda: {"sinks": np.zeros(2, np.float32)},
    "sinks_dtype": lambda: {"sinks": np.zeros(4, np.int32)},
    "sinks_list": lambda: {"sinks": [0.0] * 4},
    # functions
    "score_number": lambda: {"score": 3.0},
    "score_nothing": lambda: {"score": lambda s, at: None},
    "score_condition": lambda: {"score": lambda s, at: at.q > at.k},
    "score_array": lambda: {"score": lambda s, at: np.zeros(3)},
    "mask_returns_nothing": lambda: {"mask": lambda at: None},
    "mask_returns_score": lambda: {"mask": lambda at: at.q - at.k},
    "table_of_list": lambda: {"score": lambda s, at: s + af.table([1.0])[at.head]},
    "table_dtype": lambda: {"score": lambda s, at: s + af.table(np.zeros(4, np.uint32))[at.head]},
    "table_head": lambda: {"score": lambda s, at: s + af.table(np.zeros(3, np.float32))[at.head]},
    "table_keys": lambda: {"mask": lambda at: af.table(np.zeros(6, np.int32))[at.k] == 0},
    "table_positions": lambda: {
        "score": lambda s, at: s + af.table(np.zeros((5, 5), np.float32))[at.row, at.q]
    },
    "table_outside": lambda: {"score": lambda s, at: s + af.table(np.zeros(9, np.float32))[at.k + 9]},
    "table_negative": lambda: {"score": lambda s, at: s + af.table(np.zeros(9, np.float32))[at.k - 7]},
    "table_other_framework": lambda: {"score": lambda s, at: s + Table(Foreign((4,)), "float")[at.head]},
}
# Changes to a call of attention_varlen with 9 rows in sequences of 3, 0 and 6.
VARLEN: dict[str, Callable[[], dict[str, Any]]] = {
    "cu_seqlens_missing": lambda: {"cu_seqlens_k": None},
    "cu_seqlens_list": lambda: {"cu_seqlens_q": [0, 3, 9]},
    "cu_seqlens_dtype": lambda: {"cu_seqlens_q": STARTS.astype(np.float32)},
    "cu_seqlens_unsigned": lambda: {"cu_seqlens_k": STARTS.astype(np.uint32)},
    "cu_seqlens_rank": lambda: {"cu_seqlens_q": STARTS[None]},
    "cu_seqlens_k_rank": lambda: {"cu_seqlens_k": STARTS[None]},
    "cu_seqlens_empty": lambda: {"cu_seqlens_q": STARTS[:0]},
    "cu_seqlens_start": lambda: {"cu_seqlens_q": starts(1, 3, 3, 9)},
    "cu_seqlens_descending": lambda: {"cu_seqlens_k": starts(0, 5, 3, 9)},
    "cu_seqlens_end": lambda: {"cu_seqlens_q": starts(0, 3, 3, 10)},
    "cu_seqlens_counts": lambda: {"cu_seqlens_k": starts(0, 3, 9)},
    "cu_seqlens_other_framework": lambda: {"cu_seqlens_k": Foreign((4,))},
    "seqused_shape": lambda: {"seqused_k": starts(1, 0)},
    "seqused_dtype": lambda: {"seqused_k": np.ones(3)},
    "seqused_large": lambda: {"seqused_k": starts(3, 1, 6)},
    "seqused_negative": lambda: {"seqused_k": starts(3, 0, -1)},
    "packed_rank": lambda: {"q": Q},
    "packed_k_rank": lambda: {"k": Q},
    "packed_layout": lambda: {"layout": "bshd"},
    "packed_v_rows": lambda: {"v": PACKED[:8]},
    "packed_bias_batch": lambda: {"bias": np.zeros((2, 1, 1, 6), np.float32)},
    "packed_bias_keys": lambda: {"bias": np.zeros((3, 1, 1, 5), np.float32)},
    "packed_table_positions": lambda: {
        "cu_seqlens_k": starts(0, 2, 3, 9),
        "score": lambda s, at: s + af.table(np.zeros(9, np.float32))[at.q],
    },
    "packed_table_used": lambda: {
        "seqused_k": starts(3, 0, 5),
        "mask": lambda at: af.table(np.zeros(4, bool))[at.k],
    },
}
# Changes to a merge of two results of 2 sequences, 5 queries and 4 heads.
OUT, LSE = np.zeros((2, 5, 4, 8), np.float32), np.zeros((2, 4, 5), np.float32)
MERGE: dict[str, Callable[[], dict[str, Any]]] = {
    "merge_list": lambda: {"out_a": [0.0]},
    "merge_framework": lambda: {"lse_b": Foreign((2, 4, 5))},
    "merge_rank": lambda: {"out_a": OUT[0, 0]},
    "merge_dtype": lambda: {"out_a": OUT.astype(np.int32)},
    "merge_other_dtype": lambda: {"out_b": OUT.astype(np.float64)},
    "merge_other_shape": lambda: {"out_b": OUT[:, :4]},
    "merge_lse_rows": lambda: {"lse_a": LSE.swapaxes(1, 2)},
    "merge_lse_dtype": lambda: {"lse_b": LSE.astype(BF16)},
    "merge_layout": lambda: {"layout": "bhsd"},
    "merge_layout_unknown": lambda: {"layout": "sbhd"},
}
CASES = [*DENSE, *VARLEN, *MERGE]
MESSAGES = dict(
    line.split(": ", 1)
    for line in (Path(__file__).parent / "messages.txt").read_text(encoding="utf-8").splitlines()
)


def arguments(case: str) -> tuple[Callable[..., Any], dict[str, Any]]:
    if case in MERGE:
        return af.merge, {"out_a": OUT, "lse_a": LSE, "out_b": OUT, "lse_b": LSE, **MERGE[case]()}
    if case in DENSE:
        return af.attention, {"q": Q, "k": K, "v": K, **DENSE[case]()}
    lengths = {"cu_seqlens_q": STARTS, "cu_seqlens_k": STARTS}
    return af.attention_varlen, {"q": PACKED, "k": PACKED, "v": PACKED, **lengths, **VARLEN[case]()}


def message(case: str) -> str:
    """What the user is told, on one line."""
    function, changed = arguments(case)
    with pytest.raises(InvalidCall) as caught:
        function(**changed)
    text = str(caught.value)
    assert text.startswith(caught.value.argument)
    return " ".join(text.split())


@pytest.mark.parametrize("case", CASES)
def test_message(case: str) -> None:
    backends = ", ".join(map(repr, entries()))
    assert message(case) == MESSAGES[case].replace("{backends}", backends)


@pytest.mark.parametrize("case", [*DENSE, *VARLEN])
def test_explain_refuses_too(case: str) -> None:
    """What the attention calls refuse is not explained."""
    _, refused = arguments(case)
    with pytest.raises(InvalidCall):
        af.explain(**refused)


def test_every_message_has_a_case() -> None:
    assert set(MESSAGES) == set(CASES)
