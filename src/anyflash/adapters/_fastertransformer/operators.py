"""`ParallelGptContextDecoderOp` and `ParallelGptDecoderOp`, which FasterTransformer's Python calls.

Their constructors and `forward` take what those of its library take, by position. Attention is ours:

prompts  causal masks of the given lengths are recognised and padding is left out, as FasterTransformer's
         fused attention does; any other mask is read: a score loses 10000 where it is 0
tokens   row b writes its key and value at slot `sequence_lengths[b]` and sees the slots up to it that
         `masked_tokens` leaves, read where they lie; beams are gathered by `cache_indirection`. Finished rows
         write nothing
ALiBi    slope * (key - query); in a decoding step the padding between a prompt and what it generated does not
         count
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from anyflash import api
from anyflash.adapters._fastertransformer import caches
from anyflash.adapters._fastertransformer.layers import Stack
from anyflash.core.errors import InvalidCall
from anyflash.semantics.expr import where
from anyflash.semantics.mask import Mask

_MASKED = -10000.0


class ParallelGptContextDecoderOp:
    """Prompts: all layers, and the caches that they fill."""

    def __init__(
        self,
        num_heads: int,
        size_per_head: int,
        inter_size: int,
        num_layers: int,
        tensor_para_size: int,
        pipeline_para_size: int,
        layernorm_eps: float,
        layernorm_type: str,
        activation_type: str,
        has_adapters: bool,
        adapter_inter_size: int,
        int8_mode: int,
        weights: Sequence[Tensor],
        int8_weights: Sequence[Tensor],
        scale: Sequence[Tensor],
        remove_padding: bool,
    ) -> None:
        parallel = tensor_para_size * pipeline_para_size
        settings = layernorm_eps, layernorm_type, activation_type, has_adapters, int8_mode
        self._stack = Stack(num_heads, size_per_head, num_layers, parallel, *settings, weights)

    def forward(
        self,
        input_embeds: Tensor,
        attention_mask: Tensor,
        input_lengths: Tensor,
        memory_length: int | None = None,
        compact_index: Tensor | None = None,
        batch_to_compact_index: Tensor | None = None,
        linear_bias_slopes: Tensor | None = None,
    ) -> list[Tensor]:
        """[outputs, key cache, value cache, outputs of the last tokens].

        input_embeds (batch, rows, hidden), attention_mask (batch, rows, rows), 1 = keep, input_lengths
        (batch,), memory_length the caches' room, linear_bias_slopes (heads,). Outputs of padding are 0. With
        the two indices equal prompts are run once: `compact_index` names those to run.
        """
        if compact_index is not None:
            chosen = (t[compact_index.long()] for t in (input_embeds, attention_mask, input_lengths))
            made = self._run(*chosen, memory_length, linear_bias_slopes)
            assert batch_to_compact_index is not None
            back = batch_to_compact_index.long()
            key_cache, value_cache = (_spread(cache, back) for cache in made[1:3])
            return [made[0][back], key_cache, value_cache, made[3][back]]
        return self._run(input_embeds, attention_mask, input_lengths, memory_length, linear_bias_slopes)

    def _run(
        self, embeds: Tensor, mask: Tensor, lengths: Tensor, room: int | None, slopes: Tensor | None
    ) -> list[Tensor]:
        stack = self._stack
        batch, rows = embeds.shape[:2]
        lengths = lengths.long()
        shape = (len(stack.layers), batch, stack.num_heads, room or rows, stack.size_per_head)
        key_cache, value_cache = caches.new(embeds, shape, stack.chunk)
        places = torch.arange(rows, device=embeds.device)
        real = places < lengths[:, None]
        causal = _is_causal(mask, real)
        if not causal:
            real = torch.ones_like(real)
        at, row = real.nonzero(as_tuple=True)
        starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        x = embeds[at, row]
        for i, layer in enumerate(stack.layers):

            def attend(q: Tensor, k: Tensor, v: Tensor, i: int = i) -> Tensor:
                caches.as_rows(key_cache[i]).transpose(1, 2)[at, row] = k
                value_cache[i].transpose(1, 2)[at, row] = v
                if causal:
                    bounds = {"cu_seqlens_q": starts, "cu_seqlens_k": starts}
                    return api.attention_varlen(q, k, v, causal=True, alibi_slopes=slopes, **bounds)
                q, k, v = (t.unflatten(0, (batch, rows)) for t in (q, k, v))
                return api.attention(q, k, v, score=_masked(mask, slopes)).flatten(0, 1)

            x = stack.run(layer, x, attend)
        out = torch.zeros_like(embeds).index_put((at, row), x)
        last = out[torch.arange(batch, device=out.device), lengths - 1]
        return [out, key_cache, value_cache, last]


class ParallelGptDecoderOp:
    """One token of every row: all layers, on the caches of the prompts."""

    def __init__(
        self,
        num_heads: int,
        size_per_head: int,
        inter_size: int,
        num_layers: int,
        tensor_para_size: int,
        pipeline_para_size: int,
        layernorm_eps: float,
        layernorm_type: str,
        activation_type: str,
        has_adapters: bool,
        adapter_inter_size: int,
        int8_mode: int,
        weights: Sequence[Tensor],
        int8_weights: Sequence[Tensor],
        int8_scales: Sequence[Tensor],
    ) -> None:
        parallel = tensor_para_size * pipeline_para_size
        settings = layernorm_eps, layernorm_type, activation_type, has_adapters, int8_mode
        self._stack = Stack(num_heads, size_per_head, num_layers, parallel, *settings, weights)

    def forward(
        self,
        max_input_length: int,
        step: int,
        ite: int,
        input_embeds: Tensor,
        sequence_lengths: Tensor,
        finished: Tensor,
        total_padding_tokens: Tensor,
        masked_tokens: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        cache_indirection: Tensor | None = None,
        linear_bias_slopes: Tensor | None = None,
    ) -> list[Tensor]:
        """[outputs (rows, hidden)], the caches written.

        input_embeds (rows, hidden), masked_tokens (rows, room), True = not there, cache_indirection (rows /
        beams, beams, room): the beam that has each slot. `ite` numbers batches of `rows` within the caches.
        Raises InvalidCall if a row's slot lies past the caches, where FasterTransformer would wrap around.
        """
        stack, rows = self._stack, len(input_embeds)
        slots = sequence_lengths.long()
        used = int(slots.max()) + 1
        if used > value_cache.shape[3]:
            raise InvalidCall(
                "sequence_lengths",
                f"up to {used - 1}",
                f"less than {value_cache.shape[3]}, the caches' room",
                "Give the context decoder a greater memory_length",
            )
        part = slice(ite * rows, (ite + 1) * rows)
        live = (~finished).nonzero()[:, 0]
        call: dict[str, Any] = {"mask": _seen(slots, masked_tokens[:, :used])}
        if linear_bias_slopes is not None:
            call["score"] = _step_slopes(linear_bias_slopes, max_input_length, total_padding_tokens, slots)
        source = None if cache_indirection is None else _beams(cache_indirection, slots, used)
        x = input_embeds
        for i, layer in enumerate(stack.layers):

            def attend(q: Tensor, k: Tensor, v: Tensor, i: int = i) -> Tensor:
                keys, values = key_cache[i, part], value_cache[i, part]
                keys[live, :, :, slots[live]] = k[live].unflatten(-1, (-1, stack.chunk))
                values[live, :, slots[live]] = v[live]
                keys, values = (t[:, :, :used] for t in (caches.as_rows(keys), values))
                if source is not None:
                    keys, values = (t.transpose(1, 2)[source].transpose(1, 2) for t in (keys, values))
                return api.attention(q[:, :, None], keys, values, layout="bhsd", **call)

            x = stack.run(layer, x, attend)
        return [x]


def _spread(cache: Tensor, back: Tensor) -> Tensor:
    """Batch entries repeated, in the order of memory that the cache has."""
    if cache.ndim == 5:
        return cache[:, back]
    return caches.as_chunks(caches.as_rows(cache)[:, back], cache.shape[-1])


def _is_causal(mask: Tensor, real: Tensor) -> bool:
    """Does the mask say, of the rows that are real, that they see themselves and those before?"""
    causal = torch.ones_like(mask[0], dtype=torch.bool).tril()
    return not bool(((mask != causal) & real[:, :, None]).any())


def _masked(mask: Tensor, slopes: Tensor | None) -> Any:
    keep = api.table(mask)
    slope = None if slopes is None else api.table(slopes)

    def score(s: Any, at: Any) -> Any:
        if slope is not None:
            s = s + slope[at.head] * (at.k - at.row)
        return s + (1.0 - keep[at.batch, at.row, at.k]) * _MASKED

    return score


def _seen(slots: Tensor, masked: Tensor) -> Mask:
    """The slots up to a row's own, but for those masked; prompts of one length have none."""
    last = api.table(slots)
    seen = Mask(lambda at: at.k <= last[at.batch])
    if not bool(masked.any()):
        return seen
    hidden = api.table(masked)
    return seen & (lambda at: ~hidden[at.batch, at.k])


def _step_slopes(slopes: Tensor, longest: int, padding: Tensor, slots: Tensor) -> Any:
    slope, gap, own = api.table(slopes), api.table(padding.contiguous()), api.table(slots)

    def score(s: Any, at: Any) -> Any:
        place = where(at.k < longest, at.k + gap[at.batch], at.k)
        return s + slope[at.head] * (place - own[at.batch])

    return score


def _beams(indirection: Tensor, slots: Tensor, used: int) -> tuple[Tensor, Tensor]:
    """(row that has the slot, slot), both (rows, used). Its own slot a row has itself."""
    batch, beams = indirection.shape[:2]
    rows = torch.arange(batch * beams, device=slots.device)
    source = (indirection[:, :, :used].flatten(0, 1) + (rows // beams * beams)[:, None]).long()
    source[rows, slots] = rows
    return source, torch.arange(used, device=slots.device).expand_as(source)
