"""MosaicBERT's attention without its padding and without its (batch, heads, rows, keys) bias.

hidden_states  (tokens, width), the tokens that exist, entry after entry
cu_seqlens     (batch + 1,) their bounds; indices (tokens,) their places in batch x rows
bias           (batch, heads, rows, keys): ALiBi of the distance between places, and -10000 where a key is
               padding; for encoders of MosaicBERT an `Alibi` instead
result         (tokens, width)

What is padding does not exist among packed tokens, which is what -10000 makes of it for every token that sees
another one, itself at least.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from anyflash import api
from anyflash.semantics.expr import Expr


class Alibi:
    """In the place of an encoder's bias, with what the encoder does to that on its way to the layers.

    slopes  (heads,)
    places  (batch, rows) int32, the place of each token of an entry; None if no padding lies between tokens
    """

    def __init__(self, slopes: Tensor, places: Tensor | None) -> None:
        self.slopes, self.places = slopes, places

    @property
    def device(self) -> torch.device:
        return self.slopes.device

    def to(self, device: torch.device) -> Alibi:
        return Alibi(self.slopes.to(device), None if self.places is None else self.places.to(device))

    def __getitem__(self, cut: Any) -> Alibi:
        """Distances are the same in every cut."""
        return self

    def __radd__(self, padding: Tensor) -> Alibi:
        return self


class _WithAlibi:
    """An encoder with another bias. Not set on the encoder itself: other threads may be in it."""

    def __init__(self, encoder: Any, alibi: Alibi) -> None:
        self._encoder = encoder
        self.alibi = alibi
        self._current_alibi_size = sys.maxsize

    def __getattr__(self, name: str) -> Any:
        return getattr(self._encoder, name)


def encoder_forward(own: Callable[..., Any]) -> Callable[..., Any]:
    """Of a `BertEncoder`: its own forward, whose bias is not formed."""

    @functools.wraps(own)
    def forward(self: Any, hidden_states: Tensor, attention_mask: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._current_alibi_size < 2:
            self.rebuild_alibi_tensor(size=2, device=hidden_states.device)
        slopes = self.alibi[0, :, 1, 0].neg().to(hidden_states.device)
        alibi = Alibi(slopes, _places(attention_mask.bool()))
        return own(_WithAlibi(self, alibi), hidden_states, attention_mask, *args, **kwargs)

    return forward


def self_attention(
    self: Any,
    hidden_states: Tensor,
    cu_seqlens: Tensor,
    max_seqlen_in_batch: int,
    indices: Tensor,
    attn_mask: Tensor,
    bias: Any,
) -> Tensor:
    """Of a `BertUnpadSelfAttention`."""
    q, k, v = self.Wqkv(hidden_states).unflatten(-1, (3, self.num_attention_heads, -1)).unbind(1)
    call: dict[str, Any] = {}
    if not isinstance(bias, Alibi):
        call["score"] = _biased(bias, _order(attn_mask.bool()))
    elif bias.places is None:
        call["alibi_slopes"] = bias.slopes
    else:
        call["score"] = _distant(bias.slopes, bias.places)
    return api.attention_varlen(
        q,
        k,
        v,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        dropout_p=self.p_dropout if self.training else 0.0,
        **call,
    ).flatten(1)


def _places(kept: Tensor) -> Tensor | None:
    """Where each entry's tokens lie, in their order; None if all lie side by side."""
    starts = kept[:, 0].int() + (kept[:, 1:] & ~kept[:, :-1]).sum(1)
    if bool((starts <= 1).all()):
        return None
    return _order(kept)


def _order(kept: Tensor) -> Tensor:
    """(batch, rows) int32: the places of the tokens that exist, then the others."""
    return (~kept).to(torch.uint8).argsort(dim=1, stable=True).to(torch.int32)


def _distant(slopes: Tensor, places: Tensor) -> Callable[..., Expr]:
    slope, place = api.table(slopes), api.table(places)

    def score(s: Any, at: Any) -> Any:
        return s - slope[at.head] * abs(place[at.batch, at.row] - place[at.batch, at.k])

    return score


def _biased(bias: Tensor, places: Tensor) -> Callable[..., Expr]:
    """The bias is read where the tokens lie, along the axes on which it differs."""
    place = api.table(places)
    axes = [axis for axis in range(4) if bias.shape[axis] > 1]
    table = api.table(bias.squeeze() if axes else bias.reshape(1))

    def score(s: Any, at: Any) -> Any:
        where = (at.batch, at.head, place[at.batch, at.row], place[at.batch, at.k])
        return s + table[tuple(where[axis] for axis in axes) or (0,)]

    return score
