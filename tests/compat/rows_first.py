"""Differences of generations 1 and 2, and of all."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

import anyflash
from anyflash.compat import flash_attn_interface as generation3
from anyflash.compat.flash_attn import cute, flash_attn_func, flash_attn_interface, flash_attn_varlen_func
from anyflash.compat.flash_attn import flash_attn_triton as triton
from anyflash.semantics import rng
from compat.plain import seen
from compat.rows import INF, KEYS, ROWS, packed, pair, row, visible


@row("no window")
def _() -> None:
    for sides in ((-1, -1), (2, 1), (0, 0), (-1, 2), (3, -1), (-5, 0)):
        for causal in (False, True):
            for attention in (flash_attn_func, generation3.flash_attn_func):
                call = lambda *qkv, f=attention, c=causal, w=sides: f(*qkv, causal=c, window_size=w)
                assert np.array_equal(visible(call), seen(ROWS, KEYS, causal, sides))


@row("causal in version 1")
def _() -> None:
    top_left = np.arange(KEYS) <= np.arange(ROWS)[:, None]
    assert np.array_equal(visible(lambda *qkv: triton.flash_attn_func(*qkv, None, True)), top_left)

    def unpadded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        starts = [torch.tensor([0, x.shape[1]], dtype=torch.int32) for x in (q, k)]
        call = (q[0], k[0], v[0], *starts, ROWS, KEYS, 0.0)
        return flash_attn_interface.flash_attn_unpadded_func(*call, causal=True)[None]

    assert np.array_equal(visible(unpadded), top_left)


@row("no softcap")
def _() -> None:
    q, k, v = pair()
    ours = anyflash.attention(q, k, v, softcap=2.0)
    assert torch.equal(flash_attn_func(q, k, v, softcap=0.0), anyflash.attention(q, k, v))
    assert torch.equal(flash_attn_func(q, k, v, softcap=2.0), ours)
    assert torch.equal(generation3.flash_attn_func(q, k, v, softcap=2.0), ours)
    assert torch.equal(cute.flash_attn_func(q, k, v, softcap=2.0)[0], ours)


@row("lse of a row without keys")
def _() -> None:
    q, k, v = pair(rows=6, keys=4)
    out, lse, _ = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert (lse[..., :2] == INF).all()
    assert torch.isfinite(lse[..., 2:]).all()
    assert (out[:, :2] == 0).all()
    _, lse3 = generation3.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    _, lse4 = cute.flash_attn_func(q, k, v, causal=True, return_lse=True)
    for other in (lse3, lse4):
        assert (other[..., :2] == -INF).all()
        assert torch.equal(other[..., 2:], lse[..., 2:])
    _, none, _ = flash_attn_func(q, k[:, :0], v[:, :0], return_attn_probs=True)
    assert (none == INF).all()


@row("lse with ALiBi")
def _() -> None:
    q, k, v = pair(keys=7)
    slopes = torch.tensor([[0.5, 0.25], [1.0, 2.0]])
    position = torch.arange(ROWS) + 7 - ROWS
    raw = torch.einsum("bihd,bjhd->bhij", q, k) * 8**-0.5
    key = torch.arange(7)
    by_key = raw + slopes[:, :, None, None] * key
    by_distance = raw - slopes[:, :, None, None] * (position[:, None] - key).abs()
    for causal, sides, bias in (
        (True, (-1, -1), by_key),
        (True, (7, 3), by_key),
        (False, (-1, 0), by_key),
        (True, (3, 0), by_distance),
        (False, (-1, -1), by_distance),
        (False, (3, 0), by_distance),
    ):
        allowed = torch.from_numpy(seen(ROWS, 7, causal, sides))
        wanted = bias.masked_fill(~allowed, -INF).logsumexp(-1)
        call = {"causal": causal, "window_size": sides, "alibi_slopes": slopes, "return_attn_probs": True}
        _, lse, _ = flash_attn_func(q, k, v, **call)
        torch.testing.assert_close(lse, wanted)
        _, lse, _ = flash_attn_varlen_func(*packed(q, k, v), **call)
        torch.testing.assert_close(lse.unflatten(1, (2, ROWS)).transpose(0, 1), wanted)


@row("lse in version 1")
def _() -> None:
    q, _k, _v = pair()
    starts = torch.tensor([0, 3, 10], dtype=torch.int32)
    rows = q.flatten(0, 1)
    call = (rows, rows, rows, starts, starts, 7, 7, 0.0)
    _, lse, _ = flash_attn_interface.flash_attn_unpadded_func(*call, return_attn_probs=True)
    _, ours = anyflash.attention_varlen(
        rows, rows, rows, cu_seqlens_q=starts, cu_seqlens_k=starts, return_lse=True
    )
    assert lse.shape == (2, 2, 7)
    assert torch.equal(lse[0, :, :3], ours[:, :3])
    assert torch.equal(lse[1], ours[:, 3:])
    assert (lse[0, :, 3:] == INF).all()


@row("probabilities")
def _() -> None:
    q, k, v = pair()
    for call in (
        lambda p: flash_attn_func(q, k, v, p, causal=True, return_attn_probs=True),
        lambda p: flash_attn_varlen_func(*packed(q, k, v), p, causal=True, return_attn_probs=True),
    ):
        assert call(0.0)[2].shape == (0,)
        out, _, s_dmask = call(0.4)
        assert s_dmask.shape == (2, 2, 128, 128)
        p = s_dmask[:, :, :ROWS, :KEYS]
        raw = torch.einsum("bihd,bjhd->bhij", q, k) * 8**-0.5
        allowed = torch.from_numpy(seen(ROWS, KEYS, True, (-1, -1)))
        torch.testing.assert_close(p.abs(), raw.masked_fill(~allowed, -INF).softmax(-1))
        dropped = torch.signbit(p)
        assert 0 < int(dropped.sum()) < dropped.numel()
        kept = p.masked_fill(dropped, 0) / 0.6
        torch.testing.assert_close(out.reshape(q.shape), torch.einsum("bhij,bjhd->bihd", kept, v))


@row("random state")
def _() -> None:
    q, k, v = pair()
    call = (0.4, None, False, -1, -1, 0.0, None, False)
    torch.manual_seed(5)
    out, _, _, state = flash_attn_interface._flash_attn_forward(q, k, v, *call)
    torch.manual_seed(5)
    assert torch.equal(out, flash_attn_func(q, k, v, 0.4))
    assert (state.dtype, state.shape, int(state[1])) == (torch.int64, (2,), 0)
    assert torch.equal(out, anyflash.attention(q, k, v, dropout_p=0.4, seed=int(state[0])))


@row("chance of dropout")
def _() -> None:
    q, k, v = pair()
    out, _, _, state = flash_attn_interface._flash_attn_forward(
        q, k, v, 0.3, None, False, -1, -1, 0.0, None, False
    )
    p = (torch.einsum("bihd,bjhd->bhij", q, k) * 8**-0.5).softmax(-1)
    words = [[rng.words(int(state[0]), b, h, ROWS, KEYS) for h in range(2)] for b in range(2)]
    kept = torch.from_numpy(np.array(words).astype(np.float64) >= 0.3 * 2**32)
    torch.testing.assert_close(out, torch.einsum("bhij,bjhd->bihd", p * kept / 0.7, v))


@row("softmax_d")
def _() -> None:
    q, k, v = pair()
    dout, terms = torch.randn_like(q), (0.0, None, False, -1, -1, 0.0, None)
    out, lse, _, _ = flash_attn_interface._flash_attn_forward(q, k, v, *terms, False)
    d = flash_attn_interface._flash_attn_backward(dout, q, k, v, out, lse, None, None, None, *terms, False)
    assert d.shape == (2, 2, 128)
    torch.testing.assert_close(d[:, :, :ROWS], (dout * out).sum(-1).transpose(1, 2))
    assert (d[:, :, ROWS:] == 0).all()
    rows, keys, values, starts, starts_k, *longest = packed(q, k, v)
    d = flash_attn_interface._flash_attn_varlen_backward(
        dout.flatten(0, 1), rows, keys, values, out.flatten(0, 1), lse.transpose(0, 1).flatten(1), None, None,
        None, starts, starts_k, *longest, *terms, False,
    )  # fmt: skip
    assert d.shape == (2, 2 * ROWS + 128 * 2)


@row("longest lengths")
def _() -> None:
    arrays = packed(*pair())
    right = flash_attn_varlen_func(*arrays)
    assert torch.equal(flash_attn_varlen_func(*arrays[:5], 100, 100), right)
    assert torch.equal(flash_attn_varlen_func(*arrays[:5], torch.tensor(ROWS), torch.tensor(KEYS)), right)


@row("left padding")
def _() -> None:
    q, k, v = pair()
    pad = torch.tensor([0, 4], dtype=torch.int32)
    out, *_ = flash_attn_interface._flash_attn_varlen_forward(
        *packed(q, k, v), 0.0, None, True, leftpad_k=pad
    )
    for b, n in enumerate(pad.tolist()):
        wanted = anyflash.attention(q[b : b + 1], k[b : b + 1, n:], v[b : b + 1, n:], causal=True)
        assert torch.equal(out[b * ROWS : (b + 1) * ROWS], wanted[0])


@row("bias")
def _() -> None:
    q, k, v = pair()
    bias = torch.randn(1, 2, 1, KEYS, dtype=torch.float64, requires_grad=True)
    out = triton.flash_attn_func(q, k, v, bias)
    s = torch.einsum("bihd,bjhd->bhij", q, k) * 8**-0.5 + bias
    wanted = torch.einsum("bhij,bjhd->bihd", s.softmax(-1), v)
    torch.testing.assert_close(out, wanted)
    loss = lambda x: x.square().sum()
    torch.testing.assert_close(
        torch.autograd.grad(loss(out), bias)[0], torch.autograd.grad(loss(wanted), bias)[0]
    )


@row("gradient of lse")
def _() -> None:
    q, k, v = pair()
    q.requires_grad_()
    wanted = torch.autograd.grad((torch.einsum("bihd,bjhd->bhij", q, k) * 8**-0.5).logsumexp(-1).sum(), q)[0]
    _, lse, _ = flash_attn_func(q, k, v, return_attn_probs=True)
    torch.testing.assert_close(torch.autograd.grad(lse.sum(), q)[0], wanted)
    _, lse = generation3.flash_attn_func(q, k, v, return_attn_probs=True)
    torch.testing.assert_close(torch.autograd.grad(lse.sum(), q)[0], wanted)


@row("determinism")
def _() -> None:
    q, k, v = (x.float().requires_grad_() for x in pair(64, 64))
    found = []
    for deterministic in (False, True, True):
        out = flash_attn_func(q, k, v, causal=True, deterministic=deterministic)
        found.append(torch.autograd.grad(out.square().sum(), (q, k, v)))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@row("hints of speed")
def _() -> None:
    q, k, v = pair()
    right = anyflash.attention(q, k, v)
    call = {"num_splits": 3, "pack_gqa": True}
    assert torch.equal(generation3.flash_attn_func(q, k, v, sm_margin=2, **call), right)
    assert torch.equal(cute.flash_attn_func(q, k, v, **call)[0], right)
    out, *_ = flash_attn_interface._flash_attn_varlen_forward(
        *packed(q, k, v), 0.0, None, False, zero_tensors=True, num_splits=4
    )
    assert torch.equal(out, right.flatten(0, 1))
    cache = flash_attn_interface.flash_attn_with_kvcache(q, k, v, num_splits=7)
    assert torch.equal(cache, right)
