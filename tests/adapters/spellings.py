"""Attention in torch, spelled in every way that a graph may hold it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

B, H, S, T, D, V = 2, 3, 5, 7, 8, 6
DOUBLE = torch.float64
LEAST = torch.finfo(DOUBLE).min


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, dtype=DOUBLE, generator=generator)


def qkv(*lead: int) -> list[torch.Tensor]:
    return [draw(*lead, S, D), draw(*lead, T, D, seed=1), draw(*lead, T, V, seed=2)]


KEYS = draw(B, 1, 1, T, seed=3)
BIAS = draw(H, S, T, seed=4)
SEEN = (torch.arange(S)[:, None] + 2 >= torch.arange(T)).expand(B, 1, S, T)
SLOPES = draw(H, 1, 1, seed=5)


def in_place(q, k, v):
    s = q @ k.mT
    s *= 0.3
    s += KEYS
    return s.softmax(-1) @ v


def methods(q, k, v):
    return q.matmul(k.transpose(2, 3)).div(math.sqrt(D)).add(KEYS).softmax(dim=3).matmul(v)


def functions(q, k, v):
    s = torch.add(torch.mul(torch.matmul(q, k.permute(0, 1, 3, 2)), 0.3), BIAS)
    return torch.matmul(functional.dropout(functional.softmax(s, dim=-1), 0.3, training=False), v)


def scaled_query(q, k, v):
    return ((q / D) @ (k * 2).mT + BIAS).softmax(-1) @ v


def mask_first(q, k, v):
    return (BIAS + (KEYS + q @ k.mT)).softmax(-1) @ v


def scaled_last(q, k, v):
    return ((q @ k.mT + BIAS) / 4 * 3).softmax(-1) @ v


def subtracted(q, k, v):
    return (q @ k.mT * 0.3 - SLOPES * (torch.arange(T) - 2.0).abs()).softmax(-1) @ v


def filled(q, k, v):
    return (q @ k.mT).masked_fill(~SEEN, -math.inf).softmax(-1) @ v


def filled_with_least(q, k, v):
    return (q @ k.mT).masked_fill_(~SEEN, LEAST).softmax(-1) @ v


def where_seen(q, k, v):
    return torch.where(SEEN, q @ k.mT, torch.full((), LEAST, dtype=DOUBLE)).softmax(-1) @ v


def where_hidden(q, k, v):
    return torch.where(~SEEN, -1e4, q @ k.mT * 0.3).softmax(-1) @ v


def softcap(q, k, v):
    return (torch.tanh(q @ k.mT / 2.0) * 2.0 + KEYS).softmax(-1) @ v


def tensor_factor(q, k, v):
    return (q @ k.mT * SLOPES / torch.full([], 3.0, dtype=DOUBLE)).softmax(-1) @ v


def batched_product(q, k, v):
    return torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)), -1), v)


def sum_of_product(q, k, v):
    s = torch.baddbmm(BIAS[:1], q, k.mT, beta=0.5, alpha=0.3)
    return torch.bmm(s.softmax(-1), v)


def nothing_of_a_bias(q, k, v):
    room = torch.full((B * H, S, T), math.nan, dtype=DOUBLE)
    return torch.bmm(room.baddbmm(q, k.mT, beta=0.0, alpha=0.3).softmax(-1), v)


def by_letters(q, k, v):
    s = torch.einsum("b h i d, b h j d -> b h i j", q, k) * 0.3 + BIAS
    return torch.einsum("bhij,bhjd->bihd", s.softmax(-1), v)


def by_letters_turned(q, k, v):
    """Heads behind rows, operands the other way round."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    s = torch.einsum("bjhd,bihd->bhij", k, q)
    return torch.einsum("bjhd,bhij->bihd", v, s.softmax(-1))


def cast(q, k, v):
    scores = q @ k.mT + BIAS
    return functional.softmax(scores.double(), dim=-1, dtype=DOUBLE).type_as(scores) @ v


def twice(q, k, v):
    first = (q @ k.mT).softmax(-1) @ v
    return first + (q @ k.mT + BIAS).softmax(-1) @ v


def stacked(q, k, v):
    """One attention straight into the next, as its query and as a value."""
    first = (q @ k.mT).softmax(-1) @ k
    second = (first @ k.mT).softmax(-1) @ v
    return (q @ first.mT).softmax(-1) @ second


def fused(q, k, v):
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=BIAS) + in_place(q, k, v)


SPELLINGS: list[tuple[Callable[..., Any], tuple[int, ...], int]] = [
    (in_place, (B, H), 1),
    (methods, (B, H), 1),
    (functions, (B, H), 1),
    (scaled_query, (B, H), 1),
    (mask_first, (B, H), 1),
    (scaled_last, (B, H), 1),
    (scaled_last, (2, B, H), 1),
    (subtracted, (B, H), 1),
    (filled, (B, H), 1),
    (filled_with_least, (B, H), 1),
    (where_seen, (B, H), 1),
    (where_hidden, (B, H), 1),
    (softcap, (B, H), 1),
    (tensor_factor, (B, H), 1),
    (batched_product, (B * H,), 1),
    (lambda q, k, v: (q @ k.mT + BIAS).softmax(-1) @ v, (H,), 1),
    (lambda q, k, v: (q @ k.mT + BIAS[0]).softmax(1) @ v, (), 1),
    (sum_of_product, (B * H,), 1),
    (nothing_of_a_bias, (B * H,), 1),
    (by_letters, (B, H), 1),
    (by_letters_turned, (B, H), 1),
    (cast, (B, H), 1),
    (twice, (B, H), 2),
    (stacked, (B, H), 3),
    (fused, (B, H), 2),
]
