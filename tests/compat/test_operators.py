"""Losses, normalisation, activations and the layers of them, each against its formula in torch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from anyflash.compat.flash_attn.losses.cross_entropy import CrossEntropyLoss
from anyflash.compat.flash_attn.modules.mlp import FusedMLP, GatedMlp, Mlp
from anyflash.compat.flash_attn.ops import activations, layer_norm, rms_norm
from anyflash.compat.flash_attn.ops.triton import layer_norm as fused_norm
from anyflash.compat.flash_attn.ops.triton.cross_entropy import cross_entropy_loss
from anyflash.core.errors import Unsupported

WIDE = torch.float64
close = torch.testing.assert_close


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_cross_entropy_of_another_reduction() -> None:
    with pytest.raises(Unsupported, match="reduction='median'"):
        CrossEntropyLoss(reduction="median")


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_cross_entropy(reduction: str, smoothing: float) -> None:
    logits = torch.randn(7, 11, dtype=WIDE, requires_grad=True)
    labels = torch.tensor([3, -100, 0, 10, 5, -100, 7])
    loss = CrossEntropyLoss(reduction=reduction, label_smoothing=smoothing)(logits, labels)
    wanted = F.cross_entropy(logits, labels, reduction=reduction, label_smoothing=smoothing)
    close(loss, wanted)
    close(torch.autograd.grad(loss.sum(), logits)[0], torch.autograd.grad(wanted.sum(), logits)[0])


def test_cross_entropy_terms() -> None:
    logits = torch.randn(4, 11, dtype=WIDE, requires_grad=True)
    labels = torch.tensor([3, -100, 0, 10])
    call = {"lse_square_scale": 0.2, "logit_scale": 0.5}
    loss, penalty = CrossEntropyLoss(return_z_loss=True, **call)(logits, labels)
    lse = (logits * 0.5).logsumexp(-1)[labels != -100]
    close(penalty, 0.2 * lse.square().mean())
    close(loss, F.cross_entropy(logits * 0.5, labels) + 0.2 * lse.square().mean())
    assert not penalty.requires_grad
    given = logits.detach().logsumexp(-1)
    with_lse, _ = cross_entropy_loss(logits, labels, precomputed_lse=given)
    without, _ = cross_entropy_loss(logits, labels)
    close(with_lse, without)
    close(torch.autograd.grad(with_lse.sum(), logits)[0], torch.autograd.grad(without.sum(), logits)[0])
    half, _ = cross_entropy_loss(logits.detach().half(), labels)
    assert half.dtype is torch.float32


def test_norms() -> None:
    x, x1, residual = (torch.randn(3, 5, 16, dtype=WIDE) for _ in range(3))
    weight, bias, weight1 = (torch.randn(16, dtype=WIDE) for _ in range(3))
    scale = torch.rand(3, 5, dtype=WIDE)
    total = x * scale[..., None] + residual
    ln = lambda y, w, b=None: F.layer_norm(y, (16,), w, b, 1e-6)
    rms = lambda y, w: F.rms_norm(y, (16,), w, 1e-6)
    y, summed = fused_norm.layer_norm_fn(x, weight, bias, residual, rowscale=scale, prenorm=True)
    close(y, ln(total, weight, bias))
    close(summed, total)
    y, y1 = fused_norm.rms_norm_fn(x, weight, None, residual, x1, weight1)
    close(y, rms(x + x1 + residual, weight))
    close(y1, rms(x + x1 + residual, weight1))
    close(fused_norm.rms_norm_fn(x, weight, None, zero_centered_weight=True), rms(x, weight + 1))
    close(rms_norm.rms_norm(x, weight, 1e-6), rms(x, weight))
    close(layer_norm.layer_norm(x, weight, bias, 1e-6), ln(x, weight, bias))
    y, summed = layer_norm.dropout_add_layer_norm(
        x, residual, weight, bias, 0.0, 1e-6, rowscale=scale, layerscale=weight1, prenorm=True
    )
    close(summed, x * scale[..., None] * weight1 + residual)
    close(y, ln(summed, weight, bias))
    y0, y1 = layer_norm.dropout_add_layer_norm_parallel_residual(
        x, x1, residual, weight, bias, weight1, None, 0.0, 1e-6
    )
    close(y0, ln(x + x1 + residual, weight, bias))
    close(y1, ln(x + x1 + residual, weight1))
    close(rms_norm.dropout_add_rms_norm(x, residual, weight, None, 0.0, 1e-6), rms(x + residual, weight))
    out = fused_norm.layer_norm_linear_fn(x, weight, bias, x1.flatten(0, 1), None)
    close(out, F.linear(ln(x, weight, bias), x1.flatten(0, 1)))


def test_norms_of_16_bits() -> None:
    """Sums are float32, results of the dtype that came in, the residual stream of its own."""
    x, residual = torch.randn(4, 16).bfloat16(), torch.randn(4, 16)
    norm = fused_norm.RMSNorm(16, dtype=torch.bfloat16)
    y, summed = norm(x, residual, prenorm=True)
    assert (y.dtype, summed.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(summed, x.float() + residual)
    _, summed = norm(x, prenorm=True, residual_in_fp32=True)
    assert summed.dtype is torch.float32
    assert [p.shape for p in rms_norm.RMSNorm(16).parameters()] == [(16,)]
    assert len(list(layer_norm.DropoutAddLayerNorm(16).parameters())) == 2
    assert len(list(rms_norm.DropoutAddRMSNorm(16).parameters())) == 1


def test_dropout_of_norms() -> None:
    x, residual = torch.randn(64, 64, dtype=WIDE), torch.randn(64, 64, dtype=WIDE)
    weight = torch.ones(64, dtype=WIDE)
    y, summed, kept, other = fused_norm.layer_norm_fn(
        x, weight, None, residual, dropout_p=0.25, prenorm=True, return_dropout_mask=True
    )
    close(summed, x * kept / 0.75 + residual)
    close(y, F.layer_norm(summed, (64,), eps=1e-6))
    assert other is None
    # Five standard deviations of the mean of 4096 draws.
    assert abs(float(kept.double().mean()) - 0.75) < 5 * math.sqrt(0.25 * 0.75 / 4096)
    layer = layer_norm.DropoutAddLayerNorm(64, p=0.25, dtype=WIDE).eval()
    close(layer(x, residual), F.layer_norm(x + residual, (64,), eps=1e-5))


def test_activations() -> None:
    x, y, g = (torch.randn(3, 8, dtype=WIDE, requires_grad=True) for _ in range(3))
    grad = lambda out, *leaves: torch.autograd.grad(out, leaves, g)
    close(activations.swiglu(x, y), F.silu(x) * y)
    for got, want in zip(activations.swiglu_bwd(x, y, g), grad(F.silu(x) * y, x, y), strict=True):
        close(got, want)
    gelu = lambda t: F.gelu(t, approximate="tanh")
    close(activations.fast_gelu_impl(x), gelu(x))
    close(activations.gelu_bwd(g, x), grad(gelu(x), x)[0])
    close(activations.bias_gelu_impl(x, y[0]), gelu(x + y[0]))
    close(activations.bias_gelu_back(g, x, y[0]), grad(gelu(x + y[0]), x)[0])
    close(activations.sqrelu_fwd(x), F.relu(x).square())
    close(activations.sqrelu_bwd(g, x), grad(F.relu(x).square(), x)[0])
    close(activations.relu_bwd(g, x), grad(F.relu(x), x)[0])


def test_mlps() -> None:
    x = torch.randn(3, 16, dtype=WIDE)
    mlp = Mlp(16, 32, dtype=WIDE)
    close(mlp(x), mlp.fc2(F.gelu(mlp.fc1(x))))
    gated = GatedMlp(16, 24, activation=F.silu, multiple_of=16, dtype=WIDE)
    assert gated.fc1.out_features == 64
    y, gate = gated.fc1(x).chunk(2, -1)
    close(gated(x), gated.fc2(y * F.silu(gate)))
    fused = FusedMLP(16, activation="sqrelu", dtype=WIDE)
    close(fused(x), fused.fc2(F.relu(fused.fc1(x)).square()))
    assert isinstance(fused.fc1, nn.Linear)
