"""The tests of rows of `mapping.DIFFERENCES`, by name, and how they read results."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

TESTS: dict[str, Callable[[], None]] = {}
ROWS, KEYS = 5, 9
INF = math.inf


def row(name: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    def keep(test: Callable[[], None]) -> Callable[[], None]:
        TESTS[name] = test
        return test

    return keep


def visible(attention: Callable[..., Tensor], rows: int = ROWS, keys: int = KEYS) -> np.ndarray:
    """(rows, keys) bool: what `attention(q, k, v)` lets each query see."""
    q, k = torch.zeros(1, rows, 1, 8), torch.zeros(1, keys, 1, 8)
    out = attention(q, k, torch.eye(keys)[None, :, None])[0, :, 0]
    counts = (out > 0).sum(-1, keepdim=True)
    assert torch.equal((out * counts).round(), (out > 0).float())
    return (out > 0).numpy()


def pair(rows: int = ROWS, keys: int = KEYS, heads: int = 2, dim: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, heads, dim, dtype=torch.float64) for n in (rows, keys, keys))
    return q, k, v


def packed(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """The two sequences one behind the other, with what flash_attn wants to know."""
    starts = [torch.arange(3, dtype=torch.int32) * x.shape[1] for x in (q, k)]
    return *(x.flatten(0, 1) for x in (q, k, v)), *starts, q.shape[1], k.shape[1]
