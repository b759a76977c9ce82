"""The two attentions of llm-foundry's registry, "torch" and "flash", as its MPT models call them.

query                 (batch, rows, heads x dim)
key, value            (batch, keys, kv_heads x dim); the fewer heads are never repeated
past_key_value        None, () to begin a cache, or its pair. "torch" keeps keys (batch, kv_heads, dim, keys)
                      and values (batch, kv_heads, keys, dim); "flash" both as they come
is_causal, window     the last query stands at the last key; a window of w has w keys on either side of it
attn_bias             "torch": (1 or batch, 1 or heads, 1 or rows, keys), cut to its last rows and keys:
                      ALiBi, and finfo.min where another sequence or padding is
key_padding_mask      "torch": (batch, keys) bool, True = the key exists
flash_attn_padding... "flash": where the tokens of packed sequences lie among batch x rows, and their bounds
softcapping           before the bias
result                (batch, rows, heads x dim), no weights, the cache. A query that sees no key gets 0
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from anyflash import api
from anyflash.adapters._torch.padding import key_mask
from anyflash.core.errors import InvalidCall

Cache = tuple[Tensor, Tensor] | tuple[()] | None
Attended = tuple[Tensor, Tensor | None, Cache]


def torch_function(theirs: Callable[..., Attended]) -> Callable[..., Attended]:
    """Takes the place of "torch", which is `theirs` and still serves who asks for the weights."""

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        n_heads: int,
        kv_n_heads: int,
        past_key_value: Cache = None,
        softmax_scale: float | None = None,
        attn_bias: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
        dropout_p: float = 0.0,
        training: bool = False,
        needs_weights: bool = False,
        attn_logit_softcapping: float | None = None,
        sliding_window_size: int = -1,
    ) -> Attended:
        if needs_weights:
            return theirs(
                query, key, value, n_heads, kv_n_heads, past_key_value, softmax_scale, attn_bias,
                key_padding_mask, is_causal, dropout_p, training, needs_weights, attn_logit_softcapping,
                sliding_window_size,
            )  # fmt: skip
        q, k, v = _heads(query, n_heads), _heads(key, kv_n_heads), _heads(value, kv_n_heads)
        if past_key_value is not None:
            if past_key_value:
                k = torch.cat([past_key_value[0].permute(0, 3, 1, 2), k], dim=1)
                v = torch.cat([past_key_value[1].transpose(1, 2), v], dim=1)
            past_key_value = (k.permute(0, 2, 3, 1), v.transpose(1, 2))
        if attn_bias is not None:
            attn_bias = attn_bias[:, :, -q.shape[1] :, -k.shape[1] :]
        out = api.attention(
            q,
            k,
            v,
            causal=is_causal,
            window=_window(sliding_window_size),
            scale=softmax_scale,
            softcap=attn_logit_softcapping,
            bias=attn_bias,
            mask=None if key_padding_mask is None else key_mask(key_padding_mask),
            dropout_p=dropout_p if training else 0.0,
        )
        return out.flatten(2), None, past_key_value

    return attention


def flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    n_heads: int,
    kv_n_heads: int,
    past_key_value: Cache = None,
    softmax_scale: float | None = None,
    attn_bias: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    training: bool = False,
    needs_weights: bool = False,
    should_repeat_kv_for_gqa: bool | None = True,
    sliding_window_size: int = -1,
    alibi_slopes: Tensor | None = None,
    flash_attn_padding_info: Mapping[str, Tensor] | None = None,
    attn_logit_softcapping: float | None = None,
) -> Attended:
    """In the place of "flash". Like it, gives no weights to who asks for them."""
    for argument, given in (("attn_bias", attn_bias), ("key_padding_mask", key_padding_mask)):
        if given is not None:
            raise InvalidCall(argument, f"shape {tuple(given.shape)}", "None", 'attn_impl="torch" takes it')
    if flash_attn_padding_info is None:
        raise InvalidCall("flash_attn_padding_info", "None", "the dictionary that MPTModel makes")
    if past_key_value is not None:
        if past_key_value:
            key = torch.cat([past_key_value[0], key], dim=1)
            value = torch.cat([past_key_value[1], value], dim=1)
        past_key_value = (key, value)
    places = {x: flash_attn_padding_info[f"indices_{x}"] for x in "qkv"}
    out = api.attention_varlen(
        _heads(_tokens(query, places["q"]), n_heads),
        _heads(_tokens(key, places["k"]), kv_n_heads),
        _heads(_tokens(value, places["v"]), kv_n_heads),
        cu_seqlens_q=flash_attn_padding_info["cu_seqlens_q"],
        cu_seqlens_k=flash_attn_padding_info["cu_seqlens_k"],
        causal=is_causal,
        window=_window(sliding_window_size),
        scale=softmax_scale,
        softcap=attn_logit_softcapping,
        alibi_slopes=alibi_slopes,
        dropout_p=dropout_p if training else 0.0,
    ).flatten(1)
    if out.shape[0] != query.shape[0] * query.shape[1]:
        out = out.new_zeros(query.shape[0] * query.shape[1], out.shape[1]).index_copy(0, places["q"], out)
    return out.unflatten(0, query.shape[:2]), None, past_key_value


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1))


def _tokens(x: Tensor, places: Tensor) -> Tensor:
    """(batch, rows, width) as the rows at `places`, which ascend: as many as there are is all of them."""
    rows = x.flatten(0, 1)
    return rows if places.shape[0] == rows.shape[0] else rows.index_select(0, places)


def _window(size: int) -> tuple[int, int] | None:
    return None if size == -1 else (size, size)
