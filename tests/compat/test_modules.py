"""Padding, rotary embedding and attention layers, each against its formula written out here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import anyflash
from anyflash.compat.flash_attn.bert_padding import (
    index_first_axis,
    index_first_axis_residual,
    index_put_first_axis,
    pad_input,
    unpad_input,
    unpad_input_for_concatenated_sequences,
)
from anyflash.compat.flash_attn.flash_attention import FlashAttention, FlashMHA
from anyflash.compat.flash_attn.layers.rotary import (
    RotaryEmbedding,
    apply_rotary_emb,
    apply_rotary_emb_kv_,
    apply_rotary_emb_qkv_,
    apply_rotary_emb_torch,
)
from anyflash.compat.flash_attn.modules.mha import (
    MHA,
    CrossAttention,
    FlashCrossAttention,
    FlashSelfAttention,
    SelfAttention,
    get_alibi_slopes,
)
from anyflash.compat.flash_attn.ops.triton.rotary import apply_rotary

WIDE = torch.float64
close = torch.testing.assert_close


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_unpad_and_pad() -> None:
    x = torch.randn(3, 5, 2, dtype=WIDE)
    mask = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [0, 1, 1, 0, 1]])
    rows, indices, starts, longest, used = unpad_input(x, mask)
    assert torch.equal(rows, x[mask.bool()])
    assert (indices.dtype, starts.dtype, used.dtype) == (torch.int64, torch.int32, torch.int32)
    assert (starts.tolist(), longest, used.tolist()) == ([0, 2, 2, 5], 3, [2, 0, 3])
    assert torch.equal(pad_input(rows, indices, 3, 5), x * mask[..., None])
    unused = torch.tensor([[0, 0, 1, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
    rows, _, starts, longest, used = unpad_input(x, mask, unused)
    assert torch.equal(rows, x[(mask + unused).bool()])
    assert (starts.tolist(), longest, used.tolist()) == ([0, 3, 3, 6], 3, [2, 0, 3])


def test_unpad_concatenated() -> None:
    x = torch.randn(2, 6, dtype=WIDE)
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
    rows, indices, starts, longest = unpad_input_for_concatenated_sequences(x, lengths)
    assert torch.equal(rows, torch.cat((x[0, :5], x[1])))
    assert indices.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11]
    assert (starts.tolist(), longest) == ([0, 2, 5, 11], 6)


def test_indexing_differentiates() -> None:
    x = torch.randn(5, 3, dtype=WIDE, requires_grad=True)
    at = torch.tensor([3, 0])
    assert torch.autograd.gradcheck(index_first_axis, (x, at))
    assert torch.autograd.gradcheck(lambda v: index_put_first_axis(v, at, 5), (x[:2],))
    picked, residual = index_first_axis_residual(x, at)
    assert torch.equal(picked, x[at])
    assert residual is x


def turned(x: Tensor, angles: Tensor, interleaved: bool) -> Tensor:
    """x (..., rows, heads, D) with pair i of row t turned by angles[t, i], by complex numbers."""
    n = angles.shape[-1]
    pairs = x[..., : 2 * n]
    real, imaginary = (pairs[..., 0::2], pairs[..., 1::2]) if interleaved else pairs.chunk(2, -1)
    out = torch.complex(real, imaginary) * torch.exp(1j * angles.to(x.dtype)[..., None, :])
    parts = (out.real, out.imag)
    joined = torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)
    return torch.cat((joined, x[..., 2 * n :]), -1)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("n", [4, 8])
def test_rotary(interleaved: bool, n: int) -> None:
    angles = torch.rand(20, n, dtype=WIDE) * 6
    cos, sin = angles.cos(), angles.sin()
    x = torch.randn(2, 7, 3, 16, dtype=WIDE)
    call = {"interleaved": interleaved}
    close(apply_rotary_emb(x, cos, sin, **call), turned(x, angles[:7], interleaved))
    close(apply_rotary_emb_torch(x, cos[:7], sin[:7], interleaved), turned(x, angles[:7], interleaved))
    close(apply_rotary_emb(x, cos, sin, seqlen_offsets=5, **call), turned(x, angles[5:12], interleaved))
    offsets = torch.tensor([3, 11])
    wanted = torch.stack([turned(x[b], angles[o : o + 7], interleaved) for b, o in enumerate((3, 11))])
    close(apply_rotary_emb(x, cos, sin, seqlen_offsets=offsets, **call), wanted)
    rows, starts = x.flatten(0, 1)[:11], torch.tensor([0, 4, 4, 11], dtype=torch.int32)
    wanted = torch.cat([turned(rows[a:b], angles[: b - a], interleaved) for a, b in ((0, 4), (4, 11))])
    close(apply_rotary_emb(rows, cos, sin, cu_seqlens=starts, max_seqlen=7, **call), wanted)
    back = apply_rotary(apply_rotary(x, cos, sin, **call), cos, sin, conjugate=True, **call)
    close(back, x)
    assert torch.equal(apply_rotary(x, cos[:3], sin[:3], **call)[:, 3:], x[:, 3:])
    leaf = x.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda y: apply_rotary_emb(y, cos, sin, **call), (leaf,))
    inside = x.clone()
    assert apply_rotary_emb(inside, cos, sin, inplace=True, **call) is inside
    close(inside, turned(x, angles[:7], interleaved))
    (grad,) = torch.autograd.grad(apply_rotary_emb(leaf * 1, cos, sin, inplace=True, **call).sum(), leaf)
    close(grad, apply_rotary(torch.ones_like(x), cos, sin, conjugate=True, **call))


def test_rotary_of_packed_forms() -> None:
    angles = torch.rand(9, 4, dtype=WIDE)
    other = torch.rand(9, 4, dtype=WIDE)
    qkv = torch.randn(2, 5, 3, 2, 16, dtype=WIDE)
    tables = (angles.cos(), angles.sin(), other.cos(), other.sin())
    found = apply_rotary_emb_qkv_(qkv.clone(), *tables)
    close(found[:, :, 0], turned(qkv[:, :, 0], angles[:5], False))
    close(found[:, :, 1], turned(qkv[:, :, 1], other[:5], False))
    assert torch.equal(found[:, :, 2], qkv[:, :, 2])
    grouped = torch.cat((qkv[:, :, 0], qkv[:, :, 1, :1], qkv[:, :, 2, :1]), 2)
    found = apply_rotary_emb_qkv_(grouped.clone(), *tables, num_heads_q=2)
    close(found[:, :, :2], turned(qkv[:, :, 0], angles[:5], False))
    close(found[:, :, 2:3], turned(qkv[:, :, 1, :1], other[:5], False))
    assert torch.equal(found[:, :, 3], grouped[:, :, 3])
    found = apply_rotary_emb_kv_(qkv[:, :, 1:].clone(), *tables[:2], seqlen_offsets=2)
    close(found[:, :, 0], turned(qkv[:, :, 1], angles[2:7], False))


@pytest.mark.parametrize("scale_base", [None, 512.0])
def test_rotary_embedding(scale_base: float | None) -> None:
    layer = RotaryEmbedding(8, base=100.0, scale_base=scale_base)
    qkv = torch.randn(2, 6, 3, 2, 16, dtype=WIDE)
    found = layer(qkv.clone(), seqlen_offset=3)
    exponent = -torch.arange(0, 8, 2) / 8
    angles = torch.outer(torch.arange(9.0), 100.0**exponent).to(WIDE)
    scale = torch.ones(9, 4, dtype=WIDE)
    if scale_base is not None:
        power = (torch.arange(9) - 4) / scale_base
        scale = ((torch.arange(0, 8, 2) + 3.2) / 11.2).to(WIDE) ** power[:, None]
    grow = lambda x, s: torch.cat((x[..., :8] * torch.cat((s, s), -1)[3:, None], x[..., 8:]), -1)
    exact = {"rtol": 1e-6, "atol": 1e-6}  # its tables are float32
    close(found[:, :, 0], grow(turned(qkv[:, :, 0], angles[3:], False), scale), **exact)
    close(found[:, :, 1], grow(turned(qkv[:, :, 1], angles[3:], False), 1 / scale), **exact)
    q, kv = layer(qkv[:, :, 0].clone(), qkv[:, :, 1:].clone(), seqlen_offset=3)
    assert torch.equal(q, found[:, :, 0])
    assert torch.equal(kv, found[:, :, 1:])
    assert list(layer.state_dict()) == []


def test_alibi_slopes() -> None:
    assert get_alibi_slopes(8) == [2.0**-i for i in range(1, 9)]
    assert get_alibi_slopes(6) == [2.0**-i for i in (2, 4, 6, 8, 1, 3)]


def plain(q: Tensor, kv: Tensor, causal: bool, padding: Tensor | None) -> Tensor:
    """The masks of upstream's layers in torch: added -10000, and filled in where causal and cross."""
    k, v = kv.repeat_interleave(q.shape[2] // kv.shape[3], 3).unbind(2)
    s = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    rows, keys = s.shape[-2:]
    kept = torch.full((q.shape[0],), keys) if padding is None else padding.sum(-1)
    if padding is not None:
        s = s + torch.where(padding, 0.0, -10000.0)[:, None, None]
    if causal:
        ends = torch.arange(rows)[:, None] + (kept - rows)[:, None, None, None]
        s = s.masked_fill(torch.arange(keys) > ends, -10000.0)
    return torch.einsum("bhij,bjhd->bihd", s.softmax(-1), v)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_attention_with_finite_masks(causal: bool, padded: bool) -> None:
    padding = torch.arange(9) < torch.tensor([6, 9])[:, None] if padded else None
    q, kv = torch.randn(2, 5, 4, 8, dtype=WIDE), torch.randn(2, 9, 2, 2, 8, dtype=WIDE)
    close(CrossAttention(causal)(q, kv, key_padding_mask=padding), plain(q, kv, causal, padding))
    qkv = torch.randn(2, 9, 3, 4, 8, dtype=WIDE)
    found = SelfAttention(causal)(qkv, key_padding_mask=padding)
    s = torch.einsum("bihd,bjhd->bhij", qkv[:, :, 0], qkv[:, :, 1]) * 8**-0.5
    if padded:
        s = s + torch.where(padding, 0.0, -10000.0)[:, None, None]
    if causal:
        s = s + torch.full((9, 9), -10000.0).triu(1)
    close(found, torch.einsum("bhij,bjhd->bihd", s.softmax(-1), qkv[:, :, 2]))


def test_flash_layers() -> None:
    slopes = torch.rand(4)
    qkv = torch.randn(2, 9, 3, 4, 8, dtype=WIDE)
    layer = FlashSelfAttention(True, 0.2, 0.5, (4, 0), slopes).eval()
    wanted = anyflash.attention(*qkv.unbind(2), causal=True, scale=0.2, window=(4, 0), alibi_slopes=slopes)
    assert torch.equal(layer(qkv), wanted)
    starts = torch.tensor([0, 9, 18], dtype=torch.int32)
    close(layer(qkv.flatten(0, 1), cu_seqlens=starts, max_seqlen=9), wanted.flatten(0, 1))
    cross = FlashCrossAttention(True, 0.2, 0.5, slopes, (4, 0)).eval()
    close(cross(qkv[:, -3:, 0], qkv[:, :, 1:]), wanted[:, -3:])
    assert not torch.equal(layer.train()(qkv), wanted)
    assert layer.state_dict() == {}


def reference_mha(layer: MHA, x: Tensor) -> Tensor:
    """A layer without dwconv, by torch alone."""
    qkv = layer.Wqkv(x)
    if layer.return_residual:
        qkv = qkv[0]
    heads, heads_kv, dim = layer.num_heads, layer.num_heads_kv, layer.head_dim
    q, kv = qkv[..., : heads * dim], qkv[..., heads * dim :]
    q, kv = q.unflatten(-1, (heads, dim)), kv.unflatten(-1, (2, heads_kv, dim))
    if layer.rotary_emb_dim:
        q, kv = layer.rotary_emb(q.clone(), kv.clone())
    k, v = kv.repeat_interleave(heads // heads_kv, -2).unbind(2)
    window = getattr(layer.inner_attn, "window_size", (-1, -1))
    distance = torch.arange(x.shape[1]) - torch.arange(x.shape[1])[:, None]
    seen = distance <= 0 if layer.causal else torch.ones_like(distance, dtype=torch.bool)
    if window[0] >= 0:
        seen = seen & (distance >= -window[0])
    s = torch.einsum("bihd,bjhd->bhij", q, k) * dim**-0.5
    slopes = getattr(layer.inner_attn, "alibi_slopes", None)
    if slopes is not None:
        s = s - slopes[:, None, None] * distance.abs()
    p = s.masked_fill(~seen, -torch.inf).softmax(-1)
    return layer.out_proj(torch.einsum("bhij,bjhd->bihd", p, v).flatten(2))


LAYERS: list[dict[str, Any]] = [
    {},
    {"causal": True},
    {"causal": True, "num_heads_kv": 2},
    {"causal": True, "rotary_emb_dim": 8, "use_flash_attn": True},
    {"causal": True, "num_heads_kv": 1, "rotary_emb_dim": 16, "rotary_emb_interleaved": True},
    {"causal": True, "use_flash_attn": True, "use_alibi": True, "window_size": (4, 0)},
    {"causal": True, "use_flash_attn": True, "num_heads_kv": 2, "checkpointing": True},
    {"return_residual": True, "fused_bias_fc": True, "qkv_proj_bias": False},
]


@pytest.mark.parametrize("options", LAYERS, ids=str)
def test_mha(options: dict[str, Any]) -> None:
    layer = MHA(64, 4, dtype=WIDE, **options)
    x = torch.randn(2, 9, 64, dtype=WIDE, requires_grad=True)
    found = layer(x)
    if options.get("return_residual"):
        found, residual = found
        assert residual is x
    wanted = reference_mha(layer, x)
    close(found, wanted)
    weights = [x, *layer.parameters()]
    for got, want in zip(
        torch.autograd.grad(found.square().sum(), weights),
        torch.autograd.grad(wanted.square().sum(), weights),
        strict=True,
    ):
        close(got, want)


def test_mha_other_inputs() -> None:
    x, memory = torch.randn(2, 5, 64, dtype=WIDE), torch.randn(2, 9, 64, dtype=WIDE)
    cross = MHA(64, 4, cross_attn=True, dtype=WIDE)
    q = cross.Wq(x).unflatten(-1, (4, 16))
    kv = cross.Wkv(memory).unflatten(-1, (2, 4, 16))
    close(cross(x, memory), cross.out_proj(plain(q, kv, False, None).flatten(2)))
    close(cross(memory, mixer_subset=slice(2, 4)), cross(memory)[:, 2:4])
    packed = MHA(64, 4, causal=True, use_flash_attn=True, dtype=WIDE)
    starts = torch.tensor([0, 5, 10], dtype=torch.int32)
    close(packed(x.flatten(0, 1), cu_seqlens=starts, max_seqlen=5), packed(x).flatten(0, 1))
    convolved = MHA(64, 4, causal=True, dwconv=True, dtype=WIDE)
    for token in range(5):  # causal: a prefix does not see what follows
        close(convolved(x[:, : token + 1])[:, -1], convolved(x)[:, token])
    with pytest.raises(ValueError, match="use_flash_attn"):
        MHA(64, 4, use_alibi=True)
    with pytest.raises(ValueError, match="key_padding_mask"):
        packed(x, key_padding_mask=torch.ones(2, 5, dtype=torch.bool))


def test_version_1_modules() -> None:
    qkv = torch.randn(2, 9, 3, 4, 8, dtype=WIDE)
    layer = FlashAttention()
    layer.softmax_scale = 0.3
    out, weights = layer(qkv, causal=True)
    wanted = anyflash.attention(*qkv.unbind(2), causal=True, scale=0.3)
    assert weights is None
    assert torch.equal(out, wanted)
    mask = torch.arange(9) < torch.tensor([9, 4])[:, None]
    out, _ = layer(qkv, mask, causal=True)
    close(out[0], wanted[0])
    close(out[1, :4], wanted[1, :4])
    assert (out[1, 4:] == 0).all()
    with pytest.raises(anyflash.Unsupported, match="need_weights"):
        layer(qkv, need_weights=True)
    whole = FlashMHA(32, 4, causal=True, dtype=WIDE)
    x = torch.randn(2, 9, 32, dtype=WIDE)
    q, k, v = whole.Wqkv(x).unflatten(-1, (3, 4, 8)).unbind(2)
    attended = anyflash.attention(q, k, v, causal=True)
    close(whole(x)[0], whole.out_proj(attended.flatten(2)))
