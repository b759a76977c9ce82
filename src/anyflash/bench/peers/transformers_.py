"""transformers' sdpa attention over its static cache: its own cache, mask and attention function, called as
its models call them in a layer.

The cache has no slot too many, which is its best case: it attends to all of them, under a mask. The mask is
built once a step of a model, for all layers, so it is not timed here.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from anyflash.bench.cells import Cell
from anyflash.bench.inputs import Inputs
from anyflash.bench.peers.base import Step, torch_step


class StaticSdpa:
    name = "transformers sdpa"
    family = "transformers"
    package = "transformers"

    def lacks(self, cell: Cell) -> str | None:
        if cell.cache is None:
            return "for KV caches"
        return None if cell.variant == "causal" and not cell.backward else "for causal decoding"

    def prepare(self, inputs: Inputs) -> Step:
        from transformers import LlamaConfig, StaticCache
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
        from transformers.masking_utils import create_causal_mask

        cell, q = inputs.cell, inputs.q
        config: Any = LlamaConfig(
            hidden_size=cell.heads * cell.head_dim,
            num_attention_heads=cell.heads,
            num_key_value_heads=cell.heads_kv,
            head_dim=cell.head_dim,
            num_hidden_layers=1,
            attn_implementation="sdpa",
        )
        before = cell.seqlen_k - cell.seqlen_q
        cache: Any = StaticCache(config, max_cache_len=cell.seqlen_k)
        cache.update(inputs.k[:, :, :before], inputs.v[:, :, :before], 0)
        mask = create_causal_mask(
            config,
            torch.empty(cell.batch, cell.seqlen_q, 1, dtype=q.dtype),
            None,
            cache,
            torch.arange(before, cell.seqlen_k)[None],
        )
        # What the function reads of the layer that calls it.
        layer: Any = SimpleNamespace(
            is_causal=True, layer_idx=0, num_key_value_groups=cell.heads // cell.heads_kv
        )
        new = [x[:, :, before:].clone() for x in (inputs.k, inputs.v)]
        length = cache.layers[0].cumulative_length

        def forward() -> torch.Tensor:
            # The cache counts what is appended: each call is to find it as the one before did.
            length.fill_(before)
            keys, values = cache.update(*new, 0)
            return sdpa_attention_forward(layer, q, keys, values, mask, scaling=cell.head_dim**-0.5)[0]

        step = torch_step(inputs, forward)
        return Step(step.call, lambda out: inputs.named(out.transpose(1, 2)), step.context)


PEERS = (StaticSdpa(),)
