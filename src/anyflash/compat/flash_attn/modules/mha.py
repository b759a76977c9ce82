"""`flash_attn.modules.mha`: attention layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from anyflash.compat.flash_attn._functional import (
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from anyflash.compat.flash_attn._kvcache import flash_attn_with_kvcache
from anyflash.compat.flash_attn._parallel import absent
from anyflash.compat.flash_attn.layers.rotary import RotaryEmbedding
from anyflash.compat.flash_attn.modules._plain import CrossAttention, SelfAttention
from anyflash.compat.flash_attn.ops.fused_dense import FusedDense

__all__ = [
    "MHA",
    "CrossAttention",
    "FlashCrossAttention",
    "FlashSelfAttention",
    "LinearResidual",
    "ParallelMHA",
    "SelfAttention",
    "get_alibi_slopes",
]

ParallelMHA = absent("ParallelMHA", "MHA")


def get_alibi_slopes(nheads: int) -> list[float]:
    """The slopes of the ALiBi paper: 2 ** (-8 i / n) for head i from 1, of n heads if n is a power of two.

    Else those of the next lower power of two, then every other one of the next higher.
    """
    below = 2 ** math.floor(math.log2(nheads))
    slopes = [2.0 ** (-8 * i / below) for i in range(1, below + 1)]
    between = [2.0 ** (-8 * i / (2 * below)) for i in range(1, 2 * below + 1, 2)]
    return slopes + between[: nheads - below]


class FlashSelfAttention(nn.Module):
    """Attention of qkv (batch, seqlen, 3, heads, D), or packed (total, 3, heads, D) with cu_seqlens.

    The arguments are those of `flash_attn_func`; dropout acts in training only.
    """

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        window_size: Sequence[int] = (-1, -1),
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
    ) -> None:
        super().__init__()
        self.causal = causal
        self.softmax_scale = softmax_scale
        self.drop = nn.Dropout(attention_dropout)
        self.register_buffer("alibi_slopes", alibi_slopes, persistent=False)
        self.window_size = window_size
        self.deterministic = deterministic

    def forward(
        self,
        qkv: Tensor,
        causal: bool | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
        call: dict[str, Any] = _call(self, causal)
        if cu_seqlens is None:
            return flash_attn_qkvpacked_func(qkv, **call)
        if max_seqlen is None:
            raise ValueError("max_seqlen is needed with cu_seqlens")
        return flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, max_seqlen, **call)


class FlashCrossAttention(nn.Module):
    """Attention of q (batch, seqlen_q, heads, D) over kv (batch, seqlen_k, 2, heads_k, D), or packed (total,
    heads, D) and (total_k, 2, heads_k, D)."""

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        alibi_slopes: Tensor | None = None,
        window_size: Sequence[int] = (-1, -1),
        deterministic: bool = False,
    ) -> None:
        super().__init__()
        self.causal = causal
        self.softmax_scale = softmax_scale
        self.drop = nn.Dropout(attention_dropout)
        self.register_buffer("alibi_slopes", alibi_slopes, persistent=False)
        self.window_size = window_size
        self.deterministic = deterministic

    def forward(
        self,
        q: Tensor,
        kv: Tensor,
        causal: bool | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_k: int | None = None,
    ) -> Tensor:
        call: dict[str, Any] = _call(self, causal)
        if cu_seqlens is None:
            return flash_attn_kvpacked_func(q, kv, **call)
        if max_seqlen is None or cu_seqlens_k is None or max_seqlen_k is None:
            raise ValueError("cu_seqlens comes with max_seqlen, cu_seqlens_k and max_seqlen_k")
        packed = (cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen_k)
        return flash_attn_varlen_kvpacked_func(q, kv, *packed, **call)


def _call(layer: Any, causal: bool | None) -> dict[str, Any]:
    return {
        "dropout_p": layer.drop.p if layer.training else 0.0,
        "softmax_scale": layer.softmax_scale,
        "causal": layer.causal if causal is None else causal,
        "window_size": layer.window_size,
        "alibi_slopes": layer.alibi_slopes,
        "deterministic": layer.deterministic,
    }


class LinearResidual(nn.Linear):
    """(linear(x), x)."""

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(input), input


class MHA(nn.Module):
    """A whole attention layer: projections, rotary embedding, attention, key/value cache, output projection.

    Args:
        num_heads_kv: fewer key heads than query heads (GQA).
        cross_attn: queries from x, keys and values from x_kv.
        layer_idx: the layer's key in `inference_params.key_value_memory_dict`.
        dwconv: a causal depthwise convolution of width 3 over q, k and v.
        use_flash_attn: `FlashSelfAttention`, needed by windows, ALiBi and packed sequences; else
            `SelfAttention`, which takes a key_padding_mask.
        return_residual: give (out, x).
        checkpointing: recompute the attention in the backward.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_heads_kv: int | None = None,
        cross_attn: bool = False,
        qkv_proj_bias: bool = True,
        out_proj_bias: bool = True,
        dropout: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        layer_idx: int | None = None,
        dwconv: bool = False,
        rotary_emb_dim: int = 0,
        rotary_emb_base: float = 10000.0,
        rotary_emb_scale_base: float | None = None,
        rotary_emb_interleaved: bool = False,
        use_alibi: bool = False,
        window_size: Sequence[int] = (-1, -1),
        fused_bias_fc: bool = False,
        use_flash_attn: bool = False,
        return_residual: bool = False,
        checkpointing: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.embed_dim, self.cross_attn, self.causal = embed_dim, cross_attn, causal
        self.layer_idx, self.dwconv, self.rotary_emb_dim = layer_idx, dwconv, rotary_emb_dim
        self.use_flash_attn, self.return_residual = use_flash_attn, return_residual
        self.checkpointing = checkpointing
        self.num_heads = num_heads
        self.num_heads_kv = num_heads if num_heads_kv is None else num_heads_kv
        if num_heads % self.num_heads_kv or embed_dim % num_heads:
            raise ValueError(
                f"num_heads={num_heads}, num_heads_kv={self.num_heads_kv}, embed_dim={embed_dim}: expected "
                "key heads that divide the heads, and heads that divide embed_dim"
            )
        self.head_dim = embed_dim // num_heads
        plain = [
            name
            for name, on in (("use_alibi", use_alibi), ("window_size", tuple(window_size) != (-1, -1)))
            if on
        ]
        if plain and not use_flash_attn:
            raise ValueError(f"{plain[0]} needs use_flash_attn=True")
        if cross_attn and rotary_emb_dim:
            raise ValueError("rotary_emb_dim: positions of queries and keys of cross attention are unrelated")
        slopes = torch.tensor(get_alibi_slopes(num_heads), device=device) if use_alibi else None
        if rotary_emb_dim:
            self.rotary_emb = RotaryEmbedding(
                rotary_emb_dim, rotary_emb_base, rotary_emb_interleaved, rotary_emb_scale_base, device=device
            )
        linear = FusedDense if fused_bias_fc else nn.Linear
        first = partial(FusedDense, return_residual=True) if fused_bias_fc else LinearResidual
        first = first if return_residual else linear
        kv_dim = 2 * self.head_dim * self.num_heads_kv
        if cross_attn:
            self.Wq = linear(embed_dim, embed_dim, bias=qkv_proj_bias, **made)
            self.Wkv = first(embed_dim, kv_dim, bias=qkv_proj_bias, **made)
        else:
            self.Wqkv = first(embed_dim, embed_dim + kv_dim, bias=qkv_proj_bias, **made)
        if dwconv:
            if cross_attn or self.num_heads_kv != num_heads:
                self.dwconv_q = _causal_convolution(embed_dim, made)
                self.dwconv_kv = _causal_convolution(kv_dim, made)
            else:
                self.dwconv_qkv = _causal_convolution(embed_dim + kv_dim, made)
        common: dict[str, Any] = {
            "causal": causal,
            "softmax_scale": softmax_scale,
            "attention_dropout": dropout,
        }
        if use_flash_attn:
            flash = {"alibi_slopes": slopes, "window_size": window_size}
            self.inner_attn: nn.Module = FlashSelfAttention(**common, **flash)
            self.inner_cross_attn: nn.Module = FlashCrossAttention(**common, **flash)
        else:
            self.inner_attn = SelfAttention(**common)
            self.inner_cross_attn = CrossAttention(**common)
        self.out_proj = linear(embed_dim, embed_dim, bias=out_proj_bias, **made)

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None
    ) -> Tensor:
        """(batch, max_seqlen, 2, key heads, D), uninitialised."""
        weight = self.out_proj.weight
        shape = (batch_size, max_seqlen, 2, self.num_heads_kv, self.head_dim)
        return torch.empty(shape, dtype=weight.dtype if dtype is None else dtype, device=weight.device)

    def forward(
        self,
        x: Tensor,
        x_kv: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        mixer_subset: Any = None,
        inference_params: Any = None,
        **kwargs: Any,
    ) -> Any:
        """x (batch, seqlen, embed_dim), or packed (total, embed_dim) with cu_seqlens and max_seqlen.

        Args:
            x_kv: where keys and values come from with cross_attn; None for x.
            key_padding_mask: (batch, seqlen), true for tokens to keep; only without use_flash_attn.
            mixer_subset: only these positions of x are queries (with cross_attn).
            inference_params: its cache of this layer is read and appended to, see `utils.generation`.
        """
        self._check_call(key_padding_mask, cu_seqlens, max_seqlen, mixer_subset, inference_params)
        extra: dict[str, Any] = (
            {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen, **kwargs}
            if self.use_flash_attn
            else {"key_padding_mask": key_padding_mask, **kwargs}
        )
        q, kv, residual = self._projected(x, x_kv, mixer_subset)
        if inference_params is not None:
            context = self._with_cache(q, kv, inference_params)
        else:
            if self.rotary_emb_dim:
                q, kv = self.rotary_emb(q, kv, 0, max_seqlen=max_seqlen)
            if self.cross_attn or self.num_heads_kv != self.num_heads:
                if cu_seqlens is not None:
                    extra = {"cu_seqlens_k": cu_seqlens, "max_seqlen_k": max_seqlen, **extra}
                context = self._inner(self.inner_cross_attn, q, kv, **extra)
            else:
                qkv = torch.cat((q.unsqueeze(-3), kv), dim=-3)
                context = self._inner(self.inner_attn, qkv, **extra)
        out = self.out_proj(context.flatten(-2))
        return (out, residual) if self.return_residual else out

    def _check_call(
        self,
        key_padding_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        max_seqlen: int | None,
        mixer_subset: Any,
        inference_params: Any,
    ) -> None:
        if cu_seqlens is not None:
            if max_seqlen is None or key_padding_mask is not None or not self.use_flash_attn:
                raise ValueError(
                    "cu_seqlens needs max_seqlen and use_flash_attn=True, and takes no key_padding_mask"
                )
            if self.dwconv or self.rotary_emb_dim:
                raise ValueError("cu_seqlens goes with neither dwconv nor rotary_emb_dim")
        if key_padding_mask is not None and self.use_flash_attn:
            raise ValueError("key_padding_mask: with use_flash_attn=True unpad the batch (bert_padding)")
        if inference_params is not None and (key_padding_mask is not None or cu_seqlens is not None):
            raise ValueError("inference_params goes with neither key_padding_mask nor cu_seqlens")
        if inference_params is not None and (self.layer_idx is None or self.dwconv):
            raise ValueError("inference_params needs layer_idx, and no dwconv")
        if mixer_subset is not None and not self.cross_attn:
            raise ValueError("mixer_subset needs cross_attn=True")

    def _projected(self, x: Tensor, x_kv: Tensor | None, mixer_subset: Any) -> tuple[Tensor, Tensor, Any]:
        """(q (..., heads, D), kv (..., 2, key heads, D), residual)."""
        if self.cross_attn:
            picked = x if mixer_subset is None else x[:, mixer_subset]
            kv, residual = self._first(self.Wkv, x if x_kv is None else x_kv)
            q = self.Wq(picked)
            residual = residual if mixer_subset is None else residual[:, mixer_subset]
        else:
            qkv, residual = self._first(self.Wqkv, x)
            if self.dwconv and hasattr(self, "dwconv_qkv"):
                qkv = _convolved(self.dwconv_qkv, qkv)
            q, kv = qkv[..., : self.embed_dim], qkv[..., self.embed_dim :]
        if self.dwconv and hasattr(self, "dwconv_q"):
            q, kv = _convolved(self.dwconv_q, q), _convolved(self.dwconv_kv, kv)
        q = q.unflatten(-1, (self.num_heads, self.head_dim))
        return q, kv.unflatten(-1, (2, self.num_heads_kv, self.head_dim)), residual

    def _first(self, projection: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        return projection(x) if self.return_residual else (projection(x), x)

    def _inner(self, attention: nn.Module, *arrays: Tensor, **extra: Any) -> Tensor:
        if self.checkpointing:
            return checkpoint(attention, *arrays, use_reentrant=False, **extra)
        return attention(*arrays, **extra)

    def _with_cache(self, q: Tensor, kv: Tensor, inference_params: Any) -> Tensor:
        """Turn, append to the layer's cache, attend over what it then holds."""
        batch, rows = q.shape[:2]
        lengths = inference_params.lengths_per_sample
        offset = inference_params.seqlen_offset if lengths is None else lengths
        if self.rotary_emb_dim:
            q, kv = self.rotary_emb(q, kv, offset, max_seqlen=inference_params.max_seqlen)
        caches = inference_params.key_value_memory_dict
        if self.layer_idx not in caches:
            caches[self.layer_idx] = self.allocate_inference_cache(
                inference_params.max_batch_size, inference_params.max_seqlen, kv.dtype
            )
        first = inference_params.batch_size_offset
        cache = caches[self.layer_idx][first : first + batch]
        if self.use_flash_attn:
            inner = self.inner_cross_attn
            return flash_attn_with_kvcache(
                q,
                cache[:, :, 0],
                cache[:, :, 1],
                kv[:, :, 0],
                kv[:, :, 1],
                cache_seqlens=offset,
                softmax_scale=inner.softmax_scale,
                causal=inner.causal,
                window_size=inner.window_size,
                alibi_slopes=inner.alibi_slopes,
            )
        if lengths is not None:
            raise ValueError("lengths_per_sample needs use_flash_attn=True")
        cache[:, offset : offset + rows] = kv
        return self.inner_cross_attn(q, cache[:, : offset + rows])


def _causal_convolution(channels: int, made: dict[str, Any]) -> nn.Conv1d:
    return nn.Conv1d(channels, channels, kernel_size=3, padding=2, groups=channels, **made)


def _convolved(convolution: nn.Module, x: Tensor) -> Tensor:
    return convolution(x.transpose(1, 2))[..., :-2].transpose(1, 2).contiguous()
