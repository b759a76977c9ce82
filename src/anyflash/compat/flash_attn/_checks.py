"""What flash_attn refuses and we refuse too, in its words. What it refuses and we can do is let through:
float32 and float64, any head_dim up to 576, softcap with dropout, an empty batch, arrays on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anyflash.compat.errors import expect


def dense(q: Tensor, k: Tensor, v: Tensor, alibi_slopes: Tensor | None = None) -> None:
    """Raises Refused unless q, k, v of a dense call go together."""
    _dtypes(q, k, v)
    _axes("q", q, "(batch_size, seqlen_q, num_heads, head_size)")
    pattern = "{} must have shape (batch_size, seqlen_k, num_heads_k, head_size)"
    fits = k.ndim == 4 and k.shape[0] == q.shape[0] and k.shape[3] == q.shape[3]
    expect(fits, pattern.format("k"), _shapes(q=q, k=k))
    expect(v.ndim == 4 and v.shape[:3] == k.shape[:3], pattern.format("v"), _shapes(k=k, v=v))
    _heads(q, k)
    slopes(q, alibi_slopes, q.shape[0])


def packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    alibi_slopes: Tensor | None = None,
    paged: bool = False,
) -> None:
    """Raises Refused unless the arrays of a packed call go together. `paged` k and v have four axes."""
    _dtypes(q, k, v)
    _axes("q", q, "(total_q, num_heads, head_size)")
    rows = "num_blocks, page_block_size" if paged else "total_k"
    pattern = f"{{}} must have shape ({rows}, num_heads_k, head_size)"
    fits = k.ndim == (4 if paged else 3) and k.shape[-1] == q.shape[-1]
    expect(fits, pattern.format("k"), _shapes(q=q, k=k))
    expect(v.shape[:-1] == k.shape[:-1], pattern.format("v"), _shapes(k=k, v=v))
    _heads(q, k)
    lengths(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    slopes(q, alibi_slopes, cu_seqlens_q.shape[0] - 1)


def lengths(**arrays: Tensor | None) -> None:
    """Raises Refused unless each is contiguous int32."""
    for name, array in arrays.items():
        if array is not None:
            expect(array.dtype is torch.int32, f"{name} must have dtype int32", f"{name}: {array.dtype}")
            expect(array.is_contiguous(), f"{name} must be contiguous", f"strides {array.stride()}")


def readable(array: Tensor) -> bool:
    """May values be looked at? Those on a device would make the host wait for it; attention holds them inside
    the arrays there."""
    return array.device.type == "cpu"


def table(block_table: Tensor) -> None:
    expect(
        block_table.dtype is torch.int32,
        "block_table must have dtype torch.int32",
        f"block_table: {block_table.dtype}",
    )


def slopes(q: Tensor, alibi_slopes: Tensor | None, batch: int) -> None:
    if alibi_slopes is None:
        return
    wide = alibi_slopes.dtype is torch.float64 and q.dtype is torch.float64
    expect(
        alibi_slopes.dtype is torch.float32 or wide,
        "ALiBi slopes must have dtype fp32",
        f"alibi_slopes: {alibi_slopes.dtype}",
    )
    heads = q.shape[-2]
    expect(
        tuple(alibi_slopes.shape) in ((heads,), (batch, heads)),
        "alibi_slopes must have shape (num_heads) or (batch_size, num_heads)",
        _shapes(q=q, alibi_slopes=alibi_slopes),
    )


def _dtypes(q: Tensor, k: Tensor, v: Tensor) -> None:
    expect(k.dtype is q.dtype, "query and key must have the same dtype", f"q {q.dtype}, k {k.dtype}")
    expect(v.dtype is q.dtype, "query and value must have the same dtype", f"q {q.dtype}, v {v.dtype}")


def _axes(name: str, array: Tensor, shape: str) -> None:
    expect(array.ndim == shape.count(",") + 1, f"{name} must have shape {shape}", _shapes(**{name: array}))


def _heads(q: Tensor, k: Tensor) -> None:
    expect(
        k.shape[-2] > 0 and q.shape[-2] % k.shape[-2] == 0,
        "Number of heads in key/value must divide number of heads in query",
        _shapes(q=q, k=k),
    )


def _shapes(**arrays: Any) -> str:
    return ", ".join(f"{name} {tuple(array.shape)}" for name, array in arrays.items())
