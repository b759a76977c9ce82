"""No argument is dropped in silence: with a value that is not its default, each changes the result, is
refused, or is one of `HINTS`, which must not change a bit.

Every argument of every public attention function is looked at; a new one without a value here fails.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import anyflash
from anyflash.compat import flash_attn
from anyflash.compat import flash_attn_interface as generation3
from anyflash.compat.flash_attn import cute, flash_attn_interface

B, T, HQ, HK, D = 2, 8, 4, 2, 16
torch.manual_seed(0)
Q, K, V = (torch.randn(B, T, heads, D) for heads in (HQ, HK, HK))
NEW_K, NEW_V = torch.randn(2, B, 3, HK, D)
STARTS = torch.arange(B + 1, dtype=torch.int32) * T
LENS = torch.tensor([4, 5], dtype=torch.int32)
ANGLES = torch.rand(T, D // 2) * 6
FEW = torch.tensor([3, 2], dtype=torch.int32)

# Ways to be fast, or to be as deterministic as we are anyway.
HINTS: dict[str, Any] = {
    "deterministic": True,
    "num_splits": 3,
    "pack_gqa": True,
    "sm_margin": 2,
    "scheduler_metadata": torch.zeros(4, dtype=torch.int32),
    "disable_scheduler_metadata": True,
    "seqlen_k_per_split": 128,
    "min_seqlen_k": 2,
    # Derivatives are found.
    "score_mod_bwd": lambda *s: s[0],
    # Factors of 8-bit arrays, with which test_mapping.py has them. Programs give them with others too, and
    # there nothing is done with them either.
    "q_descale": torch.full((B, HK), 2.0),
    "k_descale": torch.full((B, HK), 2.0),
    "v_descale": torch.full((B, HK), 2.0),
}
# What these do to the shapes of the other arguments is a test of its own, in the file that is named.
ELSEWHERE = {
    "block_table": "test_acceptance.py",
    "page_table": "test_kvcache.py",
    "cu_seqlens_q": "test_kvcache.py",
    "cu_seqlens_k": "test_acceptance.py",
    "cu_seqlens_k_new": "test_kvcache.py",
    "rotary_seqlens": "test_kvcache.py",
    "max_seqlen_q": "test_mapping.py",
    "max_seqlen_k": "test_mapping.py",
    "num_heads_q": "test_interface.py",
}
VALUES: dict[str, Any] = {
    "dropout_p": 0.3,
    "softmax_scale": 0.9,
    "causal": True,
    "window_size": (2, 1),
    "softcap": 0.7,
    "alibi_slopes": torch.rand(HQ) + 0.1,
    "return_attn_probs": True,
    "return_softmax_lse": True,
    "return_lse": True,
    "attention_chunk": 3,
    "qv": torch.randn(B, T, HQ, D),
    "seqused_q": FEW,
    "seqused_k": FEW,
    "k": NEW_K,
    "v": NEW_V,
    "cache_seqlens": FEW,
    "cache_batch_idx": torch.tensor([1, 0], dtype=torch.int32),
    "cache_leftpad": torch.tensor([2, 1], dtype=torch.int32),
    "rotary_cos": ANGLES.cos(),
    "rotary_sin": ANGLES.sin(),
    "rotary_interleaved": False,
    "gather_kv_indices": FEW,
    "learnable_sink": torch.rand(HQ),
    "score_mod": lambda s, b, h, q, k, info, aux: s * 0.5,
    "mask_mod": lambda b, h, q, k, info, aux: k <= q,
    "aux_tensors": [torch.rand(HQ)],
    "aux_scalars": (1.0,),
    "block_sparse_tensors": (FEW,),
    "block_sparse_tensors_bwd": (FEW,),
}
# Arguments that mean something beside others only; those are then in both calls.
APPENDING: dict[str, Any] = {"k": NEW_K, "v": NEW_V, "cache_seqlens": LENS, "causal": True}
TURNING = {**APPENDING, "rotary_cos": ANGLES.cos(), "rotary_sin": ANGLES.sin()}
BESIDE: dict[str, dict[str, Any]] = {
    "k": {"v": NEW_V, "cache_seqlens": LENS},
    "v": {"k": NEW_K, "cache_seqlens": LENS},
    "rotary_cos": TURNING | {"rotary_cos": ANGLES.sin()},
    "rotary_sin": TURNING | {"rotary_sin": ANGLES.cos()},
    "rotary_interleaved": TURNING,
    "cache_leftpad": {"cache_seqlens": LENS},
    "score_mod_bwd": {"score_mod": lambda s, b, h, q, k, info, aux: s * 0.5},
    "aux_tensors": {
        "score_mod": lambda s, b, h, q, k, info, aux: s * (aux[0][h] if aux else 1.0),
    },
}
# What is left out with an argument to see what it changes.
TOGETHER = {"k": {"v"}, "v": {"k"}}


def packed(*arrays: Tensor) -> list[Tensor]:
    return [x.flatten(0, 1) for x in arrays]


CU = (STARTS, STARTS, T, T)
LIKE_Q = torch.randn(2, B, T, HQ, D)
VERSION_1 = {"dropout_p": 0.0}
# Function, its array arguments, and what else it must be given.
FUNCTIONS: dict[str, tuple[Callable[..., Any], list[Any], dict[str, Any]]] = {
    "flash_attn_func": (flash_attn.flash_attn_func, [Q, K, V], {}),
    "flash_attn_kvpacked_func": (flash_attn.flash_attn_kvpacked_func, [Q, torch.stack((K, V), 2)], {}),
    "flash_attn_qkvpacked_func": (
        flash_attn.flash_attn_qkvpacked_func, [torch.stack((Q, *LIKE_Q), 2)], {}
    ),
    "flash_attn_varlen_func": (flash_attn.flash_attn_varlen_func, [*packed(Q, K, V), *CU], {}),
    "flash_attn_varlen_kvpacked_func": (
        flash_attn.flash_attn_varlen_kvpacked_func, [*packed(Q, torch.stack((K, V), 2)), *CU], {}
    ),
    "flash_attn_varlen_qkvpacked_func": (
        flash_attn.flash_attn_varlen_qkvpacked_func, [*packed(torch.stack((Q, *LIKE_Q), 2)), STARTS, T], {}
    ),
    "flash_attn_with_kvcache": (flash_attn.flash_attn_with_kvcache, [Q, K, V], {}),
    "flash_attn_unpadded_func": (
        flash_attn_interface.flash_attn_unpadded_func, [*packed(Q, K, V), *CU], VERSION_1
    ),
    "generation 3: flash_attn_func": (generation3.flash_attn_func, [Q, K, V], {}),
    "generation 3: flash_attn_varlen_func": (
        generation3.flash_attn_varlen_func, [*packed(Q, K, V), *CU], {}
    ),
    "generation 3: flash_attn_qkvpacked_func": (
        generation3.flash_attn_qkvpacked_func, [torch.stack((Q, *LIKE_Q), 2)], {}
    ),
    "generation 3: flash_attn_with_kvcache": (generation3.flash_attn_with_kvcache, [Q, K, V], {}),
    "generation 4: flash_attn_func": (cute.flash_attn_func, [Q, K, V], {}),
    "generation 4: flash_attn_varlen_func": (
        cute.flash_attn_varlen_func, packed(Q, K, V),
        {"cu_seqlens_q": STARTS, "cu_seqlens_k": STARTS, "max_seqlen_q": T, "max_seqlen_k": T},
    ),
}  # fmt: skip


def arguments(function: Callable[..., Any], given: list[Any]) -> list[str]:
    return list(inspect.signature(function).parameters)[len(given) :]


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        (name, argument)
        for name, (function, given, _) in FUNCTIONS.items()
        for argument in arguments(function, given)
        if argument not in ELSEWHERE
    ],
)
def test_none_is_dropped(name: str, argument: str) -> None:
    function, given, rest = FUNCTIONS[name]
    value = HINTS[argument] if argument in HINTS else VALUES[argument]
    if argument == "qv" and "varlen" in name:
        value = value.flatten(0, 1)
    beside = rest | BESIDE.get(argument, {})

    def call(keywords: dict[str, Any]) -> Any:
        torch.manual_seed(1)
        return function(*(x.clone() if isinstance(x, Tensor) else x for x in given), **keywords)

    try:
        found = call(beside | {argument: value})
    except anyflash.Unsupported as refused:
        said = str(refused)
    else:
        said = None
        plain = call({name: x for name, x in beside.items() if name not in TOGETHER.get(argument, ())})
        assert _same(found, plain) == (argument in HINTS)
    assert said is None or (argument in said and argument not in HINTS)


def _same(found: Any, plain: Any) -> bool:
    first, second = (x if isinstance(x, tuple) else (x,) for x in (found, plain))
    return len(first) == len(second) and all(
        x is y or (isinstance(x, Tensor) and isinstance(y, Tensor) and torch.equal(x, y))
        for x, y in zip(first, second, strict=True)
    )
