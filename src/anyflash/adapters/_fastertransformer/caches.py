"""FasterTransformer's KV caches, so that ours are read in place.

Its key cache is (layers, batch, heads, head_dim / x, room, x) with x = 16 bytes of elements, its value cache
(layers, batch, heads, room, head_dim). We give it keys of that shape whose memory is ordered as the values':
the two axes of a key lie together, and taking them together copies nothing. A cache in FasterTransformer's
own order is taken too, and copied each time.
"""

from __future__ import annotations

from torch import Tensor


def new(like: Tensor, shape: tuple[int, int, int, int, int], chunk: int) -> tuple[Tensor, Tensor]:
    """(key cache, value cache) of zeros, for (layers, batch, heads, room, head_dim)."""
    keys, values = like.new_zeros(shape), like.new_zeros(shape)
    return as_chunks(keys, chunk), values


def as_chunks(keys: Tensor, chunk: int) -> Tensor:
    """(..., room, head_dim) as (..., head_dim / x, room, x); no copy."""
    return keys.unflatten(-1, (-1, chunk)).transpose(-3, -2)


def as_rows(key_cache: Tensor) -> Tensor:
    """(..., head_dim / x, room, x) as (..., room, head_dim); a copy only if the memory is in that order."""
    return key_cache.transpose(-3, -2).flatten(-2)
