"""BERT's self-attention with the biases of Composer's `Alibi`, without their (heads, rows, keys) matrix.

hidden_states   (batch, rows, width)
attention_mask  None, bool (True = attend) or additive, broadcasts to (batch, heads, rows, keys)
self.alibi      (1, heads, longest, longest), a slope times minus the distance
result          (batch, rows, width), in a tuple as BERT wants it
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from anyflash import api


def self_attention(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """Takes the place of the forward that Composer puts there, which is `theirs` and still serves decoders,
    cross attention, masks of heads, and who asks for the weights."""

    @functools.wraps(theirs)
    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_value: Any = None,
        output_attentions: bool | None = False,
    ) -> tuple[Any, ...]:
        others = (head_mask, encoder_hidden_states, past_key_value)
        if output_attentions or self.is_decoder or any(given is not None for given in others):
            return theirs(
                self, hidden_states, attention_mask, head_mask, encoder_hidden_states, encoder_attention_mask,
                past_key_value, output_attentions,
            )  # fmt: skip
        q, k, v = (
            project(hidden_states).unflatten(-1, (self.num_attention_heads, -1))
            for project in (self.query, self.key, self.value)
        )
        allowed = attention_mask is not None and attention_mask.dtype == torch.bool
        out = api.attention(
            q,
            k,
            v,
            alibi_slopes=_slopes(self.alibi),
            mask=attention_mask if allowed else None,
            bias=None if allowed else attention_mask,
            dropout_p=self.dropout.p if self.training else 0.0,
        )
        return (out.flatten(2),)

    return forward


def _slopes(matrix: Tensor) -> Tensor:
    """(heads,). A matrix for one row holds none, and needs none."""
    return matrix[0, :, min(1, matrix.shape[2] - 1), 0].neg()
