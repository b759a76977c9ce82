"""What is refused, in flash_attn's words, and what is not supported, in ours."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import anyflash
from anyflash.compat import flash_attn
from anyflash.compat import flash_attn_interface as generation3
from anyflash.compat.errors import Refused
from anyflash.compat.flash_attn import cute, flash_attn_interface
from anyflash.compat.flash_attn.losses import cross_entropy
from anyflash.compat.flash_attn.modules import mha
from compat.arrays import arrays, starts

Q, K, V = arrays(dtype=torch.float32)
CU_Q, CU_K = starts(6, 6), starts(9, 9)
QP, KP, VP = (x.flatten(0, 1) for x in (Q, K, V))
COS = torch.zeros(9, 8)
LENS = torch.tensor([3, 4], dtype=torch.int32)
PRIVATE = (None, False, -1, -1, 0.0, None)

dense, varlen = flash_attn.flash_attn_func, flash_attn.flash_attn_varlen_func
cached = flash_attn.flash_attn_with_kvcache
REFUSED: list[tuple[str, Callable[[], object]]] = [
    ("query and key must have the same dtype", lambda: dense(Q, K.half(), V)),
    ("query and value must have the same dtype", lambda: dense(Q, K, V.half())),
    (
        "k must have shape (batch_size, seqlen_k, num_heads_k, head_size)",
        lambda: dense(Q, K[:1], V),
    ),
    ("v must have shape (batch_size, seqlen_k, num_heads_k, head_size)", lambda: dense(Q, K, V[:, :3])),
    (
        "Number of heads in key/value must divide number of heads in query",
        lambda: dense(Q[:, :, :3], K, V),
    ),
    ("cu_seqlens_q must have dtype int32", lambda: varlen(QP, KP, VP, CU_Q.long(), CU_K, 6, 9)),
    (
        "cu_seqlens_q must be contiguous",
        lambda: varlen(QP, KP, VP, torch.stack((CU_Q, CU_Q), 1)[:, 0], CU_K, 6, 9),
    ),
    (
        "block_table must have dtype torch.int32",
        lambda: varlen(QP, K, V, CU_Q, CU_K, 6, 9, block_table=torch.zeros(2, 1)),
    ),
    ("ALiBi slopes must have dtype fp32", lambda: dense(Q, K, V, alibi_slopes=torch.ones(4).half())),
    (
        "return_softmax is only supported when p_dropout > 0.0",
        lambda: flash_attn_interface._flash_attn_forward(Q, K, V, 0.0, *PRIVATE, True),
    ),
    ("If key is supplied, value must also be passed in", lambda: cached(Q, K, V, K[:, :1])),
    ("If key is supplied, seqlens_k must also be passed in", lambda: cached(Q, K, V, K[:, :1], V[:, :1])),
    (
        "If key is supplied, it must have seqlen <= the seqlen of the KV cache",
        lambda: cached(Q, K, V, K, V, cache_seqlens=LENS),
    ),
    (
        "We don't support Paged KV and leftpad_k running at the same time yet",
        lambda: cached(Q, K, V, cache_leftpad=LENS, block_table=LENS[:, None] * 0),
    ),
    (
        "Paged KVcache does not support cache_batch_idx",
        lambda: cached(Q, K, V, cache_batch_idx=LENS, block_table=LENS[:, None] * 0),
    ),
    ("cache_batch_idx must have dtype int32", lambda: cached(Q, K, V, cache_batch_idx=LENS.long())),
    ("k_cache must have contiguous last dimension", lambda: cached(Q, K.mT.contiguous().mT, V)),
    (
        "If rotary cos/sin are provided, new key / value to be appended to KV cache must also be provided",
        lambda: cached(Q, K, V, rotary_cos=COS, rotary_sin=COS),
    ),
    (
        "cos/sin seqlen must be at least the seqlen of KV cache",
        lambda: cached(Q, K, V, K[:, :1], V[:, :1], COS[:5], COS[:5], LENS),
    ),
    (
        "rotary_dim must be <= headdim",
        lambda: cached(Q, K, V, K[:, :1], V[:, :1], torch.ones(9, 9), torch.ones(9, 9), LENS),
    ),
    (
        "rotary_cos must have the same dtype as query",
        lambda: cached(Q, K, V, K[:, :1], V[:, :1], COS.half(), COS.half(), LENS),
    ),
]


@pytest.mark.parametrize(("sentence", "call"), REFUSED, ids=[sentence for sentence, _ in REFUSED])
def test_refused_in_the_same_words(sentence: str, call: Callable[[], object]) -> None:
    """The first line is flash_attn's, the error both its kind (RuntimeError) and ours; nothing is written."""
    before = [x.clone() for x in (K, V)]
    with pytest.raises(Refused) as raised:
        call()
    assert str(raised.value).splitlines()[0] == sentence
    assert isinstance(raised.value, RuntimeError)
    assert isinstance(raised.value, anyflash.InvalidCall)
    assert torch.equal(before[0], K)
    assert torch.equal(before[1], V)


UNSUPPORTED: list[tuple[str, Callable[[], object]]] = [
    ("gather_kv_indices", lambda: cute.flash_attn_func(Q, K, V, gather_kv_indices=LENS)),
    ("block_sparse_tensors", lambda: cute.flash_attn_func(Q, K, V, block_sparse_tensors=(LENS,))),
    ("aux_scalars", lambda: cute.flash_attn_func(Q, K, V, aux_scalars=(1,))),
    ("score_mod", lambda: cute.flash_attn_func(Q, K, V, score_mod=lambda s, *_: s, softcap=1.0)),
    ("qv", lambda: generation3.flash_attn_with_kvcache(Q, K, V, qv=Q)),
    ("q=torch.float8", lambda: generation3.flash_attn_with_kvcache(Q.to(torch.float8_e5m2fnuz), K, V)),
    ("k_new", lambda: generation3._flash_attn_forward(Q, K, V, k_new=K)),
    ("process_group", lambda: cross_entropy.CrossEntropyLoss(process_group=object())),
    ("ParallelMHA", lambda: mha.ParallelMHA(64, 4, None)),
    (
        "generator",
        lambda: flash_attn_interface.flash_attn_gpu.fwd(
            Q, K, V, None, None, 0.0, 0.25, False, -1, -1, 0.0, False, torch.Generator()
        ),
    ),
]


@pytest.mark.parametrize(("argument", "call"), UNSUPPORTED, ids=[name for name, _ in UNSUPPORTED])
def test_what_cannot_be_done_says_so(argument: str, call: Callable[[], object]) -> None:
    with pytest.raises(anyflash.Unsupported, match=argument):
        call()
