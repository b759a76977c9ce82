"""Small random arrays of calls."""

from __future__ import annotations

import torch
from torch import Tensor


def arrays(
    rows: int = 6, keys: int = 9, heads: int = 4, heads_k: int = 2, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return tuple(
        torch.randn(2, n, h, 16).to(dtype) for n, h in ((rows, heads), (keys, heads_k), (keys, heads_k))
    )


def starts(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
