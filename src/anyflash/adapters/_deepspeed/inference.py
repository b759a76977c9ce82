"""The attention of DeepSpeed's injected inference layers, where DeepSpeed has no compiled operators.

query_key_value  (B, rows, 3 x heads x head_dim)
attn_mask        additive, (B, keys) or 4 axes; shorter than the cache: what follows is masked. One axis: none
norm_factor      its square is the scale of the products
alibi            (B x heads or heads, 1 or rows, keys), added to the scores; one axis: none
triangular_...   upper-left; a single row sees all of the cache
window_size      keys, the query's own included, as the models say. DeepSpeed's compiled kernels see one key
                 less in decoding steps
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from deepspeed.ops.transformer.inference.op_binding.workspace import InferenceContext
from torch import Tensor

from anyflash import api
from anyflash.core.errors import Unsupported
from anyflash.core.log import logger
from anyflash.semantics.mask import Mask, upper_left


def context_function(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """Takes the place of `SoftmaxContextOp.softmax_context_fallback`, which is `theirs`."""

    def softmax_context_fallback(
        self: Any,
        query_key_value: Tensor,
        attn_mask: Tensor | None,
        rotary_dim: int,
        rotate_half: bool,
        rotate_every_two: bool,
        heads: int,
        num_kv: int,
        norm_factor: float,
        triangular_masking: bool,
        local_attention: bool,
        window_size: int,
        no_masking: bool,
        layer_id: int,
        num_layers: int,
        alibi: Tensor | None,
        rope_theta: float,
        is_prompt: bool,
        token_idx: Any,
        position_ids: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(context (B, rows, heads x head_dim), keys, values), both (B, heads, cache, head_dim)."""
        if num_kv > 1:
            logger.info("DeepSpeed's attention left to DeepSpeed: %d heads of keys", num_kv)
            return theirs(
                self, query_key_value, attn_mask, rotary_dim, rotate_half, rotate_every_two, heads, num_kv,
                norm_factor, triangular_masking, local_attention, window_size, no_masking, layer_id,
                num_layers, alibi, rope_theta, is_prompt, token_idx, position_ids,
            )  # fmt: skip
        context = InferenceContext.Instance()
        q, k, v = self.bias_add_transform_0213(query_key_value, None, heads, 3, False)
        if rotary_dim > 0 and rotate_half:
            from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

            turn = context.get_rotary(rotary_dim, rope_theta, v.device)
            q, k = apply_rotary_pos_emb(q, k, *turn(v, context.get_max_tokens_num()), position_ids)
        k, v = context.update_cache(layer_id, token_idx, is_prompt, k, v)
        out = api.attention(
            q,
            k,
            v,
            layout="bhsd",
            scale=norm_factor**2,
            bias=_biases(attn_mask, alibi, heads, k.shape[2]) or None,
            mask=_mask(triangular_masking, window_size if local_attention else None, q.shape[2]),
        )
        if layer_id == num_layers - 1:
            context.advance_tokens()
        return out.transpose(1, 2).flatten(2), k, v

    return softmax_context_fallback


def _biases(attn_mask: Tensor | None, alibi: Tensor | None, heads: int, keys: int) -> list[Tensor]:
    found = []
    if attn_mask is not None and attn_mask.ndim > 1:
        masked = torch.finfo(attn_mask.dtype).min
        longer = torch.nn.functional.pad(attn_mask, (0, keys - attn_mask.shape[-1]), value=masked)
        found.append(longer if longer.ndim == 4 else longer[:, None, None])
    if alibi is not None and alibi.ndim > 1:
        found.append(alibi.unflatten(0, (-1, heads)))
    return found


def _mask(triangular: bool, window: int | None, rows: int) -> Mask | None:
    if rows == 1:
        if window is None or not triangular:
            return None
        if InferenceContext.Instance().static_shapes:
            raise Unsupported(
                "a decoding step of local attention in a cache of fixed length",
                {"DeepSpeed": ["it does not say how much of the cache is in use"]},
            )
        return Mask(lambda at: at.k > at.q - window)
    if not triangular:
        return None
    return upper_left() if window is None else upper_left() & (lambda at: at.k > at.row - window)
