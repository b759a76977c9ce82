"""Plain attention in flash_attn's terms: in long double, the truth; in a dtype of torch, what its error is
measured against.

Masks, biases and lengths are spelled here once more, from flash_attn's documentation and not from anyflash.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Wide = np.longdouble


@dataclass(frozen=True)
class Formula:
    """Of one sequence: what happens to scores (H, Tq, Tk). `kept` is dropout's mask, true where kept."""

    scale: float
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    slopes: np.ndarray | None = None
    dropout_p: float = 0.0
    kept: np.ndarray | None = None


def seen(rows: int, keys: int, causal: bool, window: tuple[int, int]) -> np.ndarray:
    """(rows, keys): flash_attn's causal, bottom right, and its window, -1 for no bound."""
    distance = np.arange(keys) - (np.arange(rows)[:, None] + keys - rows)
    left, right = window
    allowed = np.ones((rows, keys), bool)
    if causal:
        allowed &= distance <= 0
    if left >= 0:
        allowed &= distance >= -left
    if right >= 0:
        allowed &= distance <= right
    return allowed


def alibi(slopes: np.ndarray, rows: int, keys: int) -> np.ndarray:
    """(H, rows, keys)"""
    distance = np.abs(np.arange(keys) - (np.arange(rows)[:, None] + keys - rows))
    return -slopes[:, None, None].astype(Wide) * distance


def truth(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, dout: np.ndarray, formula: Formula
) -> tuple[np.ndarray, ...]:
    """(out, dq, dk, dv, lse) of q, dout (Tq, H, D), k, v (Tk, Hk, D), in long double."""
    group = q.shape[1] // k.shape[1]
    heads = lambda x, n: np.repeat(x.astype(Wide).swapaxes(0, 1), n, axis=0)
    q_, k_, v_, dout_ = heads(q, 1), heads(k, group), heads(v, group), heads(dout, 1)
    rows, keys = q_.shape[1], k_.shape[1]
    raw = formula.scale * np.einsum("hid,hjd->hij", q_, k_)
    s, slope = raw, np.ones_like(raw)
    if formula.softcap:
        t = np.tanh(raw / formula.softcap)
        s, slope = formula.softcap * t, 1 - t * t
    if formula.slopes is not None:
        s = s + alibi(formula.slopes, rows, keys)
    s = np.where(seen(rows, keys, formula.causal, formula.window), s, -np.inf)
    m = s.max(axis=-1, keepdims=True, initial=-np.inf)
    exp = np.exp(s - np.where(m == -np.inf, 0, m))
    total = exp.sum(axis=-1, keepdims=True)
    p = exp / np.where(total == 0, 1, total)
    z = 1 if formula.kept is None else formula.kept / Wide(1 - formula.dropout_p)
    out = np.einsum("hij,hjd->hid", p * z, v_)
    dp = z * np.einsum("hid,hjd->hij", dout_, v_)
    ds = p * (dp - (p * dp).sum(axis=-1, keepdims=True)) * slope * formula.scale
    fold = lambda x: x.reshape(x.shape[0] // group, group, *x.shape[1:]).sum(axis=1).swapaxes(0, 1)
    with np.errstate(divide="ignore"):
        lse = (np.where(m == -np.inf, 0, m) + np.log(total))[..., 0]
    return (
        out.swapaxes(0, 1),
        np.einsum("hij,hjd->hid", ds, k_).swapaxes(0, 1),
        fold(np.einsum("hij,hid->hjd", ds, q_)),
        fold(np.einsum("hij,hid->hjd", p * z, dout_)),
        lse,
    )


def in_dtype(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, formula: Formula) -> list[tuple[Tensor, ...]]:
    """(out, dq, dk, dv) with every step in the dtype of q: as flash_attn's tests compute them.

    The rule is of 16-bit floats, whose errors drown how sums are ordered. In wider ones a second order counts
    as well: keys in reverse, q scaled in place of k, and the backward from rowsum(dout * out).
    """
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = forward(*leaves, formula)
    found = [(out.detach(), *torch.autograd.grad(out, leaves, dout))]
    if q.dtype in (torch.float32, torch.float64):
        found.append(_reordered(q, k, v, dout, formula))
    return found


def _reordered(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, formula: Formula) -> tuple[Tensor, ...]:
    group, (rows, keys) = q.shape[1] // k.shape[1], (q.shape[0], k.shape[0])
    q_, dout_ = q.transpose(0, 1), dout.transpose(0, 1)
    k_, v_ = (x.repeat_interleave(group, dim=1).transpose(0, 1).flip(1) for x in (k, v))
    s = (q_ * formula.scale) @ k_.mT
    slope = torch.ones_like(s)
    if formula.softcap:
        t = torch.tanh(s / formula.softcap)
        s, slope = formula.softcap * t, 1 - t * t
    if formula.slopes is not None:
        s = s + torch.from_numpy(alibi(formula.slopes, rows, keys).astype(np.float64)).to(s.dtype).flip(-1)
    allowed = torch.from_numpy(seen(rows, keys, formula.causal, formula.window)).flip(-1)
    s = s.masked_fill(~allowed, -torch.inf)
    lse = torch.logsumexp(s, -1, keepdim=True)
    p = torch.exp(s - lse.masked_fill(lse == -torch.inf, 0)).masked_fill(~allowed, 0)
    z = torch.ones_like(p)
    if formula.kept is not None:
        z = torch.from_numpy(formula.kept).to(p.dtype).flip(-1) / (1 - formula.dropout_p)
    out = (p * z) @ v_
    delta = (dout_ * out).sum(-1, keepdim=True)
    ds = p * (z * (dout_ @ v_.mT) - delta) * slope * formula.scale
    fold = lambda x: x.flip(1).unflatten(0, (-1, group)).sum(1).transpose(0, 1)
    return out.transpose(0, 1), (ds @ k_).transpose(0, 1), fold(ds.mT @ q_), fold((p * z).mT @ dout_)


def forward(q: Tensor, k: Tensor, v: Tensor, formula: Formula) -> Tensor:
    """out (Tq, H, D), k scaled in place of q."""
    group = q.shape[1] // k.shape[1]
    rows, keys = q.shape[0], k.shape[0]
    k_, v_ = (x.repeat_interleave(group, dim=1) for x in (k, v))
    s = torch.einsum("ihd,jhd->hij", q, k_ * formula.scale)
    if formula.softcap:
        s = formula.softcap * torch.tanh(s / formula.softcap)
    if formula.slopes is not None:
        s = s + torch.from_numpy(alibi(formula.slopes, rows, keys).astype(np.float64)).to(s.dtype)
    allowed = torch.from_numpy(seen(rows, keys, formula.causal, formula.window))
    p = torch.softmax(s.masked_fill(~allowed, -torch.inf), dim=-1).masked_fill(~allowed, 0)
    p = p.masked_fill(~allowed.any(-1)[:, None], 0)
    if formula.kept is not None:
        p = p * torch.from_numpy(formula.kept).to(p.dtype) / (1 - formula.dropout_p)
    return torch.einsum("hij,jhd->ihd", p.to(q.dtype), v_)


def as_numpy(x: Tensor) -> np.ndarray:
    """Exactly: 16-bit floats widen to float32."""
    x = x.detach()
    return (x if x.dtype is torch.float64 else x.float()).numpy()


def noise(wanted: np.ndarray, dtype: torch.dtype) -> float:
    """What storing numbers of this size in the dtype costs: twice the greatest of |(x + 0.3 - 0.3) - x|."""
    stored = torch.from_numpy(wanted.astype(np.float64)).to(dtype)
    return 2 * float((stored + 0.3 - 0.3 - stored).abs().max()) if stored.numel() else 0.0


def excess(got: Tensor, wanted: np.ndarray, plains: Sequence[Tensor], factor: float) -> float:
    """Error over what is allowed: `factor` times the error of plain attention, and the noise of storing."""
    if not wanted.size:
        return 0.0
    error = float(np.abs(as_numpy(got).astype(Wide) - wanted).max())
    worst = max(float(np.abs(as_numpy(plain).astype(Wide) - wanted).max()) for plain in plains)
    allowed = factor * worst + noise(wanted, got.dtype)
    return error / allowed if allowed else (0.0 if error == 0 else np.inf)
