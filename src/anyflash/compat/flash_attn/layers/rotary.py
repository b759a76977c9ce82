"""`flash_attn.layers.rotary`: rotary position embedding."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from anyflash.compat.flash_attn.ops.triton.rotary import apply_rotary


def rotate_half(x: Tensor, interleaved: bool = False) -> Tensor:
    """A quarter turn of each pair: (a, b) becomes (-b, a)."""
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def apply_rotary_emb_torch(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """x (batch, seqlen, heads, D) turned, in the dtype of x: the formula without a wider type inside."""
    dim = 2 * cos.shape[-1]
    if interleaved:
        cos, sin = (t.repeat_interleave(2, dim=-1) for t in (cos, sin))
    else:
        cos, sin = (torch.cat((t, t), dim=-1) for t in (cos, sin))
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    pairs = x[..., :dim]
    return torch.cat((pairs * cos + rotate_half(pairs, interleaved) * sin, x[..., dim:]), dim=-1)


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """`ops.triton.rotary.apply_rotary` with the arguments in the order of layers."""
    return apply_rotary(x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen, interleaved, inplace)


apply_rotary_emb_func = apply_rotary_emb


def apply_rotary_emb_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
    num_heads_q: int | None = None,
) -> Tensor:
    """Turn q and k inside qkv, in place; returns qkv.

    Args:
        qkv: (batch, seqlen, 3, heads, D), or (batch, seqlen, Hq + 2 Hk, D) with `num_heads_q`.
        cos_k, sin_k: those of k where they differ (xPos).
    """
    if qkv.ndim == 5:
        q, k = qkv[:, :, 0], qkv[:, :, 1]
    else:
        if num_heads_q is None:
            raise ValueError(f"qkv {tuple(qkv.shape)}: four axes need num_heads_q")
        heads_k = (qkv.shape[2] - num_heads_q) // 2
        q, k = qkv[:, :, :num_heads_q], qkv[:, :, num_heads_q : num_heads_q + heads_k]
    apply_rotary_emb(q, cos, sin, interleaved, True, seqlen_offsets)
    apply_rotary_emb(
        k, cos if cos_k is None else cos_k, sin if sin_k is None else sin_k, interleaved, True, seqlen_offsets
    )
    return qkv


def apply_rotary_emb_kv_(
    kv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, seqlen_offsets: int | Tensor = 0
) -> Tensor:
    """Turn k inside kv (batch, seqlen, 2, heads, D), in place; returns kv."""
    apply_rotary_emb(kv[:, :, 0], cos, sin, interleaved, True, seqlen_offsets)
    return kv


class RotaryEmbedding(nn.Module):
    """Angles position * base ** (-2 i / dim), and xPos's scales if `scale_base` is given.

    xPos (Sun et al. 2022): pair i is scaled by ((2 i + 0.4 dim) / (1.4 dim)) ** ((position - middle) /
    scale_base) in q and by its inverse in k, middle being half the length.

    Args:
        dim: rotary_dim, even.
        interleaved: pairs are neighbours (GPT-J); else halves (NeoX).
        pos_idx_in_fp32: False keeps positions in the dtype of the angles' frequencies, as version 2.0 to 2.7
            could.
    """

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: float | None = None,
        pos_idx_in_fp32: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.base = float(base)
        self.interleaved = interleaved
        self.scale_base = scale_base
        self.pos_idx_in_fp32 = pos_idx_in_fp32
        self.register_buffer("inv_freq", self._compute_inv_freq(device), persistent=False)
        even = torch.arange(0, dim, 2, device=device, dtype=torch.float32)
        scale = None if scale_base is None else (even + 0.4 * dim) / (1.4 * dim)
        self.register_buffer("scale", scale, persistent=False)
        self._seq_len_cached = 0
        self._cos_cached: Tensor | None = None
        self._sin_cached: Tensor | None = None
        self._cos_k_cached: Tensor | None = None
        self._sin_k_cached: Tensor | None = None

    def _compute_inv_freq(self, device: torch.device | str | None = None) -> Tensor:
        return self.base ** -(torch.arange(0, self.dim, 2, device=device, dtype=torch.float32) / self.dim)

    def _update_cos_sin_cache(
        self, seqlen: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """Make the tables reach `seqlen` positions, on this device and in this dtype."""
        cached = self._cos_cached
        if (
            cached is not None
            and seqlen <= self._seq_len_cached
            and (cached.device, cached.dtype) == (device, dtype)
            and not (self.training and cached.is_inference())
        ):
            return
        self._seq_len_cached = seqlen
        if self.pos_idx_in_fp32:
            # A module cast to 16 bits has rounded its frequencies.
            rounded = self.inv_freq.dtype is not torch.float32
            frequencies = self._compute_inv_freq(device) if rounded else self.inv_freq.to(device)
            position = torch.arange(seqlen, device=device, dtype=torch.float32)
        else:
            frequencies = self.inv_freq.to(device)
            position = torch.arange(seqlen, device=device, dtype=frequencies.dtype)
        angles = torch.outer(position, frequencies)
        cos, sin = angles.cos(), angles.sin()
        if self.scale is None:
            self._cos_cached, self._sin_cached = cos.to(dtype), sin.to(dtype)
            return
        power = (position.float() - seqlen // 2) / self.scale_base
        scale = self.scale.to(device).float() ** power[:, None]
        self._cos_cached, self._sin_cached = (cos * scale).to(dtype), (sin * scale).to(dtype)
        self._cos_k_cached, self._sin_k_cached = (cos / scale).to(dtype), (sin / scale).to(dtype)

    def forward(
        self,
        qkv: Tensor,
        kv: Tensor | None = None,
        seqlen_offset: int | Tensor = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Turn q and k, in place.

        Args:
            qkv: (batch, seqlen, 3, heads, D), or (batch, seqlen, Hq + 2 Hk, D) with `num_heads_q`; or q
                (batch, seqlen, heads, D) where kv (batch, seqlen, 2, heads, D) is given.
            seqlen_offset: position of the first token, or (batch,) of them.
            max_seqlen: how far positions go; needed where `seqlen_offset` is a tensor.

        Returns:
            qkv, or (q, kv).
        """
        if max_seqlen is not None:
            self._update_cos_sin_cache(max_seqlen, qkv.device, qkv.dtype)
        elif isinstance(seqlen_offset, int):
            self._update_cos_sin_cache(qkv.shape[1] + seqlen_offset, qkv.device, qkv.dtype)
        cos, sin, cos_k, sin_k = (
            self._cos_cached, self._sin_cached, self._cos_k_cached, self._sin_k_cached,
        )  # fmt: skip
        if cos is None or sin is None:
            raise ValueError(
                "seqlen_offset is a tensor and no table exists yet: max_seqlen says how far to go"
            )
        if kv is None:
            return apply_rotary_emb_qkv_(
                qkv, cos, sin, cos_k, sin_k, self.interleaved, seqlen_offset, num_heads_q
            )
        q = apply_rotary_emb(qkv, cos, sin, self.interleaved, True, seqlen_offset)
        pair = (cos, sin) if cos_k is None or sin_k is None else (cos_k, sin_k)
        return q, apply_rotary_emb_kv_(kv, *pair, self.interleaved, seqlen_offset)
