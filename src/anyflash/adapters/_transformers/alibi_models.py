"""BLOOM, MPT and Falcon: models of transformers that do not use its attention interface.

Their forwards are replaced by ones that do as their own unless the model was given "anyflash", which is told
by the mask that the model hands down. What differs from models of the interface:

    BLOOM   alibi (batch * heads, 1, k) is added to the scaled scores
    MPT     position_bias (heads, 1, longest), of which the last k columns are added to the scaled scores
    Falcon  alibi as BLOOM's, added before the scores are scaled, and rounded to bfloat16 by the model; or
            rotary positions. Of its own implementations "eager" adds it twice, "sdpa" once, as ours does.
            Its own repeat grouped heads, in the cache too; ours does not

ALiBi is read as the model made it, one number a key: padding, its rounding and a user's own slopes are in it.
No (q, k) matrix is formed. Weights are not either: `output_attentions` is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial, wraps
from typing import Any

from torch import Tensor
from transformers.models.bloom import modeling_bloom as bloom
from transformers.models.falcon import modeling_falcon as falcon
from transformers.models.mpt import modeling_mpt as mpt

from anyflash.adapters._transformers.attention import attention_for_transformers
from anyflash.core.errors import Unsupported

Forward = Callable[..., Any]


class MaskOfOurs:
    """What a model that was given our attention hands to its layers: the mask or None, and what None means.

    No tensor: the models would turn one into additive matrices of (q, k), MPT by the opposite meaning.
    """

    ndim = 0

    def __init__(self, mask: Tensor | None, causal: bool) -> None:
        self.mask, self.causal = mask, causal

    def to(self, *_: Any, **__: Any) -> MaskOfOurs:
        return self


def install(implementations: Collection[str]) -> list[Callable[[], object]]:
    """Replace what is needed for models whose config names one of `implementations`; gives what undoes it."""
    undo: list[Callable[[], object]] = []
    for module, models in (
        (bloom, bloom.BloomPreTrainedModel),
        (mpt, mpt.MptPreTrainedModel),
        (falcon, falcon.FalconPreTrainedModel),
    ):
        _replace(undo, module, "create_causal_mask", _marked(module.create_causal_mask, implementations))
        # transformers looks for the interface in the source, and finds none.
        _replace(undo, models, "_can_set_attn_implementation", classmethod(lambda cls: True))
    _replace(undo, bloom.BloomAttention, "forward", _bloom(bloom.BloomAttention.forward))
    _replace(undo, mpt.MptAttention, "forward", _mpt(mpt.MptAttention.forward))
    _replace(undo, mpt.MptBlock, "forward", _mpt_block(mpt.MptBlock.forward))
    _replace(undo, falcon.FalconAttention, "forward", _falcon(falcon.FalconAttention.forward))
    classes = falcon.FALCON_ATTENTION_CLASSES
    for name in implementations:
        classes[name] = falcon.FalconAttention
        undo.append(partial(classes.pop, name, None))
    return undo


def _replace(undo: list[Callable[[], object]], owner: Any, name: str, ours: Any) -> None:
    own = vars(owner).get(name)
    setattr(owner, name, ours)
    undo.append(partial(delattr, owner, name) if own is None else partial(setattr, owner, name, own))


def _marked(own: Forward, implementations: Collection[str]) -> Forward:
    """The model's `create_causal_mask`."""

    @wraps(own)
    def create_causal_mask(config: Any, *args: Any, **kwargs: Any) -> Any:
        mask = own(config, *args, **kwargs)
        if config._attn_implementation not in implementations:
            return mask
        return MaskOfOurs(mask, getattr(config, "is_causal", True))

    return create_causal_mask


def _without_weights(wanted: bool, model: str) -> None:
    if wanted:
        raise Unsupported(
            f"output_attentions of {model}",
            {"anyflash": ["it never forms attention weights"]},
            'use attn_implementation="eager"',
        )


def _bloom(own: Forward) -> Forward:
    @wraps(own)
    def forward(
        self: Any,
        hidden_states: Tensor,
        residual: Tensor,
        alibi: Tensor,
        attention_mask: Any,
        layer_past: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> Any:
        if not isinstance(attention_mask, MaskOfOurs):
            return own(
                self, hidden_states, residual, alibi, attention_mask, layer_past, use_cache,
                output_attentions, **kwargs,
            )  # fmt: skip
        _without_weights(output_attentions, "BLOOM")
        if self.pretraining_tp > 1 and self.slow_but_exact:
            raise Unsupported(
                "BLOOM with slow_but_exact",
                {"anyflash": ["it repeats another program's order of additions, which ours has not"]},
                'use attn_implementation="eager"',
            )
        q, k, v = self._reshape(self.query_key_value(hidden_states))
        if layer_past is not None:
            k, v = layer_past.update(k, v, self.layer_idx)
        out, _ = attention_for_transformers(
            self,
            q,
            k,
            v,
            attention_mask.mask,
            dropout=self.attention_dropout.p if self.training else 0.0,
            scaling=self.inv_norm_factor,
            is_causal=attention_mask.causal,
            position_bias=alibi.unflatten(0, (-1, self.num_heads)),
        )
        projected = self.dense(out.flatten(2))
        return bloom.dropout_add(projected, residual, self.hidden_dropout, self.training), None

    return forward


def _mpt(own: Forward) -> Forward:
    @wraps(own)
    def forward(
        self: Any,
        hidden_states: Tensor,
        position_bias: Tensor | None,
        past_key_values: Any = None,
        attention_mask: Any = None,
        **kwargs: Any,
    ) -> Any:
        if not isinstance(attention_mask, MaskOfOurs):
            return own(self, hidden_states, position_bias, past_key_values, attention_mask, **kwargs)
        qkv = self.Wqkv(hidden_states)
        if self.clip_qkv:
            qkv = qkv.clamp(min=-self.clip_qkv, max=self.clip_qkv)
        q, k, v = (t.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for t in qkv.chunk(3, dim=-1))
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        out, _ = attention_for_transformers(
            self,
            q,
            k,
            v,
            attention_mask.mask,
            dropout=self.attn_dropout_p if self.training else 0.0,
            scaling=self.softmax_scale,
            is_causal=attention_mask.causal,
            position_bias=None if position_bias is None else position_bias[None, ..., -k.shape[2] :],
        )
        return self.out_proj(out.flatten(2)), None

    return forward


def _mpt_block(own: Forward) -> Forward:
    """Only here does MPT say that weights are wanted."""

    @wraps(own)
    def forward(
        self: Any,
        hidden_states: Tensor,
        position_bias: Tensor,
        attention_mask: Any,
        layer_past: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> Any:
        if isinstance(attention_mask, MaskOfOurs):
            _without_weights(output_attentions, "MPT")
        return own(
            self, hidden_states, position_bias, attention_mask, layer_past, use_cache, output_attentions,
            **kwargs,
        )  # fmt: skip

    return forward


def _falcon(own: Forward) -> Forward:
    @wraps(own)
    def forward(
        self: Any,
        hidden_states: Tensor,
        alibi: Tensor | None,
        attention_mask: Any,
        position_ids: Tensor | None = None,
        layer_past: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        if not isinstance(attention_mask, MaskOfOurs):
            return own(
                self, hidden_states, alibi, attention_mask, position_ids, layer_past, use_cache,
                output_attentions, position_embeddings, **kwargs,
            )  # fmt: skip
        _without_weights(output_attentions, "Falcon")
        q, k, v = (t.transpose(1, 2) for t in _falcon_heads(self, self.query_key_value(hidden_states)))
        bias, dropout = None, 0.0
        if alibi is None:
            assert position_embeddings is not None
            q, k = falcon.apply_rotary_pos_emb(q, k, *position_embeddings)
        else:
            bias = (alibi * self.inv_norm_factor).unflatten(0, (-1, self.num_heads))
            # Its own drops with ALiBi only.
            dropout = self.attention_dropout.p if self.training else 0.0
        if layer_past is not None:
            k, v = layer_past.update(k, v, self.layer_idx)
        out, _ = attention_for_transformers(
            self,
            q,
            k,
            v,
            attention_mask.mask,
            dropout=dropout,
            scaling=self.inv_norm_factor,
            is_causal=attention_mask.causal,
            position_bias=bias,
        )
        return self.dense(out.flatten(2)), None

    return forward


def _falcon_heads(self: Any, fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (batch, rows, heads, head_dim); k and v with as many heads as there are weights for."""
    if not self.new_decoder_architecture:
        return self._split_heads(fused)
    groups = fused.unflatten(-1, (-1, self.num_heads // self.num_kv_heads + 2, self.head_dim))
    return groups[..., :-2, :].flatten(2, 3), groups[..., -2, :], groups[..., -1, :]
