"""Differences of generations 3 and 4."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

import anyflash
from anyflash.compat import flash_attn_interface as generation3
from anyflash.compat.flash_attn import cute, flash_attn_varlen_func
from anyflash.compat.flash_attn.cute import interface as generation4
from compat.rows import INF, KEYS, ROWS, packed, pair, row, visible


@row("offset window")
def _() -> None:
    distance = np.arange(KEYS) - (np.arange(ROWS)[:, None] + KEYS - ROWS)
    for left, right in ((None, None), (2, 1), (None, 0), (3, None), (-1, 3), (4, -2), (-1, None), (None, -2)):
        for causal in (False, True):
            end = 0 if causal else right
            wanted = (distance >= -(INF if left is None else left)) & (
                distance <= (INF if end is None else end)
            )
            if left is not None and end is not None and left + end < 0:
                wanted = distance <= (0 if causal else INF)
            call = lambda *qkv, c=causal, w=(left, right): cute.flash_attn_func(
                *qkv, causal=c, window_size=w
            )[0]
            assert np.array_equal(visible(call), wanted), (left, right, causal)
    q, k, v = pair()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cute.flash_attn_func(q, k, v, window_size=(-1, -1))
        with pytest.raises(UserWarning, match="None there"):
            cute.flash_attn_func(q, k, v, window_size=(-1, 0))


@row("scale with qv")
def _() -> None:
    q, k, v = pair()
    qv = torch.randn_like(q)
    s = torch.einsum("bihd,bjhd->bhij", q, k) + torch.einsum("bihd,bjhd->bhij", qv, v)
    wanted = torch.einsum("bhij,bjhd->bihd", (s * 16**-0.5).softmax(-1), v)
    torch.testing.assert_close(generation3.flash_attn_func(q, k, v, qv=qv), wanted)
    out, lse = cute.flash_attn_func(q, k, v, qv=qv, return_lse=True)
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(lse, (s * 16**-0.5).logsumexp(-1).transpose(1, 2))


@row("used rows")
def _() -> None:
    q, k, v = pair()
    used = torch.tensor([2, 5], dtype=torch.int32)
    for call in (
        lambda: generation3.flash_attn_varlen_func(
            *packed(q, k, v), seqused_q=used, causal=True, return_attn_probs=True
        ),
        lambda: cute.flash_attn_varlen_func(
            q.flatten(0, 1), k, v, None, torch.tensor([0, 5, 10], dtype=torch.int32), seqused_q=used,
            causal=True, return_lse=True,
        ),
    ):  # fmt: skip
        out, lse = call()
        for b, n in enumerate(used.tolist()):
            wanted = anyflash.attention(q[b : b + 1, :n], k[b : b + 1], v[b : b + 1], causal=True)
            assert torch.equal(out[b * ROWS : b * ROWS + n], wanted[0])
        assert (out[2:ROWS] == 0).all()
        assert (lse[:, 2:ROWS] == -INF).all()


@row("pages")
def _() -> None:
    q, k, v = pair()
    page = 3
    order = torch.randperm(6)
    pages = [x.new_full((6, page, 2, 8), torch.nan) for x in (k, v)]
    for pool, x in zip(pages, (k, v), strict=True):
        pool[order] = x.reshape(6, page, 2, 8)
    table = order.reshape(2, 3).to(torch.int32)
    rows, *_, starts, starts_k, _, _ = packed(q, k, v)
    wanted = anyflash.attention(q, k, v, causal=True).flatten(0, 1)
    lens = (starts, starts_k, ROWS, KEYS)
    assert torch.equal(flash_attn_varlen_func(rows, *pages, *lens, causal=True, block_table=table), wanted)
    used = torch.tensor([KEYS, KEYS], dtype=torch.int32)
    call = {"cu_seqlens_q": starts, "seqused_k": used, "page_table": table, "causal": True}
    assert torch.equal(cute.flash_attn_varlen_func(rows, *pages, **call)[0], wanted)
    out, *_ = generation3._flash_attn_forward(q, *pages, seqused_k=used, page_table=table, causal=True)
    assert torch.equal(out.flatten(0, 1), wanted)


@row("chunks")
def _() -> None:
    position = np.arange(ROWS)[:, None] + KEYS - ROWS
    for size in (1, 3, 4):
        wanted = (position // size == np.arange(KEYS) // size) & (np.arange(KEYS) <= position)
        call = lambda *qkv, n=size: generation3.flash_attn_func(*qkv, causal=True, attention_chunk=n)
        assert np.array_equal(visible(call), wanted)


@row("8-bit floats")
def _() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 6, h, 16).to(torch.float8_e4m3fn) for h in (4, 2, 2))
    factors = [torch.rand(2, 2) + 0.5 for _ in range(3)]
    ours = dict(zip(("descale_q", "descale_k", "descale_v"), factors, strict=True))
    theirs = dict(zip(("q_descale", "k_descale", "v_descale"), factors, strict=True))
    out = generation3.flash_attn_func(q, k, v, None, False, None, *factors)
    assert out.dtype is torch.bfloat16
    assert torch.equal(out, anyflash.attention(q, k, v, **ours))
    by_head = [f.repeat_interleave(n, 1)[:, None, :, None] for f, n in zip(factors, (2, 1, 1), strict=True)]
    wide = anyflash.attention(*(x.float() * f for x, f in zip((q, k, v), by_head, strict=True)))
    torch.testing.assert_close(out.float(), wide, rtol=torch.finfo(torch.bfloat16).eps, atol=1e-2)
    starts = torch.tensor([0, 6, 12], dtype=torch.int32)
    rows = [x.flatten(0, 1) for x in (q, k, v)]
    flat = generation3.flash_attn_varlen_func(*rows, starts, starts, 6, 6, **theirs)
    assert torch.equal(flat, out.flatten(0, 1))
    used = torch.tensor([6, 4], dtype=torch.int32)
    cached = generation3.flash_attn_with_kvcache(q[:, -1:], k, v, cache_seqlens=used, causal=True, **theirs)
    wanted = anyflash.attention_kvcache(q[:, -1:], anyflash.KVCache(k, v, used), causal=True, **ours)
    assert torch.equal(cached, wanted)
    other = [x.float().to(torch.float8_e4m3fnuz) for x in (q, k, v)]
    amd = generation3.flash_attn_func(*other)
    assert torch.equal(amd, anyflash.attention(*(x.float() for x in other)).bfloat16())
    half = q.half(), k.half(), v.half()
    assert torch.equal(
        generation3.flash_attn_func(*half, q_descale=factors[0]), generation3.flash_attn_func(*half)
    )


@row("sink")
def _() -> None:
    q, k, v = pair()
    sink = torch.tensor([0.5, -1.0], requires_grad=True)
    out, lse = cute.flash_attn_func(q, k, v, learnable_sink=sink, return_lse=True)
    raw = torch.einsum("bihd,bjhd->bhij", q, k) * 8**-0.5
    wanted = torch.cat((raw, sink.double()[None, :, None, None].expand(2, -1, ROWS, 1)), -1).logsumexp(-1)
    torch.testing.assert_close(lse, wanted)
    p = (raw - wanted[..., None]).exp()
    torch.testing.assert_close(out, torch.einsum("bhij,bjhd->bihd", p, v))
    (got,) = torch.autograd.grad(out.sum() + lse.sum(), sink, retain_graph=True)
    plain = torch.einsum("bhij,bjhd->bihd", p, v).sum() + wanted.sum()
    torch.testing.assert_close(got, torch.autograd.grad(plain, sink)[0])


@row("modifications")
def _() -> None:
    q, k, v = pair()
    slopes = torch.tensor([0.5, 0.25], dtype=torch.float64)
    rel = lambda s, b, h, q_idx, k_idx, lengths, aux: s - aux[0][h] * abs(q_idx - k_idx)
    out, _ = cute.flash_attn_func(q, k, v, score_mod=rel, aux_tensors=[slopes])
    bias = -slopes[:, None, None] * (torch.arange(ROWS)[:, None] - torch.arange(KEYS)).abs()
    torch.testing.assert_close(out, anyflash.attention(q, k, v, bias=bias))
    shifted = lambda b, h, m, n, lengths, aux: n <= m + lengths.seqlen_k - lengths.seqlen_q
    with pytest.warns(UserWarning, match="takes the place of causal"):
        out, _ = cute.flash_attn_func(q, k, v, mask_mod=shifted, causal=True, window_size=(1, 0))
    torch.testing.assert_close(out, anyflash.attention(q, k, v, causal=True))

    def cutlass_only(*_: object) -> None:
        raise TypeError("a tensor of cutlass was expected")

    with pytest.raises(anyflash.Unsupported, match="a tensor of cutlass was expected"):
        cute.flash_attn_func(q, k, v, score_mod=cutlass_only)


@row("what is returned")
def _() -> None:
    q, k, v = pair()
    out, lse = cute.flash_attn_func(q, k, v)
    assert lse is None
    wanted, wanted_lse = anyflash.attention(q, k, v, return_lse=True)
    assert torch.equal(out, wanted)
    assert torch.equal(cute.flash_attn_func(q, k, v, return_lse=True)[1], wanted_lse)
    assert torch.equal(cute.flash_attn_func(q.clone().requires_grad_(), k, v)[1], wanted_lse)
    assert torch.equal(generation4._flash_attn_fwd(q, k, v, return_lse=True)[1], wanted_lse)
